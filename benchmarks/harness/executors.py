"""Where jobs run, behind ``concurrent.futures.Executor``: in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from harness.settings import ROOT, code_fingerprint

ATTEMPTS = 3  # of a job whose process dies; Dask has as many


@contextmanager
def open_executor(jobs: int, scheduler: str | None = None) -> Iterator[Executor]:
    """An executor whose ``shutdown(wait=False)`` drops what has not finished.

    Args:
        jobs: processes, without a scheduler.
        scheduler: address of a Dask scheduler, whose workers then do the jobs.

    Raises:
        OSError: no scheduler answers there.
        ImportError: Dask is not installed.
    """
    if scheduler is None:
        with ProcessExecutor(jobs) as executor:
            yield executor
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("--scheduler needs Dask: pip install '.[cluster]'") from error
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Dask scheduler at {scheduler}: {error}") from error
    with client:
        yield client.get_executor(pure=False)


def result_of(future: Future):
    """The future's result, or its error; that of a scheduler that is gone has a name.

    Raises:
        ConnectionError: the Dask scheduler is gone.
    """
    try:
        return future.result()
    except CancelledError:
        raise ConnectionError("the Dask scheduler is gone") from None


class ProcessExecutor(Executor):
    """A number of worker processes. One that dies takes its job alone with it, which is tried again in a fresh one.

    ``concurrent.futures.ProcessPoolExecutor`` gives up every job when a process dies, and doesn't say which one did it.

    Args:
        workers: processes, 1 or more.

    Raises:
        BrokenProcessPool: from a future, if its job's process died ``ATTEMPTS`` times.
    """

    def __init__(self, workers: int):
        self._threads = ThreadPoolExecutor(workers)  # each waits for one process
        self._mutex = threading.Lock()
        self._idle: list[_Worker] = []
        self._workers: list[_Worker] = []
        self._stopped = False

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        return self._threads.submit(self._attempt, (fn, args, kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the processes: when all jobs are done, or at once, jobs and all, if not ``wait``."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures or not wait)
        with self._mutex:
            self._stopped = True
            for worker in self._workers:
                worker.process.kill()

    def _attempt(self, job: tuple):
        for _ in range(ATTEMPTS):
            with self._mutex:
                if self._stopped:
                    raise BrokenProcessPool("the executor was shut down")
                worker = self._idle.pop() if self._idle else self._start()
            try:
                worker.connection.send(job)
                succeeded, value = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.kill()
                worker.process.join()
                continue
            with self._mutex:
                self._idle.append(worker)
            if succeeded:
                return value
            raise value
        raise BrokenProcessPool(f"its process died {ATTEMPTS} times, at last with exit code {worker.process.exitcode}")

    def _start(self) -> _Worker:
        self._workers.append(_Worker())
        return self._workers[-1]


class _Worker:
    def __init__(self):
        # A fork server imports torch and Avalanche once for all workers.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload(["harness.run"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _importable():
            self.process.start()
        theirs.close()  # so that its end is the end of the connection


@contextmanager
def _importable() -> Iterator[None]:
    """For the fork server: before Python 3.13 it has the environment's path alone, and silently loads nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _serve(connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            fn, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            outcome = True, fn(*args, **kwargs)
        except Exception as error:
            outcome = False, error
        connection.send(outcome)


def _end_with_parent() -> None:
    """A parent killed at once can't end its workers: nobody would want their results any more."""
    multiprocessing.parent_process().join()
    os._exit(1)


_one_at_a_time = threading.Lock()  # a Dask worker may have several threads; torch's random numbers have one state


@contextmanager
def prepared(code: str) -> Iterator[None]:
    """What a job does its work in, in whatever process it is.

    Args:
        code: fingerprint of the code that the job was made for.

    Raises:
        RuntimeError: the process has loaded other code.
    """
    with _one_at_a_time:
        loaded = _load()
        if loaded != code:
            raise RuntimeError(f"the worker has loaded other code ({loaded}, not {code}): restart it")
        yield


@functools.cache
def _load() -> str:
    from harness.run import quiet  # here, as only workers need torch

    quiet()
    return code_fingerprint()
