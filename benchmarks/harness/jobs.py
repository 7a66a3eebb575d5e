"""Runs jobs in parallel processes; results are appended as they come, and never computed twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from harness.settings import Run, code_fingerprint


def read_results(path: Path) -> list[dict]:
    """All records in a results file. A last line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append_result(path: Path, record: dict) -> None:
    """One line, in one write, on disk before this returns; several processes may append to one file."""
    line = json.dumps(record) + "\n"
    with open(path, "a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line  # after a line that was cut short
        file.write(line.encode())
        os.fsync(file.fileno())


def run_all(runs: list[Run], results: Path, dataset_root: str, jobs: int) -> tuple[list[dict], int]:
    """Finishes every run that ``results`` doesn't hold yet.

    Returns:
        The records of ``runs``, in their order, and the number of runs that failed. A failed run is recorded with
        its error and tried again by the next start.
    """
    code = code_fingerprint()
    done = {r["key"]: r for r in read_results(results) if "error" not in r}
    todo = [run for run in runs if run.key(code) not in done]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are already in {results}")
    failed = _run_missing(todo, code, done, results, dataset_root, jobs) if todo else 0
    return [done[run.key(code)] for run in runs if run.key(code) in done], failed


def _run_missing(todo: list[Run], code: str, done: dict, results: Path, dataset_root: str, jobs: int) -> int:
    failed = 0
    patience = 0.5 if sys.stdout.isatty() else 10  # seconds between updates: few lines in a log file
    bar = tqdm(total=len(todo), unit="run", file=sys.stdout, mininterval=patience)
    with _pool(min(jobs, len(todo))) as pool, bar as progress:
        futures = {pool.submit(_execute, run, dataset_root, run.key(code)): run for run in todo}
        try:
            for future in as_completed(futures):
                run, record = futures[future], future.result()
                append_result(results, record)
                if "error" in record:
                    failed += 1
                    progress.write(f"FAILED {run.strategy}, seed {run.seed}: {record['error'].splitlines()[-1]}")
                else:
                    done[record["key"]] = record
                progress.set_postfix_str(f"{run.strategy}, seed {run.seed}", refresh=False)
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _execute(run: Run, dataset_root: str, key: str) -> dict:
    from harness.run import execute  # here, as only workers need torch

    try:
        return execute(run, dataset_root, key)
    except Exception:
        return {"key": key, "run": run.to_json(), "error": traceback.format_exc()}


def _pool(workers: int) -> ProcessPoolExecutor:
    # A fork server imports torch and Avalanche once for all workers.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["harness.run"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    from harness.run import quiet

    quiet()
