"""Figures of a comparison: one colour for each strategy, everywhere, from a colour-blind safe set."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from harness.settings import STRATEGIES, position

# P. Tol, Colour schemes, 2021: "muted" for the others, vermilion for selective plasticity, grey for the rest.
_COLOURS = dict(
    zip(
        STRATEGIES,
        ("#bbbbbb", "#888888", "#88ccee", "#44aa99", "#117733", "#ee9955", "#cc3311")
        + ("#ddcc77", "#999933", "#332288", "#cc3311", "#000000"),
    )
)


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
        experiences = len(group[0]["accuracy_matrix"])
        for e in range(1, experiences):
            ax.axvline(x[len(x) * e // experiences - 1], color="#bbbbbb", lw=0.7, ls=":")
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
