"""Stored samples with the gate: how far they replace it."""

from dataclasses import dataclass

from avalanche_sp.gate.settings import Settings


@dataclass(frozen=True)
class StoredSamples:
    """The effect of the number of stored samples on the gate. Found on Split MNIST (``docs/trials/gate.csv``).

    Attributes:
        each: c, the number of stored samples for each class of each experience; 0 without a memory.
    """

    each: float
    settings: Settings

    @property
    def trust(self) -> float:
        """t = c / (c + half_trust), the share of the old loss that they stand for, 0 to 1."""
        return self.each / (self.each + self.settings.half_trust)

    @property
    def opening(self) -> float:
        """o = 1 + (c / double_openness)^2, a factor of the openness."""
        return 1 + (self.each / self.settings.double_openness) ** 2

    def penalty(self, ratio: float) -> float:
        """A factor of the penalty, with N_old / N_new: 1 / (o^2 (1 + t N_old / N_new))."""
        return 1 / (self.opening**2 * (1 + ratio * self.trust))
