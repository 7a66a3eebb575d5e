"""The store of results: a folder with one file of JSON lines a benchmark, one line a run.

A line holds four mappings of a run:

    {"settings": {"benchmark": "split-mnist", "strategy": "sp", ..., "seed": 0},  everything that decides the result
     "figures":  {"acc": 90.5, ..., "accuracy_matrix": [[...]], "seconds": 3.3},  or "error": the text of a failure
     "versions": {"algorithm": 1, "torch": "2.14.1", ...},
     "finished": "2026-11-26T17:12:14Z"}

The settings include the values of the strategy (learning rate, loss, arguments of the plugin), so that another
learning rate is another run. Settings in USUAL may be left out: so a new setting makes no stored run stale.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

try:
    import fcntl
except ImportError:  # Windows: one process for each store
    fcntl = None  # type: ignore[assignment]

# Settings that a row may leave out, because most runs share them: of the run, and of its strategy.
USUAL_RUN = {"train_per_task": None, "overrides": {}, "stream": "tasks", "task_incremental": False, "validation": False,
             "pixels": "normalised"}  # fmt: skip
USUAL_TRAINING = {"plugins": [], "arguments": {}, "joint_weight": False, "model": "network", "template": "naive"}
USUAL = USUAL_RUN | USUAL_TRAINING

# Versions of the algorithms: of the ones of this project ("ours"), of our gate with stored or drawn samples, and of all
# others with the training loop they share.
# Raise a number by hand if a change of the code gives other results for the same settings and seed: other equations,
# another order of the data. Never for a docstring, a comment, a new name or a faster way to the same numbers, nor for
# other random numbers of the gate if ten paired seeds show less than .3 points (docs/trials has them). A change of the
# training loop, the networks or the benchmarks raises all.
ALGORITHM_VERSION = {"ours": 5, "gate with samples": 6, "others": 1}


def version_of(strategy: str) -> int:
    """Present version of the strategy's algorithm."""
    has_samples = "replay" in strategy or "gaussian" in strategy
    if strategy.startswith("sp"):
        return ALGORITHM_VERSION["gate with samples" if has_samples else "ours"]
    return ALGORITHM_VERSION["ours" if "gaussian" in strategy else "others"]


def key_of(settings: Mapping, version: int | None = None) -> str:
    """Identifies a run: its settings with the seed, and the version of its algorithm, by default the present one."""
    # Equal settings are equal text: 1 and 1.0, lists and tuples.
    plain = json.loads(json.dumps(without_usual(settings)), parse_int=float)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    return f"{digest}-{version_of(settings['strategy']) if version is None else version}"


def without_usual(settings: Mapping) -> dict:
    return {name: value for name, value in settings.items() if name not in USUAL or value != USUAL[name]}


class Store:
    """Results in one folder. Several processes may append at the same time, and a kill loses at most its own row.

    Args:
        path: the folder, made if it does not exist.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OSError(error.errno, f"the results cannot be written: {error.strerror}", str(self.path)) from error

    def append(self, row: Mapping) -> None:
        """Writes one row, which is on disk before this returns. "versions" and "finished" are completed.

        Raises:
            OSError: the row could not be written (a full disk, for example). The rows before it are as they were.
        """
        settings = without_usual(row["settings"])
        versions = {"algorithm": version_of(settings["strategy"]), **row.get("versions", {})}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        whole = {"finished": now, **row, "settings": settings, "versions": versions}
        line = json.dumps(whole, separators=(",", ":")) + "\n"
        path = self.path / f"{settings['benchmark']}.jsonl"
        try:
            with open(path, "a+b") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or its process has ended
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":  # a kill cut the last line off: it stays, and is skipped by rows()
                        file.write(b"\n")
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def rows(self) -> Iterator[dict]:
        """All rows as they were appended, failed runs too. A line that a kill cut off is skipped."""
        for file in sorted(self.path.glob("*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def finished(self) -> dict[str, dict]:
        """Rows of the runs that did not fail, by key. Of two rows with one key the last one counts."""
        found = (row for row in self.rows() if "error" not in row)
        return {key_of(row["settings"], row["versions"]["algorithm"]): row for row in found}

    def keys(self) -> set[str]:
        return set(self.finished())

    def frame(self) -> pd.DataFrame:
        """One row a run that did not fail, its key as the index.

        Columns are the settings, the figures, "version" (of the algorithm), "torch" and "finished". Among the settings
        a mapping or a list is shown as text ("lr=0.1 openness=0.5"), so that runs can be grouped by it.
        """
        finished = self.finished()
        rows = [
            {name: as_text(value) for name, value in {**USUAL, **row["settings"]}.items()}
            | row["figures"]
            | {"version": row["versions"]["algorithm"], "torch": row["versions"].get("torch")}
            | {"finished": row.get("finished")}
            for row in finished.values()
        ]
        return pd.DataFrame(rows, index=list(finished))


def as_text(value):
    """A setting as tables show it and runs are grouped by it."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" if isinstance(v, str) else f"{k}={v:g}" for k, v in sorted(value.items()))
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
