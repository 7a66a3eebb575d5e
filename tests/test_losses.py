"""Losses for class-incremental learning."""

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training import Naive
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityPlugin, Settings
from avalanche_sp.training.replay import memory_size, stream_rows

from conftest import mlp, sliced, strategy_of


def test_one_hot_squared_error_by_hand():
    outputs = torch.tensor([[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]])
    loss = OneHotMSELoss()(outputs, torch.tensor([2, 0]))
    assert loss == pytest.approx(((0.25 + 0 + 1) + (1 + 1 + 0)) / 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_one_hot_squared_error_takes_any_integer_labels(dtype):
    outputs, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])
    assert torch.equal(OneHotMSELoss()(outputs, labels.to(dtype)), OneHotMSELoss()(outputs, labels))


def test_one_hot_squared_error_refuses_labels_that_are_no_integers():
    with pytest.raises(TypeError, match=r"Invalid targets: torch.float32 \(allowed: class labels, integers\)"):
        OneHotMSELoss()(torch.randn(4, 10), torch.ones(4))


@pytest.mark.parametrize(
    "trust, gated, weights",
    [
        (None, False, [1, 2, 3, 4]),  # replay alone: N_old / N_new
        (0.25, False, [0.25, 0.5, 0.75, 1]),
        (None, True, [1 / 3, 2 / 5, 3 / 7, 4 / 9]),  # the plugin's share: 25 / e samples a class after e experiences
        (0.25, True, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_joint_replay_weighs_the_memory_by_what_it_stands_for(split5, trust, gated, weights):
    """At every iteration of every experience; evaluation weighs all rows alike."""
    seen = []

    class Check(JointReplayLoss):
        def before_backward(self, strategy, **kwargs):
            n = stream_rows(strategy)
            rows = nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y, reduction="none")
            expected = rows[:n].mean()
            if memory_size(strategy):
                w = weights[strategy.clock.train_exp_counter - 1]
                expected = (rows[:n].mean() + w * rows[n:].mean()) / (1 + w)
                seen.append(w)
            torch.testing.assert_close(strategy.loss.squeeze(), expected)

        def after_eval_iteration(self, strategy, **kwargs):
            torch.testing.assert_close(strategy.loss, nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y))

    model = mlp()
    criterion = Check(nn.CrossEntropyLoss(), trust)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=criterion,
        train_mb_size=32,
        eval_mb_size=100,
        plugins=[ReplayPlugin(50), *[SelectivePlasticityPlugin()] * gated],
        evaluator=None,
        eval_every=1,
    )
    few = sliced(split5, 200, 50)
    for experience in few.train_stream:
        strategy.train(experience, eval_streams=[few.test_stream])
    assert sorted(set(seen)) == weights


def test_an_evaluation_after_an_interrupt_weighs_all_rows_alike(split5):
    class Interrupt(JointReplayLoss):
        armed = False

        def before_backward(self, strategy, **kwargs):
            if self.armed and memory_size(strategy):
                raise KeyboardInterrupt

        def after_eval_iteration(self, strategy, **kwargs):
            torch.testing.assert_close(strategy.loss, nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y))

    criterion = Interrupt(nn.CrossEntropyLoss())
    strategy = strategy_of(mlp(), [ReplayPlugin(50)], criterion=criterion)
    strategy.train(split5.train_stream[0])
    criterion.armed = True
    with pytest.raises(KeyboardInterrupt):
        strategy.train(split5.train_stream[1])
    strategy.eval(split5.test_stream[:1])


def test_on_an_online_stream_it_follows_what_the_plugin_found(split5):
    """With mini-batches for experiences, the old is what was consolidated; until then it counts as one experience."""
    settings = Settings(stream_chunk=320, half_trust=25)
    gate, seen = SelectivePlasticityPlugin(consolidate="continuous", settings=settings), []

    class Check(JointReplayLoss):
        def before_backward(self, strategy, **kwargs):
            n = stream_rows(strategy)
            rows = nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y, reduction="none")
            expected = rows[:n].mean()
            if memory := memory_size(strategy):
                consolidations, classes = len(gate.consolidated_at), gate.gate.memory.classes
                seen.append((consolidations, classes))
                w = max(consolidations, 1) * memory / (memory + 25 * max(classes, 1))
                expected = (rows[:n].mean() + w * rows[n:].mean()) / (1 + w)
            torch.testing.assert_close(strategy.loss.squeeze(), expected)

    criterion = Check(nn.CrossEntropyLoss())
    strategy = strategy_of(mlp(), [ReplayPlugin(50), gate], batch=20, criterion=criterion)
    for experience in split_online_stream(split5.train_stream[:2], 20, seed=0):
        strategy.train(experience)
    assert sorted(set(seen)) == [(0, 0), (1, 2), (2, 6), (3, 8)]  # the second lies across the boundary


@pytest.mark.parametrize("trust", [-1, 1.5, float("nan"), float("inf"), "1"])
def test_a_trust_out_of_range_is_named(trust):
    with pytest.raises(ValueError, match=r"Invalid trust value: .* \(allowed: 0 to 1, or None\)"):
        JointReplayLoss(OneHotMSELoss(), trust)
