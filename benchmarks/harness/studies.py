"""What the documents show: studies, each a set of settings whose runs one table compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from harness.protocols import PROTOCOLS, overrides_of
from harness.recipes.split_mnist import RECIPES
from harness.settings import STRATEGIES, TASK_INCREMENTAL, USES_REPLAY
from harness.store import USUAL_RUN, as_text

# The settings that tell runs apart; the rest of a run's settings follows from them.
IDENTITY = ["benchmark", "strategy", "n_tasks", "epochs", "batch_size", "replay_buffer", "network", *USUAL_RUN]


@dataclass(frozen=True)
class Row:
    """A strategy of a study.

    Attributes:
        strategy: its name.
        label: its name in tables; by default the strategy's.
        buffers: numbers of stored samples, if they are not the study's.
        changes: settings that are not the study's.
    """

    strategy: str
    label: str = ""
    buffers: tuple[int, ...] | None = None
    changes: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Runs that are compared with each other.

    Attributes:
        title: what captions call it.
        settings: what all its runs share; one epoch, batches of 64 and the usual network if nothing else is said.
        rows: what is compared, in the order of the tables.
        buffers: numbers of stored samples of the strategies with replay.
        curves: the numbers of stored samples with which accuracy is measured during training, too. 0: without any.
        seeds: number of runs of each row.
        protocol: name of the published protocol whose settings it has.
    """

    title: str
    settings: Mapping
    rows: Sequence[Row]
    buffers: tuple[int, ...] = (200,)
    curves: tuple[int, ...] = ()
    seeds: int = 10
    protocol: str | None = None

    def cells(self) -> list[dict]:
        """Settings of each row with each of its buffers, without the seed; "label" is its name in tables."""
        return [
            {"label": row.label or row.strategy, "epochs": 1, "batch_size": 64, "network": "256-256"}
            | {**USUAL_RUN, **self.settings, **row.changes, "strategy": row.strategy, "replay_buffer": buffer}
            | {"overrides": self._overrides(row, buffer)}
            for row in self.rows
            for buffer in ((row.buffers or self.buffers) if row.strategy in USES_REPLAY else (0,))
        ]

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The study's runs in the order of its rows, with their "label".

        Args:
            frame: runs of a store, each once (``newest``).
        """
        cells = self.cells()
        places = {tuple(as_text(cell[name]) for name in IDENTITY): place for place, cell in enumerate(cells)}
        place = np.array([places.get(identity, -1) for identity in frame["identity"]])
        order = np.argsort(place, kind="stable")
        order = order[place[order] >= 0]
        return frame.iloc[order].assign(label=[cells[i]["label"] for i in place[order]])

    def runs(self, seeds: int) -> list[dict]:
        """Settings of its runs, with the seed. Seeds outermost: a study cut short is a whole one with fewer seeds."""
        cells = [{name: value for name, value in cell.items() if name != "label"} for cell in self.cells()]
        return [{**cell, "seed": seed} for seed in range(seeds) for cell in cells]

    def keeps_curve(self, run) -> bool:
        return run.replay_buffer in self.curves

    def _overrides(self, row: Row, buffer: int) -> dict[str, float]:
        own = {**self.settings.get("overrides", {}), **row.changes.get("overrides", {})}
        return dict(overrides_of(self.settings["benchmark"], self.protocol, row.strategy, buffer, own.items()))


def newest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of the runs with equal settings and seed the one of the newest version: a row a run, by seed.

    Args:
        frame: as ``Store.frame`` returns it.
    """
    settings = frame[IDENTITY].astype(object).where(frame[IDENTITY].notna(), None)
    frame = frame.assign(identity=list(settings.itertuples(index=False, name=None)))
    frame = frame.sort_values(["version", "finished"]).drop_duplicates(["identity", "seed"], keep="last")
    return frame.sort_values("seed", kind="stable")


def _rows(strategies: str) -> tuple[Row, ...]:
    return tuple(map(Row, strategies.split()))


def _with(overrides: Mapping[str, float], strategy: str, label: str = "", buffers=None) -> Row:
    return Row(strategy, label, buffers, {"overrides": overrides})


def _split(tasks: int, **settings) -> dict:
    return {"benchmark": "split-mnist", "n_tasks": tasks, **settings}


def _permuted(tasks: int, **settings) -> dict:
    return {"benchmark": "permuted-mnist", "n_tasks": tasks, **settings}


def _protocol(benchmark: str, name: str, strategies: str, seeds: int = 3) -> Study:
    arguments = dict(PROTOCOLS[benchmark][name].arguments)
    buffers = tuple(arguments.pop("replay_buffer", ()))
    settings = {"benchmark": benchmark, "n_tasks": arguments.pop("tasks"), **arguments}
    title = f"{'Split' if benchmark == 'split-mnist' else 'Permuted'} MNIST, `{name}`"
    return Study(title, settings, _rows(strategies), buffers, seeds=seeds, protocol=name)


OURS = "sp-replay"
ALONE = "sp-both"  # ours without stored samples
# Ours with stored samples, and the same without any. The second pair has samples drawn from Gaussians as well.
WITH_AND_WITHOUT = {OURS: ALONE, "sp-replay-gaussian": "sp-gaussian"}
BEST_WITHOUT = ("rf-ridge", ALONE, "gaussian-replay", "sp-gaussian")

_TASKS2, _TASKS5, _PERMUTED10 = "Split MNIST, 2 tasks", "Split MNIST, 5 tasks", "Permuted MNIST, 10 tasks"
_TEN_THOUSAND, _OF_THEM = _permuted(10, train_per_task=10000), "Permuted MNIST, 10 tasks of 10,000 images"
_BUFFERS, _FOUR_BUFFERS = (50, 100, 200, 500, 1000, 2000, 5000), (50, 200, 1000, 2000)
_EVERY_METHOD = (
    *_rows("naive-sgd ewc si mas lwf rf-ridge sp sp-both gaussian-replay sp-gaussian"),
    *_rows("replay-sgd replay-joint replay-adaptive gdumb a-gem er-ace der++ sp-replay"),
    *_rows("replay-gaussian sp-replay-gaussian"),
    Row("gem", buffers=(50, 200)),  # it is slow
    *_rows("cumulative joint"),
)
BY_BUFFER = {
    "buffers_split2": Study(_TASKS2, _split(2), _EVERY_METHOD, _BUFFERS),
    "buffers_split5": Study(_TASKS5, _split(5), _EVERY_METHOD, _BUFFERS, curves=(0, 200)),
    "buffers_permuted10": Study(_OF_THEM, _TEN_THOUSAND, _EVERY_METHOD, _BUFFERS),
}

_NO_REPLAY = "rf-ridge sp sp-both gaussian-replay sp-gaussian"
_GATES = "upgd gate-off gate-constant gate-random sp-running sp-consolidated-adam sp-consolidated"
_NAIVE = "naive-sgd naive-adam ewc si mas"
_FIVE = {"epochs": 5}
WITHOUT_REPLAY = {
    "compare": Study(_TASKS2, _split(2), _rows(" ".join(STRATEGIES)), (200, 2000), curves=(0, 200, 2000)),
    "split5": Study(
        _TASKS5,
        _split(5),
        _rows(f"{_NAIVE} {_NO_REPLAY} lwf owm gpm replay-joint der++ replay-adaptive sp-replay joint"),
    ),
    "split2_5epochs": Study(_TASKS2, _split(2, **_FIVE), _rows("rf-ridge sp sp-both sp-gaussian")),
    "split5_5epochs": Study(
        _TASKS5,
        _split(5, **_FIVE),
        (*_rows("rf-ridge sp sp-both"), _with({"lr": 1e-4}, "gaussian-replay"), Row("sp-gaussian")),
    ),
    "split5_wide": Study(_TASKS5, _split(5, network="1000"), _rows("rf-ridge sp-both gaussian-replay sp-gaussian")),
    "split5_cnn": Study(_TASKS5, _split(5, network="cnn"), _rows(_NO_REPLAY)),
    "classes10": Study("Split MNIST, 10 tasks", _split(10), _rows(f"naive-sgd {_NO_REPLAY} owm gpm")),
    "permuted10k": Study(_OF_THEM, _TEN_THOUSAND, _rows(f"{_NAIVE} sp-optimizer {_GATES}")),
    "permuted10k_no_replay": Study(_OF_THEM, _TEN_THOUSAND, _rows(f"{_NO_REPLAY} gpm joint")),
    "permuted60k": Study(_PERMUTED10, _permuted(10), _rows(f"{_NAIVE} sp sp-both {_GATES}"), seeds=7),
    "permuted60k_100": Study(_PERMUTED10, _permuted(10, network="100-100"), _rows(f"{_NO_REPLAY} joint")),
    "permuted60k_100_20": Study(
        "Permuted MNIST, 20 tasks", _permuted(20, network="100-100"), _rows("sp sp-both joint")
    ),
}

# Learning rates by buffer: with five times as many steps the other methods need smaller ones (docs/experiments.md).
_FIVE_EPOCHS = {
    "replay-joint": {50: 0.001, 200: 0.005, 1000: 0.03, 2000: 0.1},
    "replay-adaptive": {50: 3e-6, 200: 3e-5, 1000: 1.5e-4, 2000: 5e-4},
    "der++": {50: 0.001, 200: 0.005, 1000: 0.02, 2000: 0.02},
}
_STEP_ALONE = {"openness": 1e9, "pull_back": 0.0}
_NO_GATE, _NO_PLUGIN = {"plasticity_k": 0.0}, {"openness": math.inf}
_RATES = {name: RECIPES[name].at(5, 60000).lr for name in ("sp", ALONE, "sp-gaussian", "joint")}
_CHANGES = {
    "as tuned": lambda rate: {},
    "learning rate x 3": lambda rate: {"overrides": {"lr": 3 * rate}},
    "learning rate / 3": lambda rate: {"overrides": {"lr": rate / 3}},
    "batch 10": lambda rate: {"batch_size": 10},
    "batch 256": lambda rate: {"batch_size": 256},
    "10 epochs": lambda rate: {"epochs": 10},
    "random classes": lambda rate: {"stream": "random classes"},
}
PARTS = {
    "epochs_split5": Study(
        _TASKS5,
        _split(5, **_FIVE),
        (
            *(
                _with({"lr": lr}, name, "", (size,))
                for name, rates in _FIVE_EPOCHS.items()
                for size, lr in rates.items()
            ),
            *_rows("er-ace rf-ridge sp-both sp-replay"),
        ),
        _FOUR_BUFFERS,
    ),
    "controls_split5": Study(
        f"{_TASKS5}, no stored sample",
        _split(5),
        (
            Row(ALONE),
            _with({"readout_step": 0.0}, ALONE, "the same, no readout step"),
            _with({"pull_back": 0.0}, ALONE, "the same, no penalty"),
            _with(_STEP_ALONE, ALONE, "the same, of the plugin the readout step alone"),
            _with(_NO_PLUGIN, ALONE, "the same, no plugin"),
            _with(_NO_GATE, ALONE, "the same, no gate in the optimizer"),
            Row("sp", "the plugin with SGD"),
            _with({"readout_step": 0.0}, "sp", "the plugin with SGD, no readout step"),
            _with(_STEP_ALONE, "sp", "SGD, of the plugin the readout step alone"),
            Row("naive-sgd", "SGD alone"),
        ),
    ),
    "ablations_split5": Study(
        _TASKS5,
        _split(5),
        (
            Row(OURS),
            _with(_NO_PLUGIN, OURS, "the same, no plugin"),
            _with(_NO_GATE, OURS, "the same, no gate in the optimizer"),
            _with(_NO_PLUGIN | _NO_GATE, OURS, "the same, neither gate"),
            _with({"pull_back": 0.0}, OURS, "the same, no penalty"),
            _with({"readout_step": 0.0}, OURS, "the same, no readout step"),
            _with({"shrinkage": 0.0}, OURS, "the same, a small memory at its full weight"),
            Row("sp-replay-sgd", "the plugin with SGD"),
            Row("replay-gated", "SGD with one constant gate"),
            Row("replay-distilled", "SGD with distillation, no gate"),
            Row("replay-joint", "SGD alone"),
        ),
        _FOUR_BUFFERS,
    ),
    "robustness_split5": Study(
        _TASKS5,
        _split(5),
        [Row(name, label, None, change(rate)) for label, change in _CHANGES.items() for name, rate in _RATES.items()],
    ),
    "task_incremental_split5": Study(
        f"{_TASKS5}, a head for each", _split(5, epochs=2, task_incremental=True), _rows(" ".join(TASK_INCREMENTAL))
    ),
}

_LEGACY = _split(2, epochs=5, batch_size=128)
_BUFFERED = "legacy-adam-replay legacy-control legacy-sp-replay"
PUBLISHED = {
    "original": Study("As published", _LEGACY, _rows(f"legacy-adam legacy-sp {_BUFFERED}"), (2000,)),
    "original_working_buffer": Study(
        "The same with a buffer that keeps its samples",
        _LEGACY,
        [_with({"fifo": 0.0}, name) for name in _BUFFERED.split()],
        (2000,),
    ),
    "protocol_original": _protocol(
        "split-mnist",
        "original",
        "replay-sgd replay-adam replay-joint replay-adaptive er-ace der++ sp-both sp-replay replay-gaussian "
        "sp-replay-gaussian joint",
        seeds=10,
    ),
    "protocol_mammoth_split": _protocol("split-mnist", "mammoth", "replay-sgd joint sp-replay"),
    "protocol_mammoth_permuted": _protocol("permuted-mnist", "mammoth", "replay-sgd der++ joint sp-replay"),
    "protocol_gpm": _protocol("permuted-mnist", "gpm", "replay-sgd gpm joint sp-both"),
    "protocol_van_de_ven_split": _protocol("split-mnist", "van-de-ven", "naive-adam joint sp-both"),
    "protocol_van_de_ven_permuted": _protocol("permuted-mnist", "van-de-ven", "naive-adam joint sp-both"),
}

# Streams that do not say where a task ends, by the name that their table gives them. Each strategy is told the
# boundaries, finds them by surprise, or consolidates in chunks of the stream.
_SP, _BOTH, _OURS = (_rows(f"{name} {name}-surprise {name}-continuous") for name in ("sp", ALONE, OURS))
_ONLINE, _SIZES = _split(5, stream="online", batch_size=10), (200, 1000)
BOUNDARIES = {
    "split": Study(_TASKS5, _split(5), (*_SP, *_BOTH)),
    "split-replay": Study(_TASKS5, _split(5), _OURS, _SIZES),
    "online": Study(_TASKS5, {**_ONLINE, "overrides": {"lr": 0.02, "openness": 0.1}}, _SP),
    "online naive": Study(_TASKS5, {**_ONLINE, "overrides": {"lr": 0.02}}, _rows("naive-sgd")),
    "online-replay": Study(_TASKS5, {**_ONLINE, "overrides": {"lr": 3e-4}}, (*_OURS, Row("replay-adaptive")), (500,)),
    "permuted": Study(_OF_THEM, _TEN_THOUSAND, (*_SP, *_BOTH)),
    "permuted-replay": Study(_OF_THEM, _TEN_THOUSAND, _OURS, _SIZES),
    "one task": Study("MNIST, 1 task", _split(1, epochs=20), _rows("naive-sgd sp-surprise sp-continuous")),
    "blurred-split": Study(_TASKS5, _split(5, stream="blurred"), _SP),
    "blurred-permuted": Study(_OF_THEM, {**_TEN_THOUSAND, "stream": "blurred"}, _SP),
    "drifting": Study(_OF_THEM, {**_TEN_THOUSAND, "stream": "drifting"}, (*_SP, Row("naive-sgd"))),
    "returning": Study(_TASKS5, _split(5, stream="returning"), _SP),
}


def _layers(network: str, *layers: str) -> Study:
    """Each layer protected alone, all but it, and each with four times and with a quarter of its openness."""
    rows = [Row("sp", "all"), _with(_NO_PLUGIN, "sp", "none")]
    for layer in layers:
        one = f"openness:{layer}"
        rows.append(_with({**_NO_PLUGIN, one: 0.5}, "sp", f"only {layer}"))
        rows.append(_with({one: math.inf}, "sp", f"all but {layer}"))
        rows.append(_with({one: 2.0}, "sp", f"{layer} x 4"))
        rows.append(_with({one: 0.125}, "sp", f"{layer} / 4"))
    return Study(_TASKS5, _split(5, network=network), rows)


# By network, whose gated layers are named first to last.
LAYERS = {"256-256": ("1", "3", "5"), "cnn": ("0", "2", "5")}

# All that the documents show, by the name that they and the command line give it.
STUDIES = {
    **BY_BUFFER,
    **WITHOUT_REPLAY,
    **PARTS,
    **PUBLISHED,
    **{f"boundaries_{name}".replace(" ", "_"): study for name, study in BOUNDARIES.items()},
    **{f"layers_{network}": _layers(network, *layers) for network, layers in LAYERS.items()},
}

# The table at the head of the README: methods by their number of stored samples, and benchmarks.
METHODS = {
    "none": {
        "naive-sgd": "SGD alone",
        "ewc": "elastic weight consolidation",
        "si": "synaptic intelligence",
        "mas": "memory-aware synapses",
        "gpm": "gradient projection memory",
        "rf-ridge": "ridge regression on random features",
        "sp": "**this plugin**, with SGD",
        "sp-both": "**this plugin and optimizer**",
        "gaussian-replay": "`GaussianBuffer`, no gate: the control of the next row",
        "sp-gaussian": "**this plugin, optimizer and `GaussianBuffer`**",
    },
    "200": {
        "replay-joint": "replay, tuned",
        "der++": "dark experience replay",
        "sp-replay": "**this plugin and optimizer**, with replay",
        "sp-replay-gaussian": "**the same and `GaussianBuffer`**",
    },
    "all": {"joint": "joint training"},
}
_COLUMNS = {
    "2 tasks": _split(2),
    "5 tasks": _split(5),
    "10 tasks, a class each": _split(10),
    "10 permutations": _TEN_THOUSAND,
}
_METHODS = _rows(" ".join(name for methods in METHODS.values() for name in methods))
OVERVIEW = {column: Study(column, settings, _METHODS) for column, settings in _COLUMNS.items()}
