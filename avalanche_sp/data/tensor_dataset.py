"""Tensor-backed Avalanche datasets that hand out whole batches.

Avalanche fetches a batch one sample at a time, through several nested look-ups a sample; on MNIST that
costs more than the training step. Here a sample is a light reference, and a whole batch of references is
gathered with one indexing operation by the collate function. Values, order and random numbers are those
of the ordinary route, so training ends in the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.flat_data import FlatData
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map


class TensorSource(Dataset):
    """Images and labels in memory, seen in a fixed order and, optionally, with permuted pixels.

    Several sources can share the same ``images``: rows and pixels are picked when a batch is read, so ten
    permuted tasks take the memory of one.

    Args:
        images: float tensor of shape (M, ...), or uint8 tensor of shape (M, C, H, W) with ``normalization``.
        labels: int64 tensor of shape (M,).
        rows: int64 tensor of shape (N,): which images, in which order. Default: all, as they lie.
        pixels: int64 tensor, a permutation of one flattened image. Default: none.
        normalization: mean and standard deviation of each channel, shape (C, 1, 1), of pixels between 0 and 1. The
            images are divided by 255 and normalised when they are read. Default: they are read as they are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        rows: Tensor | None = None,
        pixels: Tensor | None = None,
        normalization: tuple[Tensor, Tensor] | None = None,
    ):
        self.images = images
        self.normalization = normalization
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.labels = labels[self.rows]
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, ...) and labels (B,) at ``indices`` (int64, shape (B,))."""
        x = self.images.index_select(0, self.rows.index_select(0, indices))
        if self.pixels is not None:
            x = x.flatten(1).index_select(1, self.pixels).view_as(x)
        if self.normalization is not None:
            # In torchvision's order of operations (ToTensor, then Normalize), so the values are the same bits.
            x = x.float().div_(255).sub_(self.normalization[0]).div_(self.normalization[1])
        return x, self.labels.index_select(0, indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.gather(torch.tensor([index]))
        return x[0], int(y)

    @property
    def transforms(self):
        # Each Avalanche loader first walks every index of a leaf to learn whether FFCV could serve it (up to
        # 0.3 s for 30,000 images). This attribute is what it asks for first: an error here means "no FFCV".
        raise NotImplementedError("a TensorSource has no transforms of its own; use Avalanche's transform groups")


class _Sample(Sequence):
    """Sample ``position`` of ``dataset``: unpacks as x, y, task label; collated by the batch."""

    __slots__ = ("dataset", "position")

    def __init__(self, dataset: TensorClassificationDataset, position: int):
        self.dataset = dataset
        self.position = position

    def _values(self) -> list:
        return self.dataset.read(self.position)

    def __getitem__(self, i):
        return self._values()[i]

    def __len__(self) -> int:
        return len(self._values())

    def __iter__(self):
        return iter(self._values())


def _owner(sample) -> TensorClassificationDataset | None:
    return sample.dataset if type(sample) is _Sample else None


def _collate_samples(samples, *, collate_fn_map=None) -> list[Tensor]:
    """Turns samples, from one dataset or several in turn (stream then memory), into [x, y, task labels]."""
    parts = []
    for dataset, run in groupby(samples, key=_owner):
        parts.append(
            default_collate(list(run)) if dataset is None else dataset.read_batch([s.position for s in run])
        )
    if len(parts) == 1:
        return parts[0]
    return [torch.cat(column) for column in zip(*parts)]


# torch's documented way to teach every DataLoader a new sample type.
default_collate_fn_map[_Sample] = _collate_samples


class _Layout:
    """A dataset's tree of concatenations and subsets, flattened to arrays: which source, which row."""

    def __init__(self, dataset: TensorClassificationDataset):
        if [a.name for a in dataset._data_attributes.values() if a.use_in_getitem] != ["targets_task_labels"]:
            raise _NotPlain
        sources: list[TensorSource] = []
        which, row = _resolve(dataset._flat_data, np.arange(len(dataset)), sources)
        self.sources = sources
        self.which = torch.from_numpy(which)
        self.row = torch.from_numpy(row)
        labels = dataset.targets_task_labels
        if len(labels.uniques) == 1:
            self.task_label = torch.full((len(dataset),), *labels.uniques)
        else:
            self.task_label = torch.as_tensor(list(labels))

    def gather(self, indices: Tensor) -> list[Tensor]:
        row = self.row.index_select(0, indices)
        if len(self.sources) == 1:
            x, y = self.sources[0].gather(row)
        else:
            which = self.which[indices]
            order = which.argsort(stable=True)
            parts = [self.sources[s].gather(row[which == s]) for s in which.unique().tolist()]
            x, y = (torch.cat(column)[order.argsort()] for column in zip(*parts))
        return [x, y, self.task_label.index_select(0, indices)]


class _NotPlain(Exception):
    """The tree holds a transform or a foreign dataset: read it sample by sample."""


def _resolve(data, positions: np.ndarray, sources: list[TensorSource]) -> tuple[np.ndarray, np.ndarray]:
    """Maps positions in ``data`` to (number of the source in ``sources``, row in it); collects sources."""
    if isinstance(data, TensorSource):
        if not any(data is s for s in sources):
            sources.append(data)
        number = next(i for i, s in enumerate(sources) if s is data)
        return np.full(len(positions), number), positions
    if not isinstance(data, FlatData):
        raise _NotPlain
    for groups in ("_transform_groups", "_frozen_transform_groups"):
        found = getattr(data, groups, None)
        if found is not None and any(transform is not None for transform in found.transform_groups.values()):
            raise _NotPlain
    if data._indices is not None:
        positions = np.fromiter(data._indices, dtype=np.int64, count=len(data))[positions]
    which = np.empty(len(positions), dtype=np.int64)
    row = np.empty(len(positions), dtype=np.int64)
    ends = np.asarray(data._cumulative_sizes)
    child = np.searchsorted(ends, positions, side="right")
    for c in np.unique(child):
        here = child == c
        start = ends[c - 1] if c else 0
        which[here], row[here] = _resolve(data._datasets[c], positions[here] - start, sources)
    return which, row


class _Labels(DataAttribute):
    """Class labels of a source; their set is read off the tensor, not label by label."""

    def __init__(self, labels: Tensor):
        super().__init__(labels, "targets")
        self._uniques = set(labels.unique().tolist())


class TensorClassificationDataset(TaskAwareSupervisedClassificationDataset):
    """An Avalanche classification dataset over :class:`TensorSource` leaves that is read by the batch.

    It is a full Avalanche dataset: subset, concat, transforms, data attributes and any DataLoader work as
    on every other. Where a transform or a dataset of another kind enters the tree, reading falls back to
    Avalanche's own route.
    """

    @classmethod
    def from_source(cls, source: TensorSource, task_label: int = 0) -> TensorClassificationDataset:
        """A dataset of all of ``source``, each sample with the same task label."""
        return cls(
            [source],
            data_attributes=[
                _Labels(source.labels),
                TaskLabels(ConstantSequence(task_label, len(source))),
            ],
        )

    _layout: _Layout | None = None  # made when the first batch is read
    _plain = True  # until the first batch shows a transform or a foreign dataset

    def _shallow_clone_dataset(self):
        clone = super()._shallow_clone_dataset()
        clone._layout, clone._plain = None, True  # the clone is about to get other transforms or attributes
        return clone

    def __getstate__(self):
        return {**self.__dict__, "_layout": None}

    def read(self, index: int) -> list:
        """Sample ``index`` by Avalanche's own route."""
        return super().__getitem__(index)

    def read_batch(self, indices: list[int]) -> list[Tensor]:
        """[x, y, task labels] of the samples at ``indices``, in that order."""
        if self._layout is None and self._plain:
            try:
                self._layout = _Layout(self)
            except _NotPlain:
                self._plain = False
        if not self._plain:
            return default_collate([self.read(i) for i in indices])
        assert self._layout is not None
        return self._layout.gather(torch.from_numpy(np.array(indices, dtype=np.int64)))  # faster than from a list

    def __getitem__(self, index):
        # Called for every sample of every batch: no more than this.
        if type(index) is int:
            return _Sample(self, index)
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        return super().__getitem__(index)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def subset(self, indices):
        if isinstance(indices, range) and indices == range(len(self)):
            return self._shallow_clone_dataset()  # all of it: no index list to walk
        return super().subset(indices)
