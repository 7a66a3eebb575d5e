"""ConsolidationPlugin: tells the optimizer when an experience has been learned."""

from __future__ import annotations

from avalanche.training.plugins import SupervisedPlugin

from avalanche_sp.optimizer import SelectivePlasticityOptimizer

__all__ = ["ConsolidationPlugin"]


class ConsolidationPlugin(SupervisedPlugin):
    """Calls :meth:`~avalanche_sp.SelectivePlasticityOptimizer.consolidate` at the end of every experience.

    With it the optimizer's elementwise gate protects what earlier experiences learned, without stored data and with one
    buffer of the network's size, in any Avalanche strategy.

    Raises:
        TypeError: at ``train``, when the strategy's optimizer is not a
            :class:`~avalanche_sp.SelectivePlasticityOptimizer`.

    Example::

        optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=3e-3, beta1=0.0, eps=1e-3)
        strategy = Naive(model=model, optimizer=optimizer, criterion=OneHotMSELoss(), train_mb_size=64,
                         plugins=[ConsolidationPlugin()])
    """

    def before_training(self, strategy, **kwargs):
        if not isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
            raise TypeError(
                f"Invalid optimizer: {type(strategy.optimizer).__name__} (ConsolidationPlugin needs a "
                "SelectivePlasticityOptimizer)"
            )

    def after_training_exp(self, strategy, **kwargs):
        strategy.optimizer.consolidate()
