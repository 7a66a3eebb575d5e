"""A memory that need not store samples: what each class looks like, as Gaussians that samples are drawn from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ExemplarsBuffer, ExperienceBalancedBuffer
from sklearn.cluster import KMeans  # avalanche-lib requires it also
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from avalanche_sp.arguments import check_integer
from avalanche_sp.data import TensorClassificationDataset, TensorSource
from avalanche_sp.gate.packed import PackedRows
from avalanche_sp.training.replay import SpreadBatches

# Samples of an experience that are looked at, evenly spread over it.
_LOOKED_AT = 5000
# Least number of components of a Gaussian. With fewer of them, fewer Gaussians describe a class better.
_LEAST_COMPONENTS = 8
# Number of classes for which the default number of bytes suffices, each with all its Gaussians of 8 components.
_LEAST_CLASSES = 10
# Largest magnitude of an input. Sums of squares of larger ones can exceed single precision.
_LARGEST = 1e15


@dataclass
class Gaussian:
    """Samples of one class: their mean and leading principal components.

    Attributes:
        label, task_label: which class, of which task.
        samples: how many stand behind it.
        half: the mean (d,), in half precision, divided by ``scale``.
        scale: a power of two, 1 for means that half precision can hold.
        components: the principal directions, strongest first, each as long as the samples' standard deviation along
            it: (k, d), in four bits.
        variance: of the samples, summed over all directions.
    """

    label: int
    task_label: int
    samples: int
    half: Tensor
    scale: float
    components: PackedRows
    variance: float

    @classmethod
    def of(cls, x: Tensor, label: int, task_label: int, components: int) -> Gaussian:
        """That of samples (n, d)."""
        mean = x.mean(0)
        rows = _principal((x - mean) / len(x) ** 0.5, components)
        return cls(label, task_label, len(x), *_short(mean), PackedRows.of(rows), float(x.var(0, correction=0).sum()))

    @property
    def mean(self) -> Tensor:
        """(d,), in single precision."""
        return self.half.float() * self.scale

    def merged(self, other: Gaussian, components: int) -> Gaussian:
        """The Gaussian with the moments of both."""
        samples = self.samples + other.samples
        share = self.samples / samples
        between = (self.mean - other.mean) * (share * (1 - share)) ** 0.5
        within = share**0.5 * self.components.unpacked(), (1 - share) ** 0.5 * other.components.unpacked()
        return Gaussian(
            self.label,
            self.task_label,
            samples,
            *_short(share * self.mean + (1 - share) * other.mean),
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
        return self.components.state_bytes + self.half.nbytes


class GaussianBuffer(ExemplarsBuffer):
    """Storage policy for Avalanche's ``ReplayPlugin`` that need not store samples: a class is a mixture of Gaussians.

    When an experience ends, the samples of each of its classes are clustered. Each cluster is described by its mean and
    its leading principal components. Replay samples are drawn from these Gaussians, other ones in each mini-batch, with
    torch's global random state: pseudo-rehearsal. A component takes four bits a number, a mean two bytes.

    The buffer's length is ``max_size`` times the share of the classes' variance that their components explain, and at
    most ``max_size``. So if the components explain little, a plugin that goes by the number of stored samples trusts
    them less.

    The method is for inputs of one shape that such a mixture describes well, such as centred digits, and for
    experiences that hold many samples of a class: a class that comes again, in another experience, is described again.

    Args:
        max_size: upper bound on the number of rows of the buffer, 1 or more (default 2000). :meth:`replay_plugin` gives
            it to Avalanche's plugin.
        gaussians: number of Gaussians for each class of each experience, 1 or more (default 4). Fewer if they would
            have fewer than 8 components each, but at least one.
        max_bytes: upper bound on the memory of all Gaussians, divided equally among the classes: the more classes, the
            fewer Gaussians and components each has. Default None: what all classes, or ten if they are fewer, take with
            ``gaussians`` Gaussians of 8 components. That is 19 kB for a class of MNIST, as much as 6 images in single
            precision.
        stored: number of samples that are stored as well, as ``ReplayPlugin`` does by default: equally many of each
            experience; 0 (default) to ``max_size - 1``. Drawn and stored samples are replayed in proportion.

    Raises:
        ValueError: at construction, for an argument out of range; at the end of an experience, if the means of the
            classes alone take more than ``max_bytes``, if it is empty, or if its inputs have another shape than those
            before or a magnitude above 1e15.
        TypeError: at the end of an experience whose targets aren't class labels, or whose inputs are neither
            floating-point numbers nor uint8.
        FloatingPointError: at the end of an experience, for samples that are not finite.

    References:
        A. Robins: Catastrophic forgetting, rehearsal and pseudorehearsal, Connection Science 1995. B. Pfülb, A.
        Gepperth: Overcoming catastrophic forgetting with Gaussian mixture replay, IJCNN 2021, where the mixture is
        learned by gradient descent on the stream.

    Example::

        plugins=[SelectivePlasticityPlugin(), GaussianBuffer().replay_plugin()]

    With 200 stored samples: ``GaussianBuffer(2200, stored=200)``.
    """

    def __init__(self, max_size: int = 2000, gaussians: int = 4, max_bytes: int | None = None, stored: int = 0):
        check_integer("max_size value", max_size, 1)
        check_integer("gaussians value", gaussians, 1)
        if max_bytes is not None:
            check_integer("max_bytes value", max_bytes, 1)
        check_integer("stored value", stored, 0, int(max_size) - 1)
        super().__init__(int(max_size))
        self.gaussians = int(gaussians)
        self.max_bytes = max_bytes
        self.classes: list[list[Gaussian]] = []
        """The Gaussians of each class of each experience, in the order in which they came."""
        self.stored = ExperienceBalancedBuffer(int(stored), adaptive_size=True) if stored else None
        """The storage policy of the stored samples; None if there are none."""
        self._like = torch.empty(0)  # no samples, of the experiences' shape and data type
        self._tensor_labels = False  # whether the experiences' labels are tensors, one by one, or numbers
        self._task_labels = True  # whether their samples have a task label

    @property
    def state_bytes(self) -> int:
        """Bytes that the Gaussians take."""
        return sum(gaussian.state_bytes for known in self.classes for gaussian in known)

    def replay_plugin(self, **kwargs) -> ReplayPlugin:
        """Avalanche's ``ReplayPlugin`` with this buffer, and ``max_size`` as its ``mem_size``.

        Args:
            kwargs: its other arguments, such as ``batch_size_mem``.
        """
        return ReplayPlugin(self.max_size, storage_policy=self, **kwargs)

    def post_adapt(self, agent, exp) -> None:
        """Adds the classes of an experience."""
        self.update_from_dataset(exp.dataset, agent)

    @torch.no_grad()
    def update_from_dataset(self, new_data: AvalancheDataset, strategy=None) -> None:
        """Adds the classes of a dataset, as those of one experience.

        Raises:
            ValueError, TypeError, FloatingPointError: as the class says. Nothing was changed.
        """
        if not len(new_data):
            raise ValueError("Invalid new_data: 0 samples (allowed: 1 or more)")
        with torch.random.fork_rng([]):  # a dataset's transforms may draw from it also
            x, labels, task_labels = _some_samples(new_data)
            sample = new_data[0]
            has_task_labels, tensor_labels = len(sample) > 2, isinstance(sample[1], Tensor)
        if self.classes and x.shape[1:] != self._like.shape[1:]:
            raise ValueError(
                f"Invalid new_data: inputs of shape {tuple(x.shape[1:])} (allowed: {tuple(self._like.shape[1:])}, as "
                "those before)"
            )
        if not has_task_labels:
            task_labels = torch.zeros_like(labels)
        kinds = torch.stack([task_labels, labels], dim=1)
        new = kinds.unique(dim=0)
        number, components = self._per_class(len(self.classes) + len(new), x)
        self._like = x.new_empty(0, *x.shape[1:], dtype=x.dtype if x.is_floating_point() else torch.float32)
        self._tensor_labels, self._task_labels = tensor_labels, has_task_labels
        self.classes = [_fewer(known, number, components) for known in self.classes]
        for kind in new:
            of_it = x[(kinds == kind).all(1)].flatten(1).float()
            task_label, label = kind.tolist()
            self.classes.append([Gaussian.of(c, label, task_label, components) for c in _clusters(of_it, number)])
        if self.stored is not None:
            self.stored.post_adapt(strategy, SimpleNamespace(dataset=new_data))
        self._rebuild()

    def resize(self, strategy, new_size: int) -> None:
        """Sets ``max_size``."""
        self.max_size = new_size
        if self.stored is not None and self.stored.buffer_groups:
            self.stored.resize(strategy, min(self.stored.max_size, new_size))
        self._rebuild()

    def _per_class(self, classes: int, x: Tensor) -> tuple[int, int]:
        """Number of Gaussians of a class, and of components of a Gaussian, for samples like x (n, ...)."""
        mean = 2 * x[0].numel()  # bytes in half precision
        component = PackedRows.of(x[:1].flatten(1).float()).state_bytes
        total = self.max_bytes
        if total is None:
            total = max(classes, _LEAST_CLASSES) * self.gaussians * (mean + _LEAST_COMPONENTS * component)
        if total < classes * mean:
            raise ValueError(
                f"Invalid max_bytes value: {total} (allowed for {classes} classes: {classes * mean} or more, which "
                "their means take)"
            )
        for number in range(self.gaussians, 0, -1):
            components = (total // (classes * number) - mean) // component
            if components >= _LEAST_COMPONENTS:
                break
        return number, components

    def _rebuild(self) -> None:
        known_rows = len(self.stored.buffer) if self.stored is not None else 0
        most = (self.max_size - known_rows) / max(len(self.classes), 1)  # rows of a class
        quotas = []
        for known in self.classes:
            samples = sum(g.samples for g in known)
            center = torch.stack([g.samples / samples * g.mean for g in known]).sum(0)
            between = sum(g.samples / samples * float((g.mean - center).square().sum()) for g in known)
            within = sum(g.samples / samples * g.variance for g in known)
            explained = sum(g.samples / samples * g.explained for g in known)
            share = (explained + between) / (within + between) if within + between else 1.0
            of_class = max(min(share, 1.0) * most, min(most, 1.0))  # so that no class is forgotten
            quotas += [of_class * g.samples / samples for g in known]
        by_task: dict[int, list[tuple[Gaussian, int]]] = {}
        for g, count in zip((g for known in self.classes for g in known), _whole(quotas)):
            if count:
                by_task.setdefault(g.task_label, []).append((g, count))
        drawn: list[AvalancheDataset] = []
        for task_label, counted in by_task.items():
            source = _Drawn(counted, self._like, self._tensor_labels)
            if self._task_labels:
                drawn.append(TensorClassificationDataset.from_source(source, task_label))
            else:
                targets = DataAttribute(source.labels.tolist(), "targets")
                drawn.append(ClassificationDataset([source], data_attributes=[targets]))
        if self.stored is not None:
            drawn.append(self.stored.buffer)
        self.buffer = drawn[0] if len(drawn) == 1 else concat_datasets(drawn)


def _whole(quotas: Iterable[float]) -> list[int]:
    """Whole numbers in place of the quotas: the sum of the first ones is that of the first quotas, rounded down."""
    ends = [int(end + 1e-6) for end in accumulate(quotas)]
    return [end - begin for begin, end in zip([0, *ends], ends)]


class _Drawn(TensorSource):
    """Samples that are drawn when they are read, other ones each time: a number of each Gaussian."""

    def __init__(self, counted: Sequence[tuple[Gaussian, int]], like: Tensor, tensor_labels: bool):
        which = torch.repeat_interleave(torch.arange(len(counted)), torch.tensor([n for _, n in counted]))
        labels = torch.tensor([g.label for g, _ in counted])[which]
        super().__init__(like, labels, rows=torch.arange(len(labels)))
        self.gaussians, self.which = [g for g, _ in counted], which
        self.tensor_labels = tensor_labels

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        read, which = self.which.index_select(0, indices).unique(return_inverse=True)
        x = draw([self.gaussians[number] for number in read.tolist()], which)
        return x.to(self.images).view(len(x), *self.images.shape[1:]), self.labels.index_select(0, indices)

    def __getitem__(self, index: int):
        x, y = super().__getitem__(index)
        return x, torch.tensor(y) if self.tensor_labels else y


def draw(gaussians: Sequence[Gaussian], which: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples of Gaussians, along their components; of a variance midway, in ratio, from theirs to all of it.

    Args:
        gaussians: at least one.
        which: of which of them each sample is to be, shape (n,).
        generator: of random numbers (default: torch's global one).

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
    each = counts[which]  # number of rows that are summed for a sample, with random weights
    begins, first = each.cumsum(0) - each, (counts.cumsum(0) - counts)[which]
    places = torch.arange(int(each.sum()), device=rows.device) + torch.repeat_interleave(first - begins, each)
    noise = torch.randn(len(places), generator=generator, dtype=rows.dtype).to(rows.device)
    noise *= torch.repeat_interleave(wider[which], each)
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
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(
            f"Invalid new_data: inputs of {x.dtype} (allowed: floating-point numbers or uint8 pixels, as the mean of "
            "tokens or truth values is none)"
        )
    if not x.isfinite().all():
        raise FloatingPointError("a sample is not finite: nothing was summed up")
    if (largest := float(x.abs().max())) > _LARGEST:
        raise ValueError(f"Invalid new_data: an input of magnitude {largest:.3g} (allowed: {_LARGEST:g} at most)")
    return x, labels, task_labels


def _clusters(x: Tensor, number: int) -> list[Tensor]:
    """Samples (n, d) in ``number`` clusters, or fewer if there are few samples."""
    if number == 1 or len(x) < 2 * number:
        return [x]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct samples than clusters make fewer clusters
        found = KMeans(number, n_init=1, random_state=0).fit_predict(x.cpu().numpy())
    parts = [x[torch.from_numpy(found).to(x.device) == cluster] for cluster in range(number)]
    return [part for part in parts if len(part)]


def _fewer(known: list[Gaussian], number: int, components: int) -> list[Gaussian]:
    """A class's Gaussians: at most ``number``, the nearest merged, with at most ``components`` each."""
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
    apart = float((a.mean - b.mean).square().sum())
    return a.samples * b.samples / (a.samples + b.samples) * apart


def _short(mean: Tensor) -> tuple[Tensor, float]:
    """A vector in half precision, and the power of two by which it was divided first.

    That is 1 unless its largest number is beyond half precision, or near its smallest.
    """
    largest = float(mean.abs().max())
    fits = 1e-2 < largest < 6e4 or not largest
    scale = 1.0 if fits else 2.0 ** max(round(math.log2(largest)), -100)
    return (mean / scale).half(), scale


def _principal(rows: Tensor, components: int) -> Tensor:
    """The leading principal directions of rows (n, d), each as long as its singular value: (k, d)."""
    count = min(components, *rows.shape)
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):  # a randomised method, many times as fast
        torch.manual_seed(0)
        _, scale, directions = torch.svd_lowrank(rows, min(count + 8, *rows.shape), niter=4)
    return (scale * directions).T[:count]
