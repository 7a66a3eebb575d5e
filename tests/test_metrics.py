"""Measures by hand, and metrics through Avalanche's real evaluator and loggers."""

import io
import math

import numpy as np
import pytest
import torch
from avalanche.evaluation.metrics import StreamBWT, accuracy_metrics
from avalanche.logging import InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import avalanche_sp
from avalanche_sp import OneHotMSELoss, SelectivePlasticityPlugin, selective_plasticity_metrics

from conftest import mlp

R = [[90, 10, 5], [95, 80, 7], [60, 85, 70]]


def test_measures_by_hand():
    assert avalanche_sp.average_accuracy(R) == pytest.approx((60 + 85 + 70) / 3)
    assert avalanche_sp.backward_transfer(R) == pytest.approx(((60 - 90) + (85 - 80)) / 2)
    assert avalanche_sp.average_forgetting(R) == pytest.approx(((95 - 60) + (80 - 85)) / 2)
    assert avalanche_sp.learning_accuracy(R) == pytest.approx((90 + 80 + 70) / 3)
    assert avalanche_sp.backward_transfer([[50]]) == 0 and avalanche_sp.average_forgetting([[50]]) == 0


def test_a_matrix_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"Invalid matrix shape: \(1, 2\)"):
        avalanche_sp.average_accuracy([[1, 2]])


def train(benchmark, plugins, metrics, loggers=(), rounds=1):
    model = mlp()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
        criterion=OneHotMSELoss(),
        train_mb_size=32,
        eval_mb_size=100,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, loggers=list(loggers)),
    )
    torch.manual_seed(0)
    strategy.eval(benchmark.test_stream)  # before any training: not a row
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    return strategy


def test_accuracy_matrix_and_bwt_equal_avalanches_own(split5):
    bwt = StreamBWT()
    metrics = [*selective_plasticity_metrics(), accuracy_metrics(experience=True), bwt]
    strategy = train(split5, [SelectivePlasticityPlugin()], metrics)
    matrix = metrics[3].result()
    assert matrix.shape == (5, 5)
    last = strategy.evaluator.get_last_metrics()
    theirs = [100 * last[f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00{j}"] for j in range(5)]
    np.testing.assert_allclose(matrix[-1], theirs)
    assert last["BWT_Percent/eval_phase/test_stream"] == pytest.approx(100 * bwt.result())
    assert last["ACC_Percent/eval_phase/test_stream"] == pytest.approx(matrix[-1].mean())


def test_gate_metrics_reach_every_logger(split2, tmp_path):
    text, tensorboard = io.StringIO(), TensorboardLogger(tb_log_dir=tmp_path)
    metrics = selective_plasticity_metrics()
    loggers = [InteractiveLogger(), TextLogger(text), tensorboard]
    strategy = train(split2, [SelectivePlasticityPlugin(rank=20)], metrics, loggers)
    tensorboard.writer.flush()
    last = strategy.evaluator.get_last_metrics()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for metric in ("GateOpenness", "PresynapticSurprise", "ClaimedRank"):
        for layer in ("1", "3", "5", "mean"):
            name = f"{metric}/{layer}/train_phase/train_stream/Task000"
            assert name in text.getvalue()
            assert events.Scalars(name)[-1].value == pytest.approx(last[name])


@pytest.mark.parametrize("openness_setting, claimed", [(1e-9, 20), (1e9, 0)])
def test_gate_metrics_say_what_the_gate_did(split2, openness_setting, claimed):
    openness, surprise, rank, _ = metrics = selective_plasticity_metrics()
    plugin = SelectivePlasticityPlugin(openness=openness_setting, rank=20, pull_back=0)
    strategy = train(split2, [plugin], metrics)
    assert set(openness.result()) == set(plugin.layers) == {"1", "3", "5"}
    for layer in plugin.layers:
        assert 0 < surprise.result()[layer] < 1
        assert openness.result()[layer] == pytest.approx(0 if claimed else 1, abs=1e-3)
        assert rank.result()[layer] == claimed
    history = strategy.evaluator.get_all_metrics()["ClaimedRank/mean/train_phase/train_stream/Task000"]
    assert history[1] == [claimed, claimed]


def test_openness_and_surprise_are_shares_of_the_streams_energy(split2):
    """With full rank the whole input lies along the vectors: nothing is new, and f alone says what passes."""
    openness, surprise, _, _ = metrics = selective_plasticity_metrics()
    plugin = SelectivePlasticityPlugin(openness=1.0, rank=785)
    train(split2, [plugin], metrics)
    for layer in plugin.layers:
        assert surprise.result()[layer] == pytest.approx(0, abs=0.01)
        assert 0 < openness.result()[layer] < 1


def test_without_plugin_or_gate_the_gate_metrics_are_silent(split2):
    for plugins in ([], [SelectivePlasticityPlugin(openness=math.inf)]):
        metrics = selective_plasticity_metrics()
        strategy = train(split2, plugins, metrics)
        assert not any("GateOpenness" in name for name in strategy.evaluator.get_last_metrics())
        assert metrics[0].result() == {}
