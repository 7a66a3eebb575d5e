"""What is stream and what is memory in a mini-batch of Avalanche's replay."""

from __future__ import annotations

from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from torch import Tensor

__all__ = ["classes_of", "memory_size", "stream_part", "stream_rows"]


def memory_size(strategy) -> int:
    """Number of stored samples that the strategy's present data loader replays; 0 without replay."""
    loader = strategy.dataloader
    if not isinstance(loader, ReplayDataLoader):
        return 0
    return sum(len(memory) for memory in loader.datasets[1:])


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
