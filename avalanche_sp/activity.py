"""Consolidated presynaptic activity: what the coincidence gate remembers of earlier experience."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_sp.gates import claim, likeness, merge_eigenspace, remainder
from avalanche_sp.layers import GatedLayer, along, presynaptic, weights_and_bias
from avalanche_sp.packed import PackedRows

__all__ = ["LayerActivity", "some_inputs"]

# Input vectors that one sample adds to the second moment at most: neighbouring patches are much alike.
_ROWS_A_SAMPLE = 8
# Along so many vectors the gate closes in every step.
_STRONGEST = 32


@dataclass
class LayerActivity:
    """Consolidated presynaptic activity of one layer, and what the gate did there in the present epoch.

    Attributes:
        eigenvalues: (r,), rising; of the mean second moment of the layer's input vectors.
        vectors: (d, r), the eigenvectors.
        mean_eigenvalue: 0-dim, over all d directions.
        samples: how many samples stand behind them.
        rows: how many input vectors a sample gives a weight: 1, or the positions of a convolution or a sequence.
        anchor: (out, r), the weights along the vectors when they were consolidated.
        rough_anchor: all of them, roughly, to pull along the other directions; None where nothing pulls there.
        residual: (out, d), the old loss's mean gradient that was left at these weights; None where it isn't known.
        fed_by_data: whether nothing that learns makes the layer's input.
        closed_at: the openness that the gate was closed for; 0 before any.
        closed: (r,), how far the gate is closed along each vector, in [0, 1].
        closed_rest: the same along all other directions alike.
        closed_more: (r,), how much more it is closed along each vector.
        strongest, closed_strongest: views of the vectors (d, k) that the gate closes in every step, and of how much
            more it is closed along them.
        energy, passed, novel: 0-dim sums, over the iterations looked at in the epoch, of the stream's squared input,
            of the part that the gate let through, and of the part outside the stored eigenspace.
        met_power, met_energy: the stream's squared input along each vector (r,) and in all, over the iterations looked
            at since consolidation.
    """

    eigenvalues: Tensor
    vectors: Tensor
    mean_eigenvalue: Tensor
    samples: int
    rows: float
    anchor: Tensor
    rough_anchor: PackedRows | None
    residual: Tensor | None
    fed_by_data: bool
    closed_at: float
    closed: Tensor
    closed_rest: float
    closed_more: Tensor
    strongest: Tensor
    closed_strongest: Tensor
    energy: Tensor
    passed: Tensor
    novel: Tensor
    met_power: Tensor
    met_energy: Tensor

    @classmethod
    def empty(cls, inputs: int, like: Tensor) -> LayerActivity:
        zero, nothing = like.new_zeros(()), like.new_zeros(0)
        return cls(
            eigenvalues=nothing,
            vectors=like.new_zeros(inputs, 0),
            mean_eigenvalue=zero,
            samples=0,
            rows=0.0,
            anchor=like.new_zeros(0, 0),
            rough_anchor=None,
            residual=None,
            fed_by_data=False,
            closed_at=0.0,
            closed=nothing,
            closed_rest=0.0,
            closed_more=nothing,
            strongest=like.new_zeros(inputs, 0),
            closed_strongest=nothing,
            energy=zero,
            passed=zero,
            novel=zero,
            met_power=nothing,
            met_energy=zero,
        )

    @property
    def state_bytes(self) -> int:
        tensors = [self.eigenvalues, self.vectors, self.mean_eigenvalue, self.anchor, self.closed]
        tensors += [self.residual] if self.residual is not None else []
        rough = self.rough_anchor.state_bytes if self.rough_anchor is not None else 0
        return rough + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def openness(self) -> float:
        """Share of the stream's presynaptic energy that the gate let through in the epoch; 1 before any."""
        return float(self.passed / self.energy) if self.energy > 0 else 1.0

    @property
    def surprise(self) -> float:
        """Share of the stream's presynaptic energy unlike anything consolidated in the epoch; 1 before any."""
        return float(self.novel / self.energy) if self.energy > 0 else 1.0

    @property
    def claimed_rank(self) -> int:
        """Number of kept input directions along which the gate is at least half closed."""
        return int((self.closed >= 0.5).sum())

    @property
    def rest(self) -> Tensor:
        """Mean eigenvalue of the directions beyond the stored ones, 0-dim."""
        return remainder(self.eigenvalues, self.mean_eigenvalue, len(self.vectors))

    @property
    def likeness(self) -> Tensor:
        """How alike the stream since consolidation is to what was consolidated: 0-dim, 0 to 1, 0 before any."""
        return likeness(self.met_power, self.met_energy, self.eigenvalues, self.mean_eigenvalue, len(self.vectors))

    def close(self, openness: float) -> None:
        """Sets how far the gate is closed, and starts the epoch's sums anew."""
        self.energy = self.passed = self.novel = torch.zeros_like(self.mean_eigenvalue)
        if openness == self.closed_at:  # on an online stream every mini-batch is an epoch
            return
        self.closed_at = openness
        openness /= max(self.rows, 1)  # a change to the weights acts on each of a sample's input vectors
        d, r = self.vectors.shape
        self.closed = claim(self.eigenvalues, self.mean_eigenvalue, openness)
        self.closed_rest = float(claim(self.rest, self.mean_eigenvalue, openness)) if d > r else 0.0
        self.closed_more = self.closed - self.closed_rest
        first = max(r - _STRONGEST, 0)
        self.strongest, self.closed_strongest = self.vectors[:, first:], self.closed_more[first:]

    def watch(self, energy: Tensor, projection: Tensor) -> None:
        """Adds to the sums: input vectors' energy, 0-dim, and their projection onto the vectors (..., rows, r)."""
        power = projection.square().flatten(0, -2).sum(0)
        novel = energy - power.sum()
        through = (power * (1 - self.closed).square()).sum() + novel * (1 - self.closed_rest) ** 2
        self.energy, self.passed, self.novel = self.energy + energy, self.passed + through, self.novel + novel
        self.met_power, self.met_energy = self.met_power + power, self.met_energy + energy

    def through(self, change: Tensor) -> Tensor:
        """What the gate lets through of a change (out, d) of the layer's weights and bias."""
        held = (change @ self.vectors).mul_(self.closed_more) @ self.vectors.T
        return change * (1 - self.closed_rest) - held

    def merged(
        self,
        layer: GatedLayer,
        x: Tensor,
        rows: float,
        samples: int,
        rank: float,
        mean_eigenvalue: Tensor | None = None,
        remembers_all: bool = False,
        fed_by_data: bool = False,
        residual: Tensor | None = None,
    ) -> LayerActivity:
        """This activity with that of one more experience.

        Args:
            x: input vectors, shape (n, d), or others of the same leading second moment.
            rows: how many of them a sample gives a weight.
            samples: how many samples they stand for.
            rank: eigenvectors to keep, or the share of the energy that they are to have.
            mean_eigenvalue: of the second moment, over all directions. Default: that of ``x``.
            remembers_all: whether the weights along all other directions are to be remembered, too, roughly.
            fed_by_data, residual: as above, now.
        """
        total = self.samples + samples
        share = self.samples / total
        values, vectors = merge_eigenspace(self.eigenvalues, self.vectors, share, x, rank)
        if mean_eigenvalue is None:
            mean_eigenvalue = x.square().mean(0).mean()
        mean = share * self.mean_eigenvalue + (1 - share) * mean_eigenvalue
        new = LayerActivity.empty(len(vectors), x)
        new.eigenvalues, new.vectors, new.mean_eigenvalue, new.samples = values, vectors, mean, total
        new.rows = share * self.rows + (1 - share) * rows
        new.anchor = along(layer, vectors)
        new.met_power = torch.zeros_like(values)
        new.fed_by_data, new.residual = fed_by_data, residual
        if remembers_all and vectors.shape[1] < len(vectors):
            new.rough_anchor = PackedRows.of(weights_and_bias(layer))
        return new


def some_inputs(layer: GatedLayer, x: Tensor) -> tuple[Tensor, int]:
    """A layer's input vectors (n, d), at most 8 a sample, evenly spread over all; and how many all give a weight."""
    vectors = presynaptic(layer, x.float())
    count, some = len(vectors), _ROWS_A_SAMPLE * len(x)
    if count > some:
        vectors = vectors[torch.linspace(0, count - 1, some, device=x.device).long()]
    return vectors, count // getattr(layer, "groups", 1)
