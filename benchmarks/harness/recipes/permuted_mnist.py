"""Permuted MNIST: the settings of each strategy, tuned on validation images, seeds 100 to 104 (docs/trials)."""

from harness.recipes import common
from harness.recipes.recipe import CE, SE, Recipe, Size

_SGD, _GATED_RATES = Size({10000: 0.05, 60000: 0.02}), Size({10000: 3e-3, 60000: 2e-3})
_CONSOLIDATED = {"loss": SE, "plugins": ("consolidation",), "optimizer_arguments": common.GATED}

# fmt: off
RECIPES = common.with_boundaries_found({
    # Without stored samples.
    "naive-sgd": Recipe("SGD", Size({10000: 0.05, 60000: 0.01}), SE),
    "naive-adam": Recipe("Adam", Size({10000: 1e-4, 60000: 5e-5}), SE),
    "ewc": Recipe("SGD", _SGD, SE, ("ewc",), {"strength": 100.0}),
    "si": Recipe("SGD", _SGD, SE, ("si",), {"strength": 100.0}),
    "mas": Recipe("SGD", _SGD, SE, ("mas",), {"strength": 10.0}),
    "lwf": Recipe("SGD", 0.05, SE, ("lwf",), {"alpha": 0.1, "temperature": 0.2}),
    "owm": Recipe("SGD", 0.2, CE, ("owm",), {"alpha": 3.0}),
    "gpm": Recipe("SGD", 0.1, SE, ("gpm",), {"epsilon": 0.8}),
    "sp-optimizer": Recipe("SelectivePlasticity", 3e-4, SE),
    "sp": Recipe("SGD", 0.1, SE, ("sp",), common.PLUGIN),
    "sp-both": Recipe("SelectivePlasticity", _GATED_RATES, **common.BOTH),
    "gaussian-replay": Recipe("SelectivePlasticity", Size({10000: 2e-3, 60000: 1e-3}), **common.NEITHER_GAUSSIANS),
    "sp-gaussian": Recipe("SelectivePlasticity", _GATED_RATES, **common.BOTH_GAUSSIANS),
    # With stored samples.
    "replay-sgd": Recipe("SGD", Size({50: 0.1, 200: 0.2, 2000: 0.2, 5000: 0.3}), CE, **common.REPLAY),
    "replay-adam": Recipe("Adam", Size({200: 3e-4, 2000: 1e-3}), CE, **common.REPLAY),
    "replay-joint": Recipe("SGD", 0.15, **common.REPLAY_JOINT),
    "replay-adaptive": Recipe("SelectivePlasticity", Size({50: 1e-3, 200: 2e-3}), **common.NEITHER_REPLAY),
    "sp-replay": Recipe("SelectivePlasticity", 3e-3, **common.BOTH_REPLAY),
    "replay-gaussian": Recipe("SelectivePlasticity", Size({200: 2e-3, 2000: 1e-3}),
                              **common.NEITHER_GAUSSIANS | {"stores": True}),
    "sp-replay-gaussian": Recipe("SelectivePlasticity", 3e-3, **common.BOTH_GAUSSIANS | {"stores": True}),
    "a-gem": Recipe("SGD", 0.05, CE, ("a-gem",), stores=True),
    "gem": Recipe("SGD", 0.1, CE, ("gem",), {"memory_strength": 0.0}, stores=True),
    "gdumb": Recipe("SGD", 0.3, CE, ("gdumb",), {"passes": Size({50: 10.0, 200: 30.0})}, stores=True),
    "er-ace": Recipe("SGD", Size({50: 0.1, 200: 0.2}), template="er-ace", stores=True),
    "der++": Recipe("SGD", 0.1, arguments={"alpha": Size({2000: 0.3, 5000: 0.1}), "beta": 1.0}, template="der++",
                    stores=True),
    **common.SHARED,
    # The optimizer's gate, element by element, and its controls.
    "upgd": Recipe("UPGD", Size({10000: 0.02, 60000: 0.01}), SE, optimizer_arguments={"sigma": 1e-3}),
    "gate-off": Recipe("SelectivePlasticity", Size({10000: 3e-4, 60000: 1e-4}), SE, optimizer_arguments=common.UNGATED),
    "gate-constant": Recipe("constant gate", _GATED_RATES, **_CONSOLIDATED),
    "gate-random": Recipe("random gate", _GATED_RATES, **_CONSOLIDATED),
    "sp-running": Recipe("SelectivePlasticity", Size({10000: 2e-3, 60000: 1e-3}), SE, optimizer_arguments=common.GATED),
    "sp-consolidated-adam": Recipe("SelectivePlasticity", 1e-3, SE, ("consolidation",),
                                   optimizer_arguments={"plasticity_k": 5.0}),
    "sp-consolidated": Recipe("SelectivePlasticity", _GATED_RATES, **_CONSOLIDATED),
})
# fmt: on
