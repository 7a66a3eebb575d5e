"""How a layer's weights drift from what was consolidated: taken back where steps move them, and pulled back."""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_sp.activity import LayerActivity
from avalanche_sp.gates import pull_back
from avalanche_sp.layers import GatedLayer, add_along, add_to_gradient, along, weights_and_bias
from avalanche_sp.per_layer import PerLayer, value_of

__all__ = ["DriftWatch", "steps_along_gradient"]

# Iterations from one look at the weights to the next, at most.
LOOK = 8
# At most so many old samples for each new one pull at a time: more would outrun the optimizer's step size.
_MAX_PULL = 20
# How hard the directions beyond the rank pull, against the others.
_BEYOND = 0.15


class DriftWatch:
    """Looks at the gated layers' weights every few iterations.

    Each look takes back what the steps since the last one did along claimed directions, where the optimizer does not
    step along the gradient; and it sees how hard each layer is to be pulled in the next backward pass. A pull every
    few iterations, as many times as hard, does what one at each would.

    Args:
        weights: of the pull-back, by layer; 0 for none.
    """

    def __init__(self, weights: PerLayer[float]):
        self.weights = weights
        self.curvature = torch.zeros(())  # of the loss in its outputs, over all consolidated samples
        self.iteration = 0
        self._gated: list[tuple[str, GatedLayer, LayerActivity]] = []
        self._interval = LOOK
        self._old_samples = 0.0  # that pull for each new one
        self._takes_back = 0.0
        self._before: dict[str, Tensor] = {}  # the weights along the vectors at the last look, where steps are watched
        self._pulls: dict[str, Tensor] = {}  # along the vectors
        self._pulls_beyond: dict[str, Tensor] = {}

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
        self._interval = min(max(int(_MAX_PULL / max(ratio, 1)), 1), LOOK)
        self._old_samples = min(ratio, _MAX_PULL) * strength
        self._takes_back = takes_back
        for name, layer, activity in gated:
            if takes_back and name not in self._before:  # steps of an experience before may wait for the next look
                self._before[name] = along(layer, activity.vectors)

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
            self._look()
        if self.iteration % LOOK == 0:
            self._look_beyond()

    def end_epoch(self) -> None:
        """Takes back what the last steps did, if no look came after them."""
        if self.iteration % self._interval and self._before:
            self._look()

    def held_less(self, name: str, held: Tensor) -> None:
        """Adds the pull that is due along the vectors to what the gate holds back (out, r), in place."""
        if name in self._pulls:
            pull = self._pulls.pop(name)
            held[: len(pull)] -= pull  # fewer rows than the layer's where a head has grown

    def pull_beyond(self, name: str, layer: GatedLayer) -> None:
        """Adds the pull that is due along all other directions to a layer's gated gradient."""
        if name in self._pulls_beyond:
            add_to_gradient(layer, self._pulls_beyond.pop(name))

    def _weight(self, name: str, activity: LayerActivity, times: float) -> Tensor | None:
        """How hard a layer is to be pulled, so many times over; None if not at all."""
        weight = times * self._old_samples * value_of(self.weights, name)
        return weight * self.curvature * activity.rows if weight else None

    @torch.no_grad()
    def _look(self) -> None:
        for name, layer, activity in self._gated:
            now = along(layer, activity.vectors)
            if name in self._before:
                back = (self._before[name] - now).mul_(activity.closed * self._takes_back)
                add_along(layer, back, activity.vectors)
                self._before[name] = now.add_(back)
            weight = self._weight(name, activity, self._interval)
            if weight is not None:
                drift = now[: len(activity.anchor)] - activity.anchor
                self._pulls[name] = pull_back(drift, activity.eigenvalues, activity.closed, weight)

    @torch.no_grad()
    def _look_beyond(self) -> None:
        if all(activity.rough_anchor is None for _, _, activity in self._gated):
            return
        alike = [activity.likeness for _, _, activity in self._gated if activity.fed_by_data]
        if not alike:
            return
        likeness = torch.stack(alike).mean() ** 1.5
        for name, layer, activity in self._gated:
            weight = self._weight(name, activity, LOOK * _BEYOND)
            if weight is None or activity.rough_anchor is None:
                continue
            anchor = activity.rough_anchor.unpacked()
            drift = weights_and_bias(layer)[: len(anchor)].sub_(anchor)
            drift.sub_(drift @ activity.vectors @ activity.vectors.T)
            self._pulls_beyond[name] = drift * (weight * activity.rest * likeness * (1 - activity.closed_rest))


def steps_along_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step is its learning rate times the present gradient, and nothing else."""
    return isinstance(optimizer, torch.optim.SGD) and not any(
        group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
    )
