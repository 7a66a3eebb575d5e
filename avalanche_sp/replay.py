"""Beside Avalanche's replay: what is stream and what is memory, and how far a memory replaces the gate."""

from __future__ import annotations

from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from torch import Tensor

__all__ = [
    "classes_of",
    "memories_of",
    "memory_size",
    "stream_part",
    "stream_rows",
    "times_as_closed",
    "times_as_open",
    "trust_in",
]

# Stored samples of each class of each experience with which a memory stands for half of the old loss, the gate opens
# twice as far, and further epochs close it half as fast as without any. Found on Split MNIST: docs/experiments.md.
_TRUSTED = 50
_OPENING = 12
_RICH = 800


def trust_in(stored: float, half: float = _TRUSTED) -> float:
    """How much of the old loss a memory stands for, 0 to 1, with so many samples of each class of each experience.

    Args:
        stored: so many.
        half: with how many it is half.
    """
    return stored / (stored + half)


def times_as_open(stored: float) -> float:
    """How many times further the gate opens beside it."""
    return 1 + (stored / _OPENING) ** 2


def times_as_closed(epoch: int, stored: float) -> float:
    """How many times as far the gate closes in an experience's epoch, counted from 0."""
    return (1 + epoch) ** (5 / (1 + (stored / _RICH) ** 2))


def memories_of(strategy) -> list:
    """The datasets that the strategy's present data loader replays; none without replay."""
    loader = strategy.dataloader
    return [memory for memory in loader.datasets[1:] if len(memory)] if isinstance(loader, ReplayDataLoader) else []


def memory_size(strategy) -> int:
    """Number of stored samples that the strategy's present data loader replays; 0 without replay."""
    return sum(len(memory) for memory in memories_of(strategy))


def classes_of(dataset) -> int:
    """Number of classes among a dataset's targets; 1 where it has no targets to tell apart."""
    targets = getattr(dataset, "targets", None)
    return len(targets.uniques) if targets is not None else 1


def stream_rows(strategy) -> int:
    """How many rows at the front of the present training mini-batch come from the stream.

    ``ReplayPlugin`` puts the stream's samples first, then the memory's, and marks neither. Only the last
    batch of an epoch holds fewer of the stream's than asked for, so their number follows from the position
    in the epoch.
    """
    loader = strategy.dataloader
    if not isinstance(loader, ReplayDataLoader):
        return len(strategy.mb_x)
    size = loader.batch_sizes[0]
    return min(size, len(loader.datasets[0]) - strategy.clock.train_epoch_iterations * size)


def stream_part(x: Tensor, batch: int, stream: int) -> Tensor:
    """The part of a layer's input or output ``x`` that belongs to the first ``stream`` samples of ``batch``.

    A sample may have several rows, in sequence.
    """
    return x if stream == batch else x[: len(x) // batch * stream]
