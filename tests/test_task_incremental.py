"""Task-incremental Split MNIST: a head for each task, and the methods that are told which."""

import random

import numpy as np
import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin

from avalanche_sp import AccuracyMatrix, split_mnist
from harness import run as runs
from harness.build import build_model, build_strategy
from harness.networks import build_network, network_bytes
from harness.recipes import TASK_INCREMENTAL, USES_REPLAY, recipe_of
from harness.report import report
from harness.settings import Run
from harness.store import Store

from conftest import MNIST

pytestmark = pytest.mark.slow

NETWORK = "100-100"
SHORT = {"si": {"strength": 10.0}}  # as it is tuned, so few images don't outweigh it


def run_of(strategy, **kwargs):
    buffer = 50 if strategy in USES_REPLAY else 0
    settings = {"n_tasks": 5, "epochs": 2, "batch_size": 16, "replay_buffer": buffer, "seed": 0, "network": NETWORK}
    return Run("split-mnist", strategy, **{**settings, "task_incremental": True, **kwargs})


def test_every_task_has_its_label_and_its_classes_from_zero():
    benchmark, plain = (runs.build_benchmark(run_of("sp", task_incremental=own), str(MNIST)) for own in (True, False))
    for task, (e, digits) in enumerate(zip(benchmark.train_stream, plain.train_stream)):
        x, y, t = e.dataset.read_batch(list(range(50)))
        assert e.classes_in_this_experience == [0, 1] and set(t.tolist()) == {task}
        same, digit, _ = digits.dataset.read_batch(list(range(50)))
        assert torch.equal(x, same) and torch.equal(y, digit - 2 * task)


def test_classes_are_numbered_in_the_order_of_their_digits():
    order = [7, 3, 0, 1, 2, 4, 5, 6, 8, 9]
    benchmark = split_mnist(5, class_order=order, class_ids_from_zero_in_each_exp=True, dataset_root=MNIST)
    source = benchmark.test_stream[0].dataset._flat_data._datasets[0]
    digits = source.part.read()[1][source.rows]
    assert torch.equal(source.labels, (digits == 7).long())


def test_heads_begin_alike_and_each_sees_its_own_tasks_samples_alone():
    models = []
    for strategy in ("naive-sgd", "packnet"):
        torch.manual_seed(0)
        models.append(build_model(run_of(strategy)))
    plain, packed = models
    size = network_bytes(build_network(NETWORK))
    assert sum(4 * p.numel() for p in plain.parameters()) == size == sum(4 * p.numel() for p in packed.parameters())
    x, t = torch.randn(6, 1, 28, 28), torch.tensor([0, 0, 3, 3, 4, 1])
    out = plain(x, t)
    assert out.shape == (6, 2)
    assert torch.allclose(out[2:4], plain.heads.classifiers["3"](plain.features(x[2:4])), atol=1e-6)
    assert torch.allclose(packed(x[2:4], t[2:4]), out[2:4], atol=1e-6)


@pytest.mark.parametrize("strategy", TASK_INCREMENTAL)
def test_every_strategy_learns_all_tasks(strategy, tiny):
    row = runs.execute(run_of(strategy, overrides=SHORT.get(strategy, {})), str(MNIST), curve=False)
    record = row["figures"]
    assert row["settings"]["task_incremental"] is True
    matrix = np.array(record["accuracy_matrix"])
    assert min(matrix.diagonal()) > 60 and record["acc"] > 60
    if strategy == "packnet":  # an old task's network isn't touched
        assert all(np.ptp(matrix[task:, task]) == 0 for task in range(5))
        weights = sum(a * b for a, b in ((784, 100), (100, 100)))
        assert 3 * weights < record["extra_memory_bytes"] < 3 * weights + 200  # whose a weight is, and two masks
    elif strategy in ("naive-sgd", "joint"):
        assert record["extra_memory_bytes"] == 0


def test_importances_of_si_are_those_of_the_heads_that_were_used(tiny):
    run = run_of("si")
    benchmark = runs.build_benchmark(run, str(MNIST))
    torch.manual_seed(0)
    random.seed(0)
    strategy, (si,) = build_strategy(run, build_model(run), [], EvaluationPlugin(AccuracyMatrix()))
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
    importance = {k: float(v.data.max()) for k, v in si.ewc_data[1].items() if k.endswith("classifier.weight")}
    assert [value > 0 for value in importance.values()] == [True, True, False, False, False]


def test_what_has_no_such_form_is_named():
    with pytest.raises(ValueError, match="Invalid strategy: rf-ridge .allowed: naive-sgd, "):
        recipe_of(run_of("rf-ridge"))
    with pytest.raises(ValueError, match="Invalid strategy: packnet"):
        recipe_of(run_of("packnet", task_incremental=False))


def test_the_report_says_what_it_is_of(tiny, tmp_path, capsys):
    store = Store(tmp_path / "store")
    for run in map(run_of, ("packnet", "naive-sgd")):
        store.append(runs.execute(run, str(MNIST)))
    frame = store.frame()
    assert {path.name for path in report(frame, tmp_path)} == {"table.md", "acc.png", "training.png"}
    out = capsys.readouterr().out
    assert "**Split MNIST, 5 tasks, a head for each**: 2 epochs, batch 16, " in out and "| naive-sgd " in out
    packnet = frame[frame.strategy == "packnet"]
    assert "training.png" not in {path.name for path in report(packnet, tmp_path)}  # it has no curve
