"""What a run is: its settings, all of them, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MNIST = ROOT / "benchmarks" / "data" / "mnist"

# Networks and what reports call them.
NETWORKS = {
    "256-256": "MLP 784-256-256-10",
    "100-100": "MLP 784-100-100-10",
    "400-400": "MLP 784-400-400-10",
    "1000-1000": "MLP 784-1000-1000-10",
    "1000": "MLP 784-1000-10",
    "cnn": "CNN of two convolutions (16 and 32 channels) and a linear layer",
}
# In the order in which tables and figures show them.
STRATEGIES = (
    "naive-sgd",
    "naive-adam",
    "ewc",
    "si",
    "mas",
    "rf-ridge",
    "sp-optimizer",
    "sp",
    "sp-both",
    "gaussian-replay",
    "sp-gaussian",
    "replay-sgd",
    "replay-adam",
    "replay-joint",
    "sp-replay",
    "joint",
)
# What else can be asked for by name: more methods, and studies of a part, each on its benchmark.
_NO_REPLAY = ("lwf", "owm", "gpm")
_REPLAY = (
    "a-gem", "gem", "gdumb", "er-ace", "der++", "replay-distilled", "replay-gated", "replay-adaptive", "sp-replay-sgd",
    "replay-gaussian", "sp-replay-gaussian",
)  # fmt: skip
# The plugin where it isn't told when a task ends.
UNTOLD = tuple(f"{name}-{when}" for name in ("sp", "sp-both", "sp-replay") for when in ("surprise", "continuous"))
# How the tasks come: one after another; the same in experiences of one batch, for strategies that are told nothing;
# mixed with their neighbours; each turning slowly into the next; the first once more at the end; or of classes drawn at
# random, by seed (Split MNIST's are in order otherwise).
STREAMS = ("tasks", "online", "blurred", "drifting", "returning", "random classes")
BOUNDS = ("cumulative", "joint")
# Where every task has a head of its own, which is chosen by the task's label.
TASK_INCREMENTAL = (
    "naive-sgd", "ewc", "si", "mas", "lwf", "packnet", "sp", "sp-both",
    "replay-sgd", "replay-joint", "sp-replay", "joint",
)  # fmt: skip
STUDIES = {
    "split-mnist": (
        *_NO_REPLAY,
        *_REPLAY,
        *UNTOLD,
        "cumulative",
        "legacy-adam",
        "legacy-sp",
        "legacy-adam-replay",
        "legacy-control",
        "legacy-sp-replay",
    ),
    "permuted-mnist": (
        *_NO_REPLAY,
        *_REPLAY,
        *UNTOLD,
        "cumulative",
        "upgd",
        "gate-off",
        "gate-constant",
        "gate-random",
        "sp-running",
        "sp-consolidated-adam",
        "sp-consolidated",
    ),
}
USES_REPLAY = (
    "replay-sgd", "replay-adam", "replay-joint", "sp-replay", *_REPLAY, *UNTOLD[4:],
    "legacy-adam-replay", "legacy-control", "legacy-sp-replay",
)  # fmt: skip


def strategies_of(benchmark: str, task_incremental: bool = False) -> tuple[str, ...]:
    """Those that can be asked for."""
    return TASK_INCREMENTAL if task_incremental else STRATEGIES + STUDIES[benchmark]


@dataclass(frozen=True)
class Run:
    """One training of one strategy on one benchmark with one seed.

    Attributes:
        benchmark: "split-mnist" or "permuted-mnist".
        strategy: one of STRATEGIES, or of the benchmark's STUDIES; or of TASK_INCREMENTAL.
        n_tasks, epochs, batch_size: experiences, epochs an experience, samples of the stream in a mini-batch.
        replay_buffer: stored samples; 0 for strategies without replay.
        seed: fixes data order, initial weights and permutations; runs with equal seeds are paired.
        train_per_task: training images a task (Permuted MNIST); None is all.
        validation: score on 1/6 of the training images, held out, instead of the test set, for tuning.
        network: one of NETWORKS.
        overrides: (name, value) pairs that replace the strategy's settings, for tuning.
        stream: one of STREAMS.
        task_incremental: a head for each task, and task labels in training and in tests (Split MNIST).
    """

    benchmark: str
    strategy: str
    n_tasks: int
    epochs: int
    batch_size: int
    replay_buffer: int
    seed: int
    train_per_task: int | None = None
    validation: bool = False
    network: str = "256-256"
    overrides: tuple[tuple[str, float], ...] = ()
    stream: str = "tasks"
    task_incremental: bool = False

    def __post_init__(self):
        object.__setattr__(self, "overrides", tuple(sorted(dict(self.overrides).items())))

    def settings(self) -> dict:
        """All that decides a run's result: its settings, and what its strategy trains with."""
        from harness.strategies import recipe_of  # here, as torch is slow to load

        recipe = recipe_of(self)
        names = ("optimizer", "lr", "loss", "joint_weight", "model", "template")
        trained = {name: getattr(recipe, name) for name in names} | {"plugins": list(recipe.plugins)}
        return self.to_json() | trained | {"arguments": recipe.settings | recipe.optimizer_settings}

    @property
    def heads(self) -> int:
        return self.n_tasks if self.task_incremental else 1

    def to_json(self) -> dict:
        values = {**asdict(self), "overrides": dict(self.overrides)}
        for name, usual in (("stream", "tasks"), ("task_incremental", False)):  # stored results may not have these
            if values[name] == usual:
                del values[name]
        return values

    def key(self, code: str) -> str:
        """Names the run and the code that made it: a stored result is only ever reused for the same of both."""
        settings = json.dumps(self.to_json(), sort_keys=True)
        return f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}-{code}"


def settings_of(run: dict) -> str:
    """What a record's run is, whatever its seed, as a key."""
    return json.dumps({name: value for name, value in run.items() if name != "seed"}, sort_keys=True)


def in_mini_batches(run: Run) -> bool:
    """Whether each experience that the strategy trains on is one mini-batch."""
    return run.stream == "online" and run.strategy in (*UNTOLD, "naive-sgd", "replay-adaptive")


def code_fingerprint() -> str:
    """Hash of the code that determines a run's result: the library, and how the harness trains with it."""
    files = sorted((ROOT / "avalanche_sp").rglob("*.py"))
    files += [
        ROOT / "benchmarks" / "harness" / name
        for name in (
            "controls.py",
            "legacy.py",
            "networks.py",
            "projections.py",
            "recipes.py",
            "rehearsal.py",
            "ridge.py",
            "run.py",
            "strategies.py",
            "streams.py",
        )
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
