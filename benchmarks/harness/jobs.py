"""Runs jobs in parallel, in processes of this machine or on a Dask cluster. Each result is stored as it comes."""

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import closing, contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from harness.settings import ROOT, Run
from harness.store import Store, key_of

ATTEMPTS = 3  # number of times that a job is tried if its process dies, as in Dask


def run_all(
    runs: Sequence[Run],
    store: Store,
    dataset_root: Path | None,
    jobs: int,
    scheduler: str | None = None,
    keeps_curve: Callable[[Run], bool] = lambda run: True,
) -> int:
    """Finishes every run that ``store`` doesn't hold yet; returns the number of runs that failed.

    Args:
        runs: all that the store is to hold in the end. A failed one is stored with its error, and tried again by the
            next start.
        dataset_root: folder of the data set, as the workers see it; None: its own.
        jobs: processes, without a scheduler.
        scheduler: address of a Dask scheduler, whose workers then train.
        keeps_curve: whether a run's accuracy is also measured during training, which takes longer than to train it.

    Raises:
        OSError: results can't be written, or the scheduler can't be reached. Finished runs are kept.
    """
    keys, stored = {key_of(run.settings()): run for run in runs}, store.keys()
    tasks = [(run, dataset_root, keeps_curve(run)) for key, run in keys.items() if key not in stored]
    if len(tasks) < len(keys):
        print(f"{len(keys) - len(tasks)} of {len(keys)} runs are already in {store.path}")
    failed, patience = 0, 0.5 if sys.stdout.isatty() else 10  # seconds between updates: few lines in a log file
    bar = tqdm(total=len(tasks), unit="run", file=sys.stdout, mininterval=patience, disable=not tasks)
    with bar, closing(in_parallel(_train, tasks, jobs, scheduler)) as finished:
        for (run, *_), row in finished:
            name = f"{run.strategy}, seed {run.seed}"
            if isinstance(row, Exception):
                row = {"settings": run.settings(), "error": f"{type(row).__name__}: {row}"}
            store.append(row)
            if "error" in row:
                failed += 1
                bar.write(f"FAILED {name}: {row['error'].splitlines()[-1]}")
            bar.set_postfix_str(name, refresh=False)
            bar.update()
    return failed


def in_parallel(function: Callable, jobs: Sequence, workers: int, scheduler: str | None = None) -> Iterator[tuple]:
    """Each job with its result, or with its exception, in the order in which they end.

    A job whose process dies is tried again in a fresh one, ``ATTEMPTS`` times.

    Args:
        function: a module's function of one job.
        workers: processes, unless there is the address of a Dask scheduler.

    Raises:
        OSError: the scheduler can't be reached.
        ImportError: Dask is not installed.
    """
    if not jobs:
        return
    with _cluster(scheduler) if scheduler else _processes(min(workers, len(jobs))) as submit:
        pending = {submit(function, job): (job, 1) for job in jobs}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job, attempt = pending.pop(future)
                try:
                    result = future.result()
                except CancelledError:
                    raise ConnectionError("the Dask scheduler is gone") from None
                except ProcessExpired as error:
                    if attempt < ATTEMPTS:
                        pending[submit(function, job)] = job, attempt + 1
                        continue
                    result = RuntimeError(f"its process died {ATTEMPTS} times, at last with exit code {error.exitcode}")
                except Exception as error:
                    result = error
                yield job, result


@contextmanager
def _processes(workers: int) -> Iterator[Callable[..., Future]]:
    context = multiprocessing.get_context()
    if "forkserver" in multiprocessing.get_all_start_methods():  # it imports torch and Avalanche once for all workers
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harness.run"])
        # Before Python 3.13 the server has the environment's path alone, and silently loads nothing.
        path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
        with mock.patch.dict(os.environ, PYTHONPATH=path):
            forkserver.ensure_running()
    pool = ProcessPool(workers, context=context)
    try:
        yield lambda function, job: pool.schedule(function, [job])
    finally:
        pool.stop()  # all jobs have ended, unless something was raised
        pool.join()


@contextmanager
def _cluster(scheduler: str) -> Iterator[Callable[..., Future]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("--scheduler needs Dask: pip install '.[cluster]'") from error
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Dask scheduler at {scheduler}: {error}") from error
    with client:
        executor = client.get_executor(pure=False)
        try:
            yield executor.submit
        finally:
            executor.shutdown(wait=False)


def _train(task: tuple[Run, str, bool]) -> dict:
    """A run's row, with "error" if it failed; a worker's job."""
    run, dataset_root, curve = task
    with worker():
        from harness.run import execute

        try:
            return execute(run, dataset_root, curve=curve)
        except Exception:
            return {"settings": run.settings(), "error": traceback.format_exc()}


_one_at_a_time = threading.Lock()  # a Dask worker may have several threads; torch's random numbers have one state


@contextmanager
def worker() -> Iterator[None]:
    """Every job of a worker trains within this context: one job at a time in a process."""
    with _one_at_a_time:
        from harness.run import quiet  # here, as only workers need torch

        quiet()
        yield
