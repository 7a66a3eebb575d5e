"""The store of results: rows that several processes append, keys that settings and versions alone decide."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from harness import store as stores
from harness.store import Store, key_of

from conftest import ROOT

SETTINGS = {"benchmark": "split-mnist", "strategy": "sp-both", "n_tasks": 5, "seed": 0, "lr": 0.1}


def row(acc=90.0, **settings):
    return {"settings": {**SETTINGS, **settings}, "figures": {"acc": acc, "accuracy_matrix": [[99.0, 0.0], [acc, 1.0]]}}


def test_a_key_is_the_settings_and_the_version_whatever_their_order(monkeypatch):
    key = key_of(SETTINGS)
    assert key == key_of(dict(reversed(SETTINGS.items())))
    assert key == key_of(SETTINGS | {"stream": "tasks", "overrides": {}})  # usual values count as left out
    assert key == key_of(SETTINGS | {"n_tasks": 5.0})
    assert len({key, key_of(SETTINGS | {"seed": 1}), key_of(SETTINGS | {"lr": 0.2}), key_of(SETTINGS | {"x": 0})}) == 4
    other = key_of(SETTINGS | {"strategy": "ewc"})
    monkeypatch.setitem(stores.ALGORITHM_VERSION, "ours", stores.ALGORITHM_VERSION["ours"] + 1)
    assert key_of(SETTINGS) != key == key_of(SETTINGS, stores.ALGORITHM_VERSION["ours"] - 1)
    assert key_of(SETTINGS | {"strategy": "ewc"}) == other  # of another family


def test_a_row_comes_back_as_settings_and_figures(tmp_path):
    store = Store(tmp_path / "new" / "folder")
    arguments = {"openness": math.inf, "lr": 0.1}
    store.append(row(arguments=arguments, plugins=["replay", "sp"]) | {"versions": {"torch": "2.14"}})
    permuted = row(benchmark="permuted-mnist", strategy="ewc", seed=3)
    store.append(permuted)
    assert {path.name for path in store.path.iterdir()} == {"split-mnist.jsonl", "permuted-mnist.jsonl"}
    frame = store.frame()
    assert key_of(permuted["settings"]) in store.keys() == set(frame.index)
    run = frame[frame.strategy == "sp-both"].iloc[0]
    assert run.arguments == "lr=0.1 openness=inf" and run.plugins == "replay sp"
    assert (run.acc, run.accuracy_matrix, run.torch) == (90.0, [[99.0, 0.0], [90.0, 1.0]], "2.14")
    assert run.version == stores.ALGORITHM_VERSION["ours"] and run.finished.endswith("Z")


def test_of_two_rows_with_one_key_the_last_counts_and_a_failure_never(tmp_path):
    store = Store(tmp_path)
    store.append(row(1.0))
    store.append(row(2.0))
    store.append({"settings": SETTINGS, "error": "FloatingPointError"})
    store.append({"settings": SETTINGS | {"seed": 1}, "error": "FloatingPointError"})
    assert store.frame().acc.tolist() == [2.0] and store.keys() == {key_of(SETTINGS)}
    assert sum("error" in r for r in store.rows()) == 2


def test_a_row_of_an_older_algorithm_keeps_its_version_and_is_not_of_the_present_one(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append(row(1.0))
    monkeypatch.setitem(stores.ALGORITHM_VERSION, "ours", stores.ALGORITHM_VERSION["ours"] + 1)
    assert key_of(SETTINGS) not in store.keys()
    store.append(row(2.0))
    frame = store.frame()
    assert len(frame) == 2 and frame.loc[key_of(SETTINGS)].acc == 2.0


def test_a_line_that_was_cut_off_is_skipped_and_the_next_row_is_whole(tmp_path):
    store = Store(tmp_path)
    store.append(row(1.0))
    file = tmp_path / "split-mnist.jsonl"
    file.write_bytes(file.read_bytes() + file.read_bytes()[:40])
    assert store.frame().acc.tolist() == [1.0]
    store.append(row(2.0, seed=1))
    assert store.frame().acc.tolist() == [1.0, 2.0]


APPENDING = """
import sys; sys.path.insert(0, {benchmarks!r})
from harness.store import Store
store = Store({path!r})
for seed in range({first}, {first} + 100000):
    settings = {{"benchmark": "b", "strategy": "s", "seed": seed}}
    store.append({{"settings": settings, "figures": {{"curve": [1.5] * 20000}}}})
"""


@pytest.mark.slow
def test_processes_that_append_together_and_are_killed_lose_no_whole_row(tmp_path):
    starts, store, deadline = (1_000_000, 2_000_000), Store(tmp_path), time.monotonic() + 60
    programs = [
        APPENDING.format(benchmarks=str(ROOT / "benchmarks"), path=str(tmp_path), first=first) for first in starts
    ]
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    seeds: list[int] = []
    while time.monotonic() < deadline and not {first + 10 for first in starts} <= set(seeds):
        time.sleep(0.05)
        seeds = [r["settings"]["seed"] for r in store.rows()]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    store.append({"settings": {"benchmark": "b", "strategy": "s", "seed": 0}, "figures": {}})
    rows = list(store.rows())
    whole = [line for line in (tmp_path / "b.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(rows) == len(whole) and rows[-1]["settings"]["seed"] == 0
    assert all(len(r["figures"]["curve"]) == 20000 for r in rows[:-1])
    for first in starts:  # each in order, none missing
        seeds = [r["settings"]["seed"] for r in rows if first <= r["settings"]["seed"] < first + 100000]
        assert len(seeds) > 10 and seeds == list(range(first, first + len(seeds)))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the results cannot be written") as error:
        Store(tmp_path / place)
    assert str(tmp_path / place) in str(error.value)
