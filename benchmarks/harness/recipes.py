"""What each strategy trains with, as found on validation images: docs/experiments.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Recipe:
    """What a strategy trains with.

    Attributes:
        optimizer, loss: names from the strategies module's OPTIMIZERS and LOSSES.
        lr: learning rate, or learning rates by what they were tuned for: the buffer, of strategies with replay; else
            the training images a task.
        plugins: names from its PLUGINS.
        template: name from its TEMPLATES: the Avalanche strategy that trains with them.
        model: "network", the run's; "packnet", the same to be pruned; or "random features" in its place.
        settings: the plugins' and the template's settings; each may be given by what it was tuned for, as the rate.
        optimizer_settings: the optimizer's, besides its learning rate.
        joint_weight: weigh replayed samples as joint training would, but for a "shrinkage" among the settings.
    """

    optimizer: str
    lr: float | dict[int, float]
    loss: str = "cross-entropy"
    plugins: tuple[str, ...] = ()
    settings: dict[str, float | dict[int, float]] = field(default_factory=dict)
    joint_weight: bool = False
    optimizer_settings: dict[str, float] = field(default_factory=dict)
    model: str = "network"
    template: str = "naive"

    def tuned_for(self, size: int) -> Recipe:
        """The recipe with the values that were tuned for the nearest size."""

        def at(value):
            return nearest(value, size) if isinstance(value, dict) else value

        return replace(self, lr=at(self.lr), settings={name: at(value) for name, value in self.settings.items()})

    def override(self, overrides: dict[str, float], accepted: tuple[str, ...] = ()) -> Recipe:
        """The recipe with other values for its settings, or for what its optimizer accepts besides.

        What the plugin sets layer by layer may be overridden so: "openness:1" is the openness of layer "1". Its
        "rank" and "readout_step" may be, too, the latter 0 for none.
        """
        in_optimizer = [*self.optimizer_settings, *(name for name in accepted if name not in self.optimizer_settings)]
        allowed = ["lr", *self.settings, *in_optimizer]
        optional = {"rank", "readout_step"} if "openness" in self.settings else set()
        optional |= {"epsilon_hidden"} if "epsilon" in self.settings else set()
        by_layer = PER_LAYER & {*self.settings, *optional}
        of_layers = {k: v for k, v in overrides.items() if k.partition(":")[0] in by_layer}
        unknown = sorted(set(overrides) - set(allowed) - set(of_layers) - optional)
        if unknown:
            raise ValueError(
                f"Invalid override: {', '.join(unknown)} (allowed for this strategy: {', '.join(allowed)})"
            )
        return replace(
            self,
            lr=overrides.get("lr", self.lr),
            settings={k: overrides.get(k, v) for k, v in self.settings.items()}
            | of_layers
            | {k: overrides[k] for k in optional & set(overrides)},
            optimizer_settings=self.optimizer_settings | {k: overrides[k] for k in in_optimizer if k in overrides},
        )


PER_LAYER = {"openness", "pull_back", "rank"}
_SP = {"openness": 0.5, "pull_back": 1.0}  # the plugin's defaults
# Learning rates for networks other than perceptrons.
RATES_BY_NETWORK = {"cnn": {"sp": 0.02, "sp-both": 1.5e-4}}
_BESIDE_REPLAY = {
    "loss": "squared error",
    "plugins": ("replay", "sp"),
    "settings": _SP | {"shrinkage": 50.0},
    "joint_weight": True,
}

# By benchmark and number of tasks; found on validation images, seeds 100 to 104: docs/experiments.md.
RECIPES: dict[str, dict[int, dict[str, Recipe]]] = {
    "split-mnist": {
        2: {
            "naive-sgd": Recipe("SGD", 0.1, "squared error"),
            "naive-adam": Recipe("Adam", 1e-3),
            "ewc": Recipe("SGD", 0.01, "squared error", plugins=("ewc",), settings={"strength": 5000.0}),
            "si": Recipe("SGD", 0.02, "squared error", plugins=("si",), settings={"strength": 3000.0}),
            "mas": Recipe("SGD", 0.005, "squared error", plugins=("mas",), settings={"strength": 400.0}),
            "sp-optimizer": Recipe("SelectivePlasticity", 3e-3),
            "sp": Recipe("SGD", 0.1, "squared error", plugins=("sp",), settings=_SP),
            "replay-sgd": Recipe("SGD", {200: 0.1, 2000: 0.3}, plugins=("replay",)),
            "replay-adam": Recipe("Adam", {200: 5e-4, 2000: 1e-3}, plugins=("replay",)),
            "replay-joint": Recipe("SGD", {200: 0.05, 2000: 0.15}, "squared error", ("replay",), joint_weight=True),
            "sp-replay-sgd": Recipe("SGD", 0.1, **_BESIDE_REPLAY),
            "joint": Recipe("Adam", 1e-3, template="joint"),
        },
        5: {
            "naive-sgd": Recipe("SGD", 0.07, "squared error"),
            "naive-adam": Recipe("Adam", 1e-3),
            "ewc": Recipe("SGD", 0.02, "squared error", plugins=("ewc",), settings={"strength": 1000.0}),
            "si": Recipe("SGD", 0.1, "squared error", plugins=("si",), settings={"strength": 5000.0}),
            "mas": Recipe("SGD", 0.005, plugins=("mas",), settings={"strength": 5.0}),
            "sp-optimizer": Recipe("SelectivePlasticity", 3e-3),
            "sp": Recipe("SGD", 0.07, "squared error", plugins=("sp",), settings=_SP),
            "replay-sgd": Recipe("SGD", 0.2, plugins=("replay",)),
            "replay-adam": Recipe("Adam", {200: 2e-4, 2000: 1e-3}, plugins=("replay",)),
            "replay-joint": Recipe(
                "SGD", {50: 0.01, 200: 0.03, 1000: 0.1, 2000: 0.1}, "squared error", ("replay",), joint_weight=True
            ),
            "sp-replay-sgd": Recipe("SGD", 0.1, **_BESIDE_REPLAY),
            "joint": Recipe("Adam", 1e-3, template="joint"),
        },
    },
}
RECIPES["permuted-mnist"] = {
    10: {
        "naive-sgd": Recipe("SGD", {10000: 0.05, 60000: 0.01}, "squared error"),
        "naive-adam": Recipe("Adam", {10000: 1e-4, 60000: 5e-5}, "squared error"),
        "ewc": Recipe(
            "SGD", {10000: 0.05, 60000: 0.02}, "squared error", plugins=("ewc",), settings={"strength": 100.0}
        ),
        "si": Recipe("SGD", {10000: 0.05, 60000: 0.02}, "squared error", plugins=("si",), settings={"strength": 100.0}),
        "mas": Recipe(
            "SGD", {10000: 0.05, 60000: 0.02}, "squared error", plugins=("mas",), settings={"strength": 10.0}
        ),
        "sp-optimizer": Recipe("SelectivePlasticity", 3e-4, "squared error"),
        "sp": Recipe("SGD", 0.1, "squared error", plugins=("sp",), settings=_SP),
        "replay-sgd": Recipe("SGD", {50: 0.1, 200: 0.2, 2000: 0.2, 5000: 0.3}, plugins=("replay",)),
        "replay-adam": Recipe("Adam", {200: 3e-4, 2000: 1e-3}, plugins=("replay",)),
        "replay-joint": Recipe("SGD", 0.15, "squared error", ("replay",), joint_weight=True),
        "sp-replay-sgd": Recipe("SGD", 0.1, **_BESIDE_REPLAY),
        "joint": Recipe("Adam", 1e-3, template="joint"),
    },
}

# The elementwise gate and its controls: between Adam (eps 1e-8) and SGD (eps 1), without momentum.
_GATED = {"plasticity_k": 5.0, "beta1": 0.0, "eps": 1e-3}
_RATES = {10000: 3e-3, 60000: 2e-3}
_CONSOLIDATED = {"loss": "squared error", "plugins": ("consolidation",), "optimizer_settings": _GATED}
# The plugin's gate on the gradient and the optimizer's on the update.
_BOTH = {
    "loss": "squared error",
    "plugins": ("sp", "consolidation"),
    "settings": _SP,
    "optimizer_settings": _GATED | {"plasticity_k": 1.0},
}
RECIPES["permuted-mnist"][10] |= {
    "upgd": Recipe("UPGD", {10000: 0.02, 60000: 0.01}, "squared error", optimizer_settings={"sigma": 1e-3}),
    "gate-off": Recipe(
        "SelectivePlasticity",
        {10000: 3e-4, 60000: 1e-4},
        "squared error",
        optimizer_settings=_GATED | {"plasticity_k": 0.0},
    ),
    "gate-constant": Recipe("constant gate", _RATES, **_CONSOLIDATED),
    "gate-random": Recipe("random gate", _RATES, **_CONSOLIDATED),
    "sp-running": Recipe("SelectivePlasticity", {10000: 2e-3, 60000: 1e-3}, "squared error", optimizer_settings=_GATED),
    "sp-consolidated-adam": Recipe(
        "SelectivePlasticity",
        1e-3,
        "squared error",
        plugins=("consolidation",),
        optimizer_settings={"plasticity_k": 5.0},
    ),
    "sp-consolidated": Recipe("SelectivePlasticity", _RATES, **_CONSOLIDATED),
    "sp-both": Recipe("SelectivePlasticity", _RATES, **_BOTH),
}
_BOTH_BESIDE_REPLAY = _BOTH | _BESIDE_REPLAY | {"plugins": ("replay", *_BOTH["plugins"])}
# The same optimizer and loss beside replay without any gate.
_NEITHER_BESIDE_REPLAY = {
    "loss": "squared error",
    "plugins": ("replay",),
    "joint_weight": True,
    "optimizer_settings": _GATED | {"plasticity_k": 0.0},
}
for _recipes in RECIPES["split-mnist"].values():
    _recipes["sp-both"] = Recipe("SelectivePlasticity", 1e-3, **_BOTH)
    _recipes["sp-replay"] = Recipe("SelectivePlasticity", 1e-3, **_BOTH_BESIDE_REPLAY)
    _recipes["replay-adaptive"] = Recipe(
        "SelectivePlasticity", {50: 3e-5, 200: 1e-4, 500: 3e-4, 1000: 1e-3, 2000: 2e-3}, **_NEITHER_BESIDE_REPLAY
    )
RECIPES["permuted-mnist"][10]["sp-replay"] = Recipe("SelectivePlasticity", 3e-3, **_BOTH_BESIDE_REPLAY)
RECIPES["permuted-mnist"][10]["replay-adaptive"] = Recipe(
    "SelectivePlasticity", {50: 1e-3, 200: 2e-3}, **_NEITHER_BESIDE_REPLAY
)
# The same, samples being drawn from Gaussians instead of stored.
_DRAWN_RATES: dict = {2: 2e-3, 5: 1e-3, 10: {10000: 2e-3, 60000: 1e-3}}  # by number of tasks
# With stored samples, too, by their number.
_MIXED_RATES: dict = {2: {200: 1e-3, 2000: 2e-3}, 5: {200: 1e-3, 2000: 2e-3}, 10: {200: 2e-3, 2000: 1e-3}}
for _tuned in RECIPES.values():
    for _tasks, _recipes in _tuned.items():
        _recipes["gaussian-replay"] = replace(
            _recipes["replay-adaptive"], lr=_DRAWN_RATES[_tasks], plugins=("gaussians",)
        )
        _recipes["sp-gaussian"] = replace(
            _recipes["sp-replay"], lr=_recipes["sp-both"].lr, plugins=("gaussians", *_BOTH["plugins"])
        )
        # With stored samples, too: there the runs have a buffer.
        _recipes["replay-gaussian"] = replace(_recipes["gaussian-replay"], lr=_MIXED_RATES[_tasks])
        _recipes["sp-replay-gaussian"] = replace(_recipes["sp-gaussian"], lr=_recipes["sp-replay"].lr)
# Other methods without replay. The ridge regression is solved for: no step of SGD moves it.
_RIDGE = Recipe("SGD", 0.0, "squared error", ("ridge",), {"ridge": 1.0}, model="random features")
RECIPES["split-mnist"][2] |= {
    "lwf": Recipe("SGD", 0.02, "squared error", ("lwf",), {"alpha": 3.0, "temperature": 0.2}),
    "owm": Recipe("SGD", 0.1, "squared error", ("owm",), {"alpha": 0.03}),
    "gpm": Recipe("SGD", 0.05, "squared error", ("gpm",), {"epsilon": 0.95}),
    "rf-ridge": _RIDGE,
}
RECIPES["split-mnist"][5] |= {
    "lwf": Recipe("SGD", 0.05, "cross-entropy", ("lwf",), {"alpha": 5.0, "temperature": 2.0}),
    "owm": Recipe("SGD", 0.05, "squared error", ("owm",), {"alpha": 0.1}),
    "gpm": Recipe("SGD", 0.05, "squared error", ("gpm",), {"epsilon": 0.9}),
    "rf-ridge": _RIDGE,
}
RECIPES["permuted-mnist"][10] |= {
    "lwf": Recipe("SGD", 0.05, "squared error", ("lwf",), {"alpha": 0.1, "temperature": 0.2}),
    "owm": Recipe("SGD", 0.2, "cross-entropy", ("owm",), {"alpha": 3.0}),
    "gpm": Recipe("SGD", 0.1, "squared error", ("gpm",), {"epsilon": 0.8}),
    "rf-ridge": _RIDGE,
}
# Methods that store samples. Of those that choose their loss, a row says which; the others bring their own.
RECIPES["split-mnist"][5] |= {
    "a-gem": Recipe("SGD", 0.01, plugins=("a-gem",)),
    "gem": Recipe("SGD", 0.05, plugins=("gem",), settings={"memory_strength": 0.5}),
    "gdumb": Recipe("SGD", 0.2, plugins=("gdumb",), settings={"passes": {50: 100.0, 200: 100.0, 1000: 10.0}}),
    "er-ace": Recipe("SGD", {50: 0.2, 200: 0.3, 1000: 0.2}, template="er-ace"),
    "der++": Recipe(
        "SGD",
        {50: 0.01, 200: 0.05, 500: 0.05, 1000: 0.05},
        settings={"alpha": {50: 1.0, 500: 0.3, 1000: 1.0}, "beta": {50: 1.0, 200: 0.5, 1000: 0.5}},
        template="der++",
    ),
    "replay-distilled": Recipe(
        "SGD", 0.1, "squared error", ("replay", "distillation"), {"weight": 0.3}, joint_weight=True
    ),
    "replay-gated": Recipe("SGD", 0.05, "squared error", ("replay", "constant gate"), {"gate": 0.3}, joint_weight=True),
    "cumulative": Recipe("Adam", 1e-3, template="cumulative"),
}
RECIPES["split-mnist"][2] |= {
    "a-gem": Recipe("SGD", 0.002, plugins=("a-gem",)),
    "gem": Recipe("SGD", 0.05, plugins=("gem",), settings={"memory_strength": 0.5}),
    "gdumb": Recipe("SGD", {200: 0.2, 1000: 0.3}, plugins=("gdumb",), settings={"passes": 30.0}),
    "er-ace": Recipe("SGD", {200: 0.2, 2000: 0.3}, template="er-ace"),
    "der++": Recipe("SGD", {200: 0.05, 2000: 0.1}, settings={"alpha": 0.1, "beta": 1.0}, template="der++"),
    "cumulative": Recipe("Adam", 1e-3, template="cumulative"),
}
RECIPES["permuted-mnist"][10] |= {
    "a-gem": Recipe("SGD", 0.05, plugins=("a-gem",)),
    "gem": Recipe("SGD", 0.1, plugins=("gem",), settings={"memory_strength": 0.0}),
    "gdumb": Recipe("SGD", 0.3, plugins=("gdumb",), settings={"passes": {50: 10.0, 200: 30.0}}),
    "er-ace": Recipe("SGD", {50: 0.1, 200: 0.2}, template="er-ace"),
    "der++": Recipe("SGD", 0.1, settings={"alpha": {2000: 0.3, 5000: 0.1}, "beta": 1.0}, template="der++"),
    "cumulative": Recipe("Adam", 1e-3, template="cumulative"),
}
for _strategy in ("replay-distilled", "replay-gated"):
    RECIPES["split-mnist"][2][_strategy] = RECIPES["split-mnist"][5][_strategy]
    RECIPES["permuted-mnist"][10][_strategy] = RECIPES["split-mnist"][5][_strategy]
# As published, plain SGD or Adam with cross-entropy: docs/original.md.
_BUFFER = {"plugins": ("legacy",), "settings": {"fifo": 1.0}}
RECIPES["split-mnist"][2] |= {
    "legacy-adam": Recipe("Adam", 1e-3),
    "legacy-sp": Recipe("legacy", 3e-3, optimizer_settings={"plasticity_k": 5.0}),
    "legacy-adam-replay": Recipe("Adam", 1e-3, **_BUFFER),
    "legacy-control": Recipe("legacy", 3e-3, optimizer_settings={"plasticity_k": 0.0}, **_BUFFER),
    "legacy-sp-replay": Recipe("legacy", 3e-3, optimizer_settings={"plasticity_k": 5.0}, **_BUFFER),
}

# The plugin where it isn't told when a task ends: otherwise the same.
for _tuned in RECIPES.values():
    for _recipes in _tuned.values():
        for _name in ("sp", "sp-both", "sp-replay"):
            for _when in ("surprise", "continuous") if _name in _recipes else ():
                _plugins = tuple(f"sp-{_when}" if p == "sp" else p for p in _recipes[_name].plugins)
                _recipes[f"{_name}-{_when}"] = replace(_recipes[_name], plugins=_plugins)

# With a head for each task, where one head's settings are not good enough: docs/experiments.md.
TASK_INCREMENTAL_RECIPES = {
    "naive-sgd": replace(RECIPES["split-mnist"][5]["naive-sgd"], lr=0.03),
    "ewc": replace(RECIPES["split-mnist"][5]["ewc"], lr=0.05),
    "si": replace(RECIPES["split-mnist"][5]["si"], settings={"strength": 100.0}),
    "mas": replace(RECIPES["split-mnist"][5]["mas"], lr=0.02, settings={"strength": 1.0}),
    "replay-joint": replace(RECIPES["split-mnist"][5]["replay-joint"], lr=0.1),
    "joint": replace(RECIPES["split-mnist"][5]["joint"], lr=3e-4),
    "packnet": Recipe(
        "SGD", 0.2, plugins=("packnet",), settings={"prune_proportion": 0.75, "post_prune_epochs": 1}, model="packnet"
    ),
}


def nearest(tuned: dict[int, object], value: int):
    """The entry that was tuned for the nearest value, in ratio."""
    return tuned[min(tuned, key=lambda v: abs(math.log(value / v)))]
