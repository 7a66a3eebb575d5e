"""Runs jobs in parallel; results are appended as they come, and never computed twice."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from pathlib import Path

from tqdm import tqdm

from harness.executors import open_executor, prepared, result_of
from harness.files import append_lines
from harness.settings import Run, code_fingerprint


def read_results(path: Path) -> list[dict]:
    """All records in a results file. A last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append_result(path: Path, record: dict) -> None:
    """One line, in one write, on disk before this returns; several processes may append to one file.

    A run that another process has finished in the meantime is not written again.

    Raises:
        OSError: it could not be written (a full disk, say). The file is as it was.
    """
    append_lines(path, json.dumps(record, separators=(",", ":")) + "\n", unless=lambda: _is_finished(record, path))


def _is_finished(record: dict, path: Path) -> bool:
    if "key" not in record or "error" in record:
        return False
    return any(r.get("key") == record["key"] and "error" not in r for r in read_results(path))


def run_all(
    runs: list[Run],
    results: Path,
    dataset_root: str,
    jobs: int,
    scheduler: str | None = None,
    keeps_curve: Callable[[Run], bool] = lambda run: True,
) -> tuple[list[dict], int]:
    """Finishes every run that ``results`` doesn't hold yet.

    Args:
        runs: what is to be in the results.
        results: the file, made if it isn't there.
        dataset_root: folder with MNIST, as the workers see it.
        jobs: processes, without a scheduler.
        scheduler: address of a Dask scheduler, whose workers then do the runs.
        keeps_curve: whether a run's accuracy curve, most of its record and of the time that measuring takes, is to be
            in the results. Without it there is no worst case either.

    Returns:
        The records of ``runs``, in their order, and the number of runs that failed. A failed run is recorded with
        its error and tried again by the next start.

    Raises:
        OSError: results can't be written, or the scheduler is not there (any more). What was finished is kept.
    """
    code = code_fingerprint()
    done = {r["key"]: r for r in read_results(results) if "error" not in r}
    todo = [run for run in runs if run.key(code) not in done]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are already in {results}")
    failed = 0
    if todo:
        with open_executor(min(jobs, len(todo)), scheduler) as executor:
            try:
                failed = _run_missing(todo, code, done, results, dataset_root, executor, keeps_curve)
            except BaseException:
                executor.shutdown(wait=False)
                raise
    return [done[run.key(code)] for run in runs if run.key(code) in done], failed


def _run_missing(
    todo: list[Run], code: str, done: dict, results: Path, dataset_root: str, executor, keeps_curve
) -> int:
    failed = 0
    patience = 0.5 if sys.stdout.isatty() else 10  # seconds between updates: few lines in a log file
    with tqdm(total=len(todo), unit="run", file=sys.stdout, mininterval=patience) as progress:
        futures = {executor.submit(_execute, run, dataset_root, code, keeps_curve(run)): run for run in todo}
        for future in as_completed(futures):
            run = futures[future]
            record = _record(future, run, code)
            append_result(results, record)
            if "error" in record:
                failed += 1
                progress.write(f"FAILED {run.strategy}, seed {run.seed}: {record['error'].splitlines()[-1]}")
            else:
                done[record["key"]] = record
            progress.set_postfix_str(f"{run.strategy}, seed {run.seed}", refresh=False)
            progress.update()
    return failed


def _record(future: Future, run: Run, code: str) -> dict:
    try:
        return result_of(future)
    except ConnectionError:
        raise
    except Exception as error:  # its process died, again and again, or could not even begin
        text = "".join(traceback.format_exception_only(error)).strip()
        return {"key": run.key(code), "run": run.to_json(), "error": text}


def _execute(run: Run, dataset_root: str, code: str, watch: bool) -> dict:
    try:
        with prepared(code):
            from harness.run import execute

            return execute(run, dataset_root, run.key(code), watch=watch)
    except Exception:
        return {"key": run.key(code), "run": run.to_json(), "error": traceback.format_exc()}
