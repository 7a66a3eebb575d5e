"""The memory of earlier experiences: immutable, and all that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from avalanche_sp.gate.functional import claim, merge_eigenspace, remainder
from avalanche_sp.gate.packed import PackedColumns, PackedRows

# If a budget is too small for single precision: columns of each matrix, the last ones, that are kept in half precision;
# the others are kept at eight bits. Of the sums all are.
_PRECISE = {"vectors": 16, "anchor": 0, "class_sums": None, "data_sums": None}
_COUNTED = (
    *("eigenvalues", "vectors", "mean_eigenvalue", "anchor", "residual"),
    *("class_sums", "class_counts", "class_roots", "data_sums", "trained"),
)


def check_budget(budget: int, least: int) -> None:
    """Raises ValueError if a budget is less than the bytes that the memory takes at least."""
    if budget < least:
        raise ValueError(f"Invalid memory_budget value: {budget} (allowed for this network: {least} bytes or more)")


@dataclass(frozen=True)
class LayerMemory:
    """Consolidated presynaptic activity of one layer, and its weights at that time.

    Attributes:
        eigenvalues: (r,), rising; of the mean second moment of the layer's input vectors.
        vectors: (d, r), the eigenvectors. Of an embedding, whose input vectors are one-hot, they are coordinate axes:
            the places (r,) of the used rows.
        mean_eigenvalue: 0-dim, over all d directions.
        samples: number of samples of all consolidated experiences.
        rows: number of input vectors that a sample gives a weight: 1, or the positions of a convolution or a sequence.
        anchor: (out, r), the weights along the vectors.
        rough_anchor: all weights, at four bits each, for the penalty along the other directions; None without one.
        residual: (out, d), the mean gradient of the old loss at these weights; None if it is not known.
        class_sums, class_counts: of the readout's input vectors by class: (out, d) and (out,); None for other layers.
        class_roots: (out, k, d), in half precision (bfloat16): rows of each class whose second moment is the leading
            part of its covariance. None if the loss is quadratic, which needs no more than the shared second moment.
        data_sums: (out, d), of the input vectors by class, for the one layer that data feed; None for other layers, for
            several heads, and if there are more classes than the layer has units.
        trained: (out, d), the weights as training left them before the readout was solved, after the last experience
            that continued all earlier ones, if the optimizer's steps grow with the sharpness; None after new classes.
        sharpness: leading eigenvalue of the Gauss-Newton matrix in the layer's weights at the end of the first
            experience, without the loss's curvature, 0-dim; None if it was not measured.
        fed_by_data: True if no trained layer makes this layer's input.
        packed: of a memory that :meth:`rounded` has made, the matrices as a checkpoint holds them, by field.
    """

    eigenvalues: Tensor
    vectors: Tensor
    mean_eigenvalue: Tensor
    samples: int
    rows: float
    anchor: Tensor
    rough_anchor: PackedRows | None = None
    residual: Tensor | None = None
    class_sums: Tensor | None = None
    class_counts: Tensor | None = None
    class_roots: Tensor | None = None
    data_sums: Tensor | None = None
    trained: Tensor | None = None
    sharpness: Tensor | None = None
    fed_by_data: bool = False
    packed: Mapping[str, PackedColumns] = field(default_factory=dict)

    @classmethod
    def empty(cls, inputs: int, like: Tensor) -> LayerMemory:
        """Memory of nothing, for d inputs: input vectors such as ``like`` (n, d), or their frequencies (d,)."""
        vectors = like.new_zeros(inputs, 0) if like.dim() > 1 else like.new_zeros(0, dtype=torch.long)
        return cls(like.new_zeros(0), vectors, like.new_zeros(()), 0, 0.0, like.new_zeros(0, 0))

    def merged(
        self,
        x: Tensor,
        samples: int,
        rows: float,
        rank: float,
        mean_eigenvalue: Tensor | None = None,
        start: Tensor | None = None,
    ) -> LayerMemory:
        """The second moment of this memory and of one more experience. Weights are not remembered yet.

        Args:
            x: input vectors, shape (n, d), or others of the same leading second moment; or, for one-hot input vectors,
                the frequency of each (d,), of which all above 0 are kept.
            samples: number of samples of the experience.
            rows: number of input vectors that a sample gives a weight.
            rank: eigenvectors to keep, or the share of the energy that they are to have.
            mean_eigenvalue: of the new second moment, over all directions. Default: that of ``x``.
            start: eigenvectors of nearly the same second moment (d, m), if they are known.
        """
        total = self.samples + samples
        share = self.samples / total
        if x.dim() == 1:
            frequency = (x * (1 - share)).index_add_(0, self.vectors, share * self.eigenvalues)
            values, vectors = frequency.sort(stable=True)
            values, vectors = values[values > 0], vectors[values > 0]
        else:
            values, vectors = merge_eigenspace(self.eigenvalues, self.vectors, share, x, rank, start)
        if mean_eigenvalue is None:
            mean_eigenvalue = x.mean() if x.dim() == 1 else x.square().mean(0).mean()
        return LayerMemory(
            values,
            vectors,
            share * self.mean_eigenvalue + (1 - share) * mean_eigenvalue,
            total,
            share * self.rows + (1 - share) * rows,
            values.new_zeros(0, len(values)),
        )

    def moved(self, drift: Callable[[Tensor], Tensor]) -> LayerMemory:
        """The memory of the same inputs after a linear drift, to be merged.

        Its vectors have length 1, and are no longer orthogonal. The second moment is that of the moved inputs.

        Args:
            drift: moves input vectors (m, d).
        """
        roots = drift(self.roots)
        mean = self.mean_eigenvalue + (roots.square().sum() - self.eigenvalues.sum()) / len(self.vectors)
        sums = None if self.class_sums is None else drift(self.class_sums)
        own = self.class_roots
        if own is not None:
            own = drift(own.flatten(0, 1).to(roots)).view_as(own).to(own)
        return self._to_be_merged(roots, mean, sums, own)

    def resampled(self, before: Tensor, after: Tensor, targets: Tensor) -> LayerMemory:
        """The memory of the same inputs after a change that samples of them tell, to be merged.

        Its class means and second moment are those of the samples; the class roots stay.

        Args:
            before, after: samples (n, d) with the class means and the second moment of this memory, before the change
                and after it.
            targets: their classes (n,). Each class that has come has a sample.
        """
        assert self.class_sums is not None and self.class_counts is not None
        counts = self.class_counts
        each = counts / torch.bincount(targets, minlength=len(counts)).clamp_min(1)  # inputs that a sample stands for
        weight = (each / counts.sum())[targets].unsqueeze(1)
        mean = self.mean_eigenvalue + (weight * (after.square() - before.square())).sum() / len(self.vectors)
        sums = torch.zeros_like(self.class_sums).index_add_(0, targets, after) * each.unsqueeze(1)
        return self._to_be_merged(after * weight.sqrt(), mean, sums, self.class_roots)

    def _to_be_merged(self, roots: Tensor, mean: Tensor, sums: Tensor | None, own: Tensor | None) -> LayerMemory:
        values = roots.square().sum(1)
        vectors = (roots / values.sqrt().clamp_min(torch.finfo(roots.dtype).tiny).unsqueeze(1)).T
        moved = replace(self, eigenvalues=values, vectors=vectors, mean_eigenvalue=mean, class_sums=sums)
        return replace(moved, class_roots=own, packed={})

    @property
    def roots(self) -> Tensor:
        """Rows (r, d) with the second moment of the inputs, along the vectors."""
        return (self.vectors * self.eigenvalues.sqrt()).T

    @property
    def of_rows(self) -> bool:
        """Whether the eigenvectors are coordinate axes, as an embedding's."""
        return self.vectors.dim() == 1

    @property
    def is_complete(self) -> bool:
        """Whether no input is known beyond the kept directions."""
        return self.of_rows or self.vectors.shape[1] == len(self.vectors)

    def along(self, rows: Tensor) -> Tensor:
        """Rows (n, d) along each vector: (n, r)."""
        return rows[:, self.vectors] if self.of_rows else rows @ self.vectors

    def held(self, rows: Tensor, closed: Tensor) -> Tensor:
        """The part of rows (n, d) that a gate holds which is closed (r,) along the vectors."""
        along = self.along(rows).mul_(closed)
        return torch.zeros_like(rows).index_copy_(1, self.vectors, along) if self.of_rows else along @ self.vectors.T

    @property
    def rest(self) -> Tensor:
        """Mean eigenvalue of the directions beyond the kept ones, 0-dim."""
        if self.of_rows:
            return torch.zeros_like(self.mean_eigenvalue)
        return remainder(self.eigenvalues, self.mean_eigenvalue, len(self.vectors))

    def mean_square(self, weights: Tensor) -> Tensor:
        """Mean squared norm of the outputs that weights (out, d) make of the inputs, tr(W C W^T), 0-dim."""
        along = self.along(weights)
        of_rest = (weights.square().sum() - along.square().sum()).clamp_min(0) * self.rest
        return (along.square() * self.eigenvalues).sum() + of_rest

    def closed(self, openness: float) -> tuple[Tensor, Tensor]:
        """How far a gate of this openness is closed: along each vector (r,), and along all others, 0-dim."""
        openness = openness / max(self.rows, 1)  # a change to the weights acts on each of a sample's input vectors
        closed = claim(self.eigenvalues, self.mean_eigenvalue, openness)
        if self.is_complete:
            return closed, torch.zeros_like(self.mean_eigenvalue)
        return closed, claim(self.rest, self.mean_eigenvalue, openness)

    def leading(self, n: int) -> LayerMemory:
        """The memory with its n leading eigenvectors only, n >= 1, without what :meth:`Memory.within` drops first.

        The mean eigenvalue stays, so that the energy of the others counts to the rest. An embedding has no rest: its
        other rows are forgotten as if they were never used.
        """
        along = {k: getattr(self, k)[..., -n:].clone() for k in ("eigenvalues", "vectors", "anchor")}
        return replace(self, rough_anchor=None, class_roots=None, data_sums=None, trained=None, packed={}, **along)

    def rounded(self) -> LayerMemory:
        """The memory with its vectors, anchor and sums in half precision or at eight bits a number.

        They are held as numbers of single precision also, which training uses. An embedding's stay as they are.
        """
        if self.of_rows:
            return self
        known = {name: getattr(self, name) for name in _PRECISE if getattr(self, name) is not None}
        packed = {name: PackedColumns.of(t, _precise(name, t.shape[1])) for name, t in known.items()}
        matrices: dict = {name: columns.unpacked() for name, columns in packed.items()}
        return replace(self, packed=packed, **matrices)

    def bytes_along(self, n: int) -> int:
        """Bytes of n eigenvectors, their eigenvalues, and the weights along them."""
        total = n * self.eigenvalues.element_size()
        for name, matrix in {"vectors": self.vectors, "anchor": self.anchor}.items():
            if name in self.packed:
                total += packed_bytes(name, len(matrix), n)
            else:
                total += n * matrix[..., :1].nbytes
        return total

    @property
    def state_bytes(self) -> int:
        rough = self.rough_anchor.state_bytes if self.rough_anchor is not None else 0
        return rough + sum(self._bytes(name) for name in _COUNTED)

    def _bytes(self, name: str) -> int:
        if name in self.packed:
            return self.packed[name].state_bytes
        value = getattr(self, name)
        return 0 if value is None else value.nbytes

    def state_dict(self) -> dict:
        """Tensors and numbers by field; of packed matrices these alone."""
        rough, packed = self.rough_anchor, {name: vars(columns).copy() for name, columns in self.packed.items()}
        state: dict = vars(self) | dict.fromkeys(packed)
        return state | {"rough_anchor": None if rough is None else vars(rough).copy(), "packed": packed}

    def __reduce__(self) -> tuple:
        """For pickle: what :meth:`state_dict` gives, so that packed matrices are not held twice in a file."""
        return type(self).from_state_dict, (self.state_dict(),)

    @classmethod
    def from_state_dict(cls, state: Mapping) -> LayerMemory:
        rough = state["rough_anchor"]
        packed = {name: PackedColumns(**columns) for name, columns in state.get("packed", {}).items()}
        own = {"rough_anchor": None if rough is None else PackedRows(**rough), "packed": packed}
        return cls(**{**state, **own, **{name: columns.unpacked() for name, columns in packed.items()}})


def _precise(name: str, columns: int) -> int:
    """How many of a field's columns are packed in half precision."""
    precise = _PRECISE[name]
    return columns if precise is None else precise


def packed_bytes(name: str, rows: int, columns: int) -> int:
    """Bytes of a field's packed columns (rows, columns)."""
    return PackedColumns.bytes_of(rows, columns, _precise(name, columns))


@dataclass(frozen=True)
class Memory:
    """What a gate remembers of all consolidated experiences.

    Attributes:
        layers: by layer name.
        curvature: of the loss in the network's outputs, 0-dim, mean over all consolidated samples.
        classes: number of classes of each experience, summed.
        consolidations: number of consolidations.
        loss: 0-dim, of each experience at its consolidation, mean over all consolidated samples.
    """

    layers: Mapping[str, LayerMemory] = field(default_factory=dict)
    curvature: Tensor = field(default_factory=lambda: torch.zeros(()))
    classes: int = 0
    consolidations: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def samples(self) -> int:
        """Number of samples of all consolidated experiences."""
        return max((layer.samples for layer in self.layers.values()), default=0)

    @property
    def state_bytes(self) -> int:
        return sum(layer.state_bytes for layer in self.layers.values())

    def within(self, budget: int | None) -> Memory:
        """The memory in at most ``budget`` bytes; None is no bound.

        The matrices are rounded first (:meth:`LayerMemory.rounded`). Then the rough anchors, class roots, data sums and
        trained weights are dropped, and then the eigenvectors with the lowest eigenvalues, in units of the layer's mean
        eigenvalue and over all layers. The leading one of each layer stays.

        Raises:
            ValueError: the rest takes more than the budget.
        """
        if budget is None or self.state_bytes <= budget:
            return self
        rounded = replace(self, layers={name: layer.rounded() for name, layer in self.layers.items()})
        if rounded.state_bytes <= budget:
            return rounded
        ranks = {name: len(layer.eigenvalues) for name, layer in self.layers.items()}
        layers = {name: layer.leading(ranks[name]).rounded() for name, layer in self.layers.items()}
        excess = sum(layer.state_bytes for layer in layers.values()) - budget
        droppable = []
        for name, layer in layers.items():
            relative = (layer.eigenvalues[:-1] / layer.mean_eigenvalue).nan_to_num(0.0)
            droppable += [(value, name) for value in relative.tolist()]
        for _, name in sorted(droppable):
            if excess <= 0:
                break
            excess -= layers[name].bytes_along(ranks[name]) - layers[name].bytes_along(ranks[name] - 1)
            ranks[name] -= 1
        check_budget(budget, budget + excess)
        return replace(self, layers={name: m.leading(ranks[name]).rounded() for name, m in self.layers.items()})

    def state_dict(self) -> dict:
        """Tensors and numbers, for ``torch.save``; ``torch.load(..., weights_only=True)`` takes them."""
        return vars(self) | {"layers": {name: layer.state_dict() for name, layer in self.layers.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping) -> Memory:
        layers = {name: LayerMemory.from_state_dict(layer) for name, layer in state["layers"].items()}
        return cls(**{**state, "layers": layers})
