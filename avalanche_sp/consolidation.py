"""ConsolidationPlugin: tells the optimizer when an experience has been learned."""

from __future__ import annotations

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_sp.optimizer import SelectivePlasticityOptimizer

__all__ = ["ConsolidationPlugin"]


class ConsolidationPlugin(SupervisedPlugin):
    """Calls :meth:`~avalanche_sp.SelectivePlasticityOptimizer.consolidate` at the end of every experience.

    With it the optimizer's elementwise gate protects what earlier experiences learned, without stored data and with
    one buffer of the network's size, in any Avalanche strategy. A head that grows keeps what its old units hold, and
    its new ones are plastic. (Avalanche replaces the parameter, and with it the optimizer's state.)

    Args:
        follow: a plugin that finds for itself when to consolidate, as a
            :class:`~avalanche_sp.SelectivePlasticityPlugin` with ``consolidate="surprise"`` or ``"continuous"`` does:
            it comes earlier in the list, and the optimizer consolidates when it does. Default: at the end of
            every experience.

    Raises:
        TypeError: at ``train``, when the strategy's optimizer is not a
            :class:`~avalanche_sp.SelectivePlasticityOptimizer`.

    Example::

        optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters())
        strategy = Naive(model=model, optimizer=optimizer, criterion=OneHotMSELoss(), train_mb_size=64,
                         plugins=[ConsolidationPlugin()])
    """

    def __init__(self, follow=None):
        super().__init__()
        self.follow = follow
        self._followed = 0
        self._kept: dict[str, Tensor] = {}  # consolidated eligibility by parameter name: what the optimizer holds

    def before_training(self, strategy, **kwargs):
        if not isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
            raise TypeError(
                f"Invalid optimizer: {type(strategy.optimizer).__name__} (ConsolidationPlugin needs a "
                "SelectivePlasticityOptimizer)"
            )

    def before_training_exp(self, strategy, **kwargs):
        for name, p in strategy.model.named_parameters():
            kept, state = self._kept.get(name), strategy.optimizer.state[p]
            if (
                kept is not None
                and "consolidated" not in state
                and kept.shape[1:] == p.shape[1:]
                and len(kept) < len(p)
            ):
                state["consolidated"] = torch.cat([kept, kept.new_zeros(len(p) - len(kept), *p.shape[1:])])

    def after_update(self, strategy, **kwargs):
        if self.follow is not None and len(self.follow.consolidated_at) > self._followed:
            self._followed = len(self.follow.consolidated_at)
            self._consolidate(strategy)

    def after_training_exp(self, strategy, **kwargs):
        if self.follow is None:
            self._consolidate(strategy)

    def _consolidate(self, strategy) -> None:
        strategy.optimizer.consolidate()
        states = {name: strategy.optimizer.state.get(p, {}) for name, p in strategy.model.named_parameters()}
        self._kept = {name: state["consolidated"] for name, state in states.items() if "consolidated" in state}
