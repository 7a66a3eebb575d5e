"""Sweeps lose nothing: killed commands, dying workers, a full disk, a cluster."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings

import pytest

import permuted_mnist
from harness.jobs import ATTEMPTS, in_parallel, run_all
from harness.run import execute
from harness.settings import Run
from harness.store import Store

from conftest import MNIST, ROOT

pytestmark = pytest.mark.slow

TINY = ["--tasks", "2", "--train-per-task", "200", "--strategies", "naive-sgd", "--jobs", "2"]


def tiny(seed, strategy="naive-sgd", **kwargs):
    return Run("permuted-mnist", strategy, 2, seed=seed, train_per_task=200, **kwargs)


def started(script, *arguments, **kwargs):
    """A script in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def sweep(output, seeds, *arguments, **kwargs):
    return started("permuted_mnist.py", *TINY, "--seeds", str(seeds), "--output", output, *arguments, **kwargs)


def rows(path):
    return list(Store(path).rows())


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def check(path, seeds):
    """Every run there, none twice."""
    assert sorted(row["settings"]["seed"] for row in rows(path)) == list(range(seeds))
    assert not any("error" in row for row in rows(path))


def killed(output, seeds, kill, finished):
    """A sweep that is killed when it has finished a number of runs; the rows that it left."""
    process = sweep(output, seeds)
    wait_until(lambda: len(rows(output)) >= finished)
    kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # to the end of all that write to its output: workers end with their parent
    return rows(output)


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    kept = killed(tmp_path, 4, os.kill, 1)
    assert 1 <= len(kept) < 4
    assert run_all([tiny(seed) for seed in range(4)], Store(tmp_path), MNIST, jobs=2) == 0
    assert rows(tmp_path)[: len(kept)] == kept and f"{len(kept)} of 4 runs are already" in capsys.readouterr().out
    check(tmp_path, 4)


def test_a_sweep_killed_three_times_ends_with_every_result_once(tmp_path):
    few, many = sorted(random.Random(0).sample(range(2, 11), 2))
    for finished, kill in ((0, os.killpg), (few, os.kill), (many, os.killpg)):
        kept = killed(tmp_path, 12, kill, finished)
    last = sweep(tmp_path, 12)
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert rows(tmp_path)[: len(kept)] == kept and f"{len(kept)} of 12 runs are already" in out
    check(tmp_path, 12)


# -- Workers that die ------------------------------------------------------------------------------------------------


class Deadly(float):
    """A setting that ends the worker that looks at it."""

    def __deepcopy__(self, memo):
        return self

    def __float__(self):
        os._exit(3)

    def __mul__(self, other):
        os._exit(3)

    __le__ = __lt__ = __rmul__ = __neg__ = __mul__


def die_once(path):
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def raises(path):
    raise LookupError(f"as it is: {path}")


def test_a_job_whose_worker_dies_is_tried_again_in_another(tmp_path):
    jobs = [tmp_path / str(i) for i in range(4)]
    results = dict(in_parallel(die_once, jobs, 2))
    assert set(results) == set(jobs) and os.getpid() not in results.values()
    ((_, error),) = in_parallel(raises, jobs[:1], 2)
    assert isinstance(error, LookupError) and str(error) == f"as it is: {jobs[0]}"


def test_a_run_that_always_kills_its_worker_is_recorded_and_the_others_go_on(tmp_path, capsys):
    runs = [tiny(0), tiny(1, overrides={"lr": Deadly(0.1)}), tiny(2), tiny(3)]
    store = Store(tmp_path)
    assert run_all(runs, store, MNIST, jobs=2) == 1
    assert sorted(store.frame().seed) == [0, 2, 3]
    (error,) = [row["error"] for row in store.rows() if "error" in row]
    assert f"died {ATTEMPTS} times, at last with exit code 3" in error
    assert "FAILED naive-sgd, seed 1" in capsys.readouterr().out


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path, capsys):
    store, bad = Store(tmp_path), tiny(5, "sp", overrides={"lr": 1e30})
    assert run_all([bad, tiny(0)], store, MNIST, jobs=1) == 1
    assert store.frame().strategy.tolist() == ["naive-sgd"]
    (error,) = [row["error"] for row in store.rows() if "error" in row]
    assert "FloatingPointError: the loss is" in error
    assert "FAILED sp, seed 5" in capsys.readouterr().out


def test_finished_runs_are_not_run_again_and_are_those_of_one_process(tmp_path, capsys):
    store, runs = Store(tmp_path), [tiny(0), tiny(1), tiny(1)]
    assert run_all(runs[:1], store, MNIST, jobs=1) == 0
    with open(tmp_path / "permuted-mnist.jsonl", "a") as file:
        file.write('{"settings": {"cut sho')  # as a kill in the middle of a write leaves it
    assert run_all(runs, store, MNIST, jobs=2) == 0
    check(tmp_path, 2)
    assert run_all(runs, store, MNIST, jobs=2) == 0
    assert "2 of 2 runs are already in" in capsys.readouterr().out and len(rows(tmp_path)) == 2
    alone = execute(tiny(1), str(MNIST), curve=False)["figures"]
    assert rows(tmp_path)[1]["figures"]["accuracy_matrix"] == alone["accuracy_matrix"]


def test_a_full_disk_stops_a_sweep_and_damages_nothing(tmp_path, capsys):
    """The limit on the size of a file stands in for the disk: the write fails as it does there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        assert permuted_mnist.main([*TINY, "--seeds", "6", "--output", str(tmp_path)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert f"File too large: '{tmp_path / 'permuted-mnist.jsonl'}'" in err
    assert "the same command goes on from there" in err
    kept = rows(tmp_path)
    assert 0 < len(kept) < 6 and all(row["figures"]["acc"] for row in kept)
    assert run_all([tiny(seed) for seed in range(6)], Store(tmp_path), MNIST, jobs=2) == 0
    assert rows(tmp_path)[: len(kept)] == kept
    check(tmp_path, 6)


# -- A cluster -------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_on_a_cluster(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the worker, in this process, silences some
    store, runs = Store(tmp_path), [tiny(seed) for seed in range(3)]
    runs += [tiny(3, strategy="sp", overrides={"lr": 1e30})]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        assert run_all(runs, store, MNIST, 1, cluster.scheduler_address) == 1
    frame = store.frame().set_index("seed")
    assert set(frame.index) == {0, 1, 2}
    # Two threads, but one run at a time: the same numbers as alone.
    alone = execute(runs[1], str(MNIST), curve=False)["figures"]
    assert alone["accuracy_matrix"] == frame.accuracy_matrix[1]


def test_a_sweep_on_a_cluster_survives_the_death_of_a_worker(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    # As docs/sweeps.md says: the workers find the harness, one thread each.
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        process = sweep(tmp_path, 12, "--scheduler", cluster.scheduler_address)
        wait_until(lambda: len(rows(tmp_path)) >= 3)
        with distributed.Client(cluster) as client:
            pids = client.run(os.getpid)
        os.kill(min(pids.values()), signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode == 0, err
    check(tmp_path, 12)


def test_a_scheduler_that_is_not_there_is_named(tmp_path, capsys):
    pytest.importorskip("distributed")
    words = [*TINY, "--seeds", "1", "--output", str(tmp_path), "--scheduler", "nowhere://127.0.0.1:1"]
    assert permuted_mnist.main(words) == 1
    assert "no Dask scheduler at nowhere://127.0.0.1:1" in capsys.readouterr().err
