"""The strategies: a line on each, and what it trains with on each benchmark."""

from dataclasses import replace

from harness.recipes import permuted_mnist, split_mnist
from harness.recipes.recipe import Recipe

# In the order of tables and figures.
ABOUT = {
    "naive-sgd": "SGD, nothing against forgetting",
    "naive-adam": "Adam, nothing against forgetting",
    "ewc": "elastic weight consolidation: penalty on changes of important weights, by squared gradients",
    "si": "synaptic intelligence: the same, importance by the path of the weights",
    "mas": "memory-aware synapses: the same, importance by the outputs' sensitivity",
    "rf-ridge": "ridge regression on fixed random features, with the memory of the gate",
    "sp-optimizer": "our optimizer with its default arguments, without consolidation",
    "sp": "our plugin with SGD",
    "sp-both": "our plugin and our optimizer",
    "gaussian-replay": "replay of samples drawn from Gaussians, no gate: control",
    "sp-gaussian": "our plugin and optimizer with replay of samples drawn from Gaussians",
    "replay-sgd": "replay of stored samples, SGD",
    "replay-adam": "replay of stored samples, Adam",
    "replay-joint": "replay with squared error, weighed as in joint training, SGD",
    "sp-replay": "our plugin and optimizer with replay of stored samples",
    "joint": "one training on all tasks at once: upper bound",
    "lwf": "learning without forgetting: distillation from the network before the task",
    "owm": "orthogonal weights modification: gradients scaled down along old inputs",
    "gpm": "gradient projection memory: gradients orthogonal to old inputs",
    "a-gem": "averaged gradient episodic memory: gradient that lowers no loss on stored samples",
    "gem": "gradient episodic memory: the same, task by task; slow",
    "gdumb": "a fresh network trained on the stored samples alone",
    "er-ace": "replay with asymmetric cross-entropy",
    "der++": "dark experience replay: stored samples with their outputs",
    "replay-distilled": "`replay-joint` and distillation on the stored samples",
    "replay-gated": "`replay-joint` with one constant gate: control",
    "replay-adaptive": "replay with our optimizer, no gate: control",
    "sp-replay-sgd": "our plugin with SGD and replay of stored samples",
    "replay-gaussian": "replay of stored samples and of samples drawn from Gaussians, no gate",
    "sp-replay-gaussian": "the gates with replay of stored samples and of samples drawn from Gaussians",
    "cumulative": "training on all samples so far, task by task: upper bound",
    "upgd": "utility-based perturbed gradient descent",
    "gate-off": "our optimizer without its gate: control",
    "gate-constant": "our optimizer, one gate a tensor of the same mean: control",
    "gate-random": "our optimizer, its gates shuffled within each tensor: control",
    "sp-running": "our optimizer with a running importance, without consolidation",
    "sp-consolidated-adam": "our optimizer with consolidation, with Adam's momentum and eps",
    "sp-consolidated": "our optimizer with consolidation",
    "legacy-adam": "first publication: Adam without memory",
    "legacy-sp": "first publication: its gate on SGD",
    "legacy-adam-replay": "first publication: Adam with its memory",
    "legacy-control": "first publication: its memory without its gate",
    "legacy-sp-replay": "first publication: its gate and its memory",
    "dendrites": "`naive-sgd` with artificial dendrites, one more on each hidden layer for each later task",
    "dendrites-replay": "`replay-joint` with the same dendrites",
    "sp-dendrites": "our plugin with SGD and the same dendrites",
    "sp-dendrites-replay": "our plugin with SGD, replay and the same dendrites",
    "legacy-dendrites": "dendrites' first publication: Adam without memory",
    "legacy-dendrites-replay": "dendrites' first publication: Adam with its memory",
    "legacy-sp-dendrites": "dendrites' first publication: the gate on SGD",
    "packnet": "PackNet: each task prunes and freezes a part of the network (task labels)",
}
for _name, _what in (("sp", "the gate"), ("sp-both", "both gates"), ("sp-replay", "both gates with replay")):
    ABOUT[f"{_name}-surprise"] = f"{_what}; boundaries between tasks are found by surprise"
    ABOUT[f"{_name}-continuous"] = f"{_what}; consolidation in chunks of the stream"

# Names in tables and figures, where they are not the keys of ABOUT. "optimizer" is ours, consolidated after each task.
NAMES = {
    "rf-ridge": "random features + ridge",
    "sp-optimizer": "optimizer, not consolidated",
    "sp": "gate",
    "sp-both": "gate + optimizer",
    "gaussian-replay": "Gaussians",
    "sp-gaussian": "gate + optimizer + Gaussians",
    "sp-replay": "replay + gate + optimizer",
    "replay-gated": "replay, constant gate",
    "replay-adaptive": "replay + optimizer without gate",
    "sp-replay-sgd": "replay + gate",
    "replay-gaussian": "replay + Gaussians",
    "sp-replay-gaussian": "replay + gate + optimizer + Gaussians",
    "gate-off": "optimizer without gate",
    "gate-constant": "optimizer, one gate a tensor",
    "gate-random": "optimizer, shuffled gates",
    "sp-running": "optimizer, running importance",
    "sp-consolidated-adam": "optimizer, momentum and eps of Adam",
    "sp-consolidated": "optimizer",
    "dendrites-replay": "replay + dendrites",
    "sp-dendrites": "gate + dendrites",
    "sp-dendrites-replay": "replay + gate + dendrites",
}
for _name in ("sp", "sp-both", "sp-replay"):
    NAMES[f"{_name}-surprise"] = f"{NAMES[_name]}, boundaries found"
    NAMES[f"{_name}-continuous"] = f"{NAMES[_name]}, no boundaries"
_KEYS = {name.replace(" ", "").lower(): key for key, name in NAMES.items()}


def name_of(label: str) -> str:
    """The name in tables and figures of a strategy or of its variant ("sp-wider"); other text as it is."""
    strategy, _, variant = label.rpartition("-")
    if variant in ("wider", "sigmoid", "one", "softmax"):
        return f"{name_of(strategy)}, {variant}"
    return NAMES.get(label, label)


def strategy_called(name: str) -> str:
    """The key of a strategy, from its name, its name without blanks, or its key."""
    return _KEYS.get(name.replace(" ", "").lower(), name)


# By the kind of benchmark. All data sets have the settings that were tuned on MNIST.
_BY_KIND = {"split": split_mnist.RECIPES, "permuted": permuted_mnist.RECIPES}
TASK_INCREMENTAL = tuple(split_mnist.TASK_INCREMENTAL)
USES_REPLAY = tuple(name for name in ABOUT if any(r[name].stores for r in _BY_KIND.values() if name in r))
_RATES = {"cnn": {"sp": 0.02, "sp-both": 1.5e-4}}  # learning rates for other networks than perceptrons


def strategies_of(benchmark: str, task_incremental: bool = False) -> tuple[str, ...]:
    """Names of the strategies that a benchmark has."""
    recipes = _recipes(benchmark, task_incremental)
    return tuple(name for name in ABOUT if name in recipes)


def _recipes(benchmark: str, task_incremental: bool) -> dict[str, Recipe]:
    return split_mnist.TASK_INCREMENTAL if task_incremental else _BY_KIND[benchmark.partition("-")[0]]


def recipe_of(run) -> Recipe:
    """The recipe of a ``settings.Run``: the one tuned for the nearest numbers, with the run's overrides.

    Raises:
        ValueError: the benchmark does not have the strategy, or the strategy does not have a setting.
    """
    allowed = strategies_of(run.benchmark, run.task_incremental)
    if run.strategy not in allowed:
        raise ValueError(f"Invalid strategy: {run.strategy} (allowed: {', '.join(allowed)})")
    recipe = _recipes(run.benchmark, run.task_incremental)[run.strategy]
    recipe = recipe.at(run.n_tasks, run.replay_buffer or run.train_per_task or 60000)
    rate = _RATES.get(run.network, {}).get(run.strategy, recipe.lr)
    return replace(recipe, lr=rate).override(dict(run.overrides))
