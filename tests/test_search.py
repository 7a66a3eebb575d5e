"""The search over settings: what is searched, how trials are shared, pruned and let go, and what comes out."""

import csv
import json
import os
import shlex
import signal
import warnings

import pytest

pytest.importorskip("optuna")

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from test_sweeps import started, wait_until

import hyperparameter_search
import permuted_mnist
from harness import files, search
from harness.run import execute
from harness.settings import STRATEGIES, STUDIES, Run, code_fingerprint
from harness.store import Store
from harness.strategies import recipe_of

from conftest import MNIST, ROOT

TINY = ["--benchmark", "permuted-mnist", "--tasks", "2", "--train-per-task", "200", "--seeds", "1", "--jobs", "1"]


def make_run(strategy="naive-sgd", benchmark="permuted-mnist", **kwargs):
    settings = {"n_tasks": 2, "epochs": 1, "batch_size": 64, "replay_buffer": 0, "seed": 100, "train_per_task": 200}
    return Run(benchmark, strategy, **{**settings, "validation": True, **kwargs})


def make_search(output, trials=2, strategy="naive-sgd", storage=None, **kwargs):
    return search.Search(make_run(strategy, **kwargs), 1, trials, output, str(MNIST), code_fingerprint(), storage)


@pytest.fixture(autouse=True)
def warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # a worker, as which we act, silences some


def test_a_search_in_two_processes_loses_one_and_goes_on(tmp_path, capsys):
    arguments = [*TINY, "--strategy", "sp-consolidated", "--output", str(tmp_path)]
    one, other = (started("hyperparameter_search.py", *arguments, "--trials", "10") for _ in range(2))
    wait_until(lambda: len(list(Store(tmp_path / "runs").rows())) >= 3)
    os.killpg(one.pid, signal.SIGKILL)
    one.communicate()
    _, err = other.communicate()
    assert other.returncode == 0, err

    def state():
        best = json.loads((tmp_path / "best.json").read_text())
        trials = list(csv.DictReader((tmp_path / "trials.csv").open()))
        assert len({(t["lr"], t["trace_decay"]) for t in trials}) == len(trials) == sum(best["trials"].values())
        assert max(float(t["value"]) for t in trials if t["state"] == "complete") == best["value"]
        return best, trials

    _, trials = state()
    assert len(trials) == 10
    assert hyperparameter_search.main([*arguments, "--trials", "12"]) == 0
    best, more = state()
    assert len(more) == 12 and [t for t in more if t in trials] == trials
    assert (tmp_path / "importances.png").stat().st_size > 0 and set(best["importances"]) == set(best["settings"])
    assert 1.0 == pytest.approx(sum(best["importances"].values()))
    rows = list(Store(tmp_path / "runs").rows())
    assert all(r["settings"]["validation"] and r["settings"]["seed"] >= 100 for r in rows)
    assert best["value"] in [r["figures"]["acc"] for r in rows if r["settings"]["overrides"] == best["settings"]]

    assert best["command"] in capsys.readouterr().out
    python, script, *rest = shlex.split(best["command"])
    assert (python, ROOT / script) == ("python", ROOT / "benchmarks" / "permuted_mnist.py")
    assert permuted_mnist.main([*rest, "--seeds", "1"]) == 0
    (row,) = Store(tmp_path / "best").rows()
    settings = row["settings"]
    assert settings["overrides"] == best["settings"] and settings["seed"] == 0
    assert "validation" not in settings and settings["lr"] == best["settings"]["lr"]


def test_trials_of_killed_processes_are_let_go_and_those_of_living_ones_count(tmp_path):
    wanted = make_search(tmp_path, trials=3)
    study, space = wanted.study(), {"lr": FloatDistribution(0.01, 0.1)}
    (tmp_path / "workers").mkdir()
    for worker in ("killed", "alive"):
        study.ask(space).set_user_attr("worker", worker)
    study.ask(space)  # killed before it said whose it is
    (tmp_path / "workers" / "killed").touch()
    with open(tmp_path / "workers" / "alive", "ab") as held:
        files.lock(held)
        claimed = [search._claim(wanted, study, space) for _ in range(3)]
        states = [t.state for t in study.get_trials()]
        running, let_go = TrialState.RUNNING, TrialState.FAIL
        assert states == [let_go, running, let_go, running, running]
        assert claimed[2] is None and search.finished(study) == []
    assert len({t.params["lr"] for t in study.get_trials()}) == 5
    assert search._claim(wanted, study, space) is not None  # the other one has ended
    assert [p.name for p in (tmp_path / "workers").iterdir()] == [search._worker(tmp_path)]


@pytest.mark.parametrize("database", [False, True])
def test_a_study_goes_on_where_it_stopped(tmp_path, database):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if database else None
    assert search.work(make_search(tmp_path, 1, storage=storage))["state"] == "COMPLETE"
    if not database:
        with open(tmp_path / "study.jsonl", "a") as file:
            file.write('{"op_code": 4, "cut sho')  # as a crash of the machine leaves it
    wanted = make_search(tmp_path, 2, storage=storage)
    assert search.work(wanted)["number"] == 1
    assert search.work(wanted) is None
    first, second = search.finished(wanted.study())
    assert first.params != second.params and len(first.intermediate_values) == 2


def test_one_process_repeats_a_search_to_the_digit(tmp_path):
    searches = [make_search(tmp_path / name, 12, train_per_task=100, batch_size=32) for name in "ab"]
    for one in searches:
        one.output.mkdir()
        while search.work(one):
            pass
    a, b = ([(t.params, t.value, t.intermediate_values) for t in search.finished(s.study())] for s in searches)
    assert a == b and len(a) == 12


def test_a_run_that_diverges_is_a_bad_trial_and_one_that_fails_is_told(tmp_path):
    diverging = make_search(tmp_path, strategy="sp", overrides=(("lr", 1e30),))
    assert search.work(diverging)["value"] == 0.0
    broken = make_search(tmp_path, trials=1, batch_size=1000)
    with pytest.raises(ValueError, match="Invalid batch_size: 1000"):
        search.work(broken)
    (trial,) = search.finished(broken.study())
    assert trial.state == TrialState.FAIL and "Invalid batch_size" in trial.user_attrs["error"]


def test_a_trial_is_pruned_for_what_it_forgets():
    study = optuna.create_study(direction="maximize", pruner=search.Median())
    for last in (70.0, 80.0, 90.0, 80.0, 80.0):
        values = {0: 95.0, 1: last}
        study.add_trial(create_trial(value=last, intermediate_values=values))
    pruned = []
    for first, second in ((10.0, 85.0), (99.0, 75.0), (99.0, 80.0)):
        trial = study.ask()
        trial.report(first, 0)
        assert not trial.should_prune()  # the first task alone
        trial.report(second, 1)
        pruned.append(trial.should_prune())
    assert pruned == [False, True, False]


def test_the_hook_sees_the_accuracies_so_far():
    seen = []
    record = execute(make_run(), str(MNIST), "key", seen.append)
    assert [m.shape for m in seen] == [(1, 2), (2, 2)]
    assert seen[-1].round(4).tolist() == record["accuracy_matrix"]


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
        ("sp-replay", ELEMENTWISE | PLUGIN | {"shrinkage"}, 1e-2),
        ("replay-joint", set(), 1.0),  # which wants all of the joint weight
        ("gate-random", ELEMENTWISE, 1e-2),
        ("gate-off", {"trace_decay"}, 1e-2),
        ("upgd", {"sigma"}, 1.0),
    ],
)
def test_what_is_searched_is_what_the_strategy_has(strategy, names, highest):
    space = search.space_of(make_run(strategy))
    assert set(space) == names | {"lr"} and space["lr"].high == highest and space["lr"].log
    fixed = search.space_of(make_run(strategy, overrides=(("lr", 0.1),)))
    assert set(fixed) == names


@pytest.mark.parametrize("benchmark", STUDIES)
def test_every_strategy_has_something_to_search(benchmark):
    for strategy in STRATEGIES + STUDIES[benchmark]:
        space = search.space_of(make_run(strategy, benchmark))
        middle = {name: values.low for name, values in space.items()}
        assert recipe_of(make_run(strategy, benchmark, overrides=tuple(middle.items()))).lr == middle["lr"]


def test_an_optimizers_own_numbers_can_be_set():
    settings = recipe_of(make_run("sp-optimizer", overrides=(("warmup_steps", 700), ("trace_decay", 0.9))))
    assert settings.optimizer_settings == {"warmup_steps": 700, "trace_decay": 0.9}
    with pytest.raises(ValueError, match=r"Invalid override: trace_decay \(allowed for this strategy: lr, momentum"):
        recipe_of(make_run("naive-sgd", overrides=(("trace_decay", 0.9),)))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--strategy", "spp"], "invalid choice: 'spp'"),
        (["--strategy", "upgd"], "--strategy upgd: not on split-mnist (allowed: naive-sgd, "),
        (["--strategy", "sp", "--tasks", "3"], "--tasks 3: not on split-mnist (allowed: 2, 5, 10)"),
        (["--strategy", "sp", "--trials", "0"], "argument --trials: 0 (allowed: an integer, 1 or more)"),
        (["--strategy", "sp", "--first-seed", "5"], "Invalid first seed: 5 (allowed: 100 or more, never reported)"),
        (["--strategy", "sp", "--train-per-task", "9"], "--train-per-task 9: not on split-mnist"),
        (["--strategy", "sp", "--storage", "nowhere"], "--storage nowhere: "),
    ],
)
def test_bad_arguments_are_named(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        hyperparameter_search.main([*arguments, "--output", str(tmp_path)])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_search_never_sees_test_images(tmp_path):
    with pytest.raises(ValueError, match="Invalid validation value: False"):
        make_search(tmp_path, validation=False)
    with pytest.raises(ValueError, match="Invalid trials value: 0"):
        make_search(tmp_path, trials=0)
