"""What the page of results shows: its studies, and the runs that each is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.protocols import PROTOCOLS, overrides_of
from harness.recipes import RECIPES
from harness.settings import TASK_INCREMENTAL, USES_REPLAY, Run, settings_of


@dataclass(frozen=True)
class Row:
    """A strategy, and how it differs from its recipe.

    Attributes:
        strategy: its name.
        overrides: settings that aren't its recipe's.
        label: what reports call it; its name, if there is nothing else to say.
        buffers: stored samples that it is trained with, where these aren't all of the study's.
        epochs, batch_size: where they aren't the study's.
        stream: how the tasks come, as in a run.
    """

    strategy: str
    overrides: tuple[tuple[str, float], ...] = ()
    label: str = ""
    buffers: tuple[int, ...] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    stream: str = "tasks"


@dataclass(frozen=True)
class Study:
    """Runs that are compared with each other.

    Attributes:
        title: what it is about.
        benchmark, n_tasks, epochs, batch_size, train_per_task, network: as in a run.
        rows: what is compared.
        buffers: stored samples of the rows with replay.
        curves: with which of them the accuracy curve is kept; 0: of the rows without replay.
        seeds: runs of each row, unless fewer are asked for.
        protocol: the protocol that it follows, whose published settings go before the recipes'.
        task_incremental: as in a run.
    """

    title: str
    benchmark: str
    n_tasks: int
    rows: tuple[Row, ...]
    buffers: tuple[int, ...]
    epochs: int = 1
    batch_size: int = 64
    train_per_task: int | None = None
    network: str = "256-256"
    curves: tuple[int, ...] = ()
    seeds: int = 10
    protocol: str | None = None
    task_incremental: bool = False

    def runs(self, seeds: int, strategies: list[str] | None = None) -> list[Run]:
        """Seeds outermost, so that a study cut short is a whole one with fewer seeds.

        Args:
            seeds: how many, from 0 up.
            strategies: those wanted; all, by default.
        """
        return [
            self._run(row, buffer, seed)
            for seed in range(seeds)
            for row in self.rows
            if strategies is None or row.strategy in strategies
            for buffer in self.buffers_of(row)
        ]

    def buffers_of(self, row: Row) -> tuple[int, ...]:
        return (row.buffers or self.buffers) if row.strategy in USES_REPLAY else (0,)

    def labels(self) -> dict[str, str]:
        """What reports call a run, by its settings."""
        return {
            settings_of(self._run(row, buffer, 0).to_json()): row.label or row.strategy
            for row in self.rows
            for buffer in self.buffers_of(row)
        }

    def keeps_curve(self, run: Run) -> bool:
        return run.replay_buffer in self.curves

    def _run(self, row: Row, buffer: int, seed: int) -> Run:
        return Run(
            benchmark=self.benchmark,
            strategy=row.strategy,
            n_tasks=self.n_tasks,
            epochs=row.epochs or self.epochs,
            batch_size=row.batch_size or self.batch_size,
            replay_buffer=buffer,
            seed=seed,
            train_per_task=self.train_per_task,
            network=self.network,
            overrides=overrides_of(self.benchmark, self.protocol, row.strategy, buffer, row.overrides),
            task_incremental=self.task_incremental,
            stream=row.stream,
        )


def _rows(*strategies: str) -> tuple[Row, ...]:
    return tuple(Row(strategy) for strategy in strategies)


def _protocol(benchmark: str, name: str, *strategies: str, seeds: int = 3) -> Study:
    arguments = PROTOCOLS[benchmark][name].arguments
    return Study(
        title=f"{ {'split-mnist': 'Split', 'permuted-mnist': 'Permuted'}[benchmark]} MNIST, `{name}`",
        benchmark=benchmark,
        n_tasks=arguments["tasks"],
        rows=_rows(*strategies),
        buffers=tuple(arguments.get("replay_buffer", ())),
        epochs=arguments["epochs"],
        batch_size=arguments["batch_size"],
        network=arguments["network"],
        seeds=seeds,
        protocol=name,
    )


BUFFERS = (50, 100, 200, 500, 1000, 2000, 5000)
OURS = "sp-replay"
ALONE = "sp-both"  # ours without any stored sample
# Ours with stored samples, and the same without any; the second with samples drawn from Gaussians, too.
WITH_AND_WITHOUT = {OURS: ALONE, "sp-replay-gaussian": "sp-gaussian"}
BEST_WITHOUT = ("rf-ridge", ALONE, "gaussian-replay", "sp-gaussian")
_WITHOUT = ("naive-sgd", "ewc", "si", "mas", "lwf", "rf-ridge", "sp", ALONE, "gaussian-replay", "sp-gaussian")
_WITH = (
    "replay-sgd", "replay-joint", "replay-adaptive", "gdumb", "a-gem", "er-ace", "der++", OURS,
    "replay-gaussian", "sp-replay-gaussian",
)  # fmt: skip
_SWEEP = (*_rows(*_WITHOUT, *_WITH), Row("gem", buffers=(50, 200)), *_rows("cumulative", "joint"))  # GEM is slow

# By the name of their folder in docs/results.
BY_BUFFER = {
    "buffers_split2": Study("Split MNIST, 2 tasks", "split-mnist", 2, _SWEEP, BUFFERS),
    "buffers_split5": Study("Split MNIST, 5 tasks", "split-mnist", 5, _SWEEP, BUFFERS, curves=(0, 200)),
    "buffers_permuted10": Study(
        "Permuted MNIST, 10 tasks of 10,000 images",
        "permuted-mnist",
        10,
        _SWEEP,
        BUFFERS,
        train_per_task=10000,
    ),
}
# Learning rates by buffer: with five times as many steps the other methods want smaller ones (docs/experiments.md).
_FIVE_EPOCHS = {
    "replay-joint": {50: 0.001, 200: 0.005, 1000: 0.03, 2000: 0.1},
    "replay-adaptive": {50: 3e-6, 200: 3e-5, 1000: 1.5e-4, 2000: 5e-4},
    "der++": {50: 0.001, 200: 0.005, 1000: 0.02, 2000: 0.02},
}
EPOCHS = {
    "epochs_split5": Study(
        "Split MNIST, 5 tasks",
        "split-mnist",
        5,
        (
            *(
                Row(strategy, (("lr", lr),), buffers=(buffer,))
                for strategy, rates in _FIVE_EPOCHS.items()
                for buffer, lr in rates.items()
            ),
            *_rows("er-ace", "rf-ridge", ALONE, OURS),
        ),
        (50, 200, 1000, 2000),
        epochs=5,
    )
}
# The plugin with nothing but its readout's step.
_STEP_ALONE = (("openness", 1e9), ("pull_back", 0.0))
ABLATIONS = {
    "controls_split5": Study(
        "Split MNIST, 5 tasks, no stored sample",
        "split-mnist",
        5,
        (
            Row(ALONE),
            Row(ALONE, (("readout_step", 0.0),), "the same, the readout not settled"),
            Row(ALONE, (("pull_back", 0.0),), "the same, the pull-back off"),
            Row(ALONE, _STEP_ALONE, "the same, of the plugin the readout's step alone"),
            Row(ALONE, (("openness", math.inf),), "the same, the plugin off"),
            Row(ALONE, (("plasticity_k", 0.0),), "the same, the optimizer's gate off"),
            Row("sp", label="the plugin with SGD"),
            Row("sp", (("readout_step", 0.0),), "the plugin with SGD, the readout not settled"),
            Row("sp", _STEP_ALONE, "SGD, of the plugin the readout's step alone"),
            Row("naive-sgd", label="SGD, neither"),
        ),
        (),
    ),
    "ablations_split5": Study(
        "Split MNIST, 5 tasks",
        "split-mnist",
        5,
        (
            Row(OURS),
            Row(OURS, (("openness", math.inf),), "the same, the plugin off"),
            Row(OURS, (("plasticity_k", 0.0),), "the same, the optimizer's gate off"),
            Row(OURS, (("openness", math.inf), ("plasticity_k", 0.0)), "the same, both gates off"),
            Row(OURS, (("pull_back", 0.0),), "the same, the pull-back off"),
            Row(OURS, (("readout_step", 0.0),), "the same, the readout not settled"),
            Row(OURS, (("shrinkage", 0.0),), "the same, a small memory at its full weight"),
            Row("sp-replay-sgd", label="the plugin with SGD"),
            Row("replay-gated", label="SGD with one constant gate"),
            Row("replay-distilled", label="SGD with distillation, no gate"),
            Row("replay-joint", label="SGD, neither"),
        ),
        (50, 200, 1000, 2000),
    )
}
TASK_LABELS = {
    "task_incremental_split5": Study(
        "Split MNIST, 5 tasks, a head for each",
        "split-mnist",
        5,
        _rows(*TASK_INCREMENTAL),
        (200,),
        epochs=2,
        task_incremental=True,
    )
}

# What changes with the learning rate, the batch, the epochs and the tasks' classes; joint training shows what of it is
# theirs alone.
_RATES = {name: RECIPES["split-mnist"][5][name].lr for name in ("sp", ALONE, "sp-gaussian", "joint")}
ROBUSTNESS = {
    "robustness_split5": Study(
        "Split MNIST, 5 tasks",
        "split-mnist",
        5,
        tuple(
            Row(name, label=f"{name}, {label}" if label else name, **change(rate))
            for label, change in (
                ("", lambda rate: {}),
                ("learning rate x 3", lambda rate: {"overrides": (("lr", 3 * rate),)}),
                ("learning rate / 3", lambda rate: {"overrides": (("lr", rate / 3),)}),
                ("batch 10", lambda rate: {"batch_size": 10}),
                ("batch 256", lambda rate: {"batch_size": 256}),
                ("10 epochs", lambda rate: {"epochs": 10}),
                ("random classes", lambda rate: {"stream": "random classes"}),
            )
            for name, rate in _RATES.items()
        ),
        (),
    )
}


def _legacy(title: str, *rows: Row) -> Study:
    return Study(title, "split-mnist", 2, rows, (2000,), epochs=5, batch_size=128)


ORIGINAL = {
    "original": _legacy(
        "As published",
        *_rows("legacy-adam", "legacy-sp", "legacy-adam-replay", "legacy-control", "legacy-sp-replay"),
    ),
    "original_working_buffer": _legacy(
        "The same with a buffer that keeps what it stored",
        *(Row(name, (("fifo", 0.0),)) for name in ("legacy-adam-replay", "legacy-control", "legacy-sp-replay")),
    ),
    "protocol_original": _protocol(
        "split-mnist", "original",
        "replay-sgd", "replay-adam", "replay-joint", "replay-adaptive", "er-ace", "der++", ALONE, OURS,
        "replay-gaussian", "sp-replay-gaussian", "joint",
        seeds=10,
    )  # fmt: skip
}
PUBLISHED = {
    "protocol_mammoth_split": _protocol("split-mnist", "mammoth", "replay-sgd", "joint", OURS),
    "protocol_mammoth_permuted": _protocol("permuted-mnist", "mammoth", "replay-sgd", "der++", "joint", OURS),
    "protocol_gpm": _protocol("permuted-mnist", "gpm", "replay-sgd", "gpm", "joint", ALONE),
    "protocol_van_de_ven_split": _protocol("split-mnist", "van-de-ven", "naive-adam", "joint", ALONE),
    "protocol_van_de_ven_permuted": _protocol("permuted-mnist", "van-de-ven", "naive-adam", "joint", ALONE),
}
EVERY = {**BY_BUFFER, **EPOCHS, **ROBUSTNESS, **ABLATIONS, **TASK_LABELS, **ORIGINAL, **PUBLISHED}
