"""A memory that need not store samples: what each class looks like, as Gaussians that samples are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.training.storage_policy import ExemplarsBuffer, ExperienceBalancedBuffer
from sklearn.cluster import KMeans  # avalanche-lib requires it, too
from torch import Tensor

from avalanche_sp.data import TensorClassificationDataset, TensorSource
from avalanche_sp.gate.packed import PackedRows
from avalanche_sp.training.replay import SpreadBatches

__all__ = ["Gaussian", "GaussianBuffer"]

# Samples of an experience that are looked at, evenly spread over it.
_LOOKED_AT = 5000
# With fewer components than so many for each, fewer Gaussians say more of a class.
_LEAST_COMPONENTS = 8


@dataclass
class Gaussian:
    """Samples of one class: their mean and leading principal components.

    Attributes:
        label, task_label: which class, of which task.
        samples: how many stand behind it.
        mean: (d,), in half precision, where that can hold it.
        components: the principal directions, strongest first, each as long as the samples' standard deviation along
            it: (k, d), in four bits.
        variance: of the samples, summed over all directions.
    """

    label: int
    task_label: int
    samples: int
    mean: Tensor
    components: PackedRows
    variance: float

    @classmethod
    def of(cls, x: Tensor, label: int, task_label: int, components: int) -> Gaussian:
        """That of samples (n, d)."""
        mean = x.mean(0)
        rows = _principal((x - mean) / len(x) ** 0.5, components)
        return cls(label, task_label, len(x), _short(mean), PackedRows.of(rows), float(x.var(0, correction=0).sum()))

    def merged(self, other: Gaussian, components: int) -> Gaussian:
        """The Gaussian with the moments of both."""
        samples = self.samples + other.samples
        share = self.samples / samples
        between = (self.mean.float() - other.mean.float()) * (share * (1 - share)) ** 0.5
        within = share**0.5 * self.components.unpacked(), (1 - share) ** 0.5 * other.components.unpacked()
        return Gaussian(
            self.label,
            self.task_label,
            samples,
            _short(share * self.mean.float() + (1 - share) * other.mean.float()),
            PackedRows.of(_principal(torch.cat([*within, between.unsqueeze(0)]), components)),
            share * self.variance + (1 - share) * other.variance + float(between.square().sum()),
        )

    def cut_to(self, components: int) -> None:
        """Forgets all but its leading components."""
        kept = self.components
        self.components = PackedRows(kept.codes[:components].clone(), kept.scale[:components].clone(), kept.columns)

    @property
    def explained(self) -> float:
        """The variance that its components explain, summed over all directions."""
        return float(self.components.unpacked().square().sum())

    @property
    def state_bytes(self) -> int:
        return self.components.state_bytes + self.mean.numel() * self.mean.element_size()


class GaussianBuffer(ExemplarsBuffer):
    """Storage policy for Avalanche's ``ReplayPlugin`` that need not store samples: a class is a mixture of Gaussians.

    When an experience ends, the samples of each of its classes are clustered, and each cluster is summed up by its mean
    and leading principal components. What is replayed is drawn from them, anew in every mini-batch: pseudo-rehearsal.
    However many classes come, there are as many components at most. The more classes, the fewer each has, and
    Gaussians that are left with few are merged. Components take four bits a number, means two bytes: 190 kB for the ten
    classes of MNIST, as much as 60 images in single precision.

    The buffer's length is ``max_size`` times the share of the classes' variance that their components explain. So where
    they say little, a plugin that goes by the number of stored samples trusts them less.

    It is for inputs of one shape that such a mixture says much of, such as centred digits, and for experiences that
    hold many samples of a class: a class that comes again, in another experience, is summed up anew.

    Args:
        max_size: as many samples as what is drawn counts for at most, 1 or more (default 2000); to be the ``mem_size``
            of the ``ReplayPlugin``, too.
        gaussians: for each class of each experience, 1 or more (default 4). Fewer where that would leave any with fewer
            than 8 components, but one.
        components: of all Gaussians together, 0 or more (default 320).
        stored: samples that are stored besides, as ``ReplayPlugin`` does by default: as many of each experience; 0 or
            more (default 0). They are replayed in proportion, mixed with what is drawn.

    Raises:
        ValueError: at construction for an argument out of range.
        TypeError: at the end of an experience whose targets aren't class labels.
        FloatingPointError: likewise, for samples that are not finite.

    References:
        A. Robins: Catastrophic forgetting, rehearsal and pseudorehearsal, Connection Science 1995. B. Pfülb, A.
        Gepperth: Overcoming catastrophic forgetting with Gaussian mixture replay, IJCNN 2021, where the mixture is
        learned by gradient descent on the stream.

    Example::

        plugins=[SelectivePlasticityPlugin(), ReplayPlugin(2000, storage_policy=GaussianBuffer(2000))]

    With 200 stored samples: ``GaussianBuffer(2000, stored=200)``.
    """

    def __init__(self, max_size: int = 2000, gaussians: int = 4, components: int = 320, stored: int = 0):
        arguments = {"max_size": max_size, "gaussians": gaussians, "components": components, "stored": stored}
        for name, value in arguments.items():
            least = 1 if name in ("max_size", "gaussians") else 0
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Invalid {name} value: {value} (allowed: an integer, {least} or more)")
        super().__init__(max_size)
        self.gaussians = gaussians
        self.components = components
        self.classes: list[list[Gaussian]] = []
        """The Gaussians of each class of each experience, in the order in which they came."""
        self.stored = ExperienceBalancedBuffer(stored, adaptive_size=True) if stored else None
        """The storage policy of the stored samples; None if there are none."""
        self._shape = torch.Size()
        self._tensor_labels = False  # whether the experiences' labels are tensors, one by one, or numbers

    @property
    def state_bytes(self) -> int:
        """Bytes that the Gaussians take."""
        return sum(gaussian.state_bytes for known in self.classes for gaussian in known)

    @torch.no_grad()
    def post_adapt(self, agent, exp) -> None:
        """Sums up an experience's classes."""
        with torch.random.fork_rng([]):  # a dataset's transforms may draw from it, too
            x, labels, task_labels = _some_samples(exp.dataset)
            self._tensor_labels = isinstance(exp.dataset[0][1], Tensor)
        self._shape = x.shape[1:]
        kinds = torch.stack([task_labels, labels], dim=1)
        new = kinds.unique(dim=0)
        each = self.components // (len(self.classes) + len(new))
        number = min(max(each // _LEAST_COMPONENTS, 1), self.gaussians)
        self.classes = [_fewer(known, number, each // number) for known in self.classes]
        for kind in new:
            of_it = x[(kinds == kind).all(1)].flatten(1).float()
            task_label, label = kind.tolist()
            self.classes.append([Gaussian.of(c, label, task_label, each // number) for c in _clusters(of_it, number)])
        if self.stored is not None:
            self.stored.post_adapt(agent, exp)
        self._rebuild()

    def resize(self, strategy, new_size: int) -> None:
        """Lets what is drawn count for so many samples at most."""
        self.max_size = new_size
        self._rebuild()

    def _rebuild(self) -> None:
        by_task: dict[int, list[tuple[Gaussian, int]]] = {}
        for known in self.classes:
            samples = sum(g.samples for g in known)
            center = torch.stack([g.samples / samples * g.mean.float() for g in known]).sum(0)
            between = sum(g.samples / samples * float((g.mean.float() - center).square().sum()) for g in known)
            within = sum(g.samples / samples * g.variance for g in known)
            explained = sum(g.samples / samples * g.explained for g in known)
            share = (explained + between) / (within + between) if within + between else 1.0
            for g in known:  # at least one each, so that no class is forgotten
                count = max(int(min(share, 1.0) * self.max_size / len(self.classes) * g.samples / samples), 1)
                by_task.setdefault(g.task_label, []).append((g, count))
        drawn = [
            TensorClassificationDataset.from_source(_Drawn(pairs, self._shape, self._tensor_labels), task_label)
            for task_label, pairs in by_task.items()
        ]
        if self.stored is not None:
            drawn.append(self.stored.buffer)
        self.buffer = drawn[0] if len(drawn) == 1 else concat_datasets(drawn)


class _Drawn(TensorSource):
    """Samples that are drawn when they are read, others each time: from Gaussians, so many of each."""

    def __init__(self, counted: Sequence[tuple[Gaussian, int]], shape: torch.Size, tensor_labels: bool):
        which = torch.repeat_interleave(torch.arange(len(counted)), torch.tensor([n for _, n in counted]))
        labels = torch.tensor([g.label for g, _ in counted])[which]
        super().__init__(torch.empty(0, *shape), labels, rows=torch.arange(len(labels)))
        self.gaussians, self.which = [g for g, _ in counted], which
        self.tensor_labels = tensor_labels
        self.reads = 0  # the seed of what is drawn next: the global random state is left alone

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.reads)
        self.reads += 1
        read, which = self.which.index_select(0, indices).unique(return_inverse=True)
        x = draw([self.gaussians[number] for number in read.tolist()], which, generator)
        return x.to(self.images).view(len(x), *self.images.shape[1:]), self.labels.index_select(0, indices)

    def __getitem__(self, index: int):
        x, y = super().__getitem__(index)
        return x, torch.tensor(y) if self.tensor_labels else y


def draw(gaussians: Sequence[Gaussian], which: Tensor, generator: torch.Generator) -> Tensor:
    """Samples of Gaussians, along their components; of a variance midway, in ratio, from theirs to all of it.

    Args:
        gaussians: at least one.
        which: of which of them each sample is to be, shape (n,).
        generator: of random numbers.

    Returns:
        Shape (n, d).
    """
    packed = [g.components for g in gaussians]
    codes, scale = torch.cat([p.codes for p in packed]), torch.cat([p.scale for p in packed])
    rows = PackedRows(codes, scale, packed[0].columns).unpacked()  # of all Gaussians, one after another
    which = which.to(rows.device)
    counts = torch.tensor([len(p.scale) for p in packed], device=rows.device)
    variance = rows.new_tensor([g.variance for g in gaussians])
    explained = torch.zeros_like(variance).index_add_(0, torch.repeat_interleave(counts), rows.square().sum(1))
    wider = (variance / explained.clamp_min(torch.finfo(rows.dtype).tiny)) ** 0.25
    each = counts[which]  # a sample is the sum of so many rows, weighed at random
    begins, first = each.cumsum(0) - each, (counts.cumsum(0) - counts)[which]
    places = torch.arange(int(each.sum()), device=rows.device) + torch.repeat_interleave(first - begins, each)
    noise = torch.randn(len(places), generator=generator).to(rows) * torch.repeat_interleave(wider[which], each)
    x = F.embedding_bag(places, rows, begins, mode="sum", per_sample_weights=noise)
    return x.add_(torch.stack([g.mean for g in gaussians])[which])


def _some_samples(dataset) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of an Avalanche dataset, evenly spread over it, their labels and task labels."""
    batches = [(x, labels, tasks) for (x, tasks), labels in SpreadBatches(dataset, _LOOKED_AT)]
    x, labels, task_labels = (torch.cat(column) for column in zip(*batches))
    if labels.dim() != 1 or labels.is_floating_point():
        raise TypeError(
            f"Invalid targets: shape {tuple(labels.shape)}, {labels.dtype} (GaussianBuffer sums up classes, and needs "
            "their labels, whole numbers)"
        )
    if not x.isfinite().all():
        raise FloatingPointError("a sample is not finite: nothing was summed up")
    return x, labels, task_labels


def _clusters(x: Tensor, number: int) -> list[Tensor]:
    """Samples (n, d) in so many clusters, fewer where they are few."""
    if number == 1 or len(x) < 2 * number:
        return [x]
    found = KMeans(number, n_init=1, random_state=0).fit_predict(x.cpu().numpy())
    parts = [x[torch.from_numpy(found).to(x.device) == cluster] for cluster in range(number)]
    return [part for part in parts if len(part)]


def _fewer(known: list[Gaussian], number: int, components: int) -> list[Gaussian]:
    """A class's Gaussians, the nearest merged until there are so many at most, with so many components each."""
    known = list(known)
    while len(known) > number:
        pairs = [(a, b) for a in range(len(known)) for b in range(a)]
        a, b = min(pairs, key=lambda pair: _distance(known[pair[0]], known[pair[1]]))
        merged = known[b].merged(known.pop(a), components)
        known[b] = merged
    for gaussian in known:
        gaussian.cut_to(components)
    return known


def _distance(a: Gaussian, b: Gaussian) -> float:
    """What merging adds to the variance within: J. Ward, Journal of the American Statistical Association 1963."""
    apart = float((a.mean.float() - b.mean.float()).square().sum())
    return a.samples * b.samples / (a.samples + b.samples) * apart


def _short(mean: Tensor) -> Tensor:
    """A vector in half precision; as it is where its largest number is beyond that, or near its smallest."""
    return mean.half() if 1e-2 < mean.abs().max() < 6e4 else mean


def _principal(rows: Tensor, components: int) -> Tensor:
    """The leading principal directions of rows (n, d), each as long as its singular value: (k, d)."""
    count = min(components, *rows.shape)
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):  # a randomised method, many times as fast
        torch.manual_seed(0)
        _, scale, directions = torch.svd_lowrank(rows, min(count + 8, *rows.shape), niter=4)
    return (scale * directions).T[:count]
