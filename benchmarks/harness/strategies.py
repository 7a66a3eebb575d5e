"""The strategies that are compared: what each trains with, and how Avalanche builds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from avalanche.training import JointTraining, Naive
from avalanche.training.plugins import EWCPlugin, MASPlugin, ReplayPlugin, SynapticIntelligencePlugin
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin
from harness.settings import STRATEGIES, USES_REPLAY, Run

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "squared error": OneHotMSELoss,
}
OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "SelectivePlasticity": SelectivePlasticityOptimizer,
}


class WorkingSynapticIntelligence(SynapticIntelligencePlugin):
    """Avalanche 0.6's Synaptic Intelligence, made to work on a CPU.

    Upstream keeps views of the live weights where it means copies: on a CPU every displacement is then zero, and
    with it every importance and the penalty, whatever the strength (``tests/test_harness.py`` shows it).
    """

    def before_training_exp(self, strategy, **kwargs):
        super().before_training_exp(strategy, **kwargs)
        self._copy(self.ewc_data[0])

    def before_training_iteration(self, strategy, **kwargs):
        super().before_training_iteration(strategy, **kwargs)
        self._copy(self.syn_data["old_theta"])

    @staticmethod
    def _copy(params) -> None:
        for param in params.values():
            param.data = param.data.clone()


PLUGINS = {
    "ewc": lambda s: EWCPlugin(ewc_lambda=s["strength"]),
    "si": lambda s: WorkingSynapticIntelligence(si_lambda=s["strength"]),
    "mas": lambda s: MASPlugin(lambda_reg=s["strength"], alpha=0.5),
    "sp": lambda s: SelectivePlasticityPlugin(s["openness"], s["pull_back"], int(s["rank"])),
}


@dataclass(frozen=True)
class Recipe:
    """What a strategy trains with.

    Attributes:
        optimizer, loss: names from OPTIMIZERS and LOSSES.
        lr: learning rate, or learning rates by the buffer that they were tuned for.
        plugin: name from PLUGINS, or None.
        settings: the plugin's settings.
        joint_weight: weigh replayed samples as joint training would.
    """

    optimizer: str
    lr: float | dict[int, float]
    loss: str = "cross-entropy"
    plugin: str | None = None
    settings: dict[str, float] = field(default_factory=dict)
    joint_weight: bool = False

    def override(self, overrides: dict[str, float]) -> Recipe:
        unknown = set(overrides) - {"lr", *self.settings}
        if unknown:
            allowed = ", ".join(["lr", *self.settings])
            raise ValueError(f"Invalid override: {', '.join(sorted(unknown))} (allowed for this strategy: {allowed})")
        return replace(
            self, lr=overrides.get("lr", self.lr), settings={k: overrides.get(k, v) for k, v in self.settings.items()}
        )


_SP = {"openness": 0.2, "pull_back": 1.0, "rank": 100}  # the plugin's defaults

# By benchmark and number of tasks; found on validation images, seeds 100 to 104: docs/experiments.md.
RECIPES: dict[str, dict[int, dict[str, Recipe]]] = {
    "split-mnist": {
        2: {
            "naive-sgd": Recipe("SGD", 0.1, "squared error"),
            "naive-adam": Recipe("Adam", 1e-3),
            "ewc": Recipe("SGD", 0.01, "squared error", plugin="ewc", settings={"strength": 5000.0}),
            "si": Recipe("SGD", 0.02, "squared error", plugin="si", settings={"strength": 3000.0}),
            "mas": Recipe("SGD", 0.005, "squared error", plugin="mas", settings={"strength": 400.0}),
            "sp-optimizer": Recipe("SelectivePlasticity", 3e-3),
            "sp": Recipe("SGD", 0.1, "squared error", plugin="sp", settings=_SP),
            "replay-sgd": Recipe("SGD", {200: 0.1, 2000: 0.3}),
            "replay-adam": Recipe("Adam", {200: 5e-4, 2000: 1e-3}),
            "replay-joint": Recipe("SGD", {200: 0.05, 2000: 0.15}, "squared error", joint_weight=True),
            "sp-replay": Recipe(
                "SGD", {200: 0.1, 2000: 0.15}, "squared error", plugin="sp", settings=_SP, joint_weight=True
            ),
            "joint": Recipe("Adam", 1e-3),
        },
        5: {
            "naive-sgd": Recipe("SGD", 0.07, "squared error"),
            "naive-adam": Recipe("Adam", 1e-3),
            "ewc": Recipe("SGD", 0.02, "squared error", plugin="ewc", settings={"strength": 1000.0}),
            "si": Recipe("SGD", 0.1, "squared error", plugin="si", settings={"strength": 5000.0}),
            "mas": Recipe("SGD", 0.005, plugin="mas", settings={"strength": 5.0}),
            "sp-optimizer": Recipe("SelectivePlasticity", 3e-3),
            "sp": Recipe("SGD", 0.07, "squared error", plugin="sp", settings=_SP),
            "replay-sgd": Recipe("SGD", 0.2),
            "replay-adam": Recipe("Adam", {200: 2e-4, 2000: 1e-3}),
            "replay-joint": Recipe("SGD", {200: 0.03, 2000: 0.1}, "squared error", joint_weight=True),
            "sp-replay": Recipe("SGD", 0.1, "squared error", plugin="sp", settings=_SP, joint_weight=True),
            "joint": Recipe("Adam", 1e-3),
        },
    },
}
RECIPES["permuted-mnist"] = {
    10: {
        "naive-sgd": Recipe("SGD", 0.05, "squared error"),
        "naive-adam": Recipe("Adam", 1e-4),
        "ewc": Recipe("SGD", 0.05, "squared error", plugin="ewc", settings={"strength": 100.0}),
        "si": Recipe("SGD", 0.05, "squared error", plugin="si", settings={"strength": 100.0}),
        "mas": Recipe("SGD", 0.05, "squared error", plugin="mas", settings={"strength": 1.0}),
        "sp-optimizer": Recipe("SelectivePlasticity", 3e-4),
        "sp": Recipe("SGD", 0.1, "squared error", plugin="sp", settings=_SP),
        "replay-sgd": Recipe("SGD", 0.2),
        "replay-adam": Recipe("Adam", {200: 3e-4, 2000: 1e-3}),
        "replay-joint": Recipe("SGD", 0.1, "squared error", joint_weight=True),
        "sp-replay": Recipe("SGD", 0.1, "squared error", plugin="sp", settings=_SP, joint_weight=True),
        "joint": Recipe("Adam", 1e-3),
    },
}


def nearest(tuned: dict[int, object], value: int):
    """The entry that was tuned for the nearest value, in ratio."""
    return tuned[min(tuned, key=lambda v: abs(math.log(value / v)))]


def recipe_of(run: Run) -> Recipe:
    """The run's recipe, for its number of tasks and its buffer, its overrides applied.

    Raises:
        ValueError: the strategy or an override doesn't exist.
    """
    if run.strategy not in STRATEGIES:
        raise ValueError(f"Invalid strategy: {run.strategy} (allowed: {', '.join(STRATEGIES)})")
    recipe = nearest(RECIPES[run.benchmark], run.n_tasks)[run.strategy]
    if isinstance(recipe.lr, dict):
        recipe = replace(recipe, lr=nearest(recipe.lr, run.replay_buffer))
    return recipe.override(dict(run.overrides))


def build_model() -> nn.Module:
    """The 784-256-256-10 perceptron of the comparison."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def build_strategy(run: Run, model: nn.Module, extra_plugins: list, evaluator):
    """The Avalanche strategy of a run, and its method's own plugins."""
    recipe = recipe_of(run)
    criterion = LOSSES[recipe.loss]()
    if recipe.joint_weight:
        criterion = JointReplayLoss(criterion)
    plugins = []
    if run.strategy in USES_REPLAY:
        # Runs drop incomplete batches: a memory smaller than its batch would never be seen.
        memory_batch = min(run.batch_size, run.replay_buffer)
        plugins.append(ReplayPlugin(mem_size=run.replay_buffer, batch_size_mem=memory_batch))
    if recipe.plugin is not None:
        plugins.append(PLUGINS[recipe.plugin](recipe.settings))
    template = JointTraining if run.strategy == "joint" else Naive
    strategy = template(
        model=model,
        optimizer=OPTIMIZERS[recipe.optimizer](model.parameters(), lr=recipe.lr),
        criterion=criterion,
        train_mb_size=run.batch_size,
        train_epochs=run.epochs,
        eval_mb_size=1000,
        plugins=plugins + extra_plugins,
        evaluator=evaluator,
    )
    return strategy, plugins
