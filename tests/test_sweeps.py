"""Sweeps lose nothing: killed groups, dying workers, full disks, several writers, a cluster."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings

import pytest

from conftest import MNIST, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from harness.executors import ATTEMPTS, ProcessExecutor, open_executor, prepared, result_of  # noqa: E402
from harness.files import write_whole  # noqa: E402
from harness.jobs import run_all  # noqa: E402
from harness.run import execute  # noqa: E402
from harness.settings import Run  # noqa: E402
from harness.store import Store  # noqa: E402

TINY = ["--tasks", "2", "--train-per-task", "200", "--strategies", "naive-sgd", "--jobs", "2"]


def tiny(seed, strategy="naive-sgd", **kwargs):
    return Run("permuted-mnist", strategy, 2, 1, 64, 0, seed, 200, **kwargs)


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


def test_a_sweep_killed_three_times_ends_with_every_result_once(tmp_path):
    rng = random.Random(0)
    few, many = sorted(rng.sample(range(2, 11), 2))
    for finished, kill in ((0, os.killpg), (few, os.kill), (many, os.killpg)):
        process = sweep(tmp_path, 12)
        wait_until(lambda n=finished: len(rows(tmp_path)) >= n)
        time.sleep(rng.uniform(0.0, 0.3) if finished else rng.uniform(0.0, 4.0))  # before any result, too
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # to the end of all that write to its output: workers end with their parent
    kept = rows(tmp_path)
    assert len(kept) < 12
    last = sweep(tmp_path, 12)
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert rows(tmp_path)[: len(kept)] == kept and (f"{len(kept)} of 12 runs are already" in out or not kept)
    check(tmp_path, 12)


# -- Workers that die ------------------------------------------------------------------------------------------------


class Deadly(float):
    """A setting whose arrival ends the process that it arrives in."""

    def __reduce__(self):
        return os._exit, (3,)

    def __deepcopy__(self, memo):
        return self


def die_once(path):
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def raises():
    raise LookupError("as it is")


def test_a_job_whose_worker_dies_is_tried_again_in_another(tmp_path):
    with ProcessExecutor(2) as executor:
        jobs = [executor.submit(die_once, tmp_path / str(i)) for i in range(4)]
        assert all(job.result() != os.getpid() for job in jobs)
        with pytest.raises(LookupError, match="as it is"):
            executor.submit(raises).result()


def test_a_run_that_always_kills_its_worker_is_recorded_and_the_others_go_on(tmp_path, capsys):
    runs = [tiny(0), tiny(1, overrides=(("lr", Deadly(0.1)),)), tiny(2), tiny(3)]
    store = Store(tmp_path)
    assert run_all(runs, store, str(MNIST), jobs=2) == 1 and sorted(store.frame().seed) == [0, 2, 3]
    (error,) = [row["error"] for row in store.rows() if "error" in row]
    assert f"died {ATTEMPTS} times, at last with exit code 3" in error
    assert "FAILED naive-sgd, seed 1" in capsys.readouterr().out


# -- Files -----------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["best.json"]


def test_a_full_disk_stops_a_sweep_and_damages_nothing(tmp_path):
    """The limit on the size of a file stands in for the disk: the write fails as it does there."""
    full = sweep(tmp_path, 6, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    _, err = full.communicate()
    assert full.returncode == 1 and "Traceback" not in err
    assert f"File too large: '{tmp_path / 'permuted-mnist.jsonl'}'" in err
    assert "the same command goes on from there" in err
    kept = rows(tmp_path)
    assert 0 < len(kept) < 6 and all(row["figures"]["acc"] for row in kept)
    assert run_all([tiny(seed) for seed in range(6)], Store(tmp_path), str(MNIST), jobs=2) == 0
    assert rows(tmp_path)[: len(kept)] == kept
    check(tmp_path, 6)


# -- A cluster -------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_on_a_cluster(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the worker, in this process, silences some
    store, runs = Store(tmp_path), [tiny(seed) for seed in range(3)]
    runs += [tiny(3, strategy="sp", overrides=(("lr", 1e30),))]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        assert run_all(runs, store, str(MNIST), 1, cluster.scheduler_address) == 1
        frame = store.frame().sort_values("seed")
        assert frame.seed.tolist() == [0, 1, 2]
        with pytest.raises(RuntimeError, match="the worker has loaded other code"):
            with open_executor(1, cluster.scheduler_address) as executor:
                result_of(executor.submit(prepared_for, "other code"))
    # Two threads, but one run at a time: the same numbers as alone.
    alone = execute(runs[1], str(MNIST), "key")
    assert alone["accuracy_matrix"] == frame.accuracy_matrix.iloc[1]


def prepared_for(code):
    with prepared(code):
        pass


@pytest.mark.slow
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


def test_a_scheduler_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("distributed")
    process = sweep(tmp_path, 1, "--scheduler", "nowhere://127.0.0.1:1")
    _, err = process.communicate()
    assert process.returncode == 1 and "no Dask scheduler at nowhere://127.0.0.1:1" in err and "Traceback" not in err
