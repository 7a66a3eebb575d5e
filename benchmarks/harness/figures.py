"""Figures of a comparison: one colour for each strategy, everywhere, from a colour-blind safe set."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from harness.comparison import Cell
from harness.settings import BOUNDS, position
from harness.statistics import bootstrap
from harness.studies import ALONE, OURS, WITH_AND_WITHOUT

# Blues and greens for what replays (P. Tol, Colour schemes, 2021), red for selective plasticity, greys for the rest.
_COLOURS = {
    "naive-sgd": "#bbbbbb",
    "naive-adam": "#999999",
    "ewc": "#ddcc77",
    "si": "#999933",
    "mas": "#886622",
    "lwf": "#aa8866",
    "rf-ridge": "#666666",
    "gaussian-replay": "#997700",
    "sp-gaussian": "#ff7799",
    "replay-gaussian": "#774411",
    "sp-replay-gaussian": "#ee3377",
    "sp": "#ee8866",
    "sp-both": "#aa3377",
    "sp-replay": "#cc3311",
    "replay-sgd": "#88ccee",
    "replay-adam": "#77aadd",
    "replay-joint": "#332288",
    "replay-adaptive": "#ddaa33",
    "sp-replay-sgd": "#ee7733",
    "replay-gated": "#6655aa",
    "replay-distilled": "#aa99dd",
    "er-ace": "#44aa99",
    "der++": "#117733",
    "gdumb": "#bbcc33",
    "a-gem": "#cc6677",
    "gem": "#882255",
    "cumulative": "#555555",
    "joint": "#000000",
}
# For those that only a colour would tell apart where they are drawn in one panel.
_MARKERS = {"sp-replay": "o", "replay-joint": "s", "der++": "^", "er-ace": "v", "replay-sgd": "D", "gdumb": "P"}
_MARKERS |= {"replay-adaptive": "X", "sp-replay-gaussian": "h", "replay-gaussian": "d"}
# What a strategy that stores samples is without any: where its line begins.
_BEGINS_AS = {**WITH_AND_WITHOUT, "replay-gaussian": "gaussian-replay"}


def colour(strategy: str) -> str:
    return _COLOURS.get(strategy, "#cc3311" if strategy.startswith("sp-") else "#777777")


def label(strategy: str, replay_buffer: int) -> str:
    return f"{strategy} ({replay_buffer})" if replay_buffer else strategy


def acc_by_strategy(summary: list[dict], title: str, path: Path) -> Path:
    """Bars: mean accuracy over all tasks after the last, with its interval."""
    fig, ax = plt.subplots(figsize=(8, 0.6 + 0.32 * len(summary)), layout="constrained")
    y = np.arange(len(summary))[::-1]
    means = [s["acc"]["mean"] for s in summary]
    errors = [s["acc"]["ci95"] or 0.0 for s in summary]
    ax.barh(y, means, xerr=errors, color=[colour(s["strategy"]) for s in summary], height=0.75, capsize=2)
    for yi, mean, error in zip(y, means, errors):
        ax.text(min(mean + error, 100) + 0.8, yi, f"{mean:.1f}", va="center", fontsize=8)
    ax.set_yticks(y, [label(s["strategy"], s["replay_buffer"]) for s in summary], fontsize=9)
    ax.set(xlim=(0, 106), xlabel="ACC: mean accuracy over all tasks, %")
    ax.set_title(title, fontsize=8, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def acc_by_buffer(panels: list[tuple[str, list[Cell]]], path: Path) -> Path:
    """Lines: accuracy against stored samples, with bootstrap intervals; none are at the left, bounds are dashed.

    What lies far below everything that `sp-replay` reaches is cut off.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.4), squeeze=False, layout="constrained")
    for ax, (title, cells) in zip(axes.flat, panels):
        buffers = sorted({c.buffer for c in cells if c.buffer})
        nothing = buffers[0] / 2
        lines = list(dict.fromkeys(c.label for c in cells if c.buffer))
        begins = {_BEGINS_AS[name] for name in lines if name in _BEGINS_AS}
        for name in lines:
            line = [c for c in cells if c.label in (name, _BEGINS_AS.get(name))]
            line.sort(key=lambda c: c.buffer)
            x = [c.buffer or nothing for c in line]
            low, high = zip(*(bootstrap(list(c.values().values())) for c in line))
            width = 2.4 if name in WITH_AND_WITHOUT else 1.3
            marker = _MARKERS.get(name, ".")
            ax.plot(x, [c.mean() for c in line], marker + "-", color=colour(name), lw=width, ms=5, label=name)
            ax.fill_between(x, low, high, color=colour(name), alpha=0.2, lw=0)
        ours = [c.mean() for c in cells if c.label in (OURS, ALONE)]
        bottom = max(0, min(ours) - 20) if ours else 0
        for c in (c for c in cells if not c.buffer):
            if c.strategy in BOUNDS:
                style = "--" if c.strategy == "joint" else ":"
                ax.axhline(c.mean(), color=colour(c.strategy), ls=style, lw=1, label=c.label)
            elif c.label not in begins and c.mean() >= bottom:
                ax.plot([nothing], [c.mean()], "x", color=colour(c.label), label=c.label)
        ax.set_ylim(bottom, 100)
        ax.set_xscale("log")
        ax.set_xticks([nothing, *buffers], ["none", *map(str, buffers)], fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel("stored samples", fontsize=8)
        ax.set_title(title, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#eeeeee")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    axes.flat[0].set_ylabel("ACC, %")
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


def accuracy_over_training(records: list[dict], title: str, path: Path) -> Path:
    """Small multiples: accuracy of each task while the tasks are learned one after another, mean over seeds."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for r in records:
        groups.setdefault((r["run"]["strategy"], r["run"]["replay_buffer"]), []).append(r)
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 1.9 * rows + 0.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, sorted(groups, key=lambda g: position(*g))):
        group = groups[name]
        x = [p["iteration"] for p in group[0]["curve"]]
        curves = np.mean([[p["task_acc"] for p in r["curve"]] for r in group], axis=0)
        tasks = curves.shape[1]
        for t in range(tasks):
            shade = plt.cm.viridis(0.85 * t / max(1, tasks - 1))
            ax.plot(x, curves[:, t], color=shade, lw=1.4, label=f"task {t + 1}")
        ends = {p["experience"]: p["iteration"] for p in group[0]["curve"]}
        for end in sorted(ends.values())[:-1]:
            ax.axvline(end, color="#bbbbbb", lw=0.7, ls=":")
        ax.set_title(label(*name), fontsize=9)
        ax.set_ylim(0, 101)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles[:10], names[:10], loc="outside lower right", ncols=min(10, len(handles)), fontsize=7)
    fig.supxlabel("training iteration", fontsize=8, x=0.3)
    fig.supylabel("accuracy, %", fontsize=8)
    fig.suptitle(title, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path
