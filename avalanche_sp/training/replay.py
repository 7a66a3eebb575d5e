"""Avalanche's replay: which samples are stored ones, and what the gate is told of them."""

from collections.abc import Iterator
from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import ReplayDataLoader
from avalanche.models import MultiTaskModule, SCRModel, TrainEvalModel, avalanche_forward
from avalanche.training import DER, ER_ACE
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avalanche_sp.gate import Samples
from avalanche_sp.gate.observe import BATCH, evenly_spread

_KEPT = 2**26  # bytes of inputs


class SpreadBatches:
    """Samples of an Avalanche dataset, evenly spread over it, in batches.

    The first reading keeps the batches for later readings if their inputs take at most 64 MB. A copy by pickle reads
    them again.

    Args:
        dataset: an ``AvalancheDataset``.
        limit: number of samples, at most.
    """

    def __init__(self, dataset: Any, limit: int):
        self.dataset = dataset
        self.limit = limit
        self._kept: list[tuple[tuple[Tensor, Tensor], Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Pairs of (inputs, task labels) and targets."""
        if self._kept is not None:
            yield from self._kept
            return
        loader = DataLoader(
            self.dataset.subset(evenly_spread(len(self.dataset), self.limit)),
            batch_size=BATCH,
            collate_fn=getattr(self.dataset, "collate_fn", None),
            generator=torch.Generator(),  # its own: a loader draws from the global one even without shuffling
        )
        kept: list = []
        size = 0.0
        for batch in loader:
            pair = (batch[0], batch[-1]), batch[1]
            size += getattr(batch[0], "nbytes", float("inf"))
            kept.append(pair)
            if size > _KEPT:
                kept.clear()
            yield pair
        self._kept = kept or None

    def __getstate__(self) -> dict:
        return vars(self) | {"_kept": None}


def samples_of(dataset, limit: int) -> Samples:
    """At most ``limit`` samples of an Avalanche dataset, as the gate takes them: with task labels among the inputs."""
    return Samples(SpreadBatches(dataset, limit), min(len(dataset), limit), len(dataset), classes_of(dataset))


def forward_of(model: nn.Module, inputs: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """A model's outputs for the inputs of :func:`samples_of`: samples and their task labels.

    Without task labels the model is called as in a loop of the user's own, who called ``plugin.gate.consolidate``.
    """
    if isinstance(model, (TrainEvalModel, SCRModel)):
        model.training = True  # with the head that is trained; the modules below stay in evaluation mode
    return avalanche_forward(model, *inputs) if isinstance(inputs, tuple) else model(inputs)


def memories_of(strategy) -> list:
    """The datasets of stored samples that the strategy trains on, as far as they are known.

    Those that the present data loader replays, or that a strategy such as ER_ACE and DER draws from a buffer of its
    own; none without replay.
    """
    return _replayed(strategy) or _drawn(strategy)


def memory_size(strategy) -> int:
    """Number of stored samples that the strategy's present data loader replays; 0 without replay."""
    return sum(len(memory) for memory in _replayed(strategy))


def is_mixture(strategy) -> bool:
    """Whether the strategy trains on one dataset of the experience's and earlier samples, as Cumulative and iCaRL."""
    is_apart = isinstance(strategy.dataloader, ReplayDataLoader)
    return not is_apart and len(strategy.adapted_dataset) > len(strategy.experience.dataset)


def trains_apart(strategy) -> bool:
    """Whether stored samples follow those of the experience in a forward pass of their own, as in ER_ACE."""
    return isinstance(strategy, ER_ACE) and strategy.replay_loader is not None


def _drawn(strategy) -> list:
    """The samples that a strategy draws from its own buffer, of classes that are not in the experience."""
    if not isinstance(strategy, (DER, ER_ACE)) or strategy.replay_loader is None:
        return []
    new = strategy.experience.dataset.targets.uniques
    groups = getattr(strategy.storage_policy, "buffer_groups", {})
    return [group.buffer for c, group in groups.items() if c not in new]


def _replayed(strategy) -> list:
    loader = strategy.dataloader
    return [memory for memory in loader.datasets[1:] if len(memory)] if isinstance(loader, ReplayDataLoader) else []


def labels_of(dataset) -> set:
    """The classes among a dataset's targets; none if it has no targets, or if these are numbers and no labels."""
    targets = getattr(dataset, "targets", None)
    labels = set() if targets is None else set(targets.uniques)
    return set() if any(torch.as_tensor(label).is_floating_point() for label in labels) else labels


def classes_of(dataset) -> int:
    """Their number, 1 at least."""
    return len(labels_of(dataset)) or 1


def stream_rows(strategy) -> int:
    """Number of rows of the present training mini-batch that come from the stream; they come first.

    ``ReplayPlugin`` puts the stream's samples first, then the stored ones, and marks neither. Only the last batch of an
    epoch holds fewer of the stream's than asked for, so their number follows from the position in the epoch.
    """
    loader = strategy.dataloader
    if not isinstance(loader, ReplayDataLoader):
        return len(strategy.mb_x)
    size = loader.batch_sizes[0]
    return min(size, len(loader.datasets[0]) - strategy.clock.train_epoch_iterations * size)


def stored_rows(strategy) -> Tensor:
    """True for each row of the present training mini-batch that is a stored sample, shape (batch,).

    A multi-task model computes the tasks of a mini-batch one after another, so its layers' rows are not known. If there
    are several tasks, all rows count as stored samples: none is gated. The samples that DER, MIR, GenerativeReplay and
    A-GEM store or generate count as the stream's: that is no worse than to tell them apart (``docs/guide.md``).
    """
    if isinstance(strategy.model, MultiTaskModule) and len(strategy.mb_task_id.unique()) > 1:
        return torch.ones(len(strategy.mb_x), dtype=torch.bool)
    return torch.arange(len(strategy.mb_x)) >= stream_rows(strategy)
