"""Change detection on the stream's loss and inputs: finds the beginning of a new task."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from avalanche_sp.gate.functional import loss_surprise
from avalanche_sp.gate.settings import Settings


@runtime_checkable
class ChangeDetector(Protocol):
    """A detector of a change in a series of numbers: one of `river.drift`, or an object of one's own.

    Detectors of `river.drift.binary` take truth values, and do not work.
    """

    @property
    def drift_detected(self) -> bool:
        """Whether the last number showed a change."""

    def update(self, x: float) -> object:
        """Takes the next number: an iteration's surprise, as :class:`ChangeWatch` standardises it."""


def page_hinkley(settings: Settings) -> ChangeDetector:
    """River's Page-Hinkley test on the deviations that :class:`ChangeWatch` computes.

    It finds a change when the deviations, each less ``detection_delta``, add up to ``detection_threshold`` above their
    mean. With the defaults five very surprising iterations in a row are enough.

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
    return PageHinkley(
        min_instances=10, delta=settings.detection_delta, threshold=settings.detection_threshold, mode="up"
    )


class ChangeWatch:
    r"""Standardises what an iteration shows by those before it, and asks detectors whether it changed.

    .. math::
        z_t = \operatorname{clip}\big((y_t - \mu_{t-1}) / \sigma_{t-1}, -5, 5\big)

    for each number y that is shown, such as the loss; each has a detector of its own. The mean and the deviation are
    running ones, of decay 0.95, in which no number counts for more than 3 deviations (winsorised). So a detector's
    threshold needs no knowledge of the loss, its scale or the size of a batch. Restart them after a change
    (:meth:`restart`). After a start the detectors are not asked for 20 iterations.

    Args:
        detector: a copy of it is made for each number, at every start. It is itself left alone.
    """

    def __init__(self, detector: ChangeDetector, settings: Settings):
        self.detector, self.settings = detector, settings
        self._series: list[tuple[_Series, ChangeDetector]] = []

    def restart(self) -> None:
        """Starts again, without the iterations so far."""
        self._series = []

    def look(self, iterations: Iterable[Sequence[float]]) -> tuple[bool, bool]:
        """Takes the next iterations, in order, all of the same length.

        Returns:
            Whether a detector found a change, after which it looks at none; and whether all that it looked at were
            calm, less than 3 deviations above the mean: what a change that is not found yet would not leave.
        """
        calm = True
        for shown in iterations:
            self._series = self._series or [(_Series(self.settings), copy.deepcopy(self.detector)) for _ in shown]
            changed = False
            for (series, detector), y in zip(self._series, shown):
                z = series.standardised(y)
                calm &= z < self.settings.detection_clip
                if series.count > self.settings.detection_start:
                    detector.update(z)
                    changed |= detector.drift_detected
            if changed:
                return True, calm
        return False, calm


class _Series:
    """Running mean and deviation of numbers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.count = 0
        self._mean = self._variance = 0.0

    def standardised(self, y: float) -> float:
        """Takes the next number; returns it in deviations from the mean, both of those before it.

        One that is not finite is left out.
        """
        if not math.isfinite(y):
            return 0.0
        self.count += 1
        clip, limit = self._settings.detection_clip, self._settings.detection_limit
        deviation = math.sqrt(self._variance)
        difference = y - self._mean if self.count > 1 else 0.0
        z = difference / deviation if deviation > 0 else 0.0
        if self.count == 1:
            self._mean = y
        elif self.count > self._settings.detection_start and deviation > 0:
            difference = max(-clip * deviation, min(clip * deviation, difference))
        weight = max(1 - self._settings.detection_decay, 1 / self.count)
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference * difference)
        return max(-limit, min(limit, z))


class InputWatch:
    """Where the stream's inputs lie: their running mean, of decay 0.95 a mini-batch, and the mean of all.

    A mini-batch's mean waits until it is kept or dropped. Tensors throughout, no device sync. State: three
    vectors of a sample's size.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._waiting: tuple[Tensor, Tensor, int]  # sums over the mini-batches that wait
        self.restart()

    def restart(self) -> None:
        """Forgets all inputs so far."""
        self._size = 0
        self._kept = 0  # mini-batches
        self._recent = self._learned = self._energy = torch.zeros(())
        self.drop()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._recent, self._learned, self._waiting[0]

    def observe(self, x: Tensor) -> Tensor:
        """Takes the next inputs (n, ...); returns how far their mean lies from the running one, squared, 0-dim.

        A value that is not finite counts as 0. Inputs of another size restart it.
        """
        x = x.detach().reshape(len(x), -1).float()
        if x.shape[1] != self._size:
            self.restart()
            self._size = x.shape[1]
        mean = x.mean(0).nan_to_num(0.0, 0.0, 0.0)
        energy = (torch.linalg.vector_norm(x).square() / len(x)).nan_to_num(0.0, 0.0, 0.0)
        means, energies, n = self._waiting
        self._waiting = means + mean, energies + energy, n + 1
        difference = mean - (self._recent if self._kept else self._waiting[0] / (n + 1))
        return difference.dot(difference)

    def keep(self) -> None:
        """Takes in what waits."""
        means, energies, n = self._waiting
        if n == 0:
            return
        self._kept += n
        of_all = n / self._kept
        share = max(1 - self.decay**n, of_all)  # 1 at first
        self._recent = self._recent + share * (means / n - self._recent)
        self._energy = self._energy + share * (energies / n - self._energy)
        self._learned = self._learned + of_all * (means / n - self._learned)
        self.drop()

    def drop(self) -> None:
        self._waiting = torch.zeros(()), torch.zeros(()), 0

    @property
    def moved(self) -> Tensor:
        """How far the running mean lies from that of all, squared, in units of the inputs' variance: 0-dim."""
        limits = torch.finfo(self._energy.dtype)
        least = limits.eps * self._energy + limits.tiny  # inputs that are all the same don't move by being rounded
        variance = torch.maximum(self._energy - self._recent.square().sum(), least)
        return (self._recent - self._learned).square().sum() / variance


class RunningSurprise:
    """Surprise of each loss, in [0, 1], against a running mean and variance of the losses before it.

    For the optimizer's gate, step by step: tensors throughout, no device sync.

    Args:
        decay: of mean and variance, a step.
        full: deviations that are full surprise.
    """

    def __init__(self, decay: float, full: float) -> None:
        self.decay, self.full = decay, full
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # a loss, and the moments before it
        self._moments: tuple[Tensor, Tensor] | None = None

    def observe(self, loss: Tensor) -> None:
        """Takes the next loss, 0-dim; one that is not finite counts as the mean."""
        mean, variance = self._moments or (loss.nan_to_num(0.0, 0.0, 0.0), torch.zeros_like(loss))
        loss = torch.where(loss.isfinite(), loss, mean)
        difference, share = loss - mean, 1 - self.decay
        variance_now = torch.addcmul(variance, difference, difference, value=share).mul_(self.decay)
        self._last, self._moments = (loss, mean, variance), (torch.add(mean, difference, alpha=share), variance_now)

    def state_dict(self) -> dict:
        return {"last": self._last, "moments": self._moments}

    def load_state_dict(self, state: dict) -> None:
        self._last, self._moments = state["last"], state["moments"]

    @property
    def last(self) -> Tensor:
        """Surprise of the last loss, 0-dim; 0 before any."""
        return loss_surprise(*self._last, self.full) if self._last is not None else torch.zeros(())
