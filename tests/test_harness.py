"""The harness that the benchmark scripts share, and the scripts themselves."""

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import SynapticIntelligencePlugin
from torch import nn

from conftest import MNIST, ROOT, mlp

sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import strategies as recipes  # noqa: E402
from harness.jobs import run_all  # noqa: E402
from harness.legacy import LegacyReplay  # noqa: E402
from harness.networks import build_network  # noqa: E402
from harness.run import build_benchmark, execute  # noqa: E402
from harness.settings import STRATEGIES, STUDIES, USES_REPLAY, Run  # noqa: E402
from harness.store import Store, key_of  # noqa: E402


def make_run(strategy="naive-sgd", benchmark="permuted-mnist", **kwargs):
    settings = {"n_tasks": 2, "epochs": 1, "batch_size": 64, "replay_buffer": 0, "seed": 0, "train_per_task": 500}
    return Run(benchmark, strategy, **{**settings, **kwargs})


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("benchmark", ["split-mnist", "permuted-mnist"])
def test_every_strategy_has_a_recipe(benchmark):
    studied = set()
    for recipe in recipes.RECIPES[benchmark].values():
        assert set(recipe) >= set(STRATEGIES)
        studied |= set(recipe) - set(STRATEGIES)
    assert studied == set(STUDIES[benchmark])


def test_recipes_are_those_tuned_for_the_nearest_number_of_tasks_and_buffer():
    def lr(n_tasks, buffer):
        return recipes.recipe_of(Run("split-mnist", "replay-joint", n_tasks, 1, 64, buffer, 0)).lr

    two, five = (recipes.RECIPES["split-mnist"][n]["replay-joint"].lr for n in (2, 5))
    assert [lr(2, 50), lr(2, 200), lr(2, 1000), lr(2, 5000)] == [two[200], two[200], two[2000], two[2000]]
    assert lr(10, 200) == lr(5, 200) == five[200]


def test_rates_tuned_for_other_amounts_of_data_are_taken_from_there():
    def lr(images):
        return recipes.recipe_of(Run("permuted-mnist", "naive-sgd", 10, 1, 64, 0, 0, images)).lr

    tuned = recipes.RECIPES["permuted-mnist"][10]["naive-sgd"].lr
    assert [lr(1000), lr(10000), lr(50000), lr(None)] == [tuned[10000], tuned[10000], tuned[60000], tuned[60000]]


@pytest.mark.parametrize("strategy", STRATEGIES + STUDIES["permuted-mnist"])
def test_every_strategy_runs_and_reports(strategy):
    run = make_run(strategy, replay_buffer=50 if strategy in USES_REPLAY else 0)
    record = execute(run, str(MNIST), "key")
    matrix = np.array(record["accuracy_matrix"])
    assert record["acc"] == pytest.approx(matrix[-1].mean())
    assert 10 < record["acc"] < 100
    if strategy == "joint":
        assert record["bwt"] is None
    else:
        assert record["bwt"] == pytest.approx(matrix[1, 0] - matrix[0, 0])
    nothing_kept = ("naive-sgd", "naive-adam", "sp-optimizer", "sp-running", "gate-off", "joint")
    keeps_something = strategy not in nothing_kept
    assert (record["extra_memory_bytes"] > 0) == keeps_something
    # At every iteration where there are so few: 7 whole batches of 64 in each of two experiences; ten passes of gdumb.
    assert len(record["curve"]) == {"joint": 10, "cumulative": 7 + 12, "gdumb": 10 + 10}.get(strategy, 7 + 7)
    json.dumps(record)


@pytest.mark.parametrize("strategy", ["legacy-sp-replay", "legacy-adam-replay"])
def test_the_published_protocol_runs(strategy):
    record = execute(make_run(strategy, "split-mnist", batch_size=128, replay_buffer=300), str(MNIST), "key")
    assert record["acc"] > 10 and record["extra_memory_bytes"] >= 300 * (784 * 4 + 8)


def test_the_published_buffer_loses_the_old_samples_and_one_filled_at_the_end_keeps_them():
    old, new = torch.zeros(600, dtype=torch.long), torch.ones(600, dtype=torch.long)
    shares = {}
    for fifo in (True, False):
        memory = LegacyReplay(200, fifo=fifo)
        for labels in (old, new):
            for y in labels.split(100):
                strategy = SimpleNamespace(train_mb_size=100, mbatch=[y.float(), y, y])
                memory.before_training_iteration(strategy)
                memory.after_training_iteration(strategy)
            shares[fifo] = (memory.memory[1] == 0).float().mean().item() if memory.memory else None
            memory.after_training_exp(strategy)
    assert shares[True] < 0.2 and shares[False] == 1.0


def test_a_batch_larger_than_an_experience_is_named():
    with pytest.raises(ValueError, match=r"Invalid batch_size: 64 \(allowed: at most 50, the smallest experience\)"):
        execute(make_run(train_per_task=50), str(MNIST), "key")


def test_extra_memory_is_what_is_stored():
    run = make_run("replay-sgd", replay_buffer=50)
    assert execute(run, str(MNIST), "key")["extra_memory_bytes"] == 50 * (784 * 4 + 8)
    parameters = sum(p.numel() for p in build_network().parameters())
    ewc = execute(make_run("ewc"), str(MNIST), "key")["extra_memory_bytes"]
    assert ewc == 2 * 2 * parameters * 4  # importances and weights, for two tasks
    both, sp = (execute(make_run(s), str(MNIST), "key")["extra_memory_bytes"] for s in ("sp-both", "sp"))
    assert both == sp + parameters * 4  # the optimizer's consolidated eligibility, once


def test_equal_seeds_are_paired_and_repeat_bit_for_bit():
    first, again = (execute(make_run(), str(MNIST), "key") for _ in range(2))
    assert first["accuracy_matrix"] == again["accuracy_matrix"]
    other = execute(make_run(seed=1), str(MNIST), "key")
    assert first["accuracy_matrix"] != other["accuracy_matrix"]
    # The gate's control is paired: until something is consolidated, the two are one and the same.
    lr = (("lr", 0.1),)
    off, on = (execute(make_run(s, overrides=lr), str(MNIST), "key") for s in ("naive-sgd", "sp"))
    assert off["accuracy_matrix"][0] == on["accuracy_matrix"][0]
    assert off["accuracy_matrix"][1] != on["accuracy_matrix"][1]


@pytest.mark.parametrize("benchmark, n", [("split-mnist", 5), ("permuted-mnist", 3)])
def test_validation_images_are_taken_out_of_training(benchmark, n):
    built = build_benchmark(make_run(benchmark=benchmark, n_tasks=n, validation=True), str(MNIST))
    for train, valid in zip(built.train_stream, built.test_stream):
        (rows,), (held_out,) = ({tuple(d.row.tolist()) for d in (layout_of(e.dataset),)} for e in (train, valid))
        assert not set(rows) & set(held_out)
        assert len(rows) == pytest.approx(5 * len(held_out), rel=0.01)
    if benchmark == "permuted-mnist":
        assert len(built.train_stream[0].dataset) == 500


def layout_of(dataset):
    dataset.read_batch([0])
    return dataset._layout


def test_avalanches_si_measures_nothing_on_a_cpu_and_ours_does(split2):
    importances = []
    for plugin in (SynapticIntelligencePlugin(1.0), recipes.WorkingSynapticIntelligence(1.0)):
        model = mlp()
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=32,
            plugins=[plugin],
            evaluator=None,
        )
        for experience in split2.train_stream:
            strategy.train(experience)
        importances.append(max(float(v.data.max()) for v in plugin.ewc_data[1].values()))
    assert importances[0] == 0 < importances[1]


# -- Results ---------------------------------------------------------------------------------------------------------


def test_finished_runs_are_kept_and_not_run_again(tmp_path):
    store, runs = Store(tmp_path), [make_run(seed=s, train_per_task=100) for s in (0, 1)]
    assert run_all(runs[:1], store, str(MNIST), jobs=1) == 0 and len(store.frame()) == 1
    with open(tmp_path / "permuted-mnist.jsonl", "a") as file:
        file.write('{"settings": {"cut sho')  # as a kill in the middle of a write leaves it
    assert run_all(runs, store, str(MNIST), jobs=2) == 0
    frame = store.frame()
    assert frame.index.tolist() == [key_of(run.settings()) for run in runs]
    assert run_all(runs, store, str(MNIST), jobs=2) == 0
    assert len(list(store.rows())) == 2
    assert frame.accuracy_matrix.iloc[0] == execute(runs[0], str(MNIST), "key")["accuracy_matrix"]


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path, capsys):
    store = Store(tmp_path)
    bad, good = make_run(seed=5, overrides=(("lr", 1e30),), strategy="sp"), make_run(train_per_task=100)
    assert run_all([bad, good], store, str(MNIST), jobs=1) == 1 and store.frame().strategy.tolist() == ["naive-sgd"]
    errors = [row["error"] for row in store.rows() if "error" in row]
    assert len(errors) == 1 and "FloatingPointError: the loss is" in errors[0]
    assert "FAILED sp, seed 5" in capsys.readouterr().out


# -- Scripts ---------------------------------------------------------------------------------------------------------


def test_a_script_ends_with_table_results_and_figures(tmp_path):
    arguments = ["--train-per-task", 200, "--tasks", 2, "--strategies", "naive-sgd,sp-replay", "--seeds", 2]
    arguments += [
        "--replay-buffer",
        50,
        "--first-seed",
        3,
        "--batch-size",
        32,
        "--output",
        tmp_path,
        "--against",
        "naive-sgd",
    ]
    done = script("permuted_mnist.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "sp-replay" in done.stdout and "Warning" not in done.stderr
    for name in ("table.md", "acc.png", "training.png"):
        assert str(tmp_path / name) in done.stdout
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert "ACC minus that of naive-sgd" in done.stdout
    frame = Store(tmp_path).frame()
    assert sorted(frame.seed) == [3, 3, 4, 4] and set(frame.torch) == {importlib.metadata.version("torch")}
    again = script("permuted_mnist.py", *arguments)
    assert "4 of 4 runs are already in" in again.stdout


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("split_mnist.py", ["--strategies", "sp,spp"], "unknown strategy 'spp' (allowed: naive-sgd, "),
        ("split_mnist.py", ["--tasks", "3"], "invalid choice: 3 (choose from 2, 5, 10)"),
        ("split_mnist.py", ["--epochs", "0"], "argument --epochs: 0 (allowed: an integer, 1 or more)"),
        ("permuted_mnist.py", ["--train-per-task", "-1"], "argument --train-per-task: -1 (allowed"),
        ("permuted_mnist.py", ["--replay-buffer", "200,0"], "argument --replay-buffer: 0 (allowed: an integer, 1 or"),
        ("permuted_mnist.py", ["--protocol", "original"], "argument --protocol: invalid choice: 'original'"),
        ("permuted_mnist.py", ["--set", "lr"], "argument --set: lr (allowed: name=number)"),
        ("permuted_mnist.py", ["--strategies", "sp", "--against", "ewc"], "--against ewc: needs 2 seeds or more"),
        ("compare.py", ["--dataset-root", "/nowhere"], "no MNIST in /nowhere (expected /nowhere/MNIST/raw/"),
    ],
)
def test_bad_arguments_end_a_script_with_status_2_and_no_traceback(name, arguments, words):
    done = script(name, *arguments)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_failed_run_ends_a_script_with_status_1(tmp_path):
    arguments = ["--tasks", 1, "--train-per-task", 400, "--strategies", "sp", "--seeds", 1, "--set", "lr=1e30"]
    done = script("permuted_mnist.py", *arguments, "--output", tmp_path)
    assert done.returncode == 1
    assert "1 of 1 runs failed" in done.stderr and "Traceback" not in done.stderr
