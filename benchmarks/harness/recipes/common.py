"""Parts of the recipes of both benchmarks."""

from collections.abc import Mapping
from dataclasses import replace

from harness.recipes.recipe import SE, Recipe

PLUGIN = {"openness": 0.5, "pull_back": 1.0}  # the plugin's defaults
# Of the optimizer: between Adam (eps 1e-8) and SGD (eps 1), without momentum, with a gate or without.
GATED = {"plasticity_k": 5.0, "beta1": 0.0, "eps": 1e-3}
UNGATED = GATED | {"plasticity_k": 0.0}
BESIDE_PLUGIN = GATED | {"plasticity_k": 1.0}

SHRUNK = PLUGIN | {"shrinkage": 50.0}  # a small memory counts less
REPLAY = {"plugins": ("replay",), "stores": True}
REPLAY_JOINT = {"loss": SE, "plugins": ("replay",), "joint_weight": True, "stores": True}
# The plugin's gate on the gradient and the optimizer's on the update: alone, with stored samples, and with Gaussians.
BOTH = {"loss": SE, "plugins": ("sp", "consolidation"), "arguments": PLUGIN, "optimizer_arguments": BESIDE_PLUGIN}
BOTH_REPLAY = BOTH | REPLAY_JOINT | {"plugins": ("replay", "sp", "consolidation"), "arguments": SHRUNK}
BOTH_GAUSSIANS = BOTH_REPLAY | {"plugins": ("gaussians", "sp", "consolidation"), "stores": False}
# The same optimizer without gates.
NEITHER_REPLAY = REPLAY_JOINT | {"optimizer_arguments": UNGATED}
NEITHER_GAUSSIANS = NEITHER_REPLAY | {"plugins": ("gaussians",), "stores": False}

# A dendrite more on each hidden layer at the start of each experience (0 epochs of patience), without the package's own
# sigmoid. And as published: the package's own rule and activation, on every layer.
DENDRITES = {"most": 5.0, "patience": 0.0, "sigmoid": 0.0, "readout": 0.0}
PUBLISHED_DENDRITES = {"most": 100.0, "patience": 10.0, "sigmoid": 1.0, "readout": 1.0}


_JOINT = {"joint_weight": True, "stores": True}
SHARED = {
    "sp-replay-sgd": Recipe("SGD", 0.1, SE, ("replay", "sp"), SHRUNK, **_JOINT),
    "replay-distilled": Recipe("SGD", 0.1, SE, ("replay", "distillation"), {"weight": 0.3}, **_JOINT),
    "replay-gated": Recipe("SGD", 0.05, SE, ("replay", "constant gate"), {"gate": 0.3}, **_JOINT),
    "rf-ridge": Recipe("SGD", 0.0, SE, ("ridge",), {"ridge": 1.0}, model="random features"),  # solved: no step
    "joint": Recipe("Adam", 1e-3, template="joint"),
    "cumulative": Recipe("Adam", 1e-3, template="cumulative"),
}


def with_dendrites(recipe: Recipe, arguments: Mapping[str, float] = DENDRITES) -> Recipe:
    return replace(recipe, plugins=("dendrites", *recipe.plugins), arguments={**recipe.arguments, **arguments})


def with_boundaries_found(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes, and those of the plugin if nobody says when a task ends: by surprise, or in chunks of the stream."""
    found = dict(recipes)
    for name in ("sp", "sp-both", "sp-replay"):
        for how in ("surprise", "continuous"):
            plugins = tuple(f"sp-{how}" if plugin == "sp" else plugin for plugin in recipes[name].plugins)
            found[f"{name}-{how}"] = replace(recipes[name], plugins=plugins)
    return found
