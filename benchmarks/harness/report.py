"""The report of one comparison: a table and figures of runs that are no study."""

from pathlib import Path

import pandas as pd

from harness.figures import acc_by_strategy, accuracy_in_training
from harness.tables import listing, minus


def report(runs: pd.DataFrame, output: Path, against: str | None = None) -> list[Path]:
    """Prints the table, and writes it and the figures; returns the paths of the files.

    Args:
        runs: rows of ``Store.frame`` of one benchmark.
        against: strategy whose ACC is subtracted from the others', paired by seed.
    """
    runs = runs.assign(label=runs["strategy"])
    text = listing(runs, None) + (f"\n{minus(runs, None, against)}" if against else "")
    print(f"\n{text}")
    path = output / "table.md"
    path.write_text(text)
    paths = [path, acc_by_strategy(runs, output / "acc.png")]
    if "curve" in runs and runs["curve"].notna().any():
        paths.append(accuracy_in_training(runs, output / "training.png"))
    return paths
