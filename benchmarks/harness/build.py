"""From a run's recipe to the Avalanche strategy that trains it."""

from collections.abc import Callable
from functools import partial

import torch
from avalanche.models.packnet import PackNetPlugin
from avalanche.training import DER, ER_ACE, Cumulative, JointTraining, Naive
from avalanche.training.plugins import EWCPlugin, LwFPlugin, MASPlugin, ReplayPlugin, SynapticIntelligencePlugin
from torch import nn

from avalanche_sp import (
    ConsolidationPlugin,
    JointReplayLoss,
    OneHotMSELoss,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
)
from harness.methods import check, rehearsal
from harness.methods.controls import UPGD, ConstantGate, RandomGate
from harness.methods.legacy import LegacyReplay, LegacySelectivePlasticity
from harness.methods.projections import GradientProjectionMemory, OrthogonalWeightsModification
from harness.methods.ridge import StreamingRidge, build_random_features
from harness.networks import PackNetMultiHead, build_network, gate_bytes, network_bytes
from harness.recipes import recipe_of
from harness.recipes.recipe import PER_LAYER
from harness.settings import DATA, Run

LOSSES = {"cross-entropy": nn.CrossEntropyLoss, "squared error": OneHotMSELoss}
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
    """Avalanche 0.6's Synaptic Intelligence, repaired for CPUs and for several heads.

    Upstream keeps views of the live weights instead of copies, so on a CPU every displacement, and with it every
    importance, is zero. And it stops at a parameter without a gradient, such as another task's head.
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
    """Avalanche's LwF (Z. Li, D. Hoiem, ECCV 2016), its arguments checked: a temperature of 0 ends in NaN."""
    check("alpha", alpha)
    check("temperature", temperature)
    return LwFPlugin(alpha, temperature)


def _gate(arguments: dict[str, float], **kwargs) -> SelectivePlasticityPlugin:
    names = {key.partition(":")[0] for key in arguments}
    by_layer = {name: _by_layer(arguments, name) for name in PER_LAYER if name in names}
    return SelectivePlasticityPlugin(**by_layer, readout_step=bool(arguments.get("readout_step", True)), **kwargs)


def _by_layer(arguments: dict[str, float], name: str):
    """The argument's value; if a layer has its own ("openness:1"), the values by layer, with the others' as "*"."""
    own = {key.partition(":")[2] or "*": value for key, value in arguments.items() if key.partition(":")[0] == name}
    if name == "rank":
        own = {layer: int(value) if value >= 1 else value for layer, value in own.items()}
    return own["*"] if list(own) == ["*"] else dict(sorted(own.items(), key=lambda item: item[0] == "*"))


def _dendrites(arguments: dict[str, float]):
    from avalanche_sp.dendrites import DendritesPlugin  # needs perforatedai

    most, patience = int(arguments["most"]), int(arguments["patience"])
    grow = {"grow": "plateau", "patience": patience} if patience else {"grow": "experience"}
    activation = torch.sigmoid if arguments["sigmoid"] else torch.tanh
    return DendritesPlugin(activation=activation, most=most, readout=bool(arguments["readout"]), **grow)


PLUGINS: dict[str, Callable] = {  # of the recipe's arguments and the run
    "replay": lambda a, run: ReplayPlugin(**rehearsal.memory_of(run)),
    "gaussians": lambda a, run: rehearsal.gaussian_replay(run),
    "legacy": lambda a, run: LegacyReplay(run.replay_buffer, fifo=bool(a["fifo"])),
    "ewc": lambda a, run: EWCPlugin(ewc_lambda=a["strength"]),
    "si": lambda a, run: WorkingSynapticIntelligence(si_lambda=a["strength"]),
    "mas": lambda a, run: MASPlugin(lambda_reg=a["strength"], alpha=0.5),
    "lwf": lambda a, run: learning_without_forgetting(a["alpha"], a["temperature"]),
    "a-gem": lambda a, run: rehearsal.averaged_gem(run),
    "gem": lambda a, run: rehearsal.gradient_episodic_memory(run, a["memory_strength"]),
    "gdumb": lambda a, run: rehearsal.GDumb(run.replay_buffer, int(a["passes"])),
    "distillation": lambda a, run: rehearsal.MemoryDistillation(a["weight"]),
    "constant gate": lambda a, run: rehearsal.ConstantGate(a["gate"]),
    "owm": lambda a, run: OrthogonalWeightsModification(a["alpha"]),
    "gpm": lambda a, run: GradientProjectionMemory(a["epsilon"], a.get("epsilon_hidden")),
    "ridge": lambda a, run: StreamingRidge(a["ridge"]),
    "packnet": lambda a, run: PackNetPlugin(int(a["post_prune_epochs"]), a["prune_proportion"]),
    "dendrites": lambda a, run: _dendrites(a),
    "consolidation": lambda a, run: ConsolidationPlugin(),
    "sp": lambda a, run: _gate(a),
    "sp-surprise": lambda a, run: _gate(a, consolidate="surprise"),
    "sp-continuous": lambda a, run: _gate(a, consolidate="continuous"),
}
# Avalanche's DER stores a network's outputs when an experience ends and draws one batch of stored samples. Its
# publication (P. Buzzega et al., NeurIPS 2020) stores them at once and draws two. Avalanche's ER-ACE (L. Caccia et al.,
# ICLR 2022) has the new experience's samples in the memory from its beginning.
TEMPLATES: dict[str, Callable] = {
    "naive": lambda a, run: Naive,
    "joint": lambda a, run: JointTraining,
    "cumulative": lambda a, run: Cumulative,
    "der++": lambda a, run: partial(DER, **rehearsal.memory_of(run), alpha=a["alpha"], beta=a["beta"]),
    "er-ace": lambda a, run: partial(ER_ACE, **rehearsal.memory_of(run)),
}


def build_model(run: Run) -> nn.Module:
    """The run's network; random features with the memory of the network and of `sp` instead."""
    network = build_network(run.network, run.heads, run.data)
    kind = recipe_of(run).model
    if kind == "random features":
        data = DATA[run.data]
        return build_random_features(network_bytes(network) + gate_bytes(network), data.inputs, data.classes)
    return PackNetMultiHead(network) if kind == "packnet" else network


def build_strategy(run: Run, model: nn.Module, extra_plugins: list, evaluator):
    """The Avalanche strategy of a run, and its method's own plugins."""
    recipe = recipe_of(run)
    criterion = LOSSES[recipe.loss]()
    plugins = [PLUGINS[name](recipe.arguments, run) for name in recipe.plugins]
    if recipe.joint_weight:
        # A plugin is asked for the weight of the stored samples, unless they are to have their full weight.
        criterion = JointReplayLoss(criterion, trust=None if recipe.arguments.get("shrinkage") else 1.0)
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=recipe.lr, **recipe.optimizer_arguments)
    strategy = TEMPLATES[recipe.template](recipe.arguments, run)(
        model=model,
        optimizer=optimizer,
        criterion=criterion,
        train_mb_size=run.batch_size,
        train_epochs=run.epochs,
        eval_mb_size=1000,
        plugins=plugins + extra_plugins,
        evaluator=evaluator,
    )
    return strategy, plugins
