"""The table at the head of the README: what the methods end at on each benchmark, from the results in docs/results."""

from __future__ import annotations

import json
from pathlib import Path

from tabulate import tabulate

from harness.report import mean_and_interval

STORED = 200
# A column's folders: a row stands in the first that has it.
COLUMNS = {
    "2 tasks": ("compare", "buffers_split2"),
    "5 tasks": ("split5", "buffers_split5"),
    "10 tasks, a class each": ("classes10",),
    "10 permutations": ("permuted10k_no_replay", "permuted10k", "buffers_permuted10"),
}
# Rows by strategy and what it is; by how many samples they store.
ROWS = {
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
    f"{STORED}": {
        "replay-joint": "replay, tuned",
        "der++": "dark experience replay",
        "sp-replay": "**this plugin and optimizer**, with replay",
        "sp-replay-gaussian": "**the same and `GaussianBuffer`**",
    },
    "all": {"joint": "joint training"},
}


def overview(results: Path) -> str:
    """The table, or nothing where no column has results.

    Args:
        results: folder of the comparisons' folders.
    """
    found = {column: _accuracies(results, folders) for column, folders in COLUMNS.items()}
    columns = {column: cells for column, cells in found.items() if cells}
    if not columns:
        return ""
    table = [
        {"stored samples": stored, "method": what, "strategy": f"`{strategy}`"}
        | {column: cells.get(strategy, "-") for column, cells in columns.items()}
        for stored, rows in ROWS.items()
        for strategy, what in rows.items()
    ]
    return (
        "ACC in percent after the last task, test images, mean ± 95% interval: Split MNIST in 2, 5 and 10 tasks with "
        "one head, Permuted MNIST in 10 tasks of 10,000 images; one epoch, batch 64, MLP 784-256-256-10\n\n"
        + tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)
        + "\n"
    )


def _accuracies(results: Path, folders: tuple[str, ...]) -> dict[str, str]:
    """Accuracies by strategy: without stored samples, or with STORED of them where it is one that stores some."""
    cells: dict[str, str] = {}
    for folder in folders:
        file = results / folder / "summary.json"
        for row in json.loads(file.read_text()) if file.exists() else ():
            if row["replay_buffer"] in (0, STORED):
                cells.setdefault(row["strategy"], mean_and_interval(row["acc"]))
    return cells
