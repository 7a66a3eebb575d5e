"""The gate of one layer at the moment, and the statistics of the stream's inputs to the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_sp.gate.functional import held_back, likeness
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.processes import mean_over_processes


@dataclass(frozen=True)
class LayerGate:
    """How far one layer's gate is closed.

    Attributes:
        closed: (r,), along each vector of the memory, in [0, 1].
        closed_rest: along all other directions.
        closed_more: (r,), how much more it is closed along each vector than along the others.
        leading, closed_leading: views of the leading vectors (d, k), and of ``closed_more`` along them; these are gated
            in every step. Of an embedding these are all.
    """

    closed: Tensor
    closed_rest: float
    closed_more: Tensor
    leading: Tensor
    closed_leading: Tensor

    @classmethod
    def of(cls, memory: LayerMemory, openness: float, gated_vectors: int, scale: float = 1.0) -> LayerGate:
        """The gate of an openness, in units of the mean eigenvalue.

        It gates ``gated_vectors`` vectors in every step. The part of an update that passes is multiplied by ``scale``,
        0 to 1.
        """
        closed, closed_rest = memory.closed(openness)
        if scale < 1:
            closed, closed_rest = 1 - scale * (1 - closed), 1 - scale * (1 - closed_rest)
        rest = float(closed_rest)
        first = 0 if memory.of_rows else max(len(closed) - gated_vectors, 0)
        more = closed - rest
        return cls(closed, rest, more, memory.vectors[..., first:], more[first:])

    def held_activity(self, layer: GatedLayer, x: Tensor, delta: Tensor) -> Tensor:
        """The part held back of the gradient that input ``x`` and error ``delta`` make: (out, k)."""
        projection = layer.project(x, self.leading)
        return held_back(layer.postsynaptic(delta), projection, self.closed_leading).flatten(0, -2)

    def gate(self, layer: GatedLayer, memory: LayerMemory, added: Tensor | None = None) -> None:
        """Gates a layer's gradient in place, and adds a gradient given along the memory's vectors, in one product.

        Args:
            added: along all kept vectors (rows, r), for the layer's first output units; None for nothing.
        """
        vectors, held = self.leading, layer.gradient_along(self.leading).mul_(self.closed_leading)
        if added is not None:
            vectors = memory.vectors
            held = F.pad(held, (vectors.shape[-1] - held.shape[1], 0))
            held[: len(added)] -= added
        layer.gate_gradient(held, vectors, 1 - self.closed_rest)

    def through(self, change: Tensor, memory: LayerMemory) -> Tensor:
        """The part of a change (out, d) of the layer's weights and bias that the gate lets through."""
        return change * (1 - self.closed_rest) - memory.held(change, self.closed_more)


@dataclass
class StreamStatistics:
    """Sums over the steps at which the gate looks at a layer's inputs.

    Attributes:
        energy, passed, novel: 0-dim, of the present epoch: squared inputs; the part that the gate lets through; the
            part outside the memory's vectors.
        power, power_energy: squared inputs along each vector (r,) and in all, 0-dim, since the last consolidation.
        holding: 0-dim; with stored samples, the share that is held back of the part of the stream's gradient that the
            gate closes off (:func:`~avalanche_sp.gate.functional.unanswered`).
    """

    energy: Tensor
    passed: Tensor
    novel: Tensor
    power: Tensor
    power_energy: Tensor
    holding: Tensor

    @classmethod
    def empty(cls, memory: LayerMemory) -> StreamStatistics:
        zero = torch.zeros_like(memory.mean_eigenvalue)
        return cls(zero, zero, zero, torch.zeros_like(memory.eigenvalues), zero, torch.ones_like(zero))

    def start_epoch(self) -> None:
        """Starts the sums of an epoch."""
        self.energy = self.passed = self.novel = torch.zeros_like(self.energy)

    def add(self, gate: LayerGate, energy: Tensor, power: Tensor) -> None:
        """Adds input vectors: their energy, 0-dim, and their energy along each of the memory's vectors (r,)."""
        novel = energy - power.sum()
        through = (power * (1 - gate.closed).square()).sum() + novel * (1 - gate.closed_rest) ** 2
        self.energy, self.passed, self.novel = self.energy + energy, self.passed + through, self.novel + novel
        self.power, self.power_energy = self.power + power, self.power_energy + energy

    @property
    def openness(self) -> float:
        """Share of the stream's presynaptic energy that the gate let through in the epoch; 1 before any."""
        return float(self.passed / self.energy) if self.energy > 0 else 1.0

    @property
    def surprise(self) -> float:
        """Share of the stream's presynaptic energy outside the memory's vectors in the epoch; 1 before any."""
        return float(self.novel / self.energy) if self.energy > 0 else 1.0

    def likeness(self, memory: LayerMemory) -> Tensor:
        """How alike the stream and the memory are: 0-dim, 0 to 1, 0 before any input."""
        power, energy = mean_over_processes(self.power), mean_over_processes(self.power_energy)
        inputs = memory.eigenvalues.sum() / memory.mean_eigenvalue if memory.of_rows else len(memory.vectors)
        return likeness(power, energy, memory.eigenvalues, memory.mean_eigenvalue, inputs)
