"""From a run's settings to its figures: recipes, strategies and measures."""

import inspect
import json
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import SynapticIntelligencePlugin
from torch import nn

from harness.build import OPTIMIZERS, PLUGINS, TEMPLATES, WorkingSynapticIntelligence, build_strategy
from harness.methods.legacy import LegacyReplay
from harness.networks import build_network
from harness.recipes import ABOUT, TASK_INCREMENTAL, USES_REPLAY, recipe_of, strategies_of
from harness.recipes.permuted_mnist import RECIPES as PERMUTED
from harness.recipes.recipe import OPTIMIZER_NUMBERS
from harness.recipes.split_mnist import RECIPES as SPLIT
from harness.run import build_benchmark, execute
from harness.settings import STRATEGIES, Run
from harness.store import key_of

from conftest import MNIST, mlp


def make_run(strategy="naive-sgd", benchmark="permuted-mnist", **kwargs):
    return Run(**{"benchmark": benchmark, "strategy": strategy, "n_tasks": 2, "train_per_task": 500, **kwargs})


# -- Recipes ---------------------------------------------------------------------------------------------------------


def test_each_strategy_has_a_line_and_each_line_a_strategy():
    names = {name for benchmark in ("split-mnist", "permuted-mnist") for name in strategies_of(benchmark)}
    assert set(ABOUT) == names | set(TASK_INCREMENTAL)
    assert all(set(STRATEGIES) <= set(recipes) for recipes in (SPLIT, PERMUTED))


def test_recipes_name_parts_that_there_are():
    for recipe in (*SPLIT.values(), *PERMUTED.values()):
        assert recipe.optimizer in OPTIMIZERS and recipe.template in TEMPLATES and set(recipe.plugins) <= set(PLUGINS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_of_an_optimizer_are_those_of_its_constructor(name):
    arguments = [p for c in OPTIMIZERS[name].__mro__ for p in inspect.signature(c.__init__).parameters.values()]
    numbers = {p.name for p in arguments if type(p.default) in (int, float)} - {"lr"}
    assert set(OPTIMIZER_NUMBERS[name]) == numbers


def test_recipes_are_those_tuned_for_the_nearest_number_of_tasks_and_buffer():
    def lr(n_tasks, buffer):
        return recipe_of(make_run("replay-joint", "split-mnist", n_tasks=n_tasks, replay_buffer=buffer)).lr

    two, five = (SPLIT["replay-joint"].lr[n] for n in (2, 5))
    assert [lr(2, 50), lr(2, 200), lr(2, 1000), lr(2, 5000)] == [two[200], two[200], two[2000], two[2000]]
    assert lr(10, 200) == lr(5, 200) == five[200]


def test_rates_tuned_for_other_amounts_of_data_are_taken_from_there():
    tuned = PERMUTED["naive-sgd"].lr
    rates = [recipe_of(make_run(train_per_task=images)).lr for images in (1000, 10000, 50000, None)]
    assert rates == [tuned[10000], tuned[10000], tuned[60000], tuned[60000]]


def test_settings_that_a_strategy_does_not_have_are_named_with_all_that_it_has():
    with pytest.raises(ValueError, match=r"Invalid setting: opennes \(allowed .*: lr, openness, .*rank, .*rank:LAYER"):
        recipe_of(make_run("sp", overrides={"opennes": 0.1}))
    with pytest.raises(ValueError, match=r"Invalid setting: trace_decay \(allowed for this strategy: lr, momentum"):
        recipe_of(make_run(overrides={"trace_decay": 0.9}))
    with pytest.raises(ValueError, match="Invalid setting: strength:1"):
        recipe_of(make_run("ewc", overrides={"strength:1": 1.0}))
    with pytest.raises(ValueError, match=r"Invalid loss: hinge \(allowed: cross-entropy, squared error\)"):
        recipe_of(make_run("sp", overrides={"loss": "hinge"}))
    settings = recipe_of(make_run("sp-optimizer", overrides={"warmup_steps": 700, "trace_decay": 0.9}))
    assert settings.optimizer_arguments == {"warmup_steps": 700, "trace_decay": 0.9}


def test_overrides_reach_the_layers_they_name():
    run = make_run("sp", overrides={"openness": inf, "openness:3": 0.5, "rank:1": 8.0, "pull_back": 0.0})
    (gate,) = build_strategy(run, build_network(run.network), [], None)[1]
    assert gate.gate.openness == {"3": 0.5, "*": inf}
    assert gate.gate.rank == {"1": 8} and all(isinstance(r, int) for r in gate.gate.rank.values())
    assert gate.gate.pull_back == 0.0


def test_a_runs_settings_are_all_that_decides_it():
    run = make_run()
    changes = ({"epochs": 2}, {"seed": 1}, {"overrides": {"lr": 0.3}}, {"pixels": "0-1"})
    changes += ({"overrides": {"loss": "cross-entropy"}},)
    others = [replace(run, **change) for change in changes]
    assert len({key_of(r.settings()) for r in (run, make_run(), *others)}) == 6
    settings = make_run("sp-replay", replay_buffer=50, overrides={"openness": 0.2}).settings()
    assert settings["arguments"] == {
        "openness": 0.2, "pull_back": 1.0, "shrinkage": 50.0, "plasticity_k": 1.0, "beta1": 0.0, "eps": 1e-3,
    }  # fmt: skip
    assert settings["plugins"] == ["replay", "sp", "consolidation"] and settings["lr"] == 3e-3


# -- Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", strategies_of("permuted-mnist"))
def test_every_strategy_runs_and_reports(strategy, tiny):
    row = execute(make_run(strategy, replay_buffer=50 if strategy in USES_REPLAY else 0), str(MNIST))
    figures, matrix = row["figures"], np.array(row["figures"]["accuracy_matrix"])
    assert figures["acc"] == pytest.approx(matrix[-1].mean())
    assert 10 < figures["acc"] < 100
    if strategy == "joint":
        assert "bwt" not in figures
    else:
        assert figures["bwt"] == pytest.approx(matrix[1, 0] - matrix[0, 0])
    nothing_kept = ("naive-sgd", "naive-adam", "sp-optimizer", "sp-running", "gate-off", "joint")
    assert (figures["extra_memory_bytes"] > 0) == (strategy not in nothing_kept)
    # At every iteration, as there are few: 5 whole batches of 64 in each of two experiences; ten passes of gdumb.
    assert len(figures["curve"]) == {"cumulative": 5 + 10, "gdumb": 10 + 10}.get(strategy, 5 + 5)
    lowest = [min(p["task_acc"][0] for p in figures["curve"] if p["experience"] == 1)] if strategy != "joint" else []
    assert [figures[name] for name in ("min_acc",) if name in figures] == lowest
    assert row["versions"]["torch"] == torch.__version__.partition("+")[0] and row["settings"]["strategy"] == strategy
    json.dumps(row)


@pytest.mark.parametrize("strategy", ["legacy-sp-replay", "legacy-adam-replay"])
def test_the_published_protocol_runs(strategy, tiny):
    run = make_run(strategy, "split-mnist", batch_size=128, replay_buffer=300, train_per_task=None)
    figures = execute(run, str(MNIST))["figures"]
    assert figures["acc"] > 10 and figures["extra_memory_bytes"] >= 300 * (784 * 4 + 8)


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
        execute(make_run(train_per_task=50), str(MNIST))


def test_training_that_diverged_is_no_result(tiny):
    run = make_run("der++", replay_buffer=50, overrides={"alpha": 1e6})
    with pytest.raises(FloatingPointError, match="the weights are not finite after training experience 1"):
        execute(run, str(MNIST))


def test_extra_memory_is_what_is_stored(tiny):
    def extra(strategy, buffer=0):
        row = execute(make_run(strategy, replay_buffer=buffer), str(MNIST), curve=False)
        return row["figures"]["extra_memory_bytes"]

    parameters = sum(p.numel() for p in build_network().parameters())
    assert extra("replay-sgd", 50) == 50 * (784 * 4 + 8)
    assert extra("ewc") == 2 * 2 * parameters * 4  # importances and weights, for two tasks
    assert extra("sp-both") == extra("sp") + parameters * 4  # the optimizer's consolidated eligibility, once


def test_equal_seeds_are_paired_and_repeat_bit_for_bit(tiny):
    def matrix(**kwargs):
        return execute(make_run(**kwargs), str(MNIST), curve=False)["figures"]["accuracy_matrix"]

    assert matrix() == matrix() != matrix(seed=1)
    # The gate's control is paired: until something is consolidated, the two are one and the same.
    off, on = (matrix(strategy=strategy, overrides={"lr": 0.1}) for strategy in ("naive-sgd", "sp"))
    assert off[0] == on[0] and off[1] != on[1]


def test_after_each_experience_its_accuracies_are_there(tiny):
    seen = []
    row = execute(make_run(), str(MNIST), seen.append, curve=False)
    assert [m.shape for m in seen] == [(1, 2), (2, 2)]
    assert seen[-1].round(4).tolist() == row["figures"]["accuracy_matrix"]


@pytest.mark.parametrize("benchmark, n", [("split-mnist", 5), ("permuted-mnist", 3)])
def test_validation_images_are_taken_out_of_training(benchmark, n):
    built = build_benchmark(make_run(benchmark=benchmark, n_tasks=n, validation=True), str(MNIST))
    for train, valid in zip(built.train_stream, built.test_stream):
        rows, held_out = ({image.numpy().tobytes() for image in images_of(e)} for e in (train, valid))
        assert len(rows & held_out) <= 2  # MNIST has a few images twice
        assert len(train.dataset) == pytest.approx(5 * len(valid.dataset), rel=0.01)
    if benchmark == "permuted-mnist":
        assert len(built.train_stream[0].dataset) == 500


def images_of(experience):
    return experience.dataset.read_batch(list(range(len(experience.dataset))))[0]


def test_avalanches_si_measures_nothing_on_a_cpu_and_ours_does(split2):
    importances = []
    for plugin in (SynapticIntelligencePlugin(1.0), WorkingSynapticIntelligence(1.0)):
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
