"""Streams of tasks that are not in order, mixed, or drifting."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset

from avalanche_sp.data import TensorClassificationDataset, TensorSource, split_classes
from harness.data import parts_of
from harness.settings import DATA, Run

BLURRED = 20  # a task exchanges one of this number of samples with each neighbour
BLOCK = 100  # images of a drifting stream that share their permutation


def groups_of_classes(run: Run, n_tasks: int, dataset_root: Path | None) -> CLScenario:
    """The run's data set in ``n_tasks`` groups of classes."""
    classes = torch.arange(DATA[run.data].classes)
    heads = {"task_labels": run.task_incremental, "from_zero": run.task_incremental}
    return split_classes(*parts_of(run.data, dataset_root, run.pixels), classes.chunk(n_tasks), seed=run.seed, **heads)


def parts(run: Run, experience: CLExperience) -> Iterable[CLExperience]:
    """The arguments of ``train``, one after another."""
    if not run.in_mini_batches:
        return [experience]
    return split_online_stream([experience], run.batch_size, seed=run.seed, drop_last=True)


def blurred(tasks: Sequence[AvalancheDataset]) -> list[AvalancheDataset]:
    """Each task exchanges a twentieth of its samples with each neighbour."""
    shares = [[task.subset(part.tolist()) for part in torch.arange(len(task)).tensor_split(BLURRED)] for task in tasks]
    for left, right in zip(shares, shares[1:]):
        left[-1], right[0] = right[0], left[-1]
    return [functools.reduce(AvalancheDataset.concat, share) for share in shares]


def drifting(run: Run, dataset_root: Path | None) -> tuple[list, list]:
    """Permuted images whose permutation never rests after the first task: a few pixels change places every 100 images.

    At the end of each task the permutation is one that is independent of the task before; the tests have these.
    """
    whole = groups_of_classes(run, 1, dataset_root)
    train, test = (stream[0].dataset for stream in (whole.train_stream, whole.test_stream))
    if run.validation:
        train, test = train[len(train) // 6 :], train[: len(train) // 6]
    size, random = run.train_per_task or len(train), np.random.RandomState(run.seed)
    pixels = DATA[run.data].inputs
    permutation = random.permutation(pixels)
    train_sets, test_sets = [], []
    for task in range(run.n_tasks):
        rows = torch.from_numpy(random.permutation(len(train))[:size])
        images, labels, _ = train.read_batch(rows.tolist())
        shape, images = images.shape[1:], images.flatten(1)
        target = permutation if task == 0 else random.permutation(pixels)
        moves = swaps(permutation, target)
        for block, start in enumerate(range(0, size, BLOCK), 1):
            for i, j in moves[len(moves) * (block - 1) * BLOCK // size : len(moves) * block * BLOCK // size]:
                permutation[[i, j]] = permutation[[j, i]]
            images[start : start + BLOCK] = images[start : start + BLOCK, torch.from_numpy(permutation)]
        permutation = target.copy()
        train_sets.append(_dataset(images, labels, shape))
        images, labels, _ = test.read_batch(list(range(len(test))))
        test_sets.append(_dataset(images.flatten(1)[:, torch.from_numpy(permutation)], labels, shape))
    return train_sets, test_sets


def swaps(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """Exchanges of two places each that turn one permutation into another."""
    now, moves = start.tolist(), []
    for i, value in enumerate(end.tolist()):
        j = now.index(value, i)  # all before are in place
        if i != j:
            moves.append((i, j))
            now[i], now[j] = now[j], now[i]
    return moves


def _dataset(images: torch.Tensor, labels: torch.Tensor, shape: torch.Size) -> TensorClassificationDataset:
    return TensorClassificationDataset.from_source(TensorSource(images.view(-1, *shape), labels), 0)
