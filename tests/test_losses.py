"""Losses for class-incremental learning."""

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training import Naive
from avalanche.training.plugins import MIRPlugin, ReplayPlugin
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityPlugin, Settings
from avalanche_sp.training.replay import memory_size, stream_rows

from conftest import accuracy, mlp, sliced, strategy_of, weights


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


def test_one_hot_squared_error_names_labels_that_are_no_class():
    with pytest.raises(ValueError, match=r"Invalid targets: class labels 3 to 10 \(allowed: 0 to 9\)"):
        OneHotMSELoss()(torch.randn(2, 10), torch.tensor([10, 3]))


def test_a_value_a_sample():
    loss, outputs, labels = OneHotMSELoss(), torch.randn(6, 10), torch.arange(6)
    mean = loss(outputs, labels)
    JointReplayLoss(loss).reduction = "none"
    assert loss(outputs, labels).shape == (6,)
    torch.testing.assert_close(loss(outputs, labels).mean(), mean)


@pytest.mark.parametrize("criterion", [OneHotMSELoss, lambda: JointReplayLoss(OneHotMSELoss())])
def test_they_train_beside_mir(criterion, split2):
    plugins = [MIRPlugin(batch_size_mem=10, mem_size=40, subsample=20), SelectivePlasticityPlugin()]
    model, criterion = mlp(), criterion()
    strategy = strategy_of(model, plugins, criterion=criterion)
    for experience in sliced(split2, 96, 20).train_stream:
        strategy.train(experience)
    assert criterion.reduction == "mean" and plugins[1].gate.memory.consolidations == 2


def test_another_strategy_starts_without_the_samples_of_the_first(split2):
    criterion, ends = JointReplayLoss(OneHotMSELoss()), []
    for _ in range(2):
        model = mlp()
        strategy = strategy_of(model, [ReplayPlugin(40)], criterion=criterion)
        torch.manual_seed(0)
        for experience in sliced(split2, 96, 20).train_stream:
            strategy.train(experience)
        ends.append(weights(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("wrong, error", [(None, TypeError), (nn.CrossEntropyLoss(reduction="sum"), ValueError)])
def test_a_criterion_that_is_no_mean_is_refused(wrong, error, split2):
    with pytest.raises(error, match="Invalid criterion: "):
        JointReplayLoss(wrong)
    if wrong is not None:
        model = mlp()
        before = weights(model)
        with pytest.raises(error, match="Invalid criterion: its reduction is 'sum'"):
            strategy_of(model, [SelectivePlasticityPlugin()], criterion=wrong).train(split2.train_stream[0])
        assert torch.equal(weights(model), before)


def absolute_error(outputs, targets):
    return (outputs - nn.functional.one_hot(targets, 10)).abs().sum(1).mean()


def power_of_probability(outputs, targets):
    """Generalised cross-entropy. Its second derivative is infinite where a probability is 0."""
    chosen = outputs.softmax(1).gather(1, targets[:, None])
    return ((1 - chosen**0.7) / 0.7).mean()


@pytest.mark.parametrize(
    "criterion, least",
    [
        (nn.MultiMarginLoss(), 0.75),
        pytest.param(nn.MultiMarginLoss(p=2), 0.75, marks=pytest.mark.slow),
        (absolute_error, 0.3),
        (power_of_probability, 0.75),
    ],
)
def test_new_classes_are_learned_with_a_loss_that_is_not_curved_everywhere(split5, criterion, least):
    small, model = sliced(split5, train=416, test=200), mlp(64)
    step = torch.optim.Adam(model.parameters())
    strategy = strategy_of(model, [SelectivePlasticityPlugin()], optimizer=step, criterion=criterion)
    torch.manual_seed(0)
    for experience in small.train_stream:
        strategy.train(experience)
    assert sum(accuracy(model.eval(), small, task) for task in range(5)) / 5 > least


def test_a_loss_without_a_gradient_at_outputs_of_zero_trains(split2):
    def flat_at_zero(outputs, targets):
        return nn.functional.relu(1 + outputs.square().mean() - outputs.gather(1, targets[:, None]).square()).mean()

    model, plugin = mlp(), SelectivePlasticityPlugin()
    strategy = strategy_of(model, [plugin], criterion=flat_at_zero)
    with pytest.warns(UserWarning, match="layer 5 is not solved for this loss"):
        for experience in sliced(split2, 96, 20).train_stream:
            before = model[5].weight.detach().clone()
            strategy.train(experience)
    assert plugin.gate.memory.consolidations == 2 and not torch.equal(model[5].weight, before)


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


@pytest.mark.slow
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
