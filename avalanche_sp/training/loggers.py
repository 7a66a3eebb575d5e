"""MetricsCSVLogger: every scalar metric, custom ones too, in one CSV file."""

import csv
from pathlib import Path

from avalanche.logging import BaseLogger

_COLUMNS = ["step", "phase", "name", "value"]


class MetricsCSVLogger(BaseLogger):
    """Appends every scalar metric to a CSV file: step, phase, name, value.

    Avalanche's ``CSVLogger`` writes accuracy, loss and forgetting and ignores all other metrics. Here each value is a
    row, written when it is logged: a run that is killed loses none. A file that is there already keeps its rows, so
    several runs, or one that goes on, can share it. Values that are no numbers (matrices, images) are left out.

    ``step`` is the metric's own, for most of them the training iteration; ``phase`` is "train", "eval", or empty where
    the metric's name says neither.

    Args:
        path: the file. Folders on the way to it are made.

    Raises:
        ValueError: the file is there and its first line is not ``step,phase,name,value``.
        OSError: it cannot be written.

    Example::

        EvaluationPlugin(*selective_plasticity_metrics(), loggers=[MetricsCSVLogger("logs/metrics.csv")])
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append(_COLUMNS)
            return
        with self.path.open(newline="") as file:
            first = next(csv.reader(file), [])
        if first != _COLUMNS:
            raise ValueError(
                f"Invalid path: {self.path} holds something else, its first line is {','.join(first)!r} "
                f"(allowed: a new file, or one that begins with {','.join(_COLUMNS)!r})"
            )

    def log_single_metric(self, name: str, value, x_plot: int) -> None:
        try:
            value = float(value)  # Python's, numpy's and torch's numbers, tensors of one element too
        except (TypeError, ValueError, RuntimeError):
            return
        parts = name.split("/")
        phase = next((phase for phase in ("train", "eval") if f"{phase}_phase" in parts), "")
        self._append([x_plot, phase, name, value])

    def _append(self, row: list) -> None:
        # Opened for each row: nothing to flush or close, and a strategy with this logger can be saved.
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
