"""Figures of runs: one colour for each strategy, everywhere, from a colour-blind safe set."""

import textwrap
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from harness.recipes import name_of
from harness.settings import BOUNDS
from harness.statistics import bootstrap, student
from harness.studies import ALONE, BY_BUFFER, LONG_STREAMS, OURS, STUDIES, WITH_AND_WITHOUT
from harness.tables import by_seed, cells, title

# Blues and greens for replay (P. Tol, Colour schemes, 2021), red for selective plasticity, greys for the rest.
_COLOURS = {
    "naive-sgd": "#bbbbbb", "naive-adam": "#999999", "ewc": "#ddcc77", "si": "#999933", "mas": "#886622",
    "lwf": "#aa8866", "rf-ridge": "#666666", "gaussian-replay": "#997700", "sp-gaussian": "#ff7799",
    "replay-gaussian": "#774411", "sp-replay-gaussian": "#ee3377", "sp": "#ee8866", "sp-both": "#aa3377",
    "sp-replay": "#cc3311", "replay-sgd": "#88ccee", "replay-adam": "#77aadd", "replay-joint": "#332288",
    "replay-adaptive": "#ddaa33", "sp-replay-sgd": "#ee7733", "replay-gated": "#6655aa",
    "replay-distilled": "#aa99dd", "er-ace": "#44aa99", "der++": "#117733", "gdumb": "#bbcc33", "a-gem": "#cc6677",
    "gem": "#882255", "gpm": "#117733", "upgd": "#44aa99", "cumulative": "#555555", "joint": "#000000",
}  # fmt: skip
# Markers of the lines of one panel, whose colours alone are hard to distinguish.
_MARKERS = {"sp-replay": "o", "replay-joint": "s", "der++": "^", "er-ace": "v", "replay-sgd": "D", "gdumb": "P"}
_MARKERS |= {"replay-adaptive": "X", "sp-replay-gaussian": "h", "replay-gaussian": "d"}
# The same strategies without stored samples: their lines begin with these.
_BEGINS_AS = {**WITH_AND_WITHOUT, "replay-gaussian": "gaussian-replay"}


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws the figures of the documents from the newest run of each setting; returns their paths."""
    training = {"compare": "training_split2.png", "buffers_split5": "training_split5.png"}
    return [
        acc_by_buffer(frame, folder / "buffers.png"),
        *(accuracy_in_training(STUDIES[name].select(frame), folder / file) for name, file in training.items()),
        long_streams(frame, folder / "long_streams.png"),
    ]


def _colour(strategy: str) -> str:
    return _COLOURS.get(strategy, "#cc3311" if strategy.startswith("sp-") else "#777777")


def _name(label: str, buffer: int) -> str:
    return f"{name_of(label)} ({buffer})" if buffer else name_of(label)


def _save(figure, path: Path) -> Path:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def acc_by_strategy(runs: pd.DataFrame, path: Path) -> Path:
    """Bars: mean accuracy over all tasks after the last one, with Student's interval."""
    rows = [(_name(label, buffer), cell["strategy"].iloc[0], cell["acc"]) for label, buffer, cell in cells(runs)][::-1]
    figure, ax = plt.subplots(figsize=(8, 0.6 + 0.32 * len(rows)), layout="constrained")
    means, errors = [acc.mean() for _, _, acc in rows], [np.nan_to_num(student(acc.tolist())) for _, _, acc in rows]
    ax.barh(range(len(rows)), means, xerr=errors, color=[_colour(name) for _, name, _ in rows], height=0.75, capsize=2)
    for y, (mean, error) in enumerate(zip(means, errors)):
        ax.text(min(mean + error, 100) + 0.8, y, f"{mean:.1f}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=9)
    ax.set(xlim=(0, 106), xlabel="ACC: mean accuracy over all tasks, %")
    ax.set_title(title(runs), fontsize=8, loc="left")
    return _save(figure, path)


def acc_by_buffer(frame: pd.DataFrame, path: Path) -> Path:
    """Lines: accuracy against stored samples, with bootstrap intervals; none are at the left, bounds are dashed.

    Accuracies more than 20 points below the lowest one of ``sp-replay`` are cut off.
    """
    figure, axes = plt.subplots(1, len(BY_BUFFER), figsize=(4.4 * len(BY_BUFFER), 4.4), squeeze=False)
    figure.subplots_adjust(0.045, 0.26, 0.99, 0.94, wspace=0.12)
    for ax, name in zip(axes.flat, BY_BUFFER):
        runs = STUDIES[name].select(frame)
        accuracies = by_seed(runs)
        labels = accuracies.index.get_level_values("label")
        sizes = sorted(size for size in runs["replay_buffer"].unique() if size)
        nothing = sizes[0] / 2
        lines = dict.fromkeys(runs.loc[runs["replay_buffer"] > 0, "label"])
        for line in lines:
            points = accuracies[labels.isin((line, _BEGINS_AS.get(line)))].droplevel("label").sort_index()
            x = [size or nothing for size in points.index]
            low, high = zip(*(bootstrap(tuple(values.dropna())) for _, values in points.iterrows()))
            width, marker = 2.4 if line in WITH_AND_WITHOUT else 1.3, _MARKERS.get(line, ".")
            ax.plot(x, points.mean(axis=1), marker + "-", color=_colour(line), lw=width, ms=5, label=name_of(line))
            ax.fill_between(x, low, high, color=_colour(line), alpha=0.2, lw=0)
        bottom = max(0, accuracies[labels.isin((OURS, ALONE))].mean(axis=1).min() - 20)
        begins = {_BEGINS_AS.get(line) for line in lines}
        for label, acc in accuracies.xs(0, level="replay_buffer").mean(axis=1).items():
            if label in BOUNDS:
                ax.axhline(acc, color=_colour(label), ls="--" if label == "joint" else ":", lw=1, label=name_of(label))
            elif label not in begins and acc >= bottom:
                ax.plot([nothing], [acc], "x", color=_colour(label), label=name_of(label))
        ax.set(ylim=(bottom, 100), xscale="log")
        ax.set_xticks([nothing, *sizes], ["none", *map(str, sizes)], fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel("stored samples", fontsize=8)
        ax.set_title(STUDIES[name].title, fontsize=9)
        ax.grid(axis="y", color="#eeeeee")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="lower center", ncols=8, fontsize=8, frameon=False)
    axes.flat[0].set_ylabel("ACC, %")
    return _save(figure, path)


def accuracy_in_training(runs: pd.DataFrame, path: Path) -> Path:
    """Small multiples: accuracy of each task during training, mean over the seeds that have a curve."""
    panels = list(cells(runs[runs["curve"].notna()]))
    panels.sort(key=lambda panel: (panel[0] in BOUNDS, panel[1]))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 2.6 * columns, 1.9 * rows + 0.6
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), sharey=True, squeeze=False)
    figure.subplots_adjust(0.65 / width, 0.6 / height, 1 - 0.1 / width, 1 - 0.5 / height, wspace=0.12, hspace=0.45)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (label, buffer, cell) in zip(axes.flat, panels):
        points = cell["curve"].iloc[0]
        iterations = [point["iteration"] for point in points]
        accuracies = np.mean([[point["task_acc"] for point in curve] for curve in cell["curve"]], axis=0)
        for task, line in enumerate(accuracies.T):
            shade = plt.cm.viridis(0.85 * task / max(1, accuracies.shape[1] - 1))
            ax.plot(iterations, line, color=shade, lw=1.4, label=f"task {task + 1}")
        ends = {point["experience"]: point["iteration"] for point in points}
        for end in sorted(ends.values())[:-1]:
            ax.axvline(end, color="#bbbbbb", lw=0.7, ls=":")
        ax.set_title(textwrap.fill(_name(label, buffer), 32), fontsize=9)
        ax.set(ylim=(0, 101), yticks=(0, 50, 100))  # ticks take most of the time
        ax.locator_params("x", nbins=4)
        ax.tick_params(labelsize=7)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles[:10], names[:10], loc="lower right", ncols=min(10, len(handles)), fontsize=7, frameon=False)
    figure.supxlabel("training iteration", fontsize=8, x=0.3)
    figure.supylabel("accuracy, %", fontsize=8, x=0.05 / width)
    figure.suptitle(title(runs), fontsize=8, y=1 - 0.08 / height)
    return _save(figure, path)


def long_streams(frame: pd.DataFrame, path: Path) -> Path:
    """Small multiples: accuracy after each task on the present task, the last ten and all. A row a stream."""
    headings = {"present": "present task", "last": "last ten tasks", "all": "all tasks so far"}
    figure, axes = plt.subplots(len(LONG_STREAMS), 3, figsize=(9.6, 2.4 * len(LONG_STREAMS)), squeeze=False)
    figure.subplots_adjust(0.07, 0.06, 0.82, 0.96, wspace=0.15, hspace=0.3)
    for row, study in zip(axes, LONG_STREAMS.values()):
        runs = study.select(frame)
        strategies = [(name_of(label), cell) for label, _, cell in cells(runs[runs["over_time"].notna()])]
        for ax, (name, heading) in zip(row, headings.items()):
            ends = []
            for label, cell in strategies:
                line, colour = np.mean([f[name] for f in cell["over_time"]], axis=0), _colour(cell["strategy"].iloc[0])
                if name == "present":  # one task is a rough measure
                    line = pd.Series(line).rolling(10, min_periods=1).mean().to_numpy()
                ax.plot(np.arange(1, len(line) + 1), line, color=colour, lw=1.3)
                ends.append((line[-1], label, colour))
            ax.set_title(heading, fontsize=8, loc="left")
            ax.tick_params(labelsize=7)
        ends.sort()
        low, high = row[-1].get_ylim()
        for place, (_, label, colour) in zip(_apart([end for end, *_ in ends], 0.075 * (high - low)), ends):
            where = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
            row[-1].annotate(label, (1.02, place), fontsize=7, color=colour, **where)
        row[0].set_ylabel(f"{study.title}\naccuracy, %", fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("task", fontsize=8)
    return _save(figure, path)


def _apart(places: list[float], least: float) -> list[float]:
    """Places in rising order, moved up until neighbours are ``least`` apart."""
    return list(accumulate(places, lambda last, place: max(place, last + least)))
