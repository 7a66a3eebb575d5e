"""ConsolidationPlugin: tells the optimizer when an experience has been learned."""

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_sp.optim import SelectivePlasticityOptimizer


class ConsolidatedEligibility:
    """Consolidated eligibility by parameter name, for heads that grow.

    Avalanche replaces the parameter of a growing head, and with it the optimizer's state.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def restore(self, strategy) -> None:
        """Gives a grown parameter the eligibility of its old units; the new ones are plastic."""
        for name, p in strategy.model.named_parameters():
            kept, state = self._kept.get(name), strategy.optimizer.state[p]
            if (
                kept is not None
                and "consolidated" not in state
                and kept.shape[1:] == p.shape[1:]
                and len(kept) < len(p)
            ):
                state["consolidated"] = torch.cat([kept, kept.new_zeros(len(p) - len(kept), *p.shape[1:])])

    def consolidate(self, strategy) -> None:
        """Consolidates the strategy's optimizer."""
        strategy.optimizer.consolidate()
        states = {name: strategy.optimizer.state.get(p, {}) for name, p in strategy.model.named_parameters()}
        self._kept = {name: state["consolidated"] for name, state in states.items() if "consolidated" in state}


class ConsolidationPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Calls :meth:`~avalanche_sp.SelectivePlasticityOptimizer.consolidate` at the end of every experience.

    With it the optimizer's elementwise gate protects earlier experiences, without stored data and with one buffer of
    the network's size, in any Avalanche strategy. The old units of a head that grows stay protected, and its new ones
    are plastic.

    It is for the optimizer alone. :class:`~avalanche_sp.SelectivePlasticityPlugin` consolidates the optimizer itself,
    also at boundaries that it finds. Together with it this plugin does nothing.

    Raises:
        TypeError: at ``train``, when the strategy's optimizer is not a
            :class:`~avalanche_sp.SelectivePlasticityOptimizer`.

    Example::

        optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters())
        strategy = Naive(model=model, optimizer=optimizer, criterion=OneHotMSELoss(), train_mb_size=64,
                         plugins=[ConsolidationPlugin()])
    """

    def __init__(self):
        super().__init__()
        self._eligibility = ConsolidatedEligibility()

    def before_training(self, strategy, **kwargs):
        if not isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
            raise TypeError(
                f"Invalid optimizer: {type(strategy.optimizer).__name__} (ConsolidationPlugin needs a "
                "SelectivePlasticityOptimizer)"
            )

    def before_training_exp(self, strategy, **kwargs):
        if not self._is_beside_a_gate(strategy):
            self._eligibility.restore(strategy)

    def after_training_exp(self, strategy, **kwargs):
        if not self._is_beside_a_gate(strategy):
            self._eligibility.consolidate(strategy)

    @staticmethod
    def _is_beside_a_gate(strategy) -> bool:
        return any(getattr(plugin, "consolidates_optimizer", False) for plugin in strategy.plugins)
