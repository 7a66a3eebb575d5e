"""Split MNIST: the settings of each strategy, tuned on validation images, seeds 100 to 104 (docs/trials)."""

from harness.recipes import common
from harness.recipes.recipe import CE, SE, Recipe, Size, Tasks

_MIXED = Tasks({2: Size({200: 1e-3, 2000: 2e-3}), 5: Size({200: 1e-3, 2000: 2e-3})})
_LEGACY = {"plugins": ("legacy",), "arguments": {"fifo": 1.0}, "stores": True}  # as published: docs/original.md

# fmt: off
RECIPES = common.with_boundaries_found({
    # Without stored samples.
    "naive-sgd": Recipe("SGD", Tasks({2: 0.1, 5: 0.07}), SE),
    "naive-adam": Recipe("Adam", 1e-3, CE),
    "ewc": Recipe("SGD", Tasks({2: 0.01, 5: 0.02}), SE, ("ewc",), {"strength": Tasks({2: 5000.0, 5: 1000.0})}),
    "si": Recipe("SGD", Tasks({2: 0.02, 5: 0.1}), SE, ("si",), {"strength": Tasks({2: 3000.0, 5: 5000.0})}),
    "mas": Recipe("SGD", 0.005, Tasks({2: SE, 5: CE}), ("mas",), {"strength": Tasks({2: 400.0, 5: 5.0})}),
    "lwf": Recipe("SGD", Tasks({2: 0.02, 5: 0.05}), Tasks({2: SE, 5: CE}), ("lwf",),
                  {"alpha": Tasks({2: 3.0, 5: 5.0}), "temperature": Tasks({2: 0.2, 5: 2.0})}),
    "owm": Recipe("SGD", Tasks({2: 0.1, 5: 0.05}), SE, ("owm",), {"alpha": Tasks({2: 0.03, 5: 0.1})}),
    "gpm": Recipe("SGD", 0.05, SE, ("gpm",), {"epsilon": Tasks({2: 0.95, 5: 0.9})}),
    "sp-optimizer": Recipe("SelectivePlasticity", 3e-3, CE),
    "sp": Recipe("SGD", Tasks({2: 0.1, 5: 0.07}), SE, ("sp",), common.PLUGIN),
    "sp-both": Recipe("SelectivePlasticity", 1e-3, **common.BOTH),
    "gaussian-replay": Recipe("SelectivePlasticity", Tasks({2: 2e-3, 5: 1e-3}), **common.NEITHER_GAUSSIANS),
    "sp-gaussian": Recipe("SelectivePlasticity", 1e-3, **common.BOTH_GAUSSIANS),
    # With stored samples.
    "replay-sgd": Recipe("SGD", Tasks({2: Size({200: 0.1, 2000: 0.3}), 5: 0.2}), CE, **common.REPLAY),
    "replay-adam": Recipe("Adam", Tasks({2: Size({200: 5e-4, 2000: 1e-3}), 5: Size({200: 2e-4, 2000: 1e-3})}), CE,
                          **common.REPLAY),
    "replay-joint": Recipe("SGD", Tasks({2: Size({200: 0.05, 2000: 0.15}),
                                         5: Size({50: 0.01, 200: 0.03, 1000: 0.1, 2000: 0.1})}), **common.REPLAY_JOINT),
    "replay-adaptive": Recipe("SelectivePlasticity", Size({50: 3e-5, 200: 1e-4, 500: 3e-4, 1000: 1e-3, 2000: 2e-3}),
                              **common.NEITHER_REPLAY),
    "sp-replay": Recipe("SelectivePlasticity", 1e-3, **common.BOTH_REPLAY),
    "replay-gaussian": Recipe("SelectivePlasticity", _MIXED, **common.NEITHER_GAUSSIANS | {"stores": True}),
    "sp-replay-gaussian": Recipe("SelectivePlasticity", 1e-3, **common.BOTH_GAUSSIANS | {"stores": True}),
    "a-gem": Recipe("SGD", Tasks({2: 0.002, 5: 0.01}), CE, ("a-gem",), stores=True),
    "gem": Recipe("SGD", 0.05, CE, ("gem",), {"memory_strength": 0.5}, stores=True),
    "gdumb": Recipe("SGD", Tasks({2: Size({200: 0.2, 1000: 0.3}), 5: 0.2}), CE, ("gdumb",),
                    {"passes": Tasks({2: 30.0, 5: Size({50: 100.0, 200: 100.0, 1000: 10.0})})}, stores=True),
    "er-ace": Recipe("SGD", Tasks({2: Size({200: 0.2, 2000: 0.3}), 5: Size({50: 0.2, 200: 0.3, 1000: 0.2})}),
                     template="er-ace", stores=True),
    "der++": Recipe("SGD", Tasks({2: Size({200: 0.05, 2000: 0.1}),
                                  5: Size({50: 0.01, 200: 0.05, 500: 0.05, 1000: 0.05})}),
                    arguments={"alpha": Tasks({2: 0.1, 5: Size({50: 1.0, 500: 0.3, 1000: 1.0})}),
                               "beta": Tasks({2: 1.0, 5: Size({50: 1.0, 200: 0.5, 1000: 0.5})})},
                    template="der++", stores=True),
    **common.SHARED,
    # The method's first publication.
    "legacy-adam": Recipe("Adam", 1e-3),
    "legacy-sp": Recipe("legacy", 3e-3, optimizer_arguments={"plasticity_k": 5.0}),
    "legacy-adam-replay": Recipe("Adam", 1e-3, **_LEGACY),
    "legacy-control": Recipe("legacy", 3e-3, optimizer_arguments={"plasticity_k": 0.0}, **_LEGACY),
    "legacy-sp-replay": Recipe("legacy", 3e-3, optimizer_arguments={"plasticity_k": 5.0}, **_LEGACY),
})
WITH_DENDRITES = {  # each with the same strategy without them, in the order of tables
    "sp-dendrites": "sp", "dendrites": "naive-sgd",
    "sp-dendrites-replay": "sp-replay-sgd", "dendrites-replay": "replay-joint",
}
_AS_PUBLISHED = {
    "legacy-dendrites": "legacy-adam", "legacy-dendrites-replay": "legacy-adam-replay",
    "legacy-sp-dendrites": "legacy-sp",
}
for _name, _without in WITH_DENDRITES.items():
    RECIPES[_name] = common.with_dendrites(RECIPES[_without])
for _name, _without in _AS_PUBLISHED.items():
    RECIPES[_name] = common.with_dendrites(RECIPES[_without], common.PUBLISHED_DENDRITES)
# With a head for each task.
TASK_INCREMENTAL = {
    "naive-sgd": Recipe("SGD", 0.03, SE),
    "ewc": Recipe("SGD", 0.05, SE, ("ewc",), {"strength": 1000.0}),
    "si": Recipe("SGD", 0.1, SE, ("si",), {"strength": 100.0}),
    "mas": Recipe("SGD", 0.02, CE, ("mas",), {"strength": 1.0}),
    "lwf": RECIPES["lwf"],
    "packnet": Recipe("SGD", 0.2, CE, ("packnet",), {"prune_proportion": 0.75, "post_prune_epochs": 1},
                      model="packnet"),
    "sp": RECIPES["sp"], "sp-both": RECIPES["sp-both"], "replay-sgd": RECIPES["replay-sgd"],
    "replay-joint": Recipe("SGD", 0.1, **common.REPLAY_JOINT),
    "sp-replay": RECIPES["sp-replay"],
    "joint": Recipe("Adam", 3e-4, CE, template="joint"),
}
# fmt: on
