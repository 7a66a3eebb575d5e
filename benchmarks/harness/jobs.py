"""Runs jobs in parallel; results are appended as they come, and never computed twice."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, as_completed

from tqdm import tqdm

from harness.executors import open_executor, prepared, result_of
from harness.settings import Run, code_fingerprint
from harness.store import Store, key_of


def run_all(
    runs: list[Run],
    store: Store,
    dataset_root: str,
    jobs: int,
    scheduler: str | None = None,
    keeps_curve: Callable[[Run], bool] = lambda run: True,
) -> int:
    """Finishes every run that the store does not hold yet.

    Args:
        runs: the runs that the store shall hold.
        store: where their rows go.
        dataset_root: folder with MNIST, as the workers see it.
        jobs: processes, without a scheduler.
        scheduler: address of a Dask scheduler, whose workers then do the runs.
        keeps_curve: whether a run's accuracy curve, most of its row and of the time that measuring takes, is stored.
            Without it there is no worst case either.

    Returns:
        The number of runs that failed. A failed run is stored with its error and tried again by the next start.

    Raises:
        OSError: a row can't be written, or the scheduler is not there (any more). The finished runs are kept.
    """
    keys = {run: key_of(run.settings()) for run in runs}
    done = store.keys()
    todo = [run for run in runs if keys[run] not in done]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are already in {store.path}")
    failed = 0
    if todo:
        with open_executor(min(jobs, len(todo)), scheduler) as executor:
            try:
                failed = _run_missing(todo, store, dataset_root, executor, keeps_curve)
            except BaseException:
                executor.shutdown(wait=False)
                raise
    return failed


def _run_missing(todo: list[Run], store: Store, dataset_root: str, executor, keeps_curve) -> int:
    code, failed = code_fingerprint(), 0
    patience = 0.5 if sys.stdout.isatty() else 10  # seconds between updates: few lines in a log file
    with tqdm(total=len(todo), unit="run", file=sys.stdout, mininterval=patience) as progress:
        futures = {executor.submit(_execute, run, dataset_root, code, keeps_curve(run)): run for run in todo}
        for future in as_completed(futures):
            run = futures[future]
            row = row_of(run, _record(future))
            store.append(row)
            if "error" in row:
                failed += 1
                progress.write(f"FAILED {run.strategy}, seed {run.seed}: {row['error'].splitlines()[-1]}")
            progress.set_postfix_str(f"{run.strategy}, seed {run.seed}", refresh=False)
            progress.update()
    return failed


def row_of(run: Run, record: dict) -> dict:
    """The store's row of a run: ``record`` is what ``run.execute`` returned, or holds the "error" that ended it."""
    if "error" in record:
        return {"settings": run.settings(), "error": record["error"]}
    others = ("key", "run", "recipe", "versions", "finished")
    figures = {name: value for name, value in record.items() if name not in others and value not in (None, [])}
    return {"settings": run.settings(), "figures": figures, "versions": record["versions"]}


def _record(future: Future) -> dict:
    try:
        return result_of(future)
    except ConnectionError:
        raise
    except Exception as error:  # its process died, again and again, or could not even begin
        return {"error": "".join(traceback.format_exception_only(error)).strip()}


def _execute(run: Run, dataset_root: str, code: str, watch: bool) -> dict:
    try:
        with prepared(code):
            from harness.run import execute

            return execute(run, dataset_root, run.key(code), watch=watch)
    except Exception:
        return {"error": traceback.format_exc()}
