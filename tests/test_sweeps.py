"""Sweeps lose nothing: killed groups, dying workers, full disks, several writers, a cluster."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import pytest

from conftest import MNIST, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from harness.executors import ATTEMPTS, ProcessExecutor, open_executor, prepared, result_of  # noqa: E402
from harness.files import write_whole  # noqa: E402
from harness.jobs import append_result, read_results, run_all  # noqa: E402
from harness.run import execute  # noqa: E402
from harness.settings import Run  # noqa: E402

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


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def check(path, seeds):
    """Every line whole, every run there, none twice."""
    assert path.read_text().endswith("\n")
    records = [json.loads(line) for line in lines(path)]
    assert sorted(r["run"]["seed"] for r in records) == list(range(seeds))
    assert not any("error" in r for r in records)


def test_a_sweep_killed_three_times_ends_with_every_result_once(tmp_path):
    results, rng = tmp_path / "results.jsonl", random.Random(0)
    few, many = sorted(rng.sample(range(2, 11), 2))
    for finished, kill in ((0, os.killpg), (few, os.kill), (many, os.killpg)):
        process = sweep(tmp_path, 12)
        wait_until(lambda n=finished: len(lines(results)) >= n)
        time.sleep(rng.uniform(0.0, 0.3) if finished else rng.uniform(0.0, 4.0))  # before any result, too
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # to the end of all that write to its output: workers end with their parent
    kept = lines(results)
    assert len(kept) < 12
    last = sweep(tmp_path, 12)
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert lines(results)[: len(kept)] == kept and f"{len(kept)} of 12 runs are already" in out
    check(results, 12)


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
    records, failed = run_all(runs, tmp_path / "results.jsonl", str(MNIST), jobs=2)
    assert failed == 1 and [r["run"]["seed"] for r in records] == [0, 2, 3]
    (error,) = [r["error"] for r in read_results(tmp_path / "results.jsonl") if "error" in r]
    assert f"died {ATTEMPTS} times, at last with exit code 3" in error
    assert "FAILED naive-sgd, seed 1" in capsys.readouterr().out


# -- Files -----------------------------------------------------------------------------------------------------------

APPEND = """
import sys; sys.path.insert(0, {benchmarks!r})
from pathlib import Path; from harness.jobs import append_result
for i in range(150):
    append_result(Path({path!r}), {{"key": f"{{i}}", "writer": sys.argv[1], "filling": "x" * (i * 100)}})
    append_result(Path({path!r}), {{"writer": sys.argv[1], "i": i}})
"""


def test_two_processes_append_to_one_file_at_once(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "cut sho')  # both find it, one mends it
    code = APPEND.format(benchmarks=str(ROOT / "benchmarks"), path=str(path))
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [p.wait() for p in processes] == [0, 0]
    records = [json.loads(line) for line in lines(path)]
    assert Counter(r["writer"] for r in records if "i" in r) == {"a": 150, "b": 150}
    assert sorted(int(r["key"]) for r in records if "key" in r) == list(range(150))  # a finished run is kept once


def test_a_failed_run_does_not_keep_its_result_out(tmp_path):
    path = tmp_path / "results.jsonl"
    for record in ({"key": "k", "error": "e"}, {"key": "k", "acc": 1}, {"key": "k", "acc": 2}):
        append_result(path, record)
    assert read_results(path) == [{"key": "k", "error": "e"}, {"key": "k", "acc": 1}]


@pytest.mark.parametrize("tail, kept", [('{"b": 2}', [{"a": 1}, {"b": 2}]), ('{"b": ', [{"a": 1}])])
def test_a_last_line_without_its_end_is_ended_or_dropped(tmp_path, tail, kept):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n' + tail)
    append_result(path, {"c": 3})
    assert [json.loads(line) for line in lines(path)] == [*kept, {"c": 3}]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["best.json"]


def test_a_full_disk_stops_a_sweep_and_damages_nothing(tmp_path):
    """The limit on the size of a file stands in for the disk: the write fails as it does there."""
    results = tmp_path / "results.jsonl"
    full = sweep(tmp_path, 6, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    _, err = full.communicate()
    assert full.returncode == 1 and "Traceback" not in err
    assert f"File too large: '{results}'" in err and "the same command goes on from there" in err
    kept = lines(results)
    assert 0 < len(kept) < 6 and all(json.loads(line)["acc"] for line in kept)
    records, failed = run_all([tiny(seed) for seed in range(6)], results, str(MNIST), jobs=2)
    assert (len(records), failed) == (6, 0) and lines(results)[: len(kept)] == kept
    check(results, 6)


# -- A cluster -------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_on_a_cluster(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the worker, in this process, silences some
    results, runs = tmp_path / "results.jsonl", [tiny(seed) for seed in range(3)]
    runs += [tiny(3, strategy="sp", overrides=(("lr", 1e30),))]
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        records, failed = run_all(runs, results, str(MNIST), 1, cluster.scheduler_address)
        assert failed == 1 and [r["run"]["seed"] for r in records] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="the worker has loaded other code"):
            with open_executor(1, cluster.scheduler_address) as executor:
                result_of(executor.submit(prepared_for, "other code"))
    # Two threads, but one run at a time: the same numbers as alone.
    alone = execute(runs[1], str(MNIST), "key")
    assert alone["accuracy_matrix"] == records[1]["accuracy_matrix"]


def prepared_for(code):
    with prepared(code):
        pass


@pytest.mark.slow
def test_a_sweep_on_a_cluster_survives_the_death_of_a_worker(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    # As docs/sweeps.md says: the workers find the harness, one thread each.
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    results = tmp_path / "results.jsonl"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        process = sweep(tmp_path, 12, "--scheduler", cluster.scheduler_address)
        wait_until(lambda: len(lines(results)) >= 3)
        with distributed.Client(cluster) as client:
            pids = client.run(os.getpid)
        os.kill(min(pids.values()), signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode == 0, err
    check(results, 12)


def test_a_scheduler_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("distributed")
    process = sweep(tmp_path, 1, "--scheduler", "nowhere://127.0.0.1:1")
    _, err = process.communicate()
    assert process.returncode == 1 and "no Dask scheduler at nowhere://127.0.0.1:1" in err and "Traceback" not in err
