"""The strategies that are compared: what each trains with, and how Avalanche builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from avalanche.models.packnet import PackNetPlugin
from avalanche.training import DER, ER_ACE, Cumulative, JointTraining, Naive
from avalanche.training.plugins import EWCPlugin, LwFPlugin, MASPlugin, SynapticIntelligencePlugin
from torch import nn

from avalanche_sp import (
    ConsolidationPlugin,
    JointReplayLoss,
    OneHotMSELoss,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
)
from avalanche_sp.per_layer import PerLayer
from harness import rehearsal
from harness.controls import UPGD, ConstantGate, RandomGate
from harness.legacy import LegacyReplay, LegacySelectivePlasticity
from harness.networks import PackNetMultiHead, build_network, gate_bytes, network_bytes
from harness.projections import GradientProjectionMemory, OrthogonalWeightsModification
from harness.recipes import PER_LAYER, RATES_BY_NETWORK, RECIPES, TASK_INCREMENTAL_RECIPES, Recipe, nearest
from harness.rehearsal import memory_batch
from harness.ridge import StreamingRidge, build_random_features
from harness.settings import Run, in_mini_batches, strategies_of

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "squared error": OneHotMSELoss,
}
OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "SelectivePlasticity": SelectivePlasticityOptimizer,
    "constant gate": ConstantGate,
    "random gate": RandomGate,
    "UPGD": UPGD,
    "legacy": LegacySelectivePlasticity,
}


class WorkingSynapticIntelligence(SynapticIntelligencePlugin):
    """Avalanche 0.6's Synaptic Intelligence, made to work on a CPU.

    Upstream keeps views of the live weights where it means copies: on a CPU every displacement is then zero, and
    with it every importance and the penalty, whatever the strength (``tests/test_harness.py`` shows it). And it stops
    where a parameter has no gradient, as the heads of other tasks have none.
    """

    def before_training_exp(self, strategy, **kwargs):
        super().before_training_exp(strategy, **kwargs)
        self._copy(self.ewc_data[0])

    def before_training_iteration(self, strategy, **kwargs):
        super().before_training_iteration(strategy, **kwargs)
        self._copy(self.syn_data["old_theta"])

    def after_training_iteration(self, strategy, **kwargs):
        for parameter in strategy.model.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        super().after_training_iteration(strategy, **kwargs)

    @staticmethod
    def _copy(params) -> None:
        for param in params.values():
            param.data = param.data.clone()


def learning_without_forgetting(alpha: float, temperature: float) -> LwFPlugin:
    """Avalanche's LwF, which takes any setting without a word: a temperature of 0 ends in NaN.

    Adds alpha times the Kullback-Leibler divergence from the softmax, at the temperature, of the last experience's
    network to that of the present one, over the classes seen before it (Z. Li, D. Hoiem: Learning without forgetting,
    ECCV 2016).
    """
    for name, value in (("alpha", alpha), ("temperature", temperature)):
        if not 0 < value < float("inf"):
            raise ValueError(f"Invalid {name} value: {value} (allowed: greater than 0)")
    return LwFPlugin(alpha, temperature)


PLUGINS = {
    "replay": lambda s, run: rehearsal.replay(run),
    "gaussians": lambda s, run: rehearsal.drawn_replay(run),
    "legacy": lambda s, run: LegacyReplay(run.replay_buffer, fifo=bool(s["fifo"])),
    "ewc": lambda s, run: EWCPlugin(ewc_lambda=s["strength"]),
    "si": lambda s, run: WorkingSynapticIntelligence(si_lambda=s["strength"]),
    "mas": lambda s, run: MASPlugin(lambda_reg=s["strength"], alpha=0.5),
    "lwf": lambda s, run: learning_without_forgetting(s["alpha"], s["temperature"]),
    "a-gem": lambda s, run: rehearsal.averaged_gem(run),
    "gem": lambda s, run: rehearsal.gradient_episodic_memory(run, s["memory_strength"]),
    "gdumb": lambda s, run: rehearsal.GDumb(run.replay_buffer, int(s["passes"])),
    "distillation": lambda s, run: rehearsal.MemoryDistillation(s["weight"]),
    "constant gate": lambda s, run: rehearsal.ConstantGate(s["gate"]),
    "owm": lambda s, run: OrthogonalWeightsModification(s["alpha"]),
    "gpm": lambda s, run: GradientProjectionMemory(s["epsilon"], s.get("epsilon_hidden")),
    "ridge": lambda s, run: StreamingRidge(s["ridge"]),
    "packnet": lambda s, run: PackNetPlugin(int(s["post_prune_epochs"]), s["prune_proportion"]),
    "consolidation": lambda s, run: ConsolidationPlugin(),
    "sp": lambda s, run: _gate(s),
    "sp-surprise": lambda s, run: _gate(s, consolidate="surprise"),
    "sp-continuous": lambda s, run: _gate(s, consolidate="continuous"),
}


def _gate(settings: dict[str, float], **kwargs) -> SelectivePlasticityPlugin:
    return SelectivePlasticityPlugin(
        **{
            name: _per_layer(settings, name, _rank if name == "rank" else float)
            for name in PER_LAYER & {key.partition(":")[0] for key in settings}
        },
        readout_step=bool(settings.get("readout_step", True)),
        **kwargs,
    )


def _rank(value: float) -> int | float:
    return int(value) if value >= 1 else value


def _per_layer(settings: dict[str, float], name: str, kind: Callable[[float], float]) -> PerLayer:
    """A setting's value, or where layers have their own ("openness:1"), the values by layer, the others' last."""
    own = {key.partition(":")[2]: kind(v) for key, v in settings.items() if key.startswith(f"{name}:")}
    if name not in settings:
        return own
    return {**own, "*": kind(settings[name])} if own else kind(settings[name])


# Avalanche's DER stores a network's outputs when an experience ends and draws one batch of stored samples, where its
# publication (P. Buzzega et al., NeurIPS 2020) stores them at once and draws two. Its ER-ACE (L. Caccia et al., ICLR
# 2022) has the new experience's samples in the memory from its beginning.
TEMPLATES = {
    "naive": lambda s, run: Naive,
    "joint": lambda s, run: JointTraining,
    "cumulative": lambda s, run: Cumulative,
    "der++": lambda s, run: partial(
        DER, mem_size=run.replay_buffer, batch_size_mem=memory_batch(run), alpha=s["alpha"], beta=s["beta"]
    ),
    "er-ace": lambda s, run: partial(ER_ACE, mem_size=run.replay_buffer, batch_size_mem=memory_batch(run)),
}


def recipe_of(run: Run) -> Recipe:
    """The run's recipe, for its number of tasks and its buffer, its overrides applied.

    Raises:
        ValueError: the strategy or an override doesn't exist.
    """
    allowed = strategies_of(run.benchmark, run.task_incremental)
    if run.strategy not in allowed:
        raise ValueError(f"Invalid strategy: {run.strategy} (allowed: {', '.join(allowed)})")
    if run.task_incremental and run.strategy in TASK_INCREMENTAL_RECIPES:
        recipe = TASK_INCREMENTAL_RECIPES[run.strategy]
    else:
        tuned = {n: recipes for n, recipes in RECIPES[run.benchmark].items() if run.strategy in recipes}
        recipe = nearest(tuned, run.n_tasks)[run.strategy]
    recipe = recipe.tuned_for(run.replay_buffer or run.train_per_task or 60000)
    rates = RATES_BY_NETWORK.get(run.network, {})
    recipe = replace(recipe, lr=rates.get(run.strategy, recipe.lr))
    return recipe.override(dict(run.overrides), numbers_of(OPTIMIZERS[recipe.optimizer]))


def numbers_of(optimizer: type[torch.optim.Optimizer]) -> tuple[str, ...]:
    """The optimizer's settings that are numbers, its learning rate aside: also those that it passes on to a base."""
    arguments = [p for c in optimizer.__mro__ for p in inspect.signature(c.__init__).parameters.values()]
    return tuple(dict.fromkeys(p.name for p in arguments if type(p.default) in (int, float) and p.name != "lr"))


def build_model(run: Run) -> nn.Module:
    """The run's network; for random features, one that takes as many bytes as the network and `sp`'s memory."""
    network = build_network(run.network, run.heads)
    kind = recipe_of(run).model
    if kind == "random features":
        return build_random_features(network_bytes(network) + gate_bytes(network))
    return PackNetMultiHead(network) if kind == "packnet" else network


def build_strategy(run: Run, model: nn.Module, extra_plugins: list, evaluator):
    """The Avalanche strategy of a run, and its method's own plugins."""
    recipe = recipe_of(run)
    criterion = LOSSES[recipe.loss]()
    plugins = [PLUGINS[name](recipe.settings, run) for name in recipe.plugins]
    gate, online = _followed(plugins), in_mini_batches(run)
    # Where nothing is told or found, what would be the present experience, what the earlier ones?
    if recipe.joint_weight and (gate is not None or not online):
        criterion = JointReplayLoss(criterion, recipe.settings.get("shrinkage", 0.0), gate if online else None)
    strategy = TEMPLATES[recipe.template](recipe.settings, run)(
        model=model,
        optimizer=OPTIMIZERS[recipe.optimizer](model.parameters(), lr=recipe.lr, **recipe.optimizer_settings),
        criterion=criterion,
        train_mb_size=run.batch_size,
        train_epochs=run.epochs,
        eval_mb_size=1000,
        plugins=plugins + extra_plugins,
        evaluator=evaluator,
    )
    return strategy, plugins


def _followed(plugins: list) -> SelectivePlasticityPlugin | None:
    """The plugin that finds for itself when to consolidate, if there is one; the optimizer consolidates with it."""
    for gate in plugins:
        if isinstance(gate, SelectivePlasticityPlugin) and gate.consolidate != "experience":
            for plugin in plugins:
                if isinstance(plugin, ConsolidationPlugin):
                    plugin.follow = gate
            return gate
    return None
