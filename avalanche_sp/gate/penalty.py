"""The drift of the weights since consolidation: the gated part is taken back, and a penalty adds its gradient."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from avalanche_sp.gate.functional import penalty_gradient
from avalanche_sp.gate.layer_gate import LayerGate, StreamStatistics
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.per_layer import PerLayer, value_of
from avalanche_sp.gate.settings import Settings


@dataclass
class Gated:
    """A layer under a gate: its memory, its gate of the moment, and the statistics of its inputs.

    ``rate`` is the learning rate of an optimizer whose steps are proportional to the gradient, else 0. The layer's
    gradient is multiplied by ``step`` first, 0 to 1.
    """

    name: str
    layer: GatedLayer
    memory: LayerMemory
    gate: LayerGate
    statistics: StreamStatistics
    rate: float
    step: float = 1.0


class Drift:
    """Follows the gated layers' weights, at a look every few optimizer steps.

    A look takes back the share f of the updates since the last look along each vector of the memory. After a look the
    penalty is due: its gradient joins the next step's. A penalty at every n-th step, n times as strong, stands for one
    at each step. Looks are closer and the penalty is weaker if it would be beyond its limit of stability otherwise
    (``docs/theory.md``, 5e). At every second look a penalty along all other directions is due also.

    Args:
        weights: of the penalty, by layer; 0 for none.
        longest: steps from one look to the next, at most.
    """

    def __init__(self, weights: PerLayer[float], longest: int, settings: Settings):
        self.weights, self.longest, self.settings = weights, longest, settings
        self.steps = 0
        self._gated: dict[str, Gated] = {}
        self._interval = longest
        self._old_samples = 0.0  # in the penalty, for each new one
        self._takes_back = 0.0
        self._before: dict[str, Tensor] = {}  # the weights along the vectors after the last look
        self._due: set[str] = set()
        self._due_beyond: set[str] = set()
        self._weight: dict[str, Tensor] = {}  # of the penalty
        self._likeness: Tensor | None = None  # of stream and memory at the last look that needed it

    def begin(
        self, gated: Iterable[Gated], curvature: Tensor, ratio: float, strength: float, takes_back: float
    ) -> None:
        """Begins an epoch.

        Args:
            gated: the layers with a memory.
            curvature: of the loss in the outputs, 0-dim.
            ratio: N_old / N_new.
            strength: factor of the penalty; 1 without stored samples.
            takes_back: how much of the gated part of the updates is taken back, 0 to 1.
        """
        self._gated = {g.name: g for g in gated}
        largest = self.settings.largest_ratio
        self._old_samples = min(ratio, largest) * strength
        self._takes_back = takes_back
        a_step, limit = {}, {}  # the penalty's weight for one step, and at its limit of stability
        for name, g in self._gated.items():
            a_step[name] = self._old_samples * value_of(self.weights, name) * curvature * g.memory.rows
            sharpness = g.rate * g.memory.eigenvalues * (1 - g.gate.closed)
            limit[name] = 2 / F.pad(sharpness, (0, 1)).max()  # without a vector it is 0
        stable = [limit[name] / a_step[name] for name in a_step]
        nearest = torch.stack(stable).min().item() if stable else self.longest
        self._interval = max(int(min(nearest, largest / max(ratio, 1), self.longest)), 1)
        self._weight = {name: torch.minimum(self._interval * a_step[name], limit[name]) for name in a_step}
        self._note_new_units()

    def _note_new_units(self) -> None:
        """Notes the weights of layers, and of units of a head that has grown, that were not known at the last look."""
        for name, g in self._gated.items():
            known = self._before.get(name)  # steps of an experience before may wait for the next look
            if known is None or len(known) < g.layer.units:
                self._before[name] = g.layer.along(g.memory.vectors)
                if known is not None:
                    self._before[name][: len(known)] = known

    def forget(self) -> None:
        """Drops all that was noted of the steps so far, and of the layers."""
        self._gated = {}
        self._due.clear()
        self._due_beyond.clear()
        self._before.clear()

    def rebase(self, name: str) -> None:
        """Takes a layer's present weights for those after the last look."""
        g = self._gated[name]
        self._before[name] = g.layer.along(g.memory.vectors)

    def has_moved(self, name: str) -> bool:
        """Whether a layer's weights changed along its vectors since the epoch began, or since the last look."""
        g = self._gated[name]
        return not torch.equal(g.layer.along(g.memory.vectors), self._before[name])

    @property
    def is_looking(self) -> bool:
        """Whether the present step's inputs are looked at."""
        return self.steps % self.settings.look == 0

    def end_step(self) -> None:
        """Ends an optimizer step; every few steps this is a look."""
        self.steps += 1
        if self.steps % self._interval == 0:
            self._look(beyond=self.steps % (self.settings.beyond_every * self._interval) == 0)

    def take_back(self) -> None:
        """Takes back the gated part of the last updates, if no look came after them."""
        if self.steps % self._interval and self._before:
            self._look(beyond=False)

    def gradient(self, name: str, scale: Tensor | None = None) -> Tensor | None:
        """The penalty's gated gradient that is due, along the layer's vectors (rows, r); None if none is.

        Args:
            scale: of the other gradients, 0-dim; None for 1.
        """
        if name not in self._due:
            return None
        self._due.remove(name)
        g = self._gated[name]
        anchor = g.memory.anchor
        drift = self._before[name][: len(anchor)] - anchor
        gradient = penalty_gradient(drift, g.memory.eigenvalues, g.gate.closed, self._weight[name])
        if name in self._due_beyond:  # which acts along the vectors also
            gradient -= self._weight_beyond(g) * drift
        return gradient if scale is None else gradient * scale

    def add_gradient_beyond(self, name: str, scale: Tensor | None = None) -> None:
        """Adds the penalty's gradient that is due along all other directions to the layer's gradient."""
        if name in self._due_beyond:
            self._due_beyond.remove(name)
            g = self._gated[name]
            assert g.memory.rough_anchor is not None
            weight = self._weight_beyond(g) if scale is None else self._weight_beyond(g) * scale
            g.layer.add_to_gradient(g.layer.drift_from(g.memory.rough_anchor.unpacked()), weight)

    def _weight_beyond(self, g: Gated) -> Tensor:
        assert self._likeness is not None
        weight = self.settings.beyond_every * self.settings.beyond * self._weight[g.name]
        return weight * g.memory.rest * self._likeness * (1 - g.gate.closed_rest)

    @torch.no_grad()
    def _look(self, beyond: bool) -> None:
        if beyond:
            self._likeness = self._mean_likeness()
        for name, g in self._gated.items():
            now = g.layer.along(g.memory.vectors)
            back = (self._before[name] - now).mul_(g.gate.closed * self._takes_back)
            g.layer.add_along(back, g.memory.vectors)
            self._before[name] = now.add_(back)
            if self._old_samples and value_of(self.weights, name):
                self._due.add(name)
                if beyond and self._likeness is not None and g.memory.rough_anchor is not None:
                    self._due_beyond.add(name)

    def _mean_likeness(self) -> Tensor | None:
        """How alike stream and memory are at the layers that data feed; None if no penalty depends on it."""
        if all(g.memory.rough_anchor is None for g in self._gated.values()):
            return None
        alike = [g.statistics.likeness(g.memory) for g in self._gated.values() if g.memory.fed_by_data]
        return torch.stack(alike).mean() ** self.settings.beyond_power if alike else None

    def state_dict(self) -> dict:
        """What a run that goes on in mid-experience needs."""
        return {
            "steps": self.steps,
            "before": dict(self._before),
            "due": sorted(self._due),
            "due_beyond": sorted(self._due_beyond),
            "likeness": self._likeness,
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps, self._before = state["steps"], dict(state["before"])
        self._due, self._due_beyond = set(state["due"]), set(state["due_beyond"])
        self._likeness = state["likeness"]
        self._note_new_units()
