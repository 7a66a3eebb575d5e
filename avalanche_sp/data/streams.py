"""Streams of experiences from a data set's images: groups of classes, or permutations of the pixels."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.utils import AvalancheDataset
from torch import Tensor

from avalanche_sp.data.tensor_dataset import TensorClassificationDataset, TensorSource


class Images(Protocol):
    """The training or the test images of a data set. It is pickled in their place, so it should hold their path."""

    def read(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Images, labels and normalization of a :class:`TensorSource`."""


class _ReadSource(TensorSource):
    """Saved without its images, which are read again: a checkpoint with a replay buffer would hold all of them."""

    def __init__(self, part: Images, **kwargs):
        images, labels, normalization = part.read()
        super().__init__(images, labels, normalization=normalization, **kwargs)
        self.part = part

    def __getstate__(self):
        return {**self.__dict__, "images": None}

    def __setstate__(self, state):
        self.__dict__ = {**state, "images": state["part"].read()[0]}


def split_classes(
    train: Images, test: Images, groups: Sequence[Tensor], *, seed: int, task_labels: bool, from_zero: bool
) -> CLScenario:
    """One experience a group of classes.

    Args:
        train, test: the images.
        groups: the classes of each experience.
        seed: fixes the order of the samples within an experience. The global random state is left alone.
        task_labels: give experience i the task label i instead of 0.
        from_zero: number the classes of every experience from 0 up, in ascending order.
    """
    rng = torch.Generator().manual_seed(seed)

    def experiences(part: Images) -> list[TensorClassificationDataset]:
        datasets = []
        for e, group in enumerate(groups):
            rows = torch.isin(part.read()[1], group).nonzero().flatten()
            source = _ReadSource(part, rows=_shuffled(rows, rng))
            if from_zero:
                source.labels = torch.searchsorted(group.sort().values, source.labels)
            datasets.append(TensorClassificationDataset.from_source(source, e if task_labels else 0))
        return datasets

    return benchmark_of(experiences(train), experiences(test))


def permute_pixels(
    train: Images, test: Images, n_experiences: int, *, train_size: int | None, seed: int, task_labels: bool
) -> CLScenario:
    """One experience a permutation of the pixels, the first one too. A pixel's channels stay together.

    Args:
        train, test: the images.
        n_experiences: number of permutations.
        train_size: training images an experience, drawn again for each. None: all.
        seed: fixes the permutations, the draws and the order of the samples.
        task_labels: give experience i the task label i instead of 0.
    """
    rng, permutations = torch.Generator().manual_seed(seed), np.random.RandomState(seed)
    train_sets: list[TensorClassificationDataset] = []
    test_sets: list[TensorClassificationDataset] = []
    channels, *sides = train.read()[0].shape[1:]
    size = int(np.prod(sides))
    for e in range(n_experiences):
        plane = torch.from_numpy(permutations.permutation(size))
        pixels = torch.cat([plane + channel * size for channel in range(channels)])
        for part, number, datasets in ((train, train_size, train_sets), (test, None, test_sets)):
            rows = _shuffled(torch.arange(len(part.read()[1])), rng)[:number]
            source = _ReadSource(part, rows=rows, pixels=pixels)
            datasets.append(TensorClassificationDataset.from_source(source, e if task_labels else 0))
    return benchmark_of(train_sets, test_sets)


def _shuffled(rows: Tensor, rng: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=rng)]


def benchmark_of(train: Sequence[AvalancheDataset], test: Sequence[AvalancheDataset]) -> CLScenario:
    """A benchmark with a train and a test stream, one experience a dataset, with task labels and class timeline.

    Avalanche's own ``with_classes_timeline`` gives sets where its protocol promises lists, and its multi-head
    models need lists; here they are lists, sorted.
    """
    benchmark = with_task_labels(with_classes_timeline(benchmark_from_datasets(train=list(train), test=list(test))))
    for stream in benchmark.streams.values():
        for e in stream:
            for name in ("classes_in_this_experience", "previous_classes", "classes_seen_so_far", "future_classes"):
                setattr(e, name, sorted(getattr(e, name)))
    return benchmark
