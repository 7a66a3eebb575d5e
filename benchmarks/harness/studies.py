"""The studies that the documents show: each is a set of runs that one table compares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from harness.protocols import PROTOCOLS, overrides_of
from harness.recipes import TASK_INCREMENTAL, USES_REPLAY
from harness.recipes.recipe import CE
from harness.recipes.split_mnist import WITH_DENDRITES
from harness.settings import STRATEGIES, title_of
from harness.store import USUAL_RUN, as_text

# The settings that tell runs apart; the rest of a run's settings follows from them.
IDENTITY = ["benchmark", "strategy", "n_tasks", "epochs", "batch_size", "replay_buffer", "network", *USUAL_RUN]


@dataclass(frozen=True)
class Row:
    """A strategy of a study, its name in tables, and the settings and buffers that are not the study's."""

    strategy: str
    label: str = ""
    buffers: tuple[int, ...] | None = None
    changes: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Runs that are compared with each other.

    Attributes:
        settings: of all its runs; by default one epoch, batches of 64 and the usual network.
        buffers: numbers of stored samples of the strategies with replay.
        curves: numbers of stored samples with which accuracy is also measured during training. 0: without any.
        protocol: the published protocol whose settings it has.
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
        """Its runs among the newest ones, in the order of its rows, with their "label"."""
        cells = self.cells()
        places = {hash(tuple(as_text(cell[name]) for name in IDENTITY)): place for place, cell in enumerate(cells)}
        place = frame["identity"].map(places).dropna().sort_values(kind="stable")
        return frame.loc[place.index].assign(label=[cells[int(i)]["label"] for i in place])

    def runs(self, seeds: int) -> list[dict]:
        """Settings of its runs, with the seed. Seeds outermost: a study cut short is a whole one with fewer seeds."""
        runs = [cell | {"seed": seed} for seed in range(seeds) for cell in self.cells()]
        return [{name: value for name, value in run.items() if name != "label"} for run in runs]

    def keeps_curve(self, run) -> bool:
        return run.replay_buffer in self.curves

    def _overrides(self, row: Row, buffer: int) -> dict[str, float | str]:
        own = {**self.settings.get("overrides", {}), **row.changes.get("overrides", {})}
        return dict(overrides_of(self.settings["benchmark"], self.protocol, row.strategy, buffer, own.items()))


def newest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of a store's runs with equal settings and seed the one of the newest version, by seed."""
    settings = frame[IDENTITY].astype(object).where(frame[IDENTITY].notna(), None)
    frame = frame.assign(identity=[hash(row) for row in settings.itertuples(index=False, name=None)])
    frame = frame.sort_values(["version", "finished"]).drop_duplicates(["identity", "seed"], keep="last")
    return frame.sort_values("seed", kind="stable")


def _rows(strategies: str) -> tuple[Row, ...]:
    return tuple(map(Row, strategies.split()))


def _set(overrides: Mapping[str, float | str], strategy: str, label: str = "", *buffers: int) -> Row:
    return Row(strategy, label, buffers or None, {"overrides": overrides})


def _split(tasks: int, data: str = "mnist", **settings) -> dict:
    return {"benchmark": f"split-{data}", "n_tasks": tasks, **settings}


def _permuted(tasks: int, **settings) -> dict:
    return {"benchmark": "permuted-mnist", "n_tasks": tasks, **settings}


def _protocol(benchmark: str, name: str, strategies: str, seeds: int = 3) -> Study:
    arguments = dict(PROTOCOLS[benchmark][name].arguments)
    buffers = tuple(arguments.pop("replay_buffer", ()))
    settings = {"benchmark": benchmark, "n_tasks": arguments.pop("tasks"), **arguments}
    title = f"{title_of(benchmark)}, `{name}`"
    return Study(title, settings, _rows(strategies), buffers, seeds=seeds, protocol=name)


OURS = "sp-replay"
ALONE = "sp-both"  # ours without stored samples
# Ours with stored samples, and the same without any. The second pair has samples drawn from Gaussians as well.
WITH_AND_WITHOUT = {OURS: ALONE, "sp-replay-gaussian": "sp-gaussian"}
BEST_WITHOUT = ("rf-ridge", ALONE, "gaussian-replay", "sp-gaussian")

_TWO, _FIVE, _SMALL_TEN = "Split MNIST, 2 tasks", "Split MNIST, 5 tasks", "Permuted MNIST, 10 tasks of 10,000 images"
_TEN_THOUSAND = _permuted(10, train_per_task=10000)
_SIZES, _TWO_SIZES = (50, 200, 1000, 2000), (200, 2000)
_EVERY_METHOD = (
    *_rows("naive-sgd ewc si mas lwf rf-ridge sp sp-both gaussian-replay sp-gaussian"),
    *_rows("replay-sgd replay-joint replay-adaptive gdumb a-gem er-ace der++ sp-replay replay-gaussian"),
    *(Row("sp-replay-gaussian"), Row("gem", buffers=(50, 200)), *_rows("cumulative joint")),  # GEM is slow
)
BY_BUFFER = {
    "buffers_split2": Study(_TWO, _split(2), _EVERY_METHOD, _SIZES),
    "buffers_split5": Study(_FIVE, _split(5), _EVERY_METHOD, _SIZES, curves=(0, 200)),
    "buffers_permuted10": Study(_SMALL_TEN, _TEN_THOUSAND, _EVERY_METHOD, _SIZES),
}

_NAIVE, _NO_REPLAY = "naive-sgd naive-adam ewc si mas", "rf-ridge sp sp-both gaussian-replay sp-gaussian"
_ALL_FIVE = f"{_NAIVE} {_NO_REPLAY} lwf owm gpm replay-joint der++ replay-adaptive sp-replay joint"
_GATES = "upgd gate-off gate-constant gate-random sp-running sp-consolidated-adam sp-consolidated"
# With BatchNorm the rates of perceptrons diverge. These are the best of .0001 to .02 on validation images, seed 100.
_NORMALISED = (
    *_rows("rf-ridge sp-both gaussian-replay sp-gaussian joint"),
    *(_set({"lr": 5e-3}, name) for name in ("naive-sgd", "sp")),
    _set({"lr": 2e-3}, "ewc"),
    *(_set({"lr": 3e-4}, name) for name in ("owm", "gpm")),
)
WITHOUT_REPLAY = {
    "compare": Study(_TWO, _split(2), _rows(" ".join(STRATEGIES)), (200, 2000), curves=(0, 200, 2000)),
    "split5": Study(_FIVE, _split(5), _rows(_ALL_FIVE)),
    "split5_wide": Study(_FIVE, _split(5, network="1000"), _rows("rf-ridge sp-both gaussian-replay sp-gaussian")),
    "split5_cnn": Study(_FIVE, _split(5, network="cnn"), _rows(_NO_REPLAY)),
    "split5_cnn-bn": Study(_FIVE, _split(5, network="cnn-bn"), _NORMALISED, seeds=3),
    "classes10": Study("Split MNIST, 10 tasks", _split(10), _rows(f"naive-sgd {_NO_REPLAY} owm gpm")),
    "permuted10k": Study(_SMALL_TEN, _TEN_THOUSAND, _rows(f"{_NAIVE} sp-optimizer {_GATES}")),
    "permuted10k_no_replay": Study(_SMALL_TEN, _TEN_THOUSAND, _rows(f"{_NO_REPLAY} gpm joint")),
}

# Learning rates by buffer: with five times the steps the other methods need smaller ones (docs/trials/baselines.csv).
_FIVE_EPOCHS = {
    "replay-joint": {200: 0.005, 2000: 0.1},
    "replay-adaptive": {200: 3e-5, 2000: 5e-4},
    "der++": {200: 0.005, 2000: 0.02},
}
_EPOCHS = [_set({"lr": lr}, name, "", size) for name, rates in _FIVE_EPOCHS.items() for size, lr in rates.items()]
_STEP_ALONE = {"openness": 1e9, "pull_back": 0.0}
_NO_PLUGIN, _NO_GATE, _NO_PENALTY = {"openness": math.inf}, {"plasticity_k": 0.0}, {"pull_back": 0.0}
_NO_STEP = {"readout_step": 0.0}
_CONTROLS = (
    Row(ALONE),
    _set(_NO_STEP, ALONE, "the same, no readout step"),
    _set(_NO_PENALTY, ALONE, "the same, no penalty"),
    _set(_STEP_ALONE, ALONE, "the same, of the plugin the readout step alone"),
    _set(_NO_PLUGIN, ALONE, "the same, no plugin"),
    _set(_NO_GATE, ALONE, "the same, no gate in the optimizer"),
    Row("sp", "the plugin with SGD"),
    _set(_NO_STEP, "sp", "the plugin with SGD, no readout step"),
    _set(_STEP_ALONE, "sp", "SGD, of the plugin the readout step alone"),
    Row("naive-sgd", "SGD alone"),
)
_ABLATIONS = (
    Row(OURS),
    _set(_NO_PLUGIN, OURS, "the same, no plugin"),
    _set(_NO_GATE, OURS, "the same, no gate in the optimizer"),
    _set(_NO_PLUGIN | _NO_GATE, OURS, "the same, neither gate"),
    _set(_NO_PENALTY, OURS, "the same, no penalty"),
    _set(_NO_STEP, OURS, "the same, no readout step"),
    _set({"shrinkage": 0.0}, OURS, "the same, a small memory at its full weight"),
    Row("sp-replay-sgd", "the plugin with SGD"),
    Row("replay-gated", "SGD with one constant gate"),
    Row("replay-distilled", "SGD with distillation, no gate"),
    Row("replay-joint", "SGD alone"),
)
_HEADS = _split(5, epochs=2, task_incremental=True)
PARTS = {
    "epochs_split5": Study(
        _FIVE, _split(5, epochs=5), (*_EPOCHS, *_rows("er-ace rf-ridge sp sp-both sp-replay")), _TWO_SIZES
    ),
    "controls_split5": Study(f"{_FIVE}, no stored sample", _split(5), _CONTROLS),
    "ablations_split5": Study(_FIVE, _split(5), _ABLATIONS, _TWO_SIZES),
    "task_incremental_split5": Study(f"{_FIVE}, a head for each", _HEADS, _rows(" ".join(TASK_INCREMENTAL))),
}

_LEGACY, _BUFFERED = _split(2, epochs=5, batch_size=128), "legacy-adam-replay legacy-control legacy-sp-replay"
_WORKING = "The same with a buffer that keeps its samples"
_TUNED = "replay-sgd replay-adam replay-joint replay-adaptive er-ace der++ sp-both sp-replay replay-gaussian"
PUBLISHED = {
    "original": Study("As published", _LEGACY, _rows(f"legacy-adam legacy-sp {_BUFFERED}"), (2000,)),
    "original_working_buffer": Study(
        _WORKING, _LEGACY, [_set({"fifo": 0.0}, name) for name in _BUFFERED.split()], (2000,)
    ),
    "protocol_original": _protocol("split-mnist", "original", f"{_TUNED} sp-replay-gaussian joint", seeds=10),
    "protocol_mammoth_split": _protocol("split-mnist", "mammoth", "replay-sgd joint sp-replay"),
    "protocol_mammoth_permuted": _protocol("permuted-mnist", "mammoth", "replay-sgd der++ joint sp-replay"),
    "protocol_gpm": _protocol("permuted-mnist", "gpm", "replay-sgd gpm joint sp-both"),
    "protocol_van_de_ven_split": _protocol("split-mnist", "van-de-ven", "naive-adam joint sp-both"),
    "protocol_van_de_ven_permuted": _protocol("permuted-mnist", "van-de-ven", "naive-adam joint sp-both"),
}

# Other data than MNIST, with the settings that were tuned on MNIST.
_OTHERS = "naive-sgd ewc si mas gpm rf-ridge sp sp-both gaussian-replay sp-gaussian replay-joint sp-replay joint"
OTHER_DATA = {
    f"{data}_{tasks}": Study(f"{title_of(f'split-{data}')}, {tasks} tasks", _split(tasks, data), _rows(_OTHERS))
    for data, numbers in {"fashion-mnist": (5, 2, 10), "glyphs": (19,)}.items()
    for tasks in numbers
}

# With many classes the loss decides more than with few: ours and their control with cross-entropy also, at the learning
# rates that were the best ones with it on validation images of Split MNIST, seeds 100 and 101.
_WITH_SOFTMAX = {"sp": {"lr": 0.1}, "sp-both": {}, "gaussian-replay": {}, "sp-gaussian": {"lr": 2e-3}}
OTHER_DATA["glyphs_19"] = replace(
    OTHER_DATA["glyphs_19"],
    rows=[
        *_rows(_OTHERS),
        *(_set({"loss": CE} | rate, name, f"{name}-softmax") for name, rate in _WITH_SOFTMAX.items()),
    ],
)

# Dendrites, and the same number of parameters without them: 436 or 827 units a layer instead of 256 with one or four
# dendrites.
_PUBLISHED_DENDRITES = (
    *_rows("legacy-adam legacy-adam-replay legacy-dendrites legacy-dendrites-replay legacy-sp legacy-sp-dendrites"),
    _set({"patience": 1.0}, "legacy-dendrites", "legacy-dendrites-added"),
    _set({"patience": 1.0}, "legacy-dendrites-replay", "legacy-dendrites-replay-added"),
)


def _dendrites(title: str, tasks: int, wider: str, **settings) -> Study:
    rows = []
    for name, alone in WITH_DENDRITES.items():
        rows += [Row(alone), Row(name), Row(alone, f"{alone}-wider", None, {"network": wider})]
    rows.append(_set({"sigmoid": 1.0}, "sp-dendrites", "sp-dendrites-sigmoid"))
    if tasks > 2:
        rows.append(_set({"most": 1.0}, "sp-dendrites", "sp-dendrites-one"))
    return Study(title, _split(tasks, **settings), rows)


DENDRITES = {
    "dendrites_published": Study("As published", _LEGACY, _PUBLISHED_DENDRITES, (2000,)),
    "dendrites_split2": _dendrites(_TWO, 2, "436-436"),
    "dendrites_split5": _dendrites(_FIVE, 5, "827-827"),
}

# Streams that do not say where a task ends, by the name that their table gives them. Each strategy is told the
# boundaries, finds them by surprise, or consolidates in chunks of the stream.
_SP, _BOTH, _OURS = (_rows(f"{name} {name}-surprise {name}-continuous") for name in ("sp", ALONE, OURS))
_ONLINE = _split(5, stream="online", batch_size=10)
BOUNDARIES = {
    "split": Study(_FIVE, _split(5), (*_SP, *_BOTH)),
    "split-replay": Study(_FIVE, _split(5), _OURS),
    "online": Study(_FIVE, {**_ONLINE, "overrides": {"lr": 0.02, "openness": 0.1}}, _SP),
    "online naive": Study(_FIVE, {**_ONLINE, "overrides": {"lr": 0.02}}, _rows("naive-sgd")),
    "permuted": Study(_SMALL_TEN, _TEN_THOUSAND, (*_SP, *_BOTH)),
    "permuted-replay": Study(_SMALL_TEN, _TEN_THOUSAND, _OURS),
    "one task": Study("MNIST, 1 task", _split(1, epochs=20), _rows("naive-sgd sp-surprise sp-continuous")),
    "blurred-split": Study(_FIVE, _split(5, stream="blurred"), _SP),
    "blurred-permuted": Study(_SMALL_TEN, {**_TEN_THOUSAND, "stream": "blurred"}, _SP),
    "drifting": Study(_SMALL_TEN, {**_TEN_THOUSAND, "stream": "drifting"}, (*_SP, Row("naive-sgd"))),
    "returning": Study(_FIVE, _split(5, stream="returning"), _SP),
}

# Many tasks of few images. The learning rates were tuned on validation images, seed 100 (docs/trials/baselines.csv).
# EWC has a penalty for each task, so that its time grows with their square.
_LONG_RATES = {"naive-sgd": 0.05, "naive-adam": 1e-4, "upgd": 0.05, "gpm": 0.1, "sp": 0.1, "sp-both": 2e-3}
_LONG = (*(_set({"lr": lr}, name) for name, lr in _LONG_RATES.items()), *_rows("rf-ridge joint"))
_LONG_AND_SLOW = (
    *_LONG,
    _set({"lr": 0.05, "strength": 10.0}, "ewc"),
    *(_set({"lr": lr}, name) for name, lr in {"gaussian-replay": 2e-3, "sp-gaussian": 3e-3}.items()),
)
_OF_LETTERS = _rows("naive-sgd naive-adam gpm rf-ridge sp sp-both gaussian-replay sp-gaussian joint")
LONG_STREAMS = {
    f"permuted_{tasks}": Study(
        f"Permuted MNIST, {tasks} tasks of 1000 images", _permuted(tasks, train_per_task=1000), rows, seeds=3
    )
    for tasks, rows in ((100, _LONG_AND_SLOW), (200, _LONG))
}
LONG_STREAMS["glyphs_38"] = Study("76 letters, 38 tasks of two", _split(38, "glyphs"), _OF_LETTERS, seeds=3)

# All that the documents show, by the name that they and the command line give it.
STUDIES = {**BY_BUFFER, **WITHOUT_REPLAY, **PARTS, **PUBLISHED, **DENDRITES, **OTHER_DATA, **LONG_STREAMS}
STUDIES |= {f"boundaries_{name}".replace(" ", "_"): study for name, study in BOUNDARIES.items()}

# The table of the README, by the heads of its columns: naive training, other methods that store no sample, the
# controls, ours and the bound.
OTHERS = ("ewc", "si", "mas", "lwf", "owm", "gpm")
_FRONT = ("naive-sgd", *OTHERS, "rf-ridge", "gaussian-replay", "sp", ALONE, "sp-gaussian", "joint")
FRONT = {
    name: Study(name, settings, tuple(map(Row, _FRONT)))
    for name, settings in {
        "Split MNIST": _split(5),
        "Split Fashion-MNIST": _split(5, "fashion-mnist"),
        "76 letters": _split(19, "glyphs"),
        "Permuted MNIST": _TEN_THOUSAND,
    }.items()
}
FRONT["Split MNIST, CNN with BatchNorm"] = WITHOUT_REPLAY["split5_cnn-bn"]

# The overview at the head of the page of results, by the heads of its columns.
_METHODS = "naive-sgd ewc si mas gpm rf-ridge sp sp-both gaussian-replay sp-gaussian replay-joint der++ sp-replay"
_COLUMNS = {"2 tasks": _split(2), "5 tasks": _split(5), "10 tasks, a class each": _split(10)}
_COLUMNS["10 permutations"] = _TEN_THOUSAND
OVERVIEW = {
    name: Study(name, settings, _rows(f"{_METHODS} sp-replay-gaussian joint")) for name, settings in _COLUMNS.items()
}
