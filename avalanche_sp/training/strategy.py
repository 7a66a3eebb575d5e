"""SelectivePlasticity: the plugin, its optimizer and squared error as one Avalanche strategy."""

from collections.abc import Callable, Sequence

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_sp.arguments import check_integer
from avalanche_sp.optim import SelectivePlasticityOptimizer
from avalanche_sp.training.losses import JointReplayLoss, OneHotMSELoss
from avalanche_sp.training.plugin import SelectivePlasticityPlugin


class SelectivePlasticity(SupervisedTemplate):
    """Selective plasticity with the settings of "gate + optimizer" in this project's tables. Only the model is needed.

    It is ``Naive`` with a :class:`~avalanche_sp.SelectivePlasticityPlugin`, a
    :class:`~avalanche_sp.SelectivePlasticityOptimizer` and squared error, and with a ``ReplayPlugin`` if a number of
    stored samples is given. Each part can be replaced.

    Args:
        model: the network.
        optimizer: default ``SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)``.
        criterion: loss of (outputs, targets), averaged over the batch (default :class:`~avalanche_sp.OneHotMSELoss`).
            :class:`~avalanche_sp.JointReplayLoss` weighs stored samples with it.
        mem_size: number of stored samples, 0 or more (default 0). Each mini-batch gets at most ``train_mb_size`` of
            them.
        plugins: other plugins. A :class:`~avalanche_sp.SelectivePlasticityPlugin` with settings of its own replaces
            the default one. A ``ReplayPlugin``, such as ``GaussianBuffer().replay_plugin()``, replaces ``mem_size``.
        train_mb_size, train_epochs, eval_mb_size, device, evaluator, eval_every, base_kwargs: as Avalanche's, but for
            mini-batches of 64 by default.

    Raises:
        ValueError: ``mem_size`` is out of range, or given together with a ``ReplayPlugin``.

    Example::

        strategy = SelectivePlasticity(model=model, mem_size=200)
        for experience in benchmark.train_stream:
            strategy.train(experience)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        mem_size: int = 0,
        train_mb_size: int = 64,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[BasePlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        **base_kwargs,
    ):
        check_integer("mem_size value", mem_size, 0)
        plugins = list(plugins or ())
        if mem_size:
            if any(isinstance(plugin, ReplayPlugin) for plugin in plugins):
                raise ValueError(f"Invalid mem_size value: {mem_size} (allowed with a ReplayPlugin in plugins: 0)")
            plugins.append(ReplayPlugin(mem_size, batch_size_mem=min(mem_size, train_mb_size)))
        if not any(isinstance(plugin, SelectivePlasticityPlugin) for plugin in plugins):
            plugins.insert(0, SelectivePlasticityPlugin())
        if criterion is None:
            criterion = OneHotMSELoss()
        if optimizer is None:
            optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion if isinstance(criterion, JointReplayLoss) else JointReplayLoss(criterion),
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
