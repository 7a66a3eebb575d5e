"""How a layer's weights drift from what was consolidated: taken back where steps move them, and pulled back."""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_sp.activity import LayerActivity
from avalanche_sp.gates import pull_back
from avalanche_sp.layers import GatedLayer, add_along, add_to_gradient, along, drift_from
from avalanche_sp.per_layer import PerLayer, value_of

__all__ = ["DriftWatch"]

# Iterations from one look at the weights to the next, at most.
LOOK = 8
# At most so many old samples for each new one pull at a time: more would outrun the optimizer's step size.
_MAX_PULL = 20
# How hard the directions beyond the rank pull, against the others, and every how many looks: it takes longer.
_BEYOND = 0.15
_EVERY = 2


class DriftWatch:
    """Looks at the gated layers' weights every few iterations.

    Each look takes back what the steps since the last one did along claimed directions; and it sees how hard each
    layer is to be pulled in the next backward pass. A pull every few iterations, as many times as hard, does what one
    at each would. Every second look sees to the directions beyond the rank, too.

    Args:
        weights: of the pull-back, by layer; 0 for none.
        longest: iterations from one look to the next, at most.
    """

    def __init__(self, weights: PerLayer[float], longest: int = LOOK):
        self.weights, self.longest = weights, longest
        self.curvature = torch.zeros(())  # of the loss in its outputs, over all consolidated samples
        self.iteration = 0
        self._gated: list[tuple[str, GatedLayer, LayerActivity]] = []
        self._interval = LOOK
        self._old_samples = 0.0  # that pull for each new one
        self._takes_back = 0.0
        self._before: dict[str, Tensor] = {}  # the weights along the vectors at the last look
        self._pulls: dict[str, Tensor] = {}  # along the vectors
        self._pulls_beyond: dict[str, tuple[Tensor, Tensor]] = {}  # along all directions, and how hard

    def begin(
        self,
        gated: list[tuple[str, GatedLayer, LayerActivity]],
        ratio: float,
        strength: float,
        takes_back: float,
    ) -> None:
        """Begins an epoch.

        Args:
            gated: the layers that something is consolidated for, by name, and what.
            ratio: old samples for each new one.
            strength: how hard each of them pulls; 1 without a memory.
            takes_back: how much of what steps do along claimed directions is taken back, 0 to 1.
        """
        self._gated = gated
        self._interval = min(max(int(_MAX_PULL / max(ratio, 1)), 1), self.longest)
        self._old_samples = min(ratio, _MAX_PULL) * strength
        self._takes_back = takes_back
        for name, layer, activity in gated:
            known = self._before.get(name)  # steps of an experience before may wait for the next look
            if known is None or len(known) < len(layer.weight):  # of a head that has grown
                self._before[name] = along(layer, activity.vectors)
                if known is not None:
                    self._before[name][: len(known)] = known

    def forget(self) -> None:
        """Drops what was noted of the steps so far, and of the layers."""
        self._gated = []
        self._pulls.clear()
        self._pulls_beyond.clear()
        self._before.clear()

    def rebase(self, name: str, layer: GatedLayer, activity: LayerActivity) -> None:
        """Takes a layer's weights as they are now for those at the last look."""
        if name in self._before:
            self._before[name] = along(layer, activity.vectors)

    def end_step(self) -> None:
        self.iteration += 1
        if self.iteration % self._interval == 0:
            self._look(beyond=self.iteration % (_EVERY * self._interval) == 0)

    def end_epoch(self) -> None:
        """Takes back what the last steps did, if no look came after them."""
        if self.iteration % self._interval and self._before:
            self._look(beyond=False)

    def pull_due(self, name: str) -> Tensor | None:
        """What is to be added to a layer's gradient along the vectors (rows, r), once; None for nothing."""
        return self._pulls.pop(name, None)

    def pull_beyond(self, name: str, layer: GatedLayer) -> None:
        """Adds the pull that is due along all other directions to a layer's gated gradient."""
        if name in self._pulls_beyond:
            add_to_gradient(layer, *self._pulls_beyond.pop(name))

    @torch.no_grad()
    def _look(self, beyond: bool) -> None:
        likeness = self._likeness() if beyond else None
        for name, layer, activity in self._gated:
            now = along(layer, activity.vectors)
            back = (self._before[name] - now).mul_(activity.closed * self._takes_back)
            add_along(layer, back, activity.vectors)
            self._before[name] = now.add_(back)
            strength = self._interval * self._old_samples * value_of(self.weights, name)
            if not strength:
                continue
            weight = strength * self.curvature * activity.rows
            drift = now[: len(activity.anchor)] - activity.anchor
            self._pulls[name] = pull_back(drift, activity.eigenvalues, activity.closed, weight)
            if likeness is not None and activity.rough_anchor is not None:
                weight = _EVERY * _BEYOND * weight * activity.rest * likeness * (1 - activity.closed_rest)
                self._pulls_beyond[name] = drift_from(layer, activity.rough_anchor.unpacked()), weight
                self._pulls[name] -= weight * drift

    def _likeness(self) -> Tensor | None:
        """How alike the stream is to what was consolidated, where data feeds a layer; None if nothing pulls by it."""
        if all(activity.rough_anchor is None for _, _, activity in self._gated):
            return None
        alike = [activity.likeness for _, _, activity in self._gated if activity.fed_by_data]
        return torch.stack(alike).mean() ** 1.5 if alike else None
