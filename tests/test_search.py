"""The search over settings: the space, how trials are shared and pruned, and the report."""

import csv
import json
import os
import shlex
import signal
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState, create_trial
from test_sweeps import rows, started, wait_until

import hyperparameter_search
import permuted_mnist
from harness.cli import parsed
from harness.recipes import recipe_of, strategies_of
from harness.search import Search, finished, work
from harness.store import Store

from conftest import ROOT

pytestmark = pytest.mark.slow

TINY = ["--benchmark", "permuted-mnist", "--tasks", "2", "--train-per-task", "200", "--seeds", "1", "--jobs", "1"]


def search_of(output=Path("unused"), strategy="naive-sgd", benchmark="permuted-mnist", **kwargs):
    settings = {"trials": 2, "seeds": 1, "jobs": 1, "train_per_task": 200 if benchmark == "permuted-mnist" else None}
    return Search(**{"output": output, "strategy": strategy, "benchmark": benchmark, "tasks": 2, **settings, **kwargs})


def report_of(output):
    """best.json, and the trials of trials.csv that ended; the two agree."""
    best = json.loads((output / "best.json").read_text())
    trials = list(csv.DictReader((output / "trials.csv").open()))
    ended = [t for t in trials if t["state"] in ("COMPLETE", "PRUNED")]
    assert len({(t["params_lr"], t["params_trace_decay"]) for t in trials}) == len(trials)
    assert sum(best["trials"].values()) == len(ended)
    assert max(float(t["value"]) for t in ended if t["state"] == "COMPLETE") == best["value"]
    return best, ended


def test_two_searches_on_one_study_of_which_one_is_killed(tmp_path):
    arguments = [*TINY, "--strategy", "sp-consolidated", "--output", str(tmp_path)]
    one, other = (started("hyperparameter_search.py", *arguments, "--trials", "10") for _ in range(2))
    wait_until(lambda: len(rows(tmp_path)) >= 3)
    os.killpg(one.pid, signal.SIGKILL)
    one.communicate()
    _, err = other.communicate()
    assert other.returncode == 0, err
    assert len(report_of(tmp_path)[1]) == 10


def test_two_workers_share_a_study_which_goes_on_and_is_reported(tmp_path, capsys):
    arguments = [*TINY, "--strategy", "sp-consolidated", "--output", str(tmp_path), "--jobs", "2"]
    assert hyperparameter_search.main([*arguments, "--trials", "5"]) == 0
    _, trials = report_of(tmp_path)
    assert hyperparameter_search.main([*arguments, "--trials", "8"]) == 0
    best, more = report_of(tmp_path)
    assert 5 <= len(trials) <= 6 and 8 <= len(more) <= 9  # the other worker's last trial ends, too
    assert [t for t in more if t in trials] == trials
    assert (tmp_path / "importances.png").stat().st_size > 0 and set(best["importances"]) == set(best["settings"])
    assert 1.0 == pytest.approx(sum(best["importances"].values()))
    runs = [row["settings"] for row in rows(tmp_path)]
    assert all(run["validation"] and run["seed"] >= 100 for run in runs)
    accs = [row["figures"]["acc"] for row in rows(tmp_path) if row["settings"]["overrides"] == best["settings"]]
    assert accs == [best["value"]]

    assert best["command"] in capsys.readouterr().out
    python, script, *rest = shlex.split(best["command"])
    assert (python, ROOT / script) == ("python", ROOT / "benchmarks" / "domain_incremental.py")
    assert permuted_mnist.main([*rest, "--seeds", "1"]) == 0
    (row,) = Store(tmp_path / "best").rows()
    assert row["settings"]["overrides"] == best["settings"] and row["settings"]["seed"] == 0
    assert "validation" not in row["settings"] and row["settings"]["lr"] == best["settings"]["lr"]


@pytest.mark.parametrize("database", [False, True])
def test_a_study_goes_on_where_it_stopped(tmp_path, database, tiny):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if database else None
    for trials in (1, 2, 2):
        search = search_of(tmp_path, "naive-adam", trials=trials, storage=storage)
        work((search, None))
        assert len(finished(search.study())) == trials
    first, second = finished(search.study())
    assert first.params != second.params and len(first.intermediate_values) == 2
    assert first.intermediate_values[1] == pytest.approx(first.value)


def test_a_trial_that_was_killed_does_not_count(tmp_path, tiny):
    search = search_of(tmp_path)
    search.study().ask()  # and nobody tells its end
    work((search, None))
    states = [trial.state for trial in search.study().trials]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.COMPLETE]


def test_a_worker_with_a_seed_repeats_a_search_to_the_digit(tmp_path, tiny):
    found = []
    for name in "ab":
        search = search_of(tmp_path / name, trials=12, batch_size=32)
        Store(search.output)
        work((search, 100))
        found.append([(t.params, t.value, t.intermediate_values) for t in search.study().trials])
    assert found[0] == found[1] and len(found[0]) == 12


def test_a_run_that_diverges_is_a_bad_trial_and_one_that_fails_ends_the_search(tmp_path, tiny):
    diverging = search_of(tmp_path, "sp", trials=1, set=({"lr": 1e30},))
    work((diverging, None))
    (trial,) = finished(diverging.study())
    assert trial.value == 0.0 and "the loss is" in trial.user_attrs["diverged"]
    broken = search_of(tmp_path, batch_size=1000)
    with pytest.raises(ValueError, match="Invalid batch_size: 1000"):
        work((broken, None))
    assert [t.state for t in broken.study().trials] == [TrialState.FAIL]
    assert hyperparameter_search.main([*TINY, "--batch-size", "1000", "--output", str(tmp_path)]) == 1


def test_a_trial_is_pruned_for_what_it_forgets(tmp_path, tiny):
    """Its value so far is low after the second task; after the first one it counts for nothing."""
    search = search_of(tmp_path, set=({"lr": 0.1},), strategy="sp", trials=6)
    study = search.study()
    for last in (70.0, 80.0, 90.0, 80.0, 99.0):
        values = {0: 50.0, 1: last}
        study.add_trial(create_trial(value=last, intermediate_values=values, params={}, distributions={}))
    work((search, None))
    pruned = study.trials[-1]
    assert pruned.state == TrialState.PRUNED
    assert pruned.intermediate_values[0] < 50 < pruned.intermediate_values[1] < 80


ELEMENTWISE = {"trace_decay", "plasticity_k", "warmup_steps"}
PLUGIN = {"openness", "pull_back", "rank"}


@pytest.mark.parametrize(
    "strategy, names, highest",
    [
        ("naive-sgd", set(), 1.0),
        ("joint", set(), 1e-2),
        ("mas", {"strength"}, 1.0),
        ("sp", PLUGIN, 1.0),
        ("sp-optimizer", ELEMENTWISE, 1e-2),
        ("sp-both", ELEMENTWISE | PLUGIN, 1e-2),
        ("sp-replay", ELEMENTWISE | PLUGIN, 1e-2),
        ("replay-joint", set(), 1.0),  # which wants all of the joint weight
        ("gate-random", ELEMENTWISE, 1e-2),
        ("gate-off", {"trace_decay"}, 1e-2),
        ("upgd", {"sigma"}, 1.0),
    ],
)
def test_the_space_is_what_the_strategy_has(strategy, names, highest):
    space = search_of(strategy=strategy).space()
    assert set(space) == names | {"lr"} and space["lr"].high == highest and space["lr"].log
    if names:
        assert set(search_of(strategy=strategy, set=({"lr": 0.1},)).space()) == names


@pytest.mark.parametrize("benchmark", ["split-mnist", "permuted-mnist"])
def test_every_strategy_has_something_to_search(benchmark):
    for strategy in strategies_of(benchmark):
        lowest = {name: values.low for name, values in search_of(None, strategy, benchmark).space().items()}
        fixed = dict(list(lowest.items())[1:])
        assert recipe_of(search_of(None, strategy, benchmark, set=(fixed,)).first_run).lr is not None


def test_the_command_line_is_the_search():
    search = parsed(Search, [*TINY, "--strategy", "sp-replay", "--set", "lr=1,", "rank=50", "--trials", "7"], "")
    run = search.first_run
    assert (run.n_tasks, run.replay_buffer, run.seed, search.trials) == (2, 200, 100, 7)
    assert run.validation and dict(run.overrides) == {"lr": 1.0, "rank": 50.0}
