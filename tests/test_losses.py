"""Losses for class-incremental learning."""

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss
from avalanche_sp.replay import memory_size, stream_rows

from conftest import mlp


def test_one_hot_squared_error_by_hand():
    outputs = torch.tensor([[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]])
    loss = OneHotMSELoss()(outputs, torch.tensor([2, 0]))
    assert loss == pytest.approx(((0.25 + 0 + 1) + (1 + 1 + 0)) / 2)


@pytest.mark.parametrize("shrinkage", [0, 25])
def test_joint_replay_weighs_the_memory_by_what_it_stands_for(split5, shrinkage):
    """Against the formula, at every iteration of every experience; evaluation weighs all rows alike."""
    seen = []

    class Check(JointReplayLoss):
        def before_backward(self, strategy, **kwargs):
            n = stream_rows(strategy)
            rows = nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y, reduction="none")
            expected = rows[:n].mean()
            if memory_size(strategy):
                experiences = strategy.clock.train_exp_counter  # of 600 images and two classes each
                w = experiences * 50 / (50 + shrinkage * 2 * experiences)
                expected = (rows[:n].mean() + w * rows[n:].mean()) / (1 + w)
                seen.append(w)
            torch.testing.assert_close(strategy.loss.squeeze(), expected)

        def after_eval_iteration(self, strategy, **kwargs):
            torch.testing.assert_close(
                strategy.loss, nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y)
            )

    model = mlp()
    criterion = Check(nn.CrossEntropyLoss(), shrinkage)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=criterion,
        train_mb_size=32,
        eval_mb_size=100,
        plugins=[ReplayPlugin(50)],
        evaluator=None,
        eval_every=1,
    )
    for experience in split5.train_stream:
        strategy.train(experience, eval_streams=[split5.test_stream])
    assert sorted(set(seen)) == ([1, 2, 3, 4] if shrinkage == 0 else [0.5, 2 / 3, 0.75, 0.8])


@pytest.mark.parametrize("shrinkage", [-1, float("nan"), float("inf")])
def test_a_shrinkage_out_of_range_is_named(shrinkage):
    with pytest.raises(ValueError, match=r"Invalid shrinkage value: .* \(allowed: 0 or more\)"):
        JointReplayLoss(OneHotMSELoss(), shrinkage)
