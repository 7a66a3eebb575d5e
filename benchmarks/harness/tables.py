"""Tables: queries on the runs of a study, as Markdown."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from harness.protocols import PROTOCOLS
from harness.recipes import ABOUT, USES_REPLAY, name_of
from harness.settings import BOUNDS, ROOT, network_title, title_of
from harness.statistics import bootstrap, holm, rank_biserial, student, wilcoxon
from harness.store import version_of
from harness.studies import (
    BEST_WITHOUT,
    BOUNDARIES,
    FRONT,
    OTHERS,
    OVERVIEW,
    STUDIES,
    WITH_AND_WITHOUT,
    Study,
)

ALPHA = 0.05
CELL = ["label", "replay_buffer"]


def table(frame: pd.DataFrame, kind: str, *arguments: str) -> str:
    """The table that a document asks for.

    Args:
        frame: the newest run of each setting (``studies.newest``).
        kind: a key of OF_ONE_STUDY, with the name of the study as the first argument, or of OF_SEVERAL.
    """
    if kind in OF_SEVERAL:
        return OF_SEVERAL[kind](frame, *arguments)
    study = STUDIES[arguments[0]]
    return OF_ONE_STUDY[kind](study.select(frame), study, *arguments[1:])


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    """A Markdown table. A row may lack any column."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)


def older(runs: pd.DataFrame) -> int:
    """Number of runs of an older version of their algorithm."""
    return sum(version < version_of(name) for version, name in zip(runs["version"], runs["strategy"]))


def caption(title: str, runs: pd.DataFrame) -> str:
    """Settings that the runs share, and their number of seeds."""
    run, seeds = runs.iloc[0], runs.groupby([*CELL, "strategy"]).size()
    old = older(runs)
    parts = [f"{run.epochs} epoch{'s' if run.epochs > 1 else ''}", f"batch {run.batch_size}"]
    parts.append(network_title(run.network, run.benchmark))
    parts += ["pixels between 0 and 1"] if run.pixels == "0-1" else []
    number = " to ".join(str(n) for n in sorted({seeds.min(), seeds.max()}))
    parts.append(f"{number} seed{'s' if seeds.max() > 1 else ''}")
    note = f"; {old} run{'s' if old > 1 else ''} of an older version" if old else ""
    return f"**{title}**: {', '.join(parts)}{note}.\n\n"


def title(runs: pd.DataFrame) -> str:
    """Benchmark, tasks and images of runs that are no study."""
    run = runs.iloc[0]
    images = f" of {run.train_per_task:,.0f} images" if pd.notna(run.train_per_task) else ""
    heads = ", a head for each" if run.task_incremental else ""
    held_out = ", validation images" if run.validation else ""
    return f"{title_of(run.benchmark)}, {run.n_tasks} tasks{images}{heads}{held_out}"


# -- Cells: the runs of one row with one number of stored samples -----------------------------------------------------


def cells(runs: pd.DataFrame) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """The runs by label and number of stored samples, in the order of the study."""
    for (label, buffer), cell in runs.groupby(CELL, sort=False):
        yield label, buffer, cell


def with_bootstrap(values: pd.Series, form: str = ".1f") -> str:
    """Mean with its bootstrap interval; "-" if a run has no such figure."""
    if values.isna().any():
        return "-"
    low, high = bootstrap(tuple(values))
    return f"{values.mean():{form}}" + (f" [{low:{form}}, {high:{form}}]" if len(values) > 1 else "")


def with_student(values: pd.Series, form: str = ".1f") -> str:
    """Mean with the half-width of its interval by Student's t; "-" if a run has no such figure."""
    if values.isna().any():
        return "-"
    return f"{values.mean():{form}}" + (f" ± {student(values):.1f}" if len(values) > 1 else "")


# -- Comparisons, paired by seed --------------------------------------------------------------------------------------


def by_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """ACC: a row a cell, a column a seed."""
    return runs.pivot_table("acc", CELL, "seed", sort=False)


def differences(ours: pd.Series, others: pd.DataFrame) -> pd.DataFrame:
    """Ours minus every other row of ``by_seed`` with two seeds or more, as one family of comparisons.

    A row a cell: "gains" by seed, their "mean", "p" corrected for the number of cells, and "other", its ACC.
    """
    gains = [(ours - row).dropna() for _, row in others.iterrows()]
    found = pd.DataFrame({"gains": gains, "other": others.mean(axis=1)}, index=others.index)
    found = found.loc[[len(gain) > 1 for gain in gains]]
    return found.assign(mean=found["gains"].map(np.mean), p=holm(list(map(wilcoxon, found["gains"]))))


def against_others(runs: pd.DataFrame, name: str) -> dict[int, pd.DataFrame]:
    """By number of stored samples: ours minus each row with the same number, and minus the best ones without any."""
    accuracies = by_seed(runs)
    labels, buffers = (accuracies.index.get_level_values(level) for level in CELL)
    found = {}
    for buffer in buffers[labels == name]:
        others = accuracies[labels.isin(BEST_WITHOUT) | (buffers == buffer)].drop(index=[(name, buffer)])
        found[buffer] = differences(accuracies.loc[(name, buffer)], others)
    return {buffer: rows for buffer, rows in found.items() if len(rows)}


def growth(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """Ours with each number of stored samples minus ours with the next smaller one, from none on."""
    accuracies = by_seed(runs)
    ours = accuracies[accuracies.index.get_level_values("label").isin((name, WITH_AND_WITHOUT[name]))]
    ours = ours.sort_index(level="replay_buffer").droplevel("label")
    found = pd.concat([differences(ours.iloc[i], ours.iloc[[i - 1]]) for i in range(1, len(ours))])
    return found.set_axis(ours.index[1:]).assign(p=holm(found["p"]))


def verdict(difference: pd.Series) -> str:
    if difference["p"] >= ALPHA:
        return "level"
    return "above" if difference["mean"] > 0 else "below"


# -- Tables of one study ----------------------------------------------------------------------------------------------


def each_task(cell: pd.DataFrame) -> str:
    """Accuracy on each task after the last one, mean over the runs."""
    accuracies = np.mean([matrix[-1] for matrix in cell["accuracy_matrix"]], axis=0)
    few = len(accuracies) <= 5
    return " / ".join(map("{:.1f}".format, accuracies)) if few else f"{accuracies.min():.1f} to {accuracies.max():.1f}"


def _over_time(cell: pd.DataFrame, name: str, tasks: slice) -> str:
    """Mean over some tasks of a long stream of an accuracy over time; joint training has none."""
    runs = cell["over_time"].dropna()
    return with_student(runs.map(lambda found: np.mean(found[name][tasks]))) if len(runs) else "-"


def trained_with(cell: pd.DataFrame) -> str:
    run = cell.iloc[0]
    # "shrinkage" is no argument: it marks the rows whose JointReplayLoss asks the gate for the weight (build.py).
    arguments = " ".join(a for a in run.arguments.split() if not a.startswith("shrinkage"))
    return f"{run.optimizer} {run.lr:g}, {run.loss}" + (f"; {arguments}" if arguments else "")


# The columns of a listing: the text of a cell by the column's name.
_ACC = {"ACC %": lambda cell: with_bootstrap(cell["acc"])}
_MEMORY = {"extra kB": lambda cell: f"{cell['extra_memory_bytes'].max() / 1000:.0f}"}
_WITH_STUDENT = {f"{name.upper()} %": lambda cell, name=name: with_student(cell[name]) for name in ("acc", "bwt")}
LISTINGS: dict[str, dict[str, Callable[[pd.DataFrame], str]]] = {
    "full": {**_WITH_STUDENT, "each task %": each_task, **_MEMORY, "trained with": trained_with},
    "worst": {"worst case %": lambda cell: with_bootstrap(cell["min_acc"]), **_ACC},
    "memory": _MEMORY,
    "task-labels": {
        **_ACC,
        "BWT %": lambda cell: with_bootstrap(cell["bwt"]),
        "right after learning %": lambda cell: with_bootstrap(cell["learning_acc"]),
        **_MEMORY,
    },
    "two-tasks": {
        **_ACC,
        "task A %": lambda cell: each_task(cell).split(" / ")[0],
        "task B %": lambda cell: each_task(cell).split(" / ")[1],
    },
    "long": {
        "present task, first ten %": lambda cell: _over_time(cell, "present", slice(None, 10)),
        "present task, last ten %": lambda cell: _over_time(cell, "present", slice(-10, None)),
        "last ten at the end %": lambda cell: _over_time(cell, "last", slice(-1, None)),
        "all at the end %": lambda cell: with_student(cell["acc"]),
        **_MEMORY,
    },
    "published": {
        "published %": lambda cell: f"{cell['published'].iloc[0]:.1f}".replace("nan", "-"),
        "here %": _ACC["ACC %"],
        "difference": lambda cell: f"{(cell['acc'] - cell['published']).mean():+.1f}".replace("+nan", "-"),
        "seeds": lambda cell: str(len(cell)),
    },
}


def listing(runs: pd.DataFrame, study: Study | None, columns: str = "full") -> str:
    """A row a strategy and number of stored samples, with the columns of LISTINGS; runs of no study are allowed."""
    source = ""
    if columns == "full":
        order = runs.assign(bound=runs["strategy"].isin(BOUNDS))
        runs = order.sort_values(["bound", "replay_buffer"], kind="stable")
    if columns in ("worst", "memory"):
        runs = runs[runs["replay_buffer"].isin(study.curves)]
    if columns == "published":
        protocol = PROTOCOLS[study.settings["benchmark"]][study.protocol]
        figures = [protocol.published.get(cell, np.nan) for cell in zip(runs["strategy"], runs["replay_buffer"])]
        source = f"\nPublished: {protocol.source}. {protocol.note}".rstrip() + "\n"
        runs = runs.assign(published=figures)
    rows = (
        {"strategy": name_of(label), "buffer": buffer or "-"}
        | {name: text(cell) for name, text in LISTINGS[columns].items()}
        for label, buffer, cell in cells(runs)
    )
    return caption(study.title if study else title(runs), runs) + markdown(rows) + source


def minus(runs: pd.DataFrame, study: Study | None, reference: str) -> str:
    """ACC of each row minus that of a strategy that has one row, with Student's interval."""
    accuracies = by_seed(runs)
    ours = [cell for cell in accuracies.index if cell[0] == reference]
    if len(ours) != 1:
        raise ValueError(f"Invalid against: {reference} (allowed: a strategy with one row in this comparison)")
    found = differences(accuracies.loc[ours[0]], accuracies.drop(index=ours))
    return markdown(
        {"strategy": name_of(label), "buffer": buffer or "-"}
        | {f"ACC minus that of {name_of(reference)}": with_student(-row["gains"], "+.1f")}
        | {"p (Holm)": f"{row['p']:.3f}"}
        for (label, buffer), row in found.iterrows()
    )


def _column(buffer: int) -> str:
    return str(buffer) if buffer else "no buffer"


def grid(runs: pd.DataFrame, study: Study) -> str:
    """ACC: a row a strategy, a column a number of stored samples."""
    shown = runs.groupby(CELL, sort=False)["acc"].agg(with_bootstrap).unstack("replay_buffer", sort=False)
    shown = shown.sort_index(axis=1).rename(columns=_column, index=name_of).fillna("").rename_axis(index="strategy")
    return caption(study.title, runs) + markdown(shown.reset_index().to_dict("records"))


def best(runs: pd.DataFrame, study: Study, ours: str) -> str:
    """Ours minus the best other row, for each number of stored samples."""
    found = {buffer: rows.loc[rows["other"].idxmax()] for buffer, rows in against_others(runs, ours).items()}
    return markdown(
        {"buffer": buffer, "best other row": f"{name_of(row.name[0])} {row['other']:.1f}"}
        | {f"{name_of(ours)} minus it": with_bootstrap(row["gains"], "+.1f"), "p (Holm)": f"{row['p']:.3f}"}
        | {"effect": f"{rank_biserial(row['gains']):+.2f}", "verdict": verdict(row)}
        for buffer, row in found.items()
    )


def minus_others(runs: pd.DataFrame, study: Study, ours: str, *names: str) -> str:
    """Ours minus every other row, or those named: a column a number of stored samples. Bold if it is significant.

    With several buffers and all other rows there is one more row: ours minus ours with the next smaller memory.
    """
    runs = runs[runs["label"].isin((ours, *names))] if names else runs
    found = against_others(runs, ours)

    def text(row: pd.Series) -> str:
        shown = with_bootstrap(row["gains"], "+.1f")
        return shown if verdict(row) == "level" else f"**{shown}**"

    head = f"{name_of(ours)} minus"
    rows: dict[str, dict] = {label: {head: name_of(label)} for label in runs["label"] if label != ours}
    for buffer, differences_at in found.items():
        for (label, _), row in differences_at.iterrows():
            rows[label][_column(buffer)] = text(row)
    if not names and ours in WITH_AND_WITHOUT and len(found) > 1:
        steps = {_column(buffer): text(row) for buffer, row in growth(runs, ours).iterrows()}
        rows[ours] = {head: "itself with the next smaller memory"} | steps
    return markdown(row for row in rows.values() if len(row) > 1)


# -- Tables of several studies ----------------------------------------------------------------------------------------


def overview(frame: pd.DataFrame) -> str:
    """The methods on several benchmarks: ACC without stored samples, or with 200 of them."""
    columns = {
        name: {label: with_student(cell["acc"]) for label, _, cell in cells(study.select(frame))}
        for name, study in OVERVIEW.items()
    }
    rows = []
    for strategy in (row.strategy for row in next(iter(OVERVIEW.values())).rows):
        stored = "all" if strategy in BOUNDS else "200" if strategy in USES_REPLAY else "none"
        about = ABOUT[strategy].partition(":")[0]
        method = f"**{about}**" if strategy.startswith("sp") else about
        row = {"stored samples": stored, "strategy": name_of(strategy), "method": method}
        rows.append(row | {name: column.get(strategy, "-") for name, column in columns.items()})
    return markdown(rows)


def front(frame: pd.DataFrame) -> str:
    """The README's table: mean ACC of the gates, of their controls and of the best other method of each column."""
    rows: dict[str, dict] = {}
    counts, widths, old = [], [], 0

    def put(row: str, column: str, acc: pd.Series, remark: str = "") -> None:
        rows.setdefault(row, {"": row})[column] = f"{acc.mean():.1f}{remark}"
        counts.append(len(acc))
        widths.extend([student(acc)] if len(acc) > 1 else [])

    for column, study in FRONT.items():
        runs = study.select(frame)
        old += older(runs)
        found = {label: cell["acc"] for label, _, cell in cells(runs)}
        best = max((name for name in OTHERS if name in found), key=lambda name: found[name].mean())
        put("naive SGD", column, found["naive-sgd"])
        put("best other method without stored samples", column, found[best], f" ({best.upper()})")
        for control in ("rf-ridge", "gaussian-replay"):
            put(f"{name_of(control)} (control)", column, found[control])
        for ours in ("sp", "sp-both", "sp-gaussian"):
            put(f"**{name_of(ours)}**", column, found[ours])
        put("joint training, one pass", column, found["joint"])
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    note = f"Means of {seeds} seeds. The 95% interval of a mean is ± {np.median(widths):.1f} in the median, and"
    note += f" ± {max(widths):.1f} at most."
    note += f" {old} runs are of an older version." if old else ""
    return f"{markdown(rows.values())}\n{note}\n"


# The networks of ``overhead.py`` in the README.
_TIMED = {"256-256": "perceptron", "cnn": "CNN", "slim-resnet18": "SlimResNet18", "vit": "vision transformer"}


def _measured() -> dict:
    """What ``overhead.py`` measured."""
    return json.loads((ROOT / "docs" / "results" / "overhead.json").read_text())


def overhead(frame: pd.DataFrame) -> str:
    """Ratios of times that ``overhead.py`` measured, and the gate's memory over the network's."""
    found = _measured()
    rows = (
        {"measured": part["what"], "batch": part["batch_size"], "": row["name"], "relative to": row["reference"]}
        | {"ratio": f"{row['ratio']:.2f}", "rounds": f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"}
        for part in found["parts"]
        for row in part["rows"]
        if row["name"] != row["reference"]
    )
    state = ", ".join(f"{_TIMED.get(name, name)} {share:.0%}" for name, share in found["state"].items())
    device = f"{found['rounds']} rounds on {found['device']}, torch {found['torch'].partition('+')[0]}."
    return f"{markdown(rows)}\n{device} Bytes of the gate's memory over those of the network: {state}.\n"


def costs(frame: pd.DataFrame) -> str:
    """The README's costs: the largest ratios of time of all networks, with Adam, and the range of the memory."""
    found = _measured()
    ratios = pd.DataFrame(
        (part["what"].partition(": ")[2], row["ratio"])
        for part in found["parts"]
        for row in part["rows"]
        if row["name"] == "Adam, gate"
    )
    times = {what: f"{ratio:.1f}" for what, ratio in ratios.groupby(0, sort=False)[1].max().items()}
    table = markdown({"": what, "time, relative to training without the gate": time} for what, time in times.items())
    least, most = min(found["state"].values()), max(found["state"].values())
    return f"{table}\nThe gate's memory takes {least:.1f} to {most:.1f} times the bytes of the network.\n"


def pretrained(frame: pd.DataFrame) -> str:
    """What ``examples/pretrained_text.py`` measured. Gains over random features and times over naive are by seed."""
    runs = pd.read_csv(ROOT / "docs" / "results" / "pretrained-text.csv")
    runs["acc"] = [np.mean([float(accuracy) for accuracy in text.split()]) for text in runs["accuracies"]]
    acc, seconds = (runs.pivot(index="row", columns="seed", values=name) for name in ("acc", "seconds"))
    control, times = "frozen + random projection + ridge", (seconds / seconds.loc["naive"]).median(axis=1)
    rows = []
    for row in runs["row"].unique():
        gain = "-" if row == control else with_student((acc.loc[row] - acc.loc[control]).dropna(), "+.1f")
        cells = {"": row, "seeds": acc.loc[row].count(), "ACC %": with_student(acc.loc[row].dropna())}
        rows.append(cells | {f"minus {control}": gain, "time, relative to naive": f"{times[row]:.1f}"})
    return markdown(rows)


def found_boundaries(task_ends: list[int], consolidated_at: list[int]) -> tuple[list[int], int, int]:
    """Delays of the boundaries that were found, in iterations; how many were missed; how many alarms were false."""
    starts, delays = task_ends[:-1], {}
    for at in consolidated_at:
        if before := [start for start in starts if start < at]:
            delays.setdefault(before[-1], at - before[-1])
    return list(delays.values()), len(starts) - len(delays), len(consolidated_at) - len(delays)


def boundaries(frame: pd.DataFrame) -> str:
    """Streams that do not say where a task ends, each strategy compared with itself, task-aware."""
    rows = []
    for stream, study in BOUNDARIES.items():
        runs = study.select(frame)
        runs["consolidated_at"] = [at if isinstance(at, list) else [] for at in runs["consolidated_at"]]
        accuracies = by_seed(runs)
        for label, buffer, cell in cells(runs):
            told = label.removesuffix("-surprise").removesuffix("-continuous")
            told = told if (told, buffer) in accuracies.index else "naive-sgd"
            gains = (accuracies.loc[(label, buffer)] - accuracies.loc[(told, buffer)]).dropna()
            row = {"stream": stream, "strategy": name_of(label), "buffer": buffer or "-", "runs": len(cell)}
            row["ACC %"] = with_student(cell["acc"])
            row["minus task-aware"] = "-" if told == label else with_student(gains)
            if stream == "drifting":  # it has no boundary that could be found
                row["consolidated"] = f"{cell['consolidated_at'].map(len).median():g}"
            elif label.endswith("-surprise"):
                delays, missed, false = zip(*map(found_boundaries, cell["task_ends"], cell["consolidated_at"]))
                every = [delay for run in delays for delay in run]
                row["found"] = f"{len(every)}/{len(every) + sum(missed)}"
                row["delay"] = f"{np.median(every):g} (max {max(every)})" if every else "-"
                row["false"] = sum(false)
            if stream == "returning":
                kept = np.mean([np.sum(matrix[-2:], axis=1) / 5 for matrix in cell["accuracy_matrix"]], axis=0)
                row["before, after the return"] = " ".join(f"{value:.1f}" for value in kept)
                ranks = np.median([ranks[-2:] for ranks in cell["claimed_rank"]], axis=0)
                row["claimed rank"] = " ".join(f"{value:g}" for value in ranks)
            rows.append(row)
    return markdown(rows)


OF_ONE_STUDY: dict[str, Callable[..., str]] = {"listing": listing, "minus": minus, "grid": grid, "best": best}
OF_ONE_STUDY["minus-others"] = minus_others
OF_SEVERAL: dict[str, Callable[..., str]] = {"overview": overview, "boundaries": boundaries, "front": front}
OF_SEVERAL |= {"costs": costs, "overhead": overhead, "pretrained": pretrained}
