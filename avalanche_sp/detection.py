"""Change detection on the stream's loss: what is surprising enough to be a new task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from avalanche_sp.gates import loss_surprise

__all__ = ["ChangeDetector", "page_hinkley", "LossWatch", "RunningSurprise"]

# Decay of the running mean and variance of the loss, iteration by iteration.
_DECAY = 0.95
# A loss so many deviations from the mean moves mean and variance no further than this: a new task's losses would
# soon look ordinary otherwise.
_MOVES = 3.0
# Nothing is more surprising than this many deviations: one odd batch alone is no change.
_LIMIT = 5.0
# Losses at the start, and after a change, that set mean and variance without any limit. The detector is not told them.
_START = 20


class ChangeDetector(Protocol):
    """What finds a change in a series of numbers: any detector of `river.drift` does, or an object of one's own."""

    @property
    def drift_detected(self) -> bool:
        """Whether the last number showed a change."""

    def update(self, x: float) -> object:
        """Takes the next number: an iteration's loss as :class:`LossWatch` standardises it."""


def page_hinkley() -> ChangeDetector:
    """River's Page-Hinkley test, set for what :class:`LossWatch` gives it: losses in deviations, 5 at most.

    It finds a change when losses have been, in sum, 20 deviations above their mean, each of them counting less 1: five
    very surprising iterations in a row are enough.

    Raises:
        ImportError: river is not installed.

    References:
        E. S. Page: Continuous inspection schemes, Biometrika 1954.
    """
    try:
        from river.drift import PageHinkley
    except ImportError as error:
        raise ImportError(
            "consolidate='surprise' needs river to find changes: pip install 'avalanche-sp[detection]', or pass a "
            "detector of your own (an object with update(x) and drift_detected)"
        ) from error
    return PageHinkley(min_instances=10, delta=1.0, threshold=20.0, mode="up")


class LossWatch:
    r"""Standardises losses by those before them, and asks a detector whether they changed.

    .. math::
        z_t = \operatorname{clip}\big((L_t - \mu_{t-1}) / \sigma_{t-1}, -5, 5\big)

    The mean and the deviation are running ones, of decay 0.95, in which no loss counts for more than 3 deviations
    (winsorised). So the detector's threshold needs no knowledge of the loss, its scale or the size of a batch. They
    start anew after a change, and after a start the detector is not asked for 20 iterations.

    Args:
        detector: told these.
    """

    def __init__(self, detector: ChangeDetector):
        self.detector = detector
        self._mean = self._variance = 0.0
        self._count = 0

    def look(self, losses: Iterable[float]) -> tuple[bool, bool]:
        """Takes the next losses, in order.

        Returns:
            Whether the detector found a change; and whether all of them were calm, less than 3 deviations above the
            mean: what a change that is not found yet would not leave.
        """
        found, calm = False, True
        for loss in losses:
            z = self._standardised(loss)
            calm &= z < _MOVES
            if self._count > _START:
                self.detector.update(z)
                if self.detector.drift_detected:
                    found, self._count, self._variance = True, 0, 0.0
        return found, calm

    def _standardised(self, loss: float) -> float:
        self._count += 1
        deviation = math.sqrt(self._variance)
        difference = loss - self._mean if self._count > 1 else 0.0
        z = difference / deviation if deviation > 0 else 0.0
        if self._count == 1:
            self._mean = loss
        elif self._count > _START and deviation > 0:
            difference = max(-_MOVES * deviation, min(_MOVES * deviation, difference))
        weight = max(1 - _DECAY, 1 / self._count)
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference * difference)
        return max(-_LIMIT, min(_LIMIT, z))


class RunningSurprise:
    """Surprise of each loss, in [0, 1], against a running mean and variance of those before it, of decay 0.99.

    For the optimizer's gate, step by step: tensors throughout, no device sync.
    """

    decay = 0.99

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # a loss, and the moments before it
        self._moments: tuple[Tensor, Tensor] | None = None

    def observe(self, loss: Tensor) -> None:
        """Takes the next loss, 0-dim."""
        mean, variance = self._moments or (loss, torch.zeros_like(loss))
        difference, share = loss - mean, 1 - self.decay
        variance_now = torch.addcmul(variance, difference, difference, value=share).mul_(self.decay)
        self._last, self._moments = (loss, mean, variance), (torch.add(mean, difference, alpha=share), variance_now)

    @property
    def last(self) -> Tensor:
        """Surprise of the last loss, 0-dim; 0 before any."""
        return loss_surprise(*self._last) if self._last is not None else torch.zeros(())
