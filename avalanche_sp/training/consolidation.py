"""ConsolidationPlugin: tells the optimizer when an experience has been learned."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor

from avalanche_sp.optim import SelectivePlasticityOptimizer


class ConsolidatedEligibility:
    """Consolidated eligibility by parameter name, for optimizers that lose their state.

    Avalanche replaces the parameter of a growing head, and with it the optimizer's state. It empties the whole state
    in a new strategy's first ``train``, and in ``train(..., reset_optimizer_state=True)``.
    """

    # Weak references to the model and the optimizer of the last note. A copy or a pickle has none.
    _model: Callable[[], Any] = staticmethod(lambda: None)
    _optimizer: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __getstate__(self) -> dict:
        return {"_kept": self._kept}

    def note(self, strategy) -> None:
        """Keeps the optimizer's consolidated eligibility, before Avalanche adapts the model and the optimizer.

        If the optimizer is new and the model is the same, parameters without an eligibility in the optimizer keep the
        earlier one. In all other cases the earlier eligibility is dropped.
        """
        model, optimizer = strategy.model, strategy.optimizer
        is_new_optimizer = model is self._model() and optimizer is not self._optimizer()
        present = self._present(strategy)
        self._kept = {**self._kept, **present} if is_new_optimizer else present
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)

    def restore(self, strategy) -> None:
        """Gives the parameters their eligibility again. New units of a parameter that has grown are plastic."""
        for name, p in strategy.model.named_parameters():
            kept = self._kept.get(name)
            if kept is None or "consolidated" in strategy.optimizer.state.get(p, {}):
                continue
            if kept.dim() == p.dim() and kept.shape[1:] == p.shape[1:] and kept.shape[:1] < p.shape[:1]:
                kept = torch.cat([kept, kept.new_zeros(len(p) - len(kept), *p.shape[1:])])
            if kept.shape == p.shape:
                strategy.optimizer.state[p]["consolidated"] = kept.to(p)

    def consolidate(self, strategy) -> None:
        """Consolidates the strategy's optimizer."""
        strategy.optimizer.consolidate()
        self._kept = self._present(strategy)

    @staticmethod
    def _present(strategy) -> dict[str, Tensor]:
        states = {name: strategy.optimizer.state.get(p, {}) for name, p in strategy.model.named_parameters()}
        return {name: state["consolidated"] for name, state in states.items() if "consolidated" in state}


class ConsolidationPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Calls :meth:`~avalanche_sp.SelectivePlasticityOptimizer.consolidate` at the end of every experience.

    With it the optimizer's elementwise gate protects earlier experiences, without stored data and with one buffer of
    the network's size, in any Avalanche strategy. The old units of a head that grows stay protected, and its new ones
    are plastic. The consolidated eligibility outlives a reset of the optimizer's state, a new optimizer for the same
    model, and a new strategy for both. ``optimizer.reset_eligibility()`` between two calls of ``train`` ends it.

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
        self._eligibility.note(strategy)

    def before_training_exp(self, strategy, **kwargs):
        if not self._is_beside_a_gate(strategy):
            self._eligibility.restore(strategy)

    def after_training_exp(self, strategy, **kwargs):
        if not self._is_beside_a_gate(strategy):
            self._eligibility.consolidate(strategy)

    @staticmethod
    def _is_beside_a_gate(strategy) -> bool:
        return any(getattr(plugin, "consolidates_optimizer", False) for plugin in strategy.plugins)
