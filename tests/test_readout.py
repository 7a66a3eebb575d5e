"""The readout, settled when an experience ends: against plain linear algebra, and on real MNIST."""

import copy

import numpy as np
import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import ReplayPlugin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityPlugin, boundaries
from avalanche_sp.activity import LayerActivity
from avalanche_sp.gates import newton_step
from avalanche_sp.readout import ReadoutLoss, settle

from conftest import mlp, strategy_of


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@given(st.integers(1, 8), st.integers(1, 4), st.floats(1e-6, 10), st.integers(0, 1000))
def test_a_newton_step_ends_at_the_damped_least_squares_solution(d, out, damping, seed):
    x, y, w = normal(seed, 3 * d, d), normal(seed + 1, 3 * d, out), normal(seed + 2, out, d)
    hessian = 2 * x.T @ x
    step = newton_step(2 * (x @ w.T - y).T @ x, hessian, damping)
    ridge = damping * hessian.diagonal().mean() / 2
    rows = torch.cat([x, ridge.sqrt() * torch.eye(d).double()])  # least squares that stays near w
    targets = torch.cat([y, ridge.sqrt() * w.T])
    torch.testing.assert_close(w + step, torch.linalg.lstsq(rows, targets).solution.T)


def test_a_newton_step_without_curvature_is_none():
    assert torch.equal(newton_step(normal(0, 2, 3), torch.zeros(3, 3), 0.05), torch.zeros(2, 3).double())


def experience(seed, n, d, out):
    return normal(seed, n, d) @ normal(seed + 50, d, d), normal(seed + 100, n, out)


def settled(layer, x, y, old, rank, damping=0.05):
    """One more experience: the readout settled, what was learned consolidated."""
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1).float()
    gradient = 2 * (layer(x.float()).detach() - y.float()).T @ ones / len(x)
    kappa = torch.tensor(2.0)
    losses = [ReadoutLoss(gradient, ones.T @ ones / len(x), kappa, y.float().square().sum() / len(x), len(x))]
    residual = settle(layer, losses, old, kappa, damping=damping)
    empty = LayerActivity.empty(ones.shape[1], ones)
    return (old or empty).merged(layer, ones, 1.0, len(x), rank, residual=residual)


def test_undamped_it_is_recursive_least_squares(monkeypatch):
    """However many experiences came, with all directions kept: the solution on all their samples at once."""
    monkeypatch.setattr("avalanche_sp.readout._OLD_WEIGHT", 1)
    monkeypatch.setattr("avalanche_sp.readout._WHOLE", 1e-9)  # whole steps
    torch.manual_seed(0)
    layer, old, parts = nn.Linear(5, 3), None, [experience(i, 40 + 10 * i, 5, 3) for i in range(4)]
    for x, y in parts:
        old = settled(layer, x, y, old, rank=6, damping=1e-9)
    x, y = (torch.cat(some) for some in zip(*parts))
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(x, y).solution.T
    found = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().double()
    torch.testing.assert_close(found, solution, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("learned", [True, False])
def test_it_is_the_step_that_its_docstring_says(learned):
    """Only part of it where training has left little to gain."""
    torch.manual_seed(0)
    layer, (x, y), (x2, y2) = nn.Linear(7, 2), experience(0, 30, 7, 2), experience(1, 50, 7, 2)
    old = settled(layer, x, y, None, rank=3)
    anchor = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().double().numpy()
    with torch.no_grad():
        layer.weight.add_(normal(9, 2, 7) / 5)  # training
        y2 = layer(x2.float()).double() + y2 if learned else y2
    w = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().double().numpy()
    settled(layer, x2, y2, old, rank=3)

    ones, ones2 = (np.concatenate([a.numpy(), np.ones((len(a), 1))], 1) for a in (x, x2))
    residual = 2 * (ones @ anchor.T - y.numpy()).T @ ones / 30
    values, vectors = np.linalg.eigh(ones.T @ ones / 30)
    kept, rest = vectors[:, -3:], values[:-3].mean()
    leading = kept @ np.diag(values[-3:]) @ kept.T
    gradient = 2 * (ones2 @ w.T - y2.numpy()).T @ ones2 + 30 * (residual + 2 * 2 * (w - anchor) @ leading)
    hessian = 2 * ones2.T @ ones2 + 30 * 2 * 2 * (leading + rest * (np.eye(8) - kept @ kept.T))
    step = -gradient @ np.linalg.inv(hessian + 0.05 * np.diag(hessian).mean() * np.eye(8))
    error = ones2 @ w.T - y2.numpy()
    gain = -np.sum(error.T @ ones2 * step) / np.sum(y2.numpy() ** 2)
    assert 0.001 < gain < 0.04 if learned else gain > 0.06
    expected = w + min(1, 20 * gain) * step
    found = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("joint", [True, False], ids=["joint loss", "plain loss"])
@pytest.mark.parametrize("first", [True, False], ids=["replay before", "replay after"])
def test_beside_a_memory_it_is_settled_on_the_stored_samples_too(split5, joint, first):
    """Each class's 15 stand for 15 / 65 of the old loss, the quadratic for the rest."""
    memory, criterion = ReplayPlugin(60), OneHotMSELoss()

    class Check(SelectivePlasticityPlugin):
        def after_training_exp(self, strategy, **kwargs):
            layer, old = strategy.model[5], copy.copy(self.layers.get("5"))
            w = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().double().numpy()
            if strategy.clock.train_exp_counter == 2:
                loader = strategy.dataloader
                self.expected = self.step(strategy, w, old, loader.datasets[0], loader.datasets[1])
            super().after_training_exp(strategy, **kwargs)
            self.found = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().double().numpy()

        def step(self, strategy, w, old, stream, stored):
            def seen(dataset):
                x, y = (torch.stack([torch.as_tensor(row[i]) for row in dataset]) for i in (0, 1))
                with torch.no_grad():
                    hidden = strategy.model[:5](x)
                ones = torch.cat([hidden, torch.ones(len(x), 1)], 1).double().numpy()
                return ones, np.eye(10)[y.numpy()]

            (x, y), (m, z) = seen(stream), seen(stored)
            assert (len(x), len(m)) == (600, 60)
            t, n = 15 / 65, 1200
            v, values, anchor = (a.double().numpy() for a in (old.vectors, old.eigenvalues, old.anchor))
            rest, d = float(old.rest), len(v)
            gradient = 2 * (x @ w.T - y).T @ x + 2 * t * n / 60 * (m @ w.T - z).T @ m
            gradient += (1 - t) * n * (old.residual.numpy() + 4 * (w @ v - anchor) * values @ v.T)
            hessian = 2 * x.T @ x + 2 * t * n / 60 * m.T @ m
            hessian += (1 - t) * n * 4 * (v * values @ v.T + rest * (np.eye(d) - v @ v.T))
            step = -gradient @ np.linalg.inv(hessian + 0.05 * np.trace(hessian) / d * np.eye(d))
            errors = x @ w.T - y, m @ w.T - z
            gain = -np.sum((errors[0].T @ x + t * n / 60 * errors[1].T @ m) * step)
            gain /= np.sum(y**2) + t * n / 60 * np.sum(z**2)
            return w + (t + (1 - t) * min(1, 20 * gain)) * step

    gate = Check(rank=10)
    if joint:
        criterion = JointReplayLoss(criterion, shrinkage=50)
    strategy = strategy_of(mlp(), [memory, gate] if first else [gate, memory], criterion=criterion)
    for part in split5.train_stream[:3]:
        strategy.train(part)
    np.testing.assert_allclose(gate.found, gate.expected, atol=1e-4)


def moved(benchmark, model, experiences=2, criterion=None, others=(), **settings):
    """Which layers the end of the last experience moved."""

    class Note(SelectivePlasticityPlugin):
        def after_training_exp(self, strategy, **kwargs):
            before = copy.deepcopy(strategy.model.state_dict())
            super().after_training_exp(strategy, **kwargs)
            now = strategy.model.state_dict()
            self.moved = {name.rpartition(".")[0] for name in now if not torch.equal(now[name], before[name])}

    plugin = Note(rank=10, **settings)
    strategy = strategy_of(model, [*others, plugin], criterion=criterion or OneHotMSELoss())
    for part in benchmark.train_stream[:experiences]:
        strategy.train(part)
    return plugin.moved


def test_the_readout_alone_is_settled_from_the_second_experience_on(split2):
    assert moved(split2, mlp(), experiences=1) == set()
    assert moved(split2, mlp()) == {"5"}
    assert moved(split2, mlp(), openness=1e9, pull_back=0.0) == {"5"}  # the step alone
    assert moved(split2, mlp(), others=[ReplayPlugin(40)]) == {"5"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"readout_step": False},
        {"criterion": nn.CrossEntropyLoss()},  # a quadratic says little of it where it is far away
        {"criterion": lambda z, _: (z[:, 0].square() - z[:, 1].square()).mean() / 100},  # it has no least value
        {"openness": {"5": float("inf")}},
    ],
    ids=["off", "cross-entropy", "saddle", "ungated"],
)
def test_where_nothing_is_settled(split2, kwargs):
    assert moved(split2, mlp(), **kwargs) == set()


def test_what_is_no_readout_is_not_settled(split2):
    frozen = mlp()
    frozen[5].bias.requires_grad_(False)
    scaled = nn.Sequential(*mlp(), nn.Softmax(dim=1))
    assert moved(split2, frozen) == moved(split2, scaled) == set()


class At:
    """Finds changes at these iterations, as if no step since the last look had been surprising."""

    def __init__(self, *iterations):
        self.iterations, self.n, self.drift_detected = iterations, 0, False

    def update(self, x):
        self.n += 1
        self.drift_detected = self.n in self.iterations


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("consolidate", ["continuous", "surprise"])
def test_where_boundaries_are_found_the_readout_alone_is_settled(split2, monkeypatch, consolidate, replay):
    monkeypatch.setattr(boundaries, "_CHUNK", 16 * 32)
    ends = []
    for settles in (True, False):

        class Until(SelectivePlasticityPlugin):
            def after_update(self, strategy, **kwargs):
                super().after_update(strategy, **kwargs)
                if len(self.consolidated_at) == 2 and not hasattr(self, "end"):
                    self.end = copy.deepcopy(strategy.model.state_dict())

            def _settle(self, strategy, name, layer, loss, damping):
                assert loss.wanted == pytest.approx(1)  # one-hot
                return super()._settle(strategy, name, layer, loss, damping)

        detector = At(4, 20) if consolidate == "surprise" else None
        plugin = Until(consolidate=consolidate, detector=detector, readout_step=settles)
        plugins = [plugin, ReplayPlugin(40)] if replay else [plugin]
        strategy = strategy_of(mlp(), plugins, criterion=JointReplayLoss(OneHotMSELoss(), shrinkage=50), batch=16)
        torch.manual_seed(0)
        for part in split2.train_stream:
            strategy.train(part)
        ends.append(plugin.end)
    assert {name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])} == {"5.weight", "5.bias"}


def test_what_a_stream_notes_gives_the_mean_gradient_at_the_weights_that_follow():
    """Of squared error on inputs that don't move, whatever the weights were when they were seen."""
    moment, layer, parts = boundaries.Moment(4, 2, torch.zeros(1)), nn.Linear(4, 3, bias=False), []
    for seed in range(5):
        x, y = (part.float() for part in experience(seed, 10 + seed, 4, 3))
        with torch.no_grad():
            layer.weight.add_(1)
            z = layer(x)
        moment.add(x, z - 2 * (z - y) / 2)
        moment.keep()
        parts.append((x, y))
    x, y = (torch.cat(some) for some in zip(*parts))
    rows = moment.factor()
    found = 2 * (layer.weight @ (rows.T @ rows / len(rows)) - moment.targets)
    torch.testing.assert_close(found, 2 * (layer(x) - y).T @ x / len(x), atol=1e-2, rtol=1e-3)


def test_heads_that_grow_and_mask(split2):
    for masking in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*mlp()[:-1], IncrementalClassifier(32, initial_out_features=5, masking=masking))
        assert moved(split2, model, criterion=Grown()) == {"5.classifier"}
        assert model[5].classifier.out_features == 10


class Grown(nn.Module):
    """Squared error on as many classes as there are outputs."""

    def forward(self, outputs, targets):
        return (outputs - nn.functional.one_hot(targets, outputs.shape[1])).square().sum(1).mean()


def test_a_task_with_few_steps_is_read_out_as_well(split5):
    """Batches of 100, so 6 steps a task: the last one has no more than that."""
    accuracies = []
    for settles in (False, True):
        torch.manual_seed(0)
        strategy = strategy_of(mlp(), [SelectivePlasticityPlugin(readout_step=settles)], batch=100, epochs=1)
        for part in split5.train_stream:
            strategy.train(part)
        found = [
            (strategy.model(x).argmax(1) == y).float().mean().item()
            for x, y, _ in (e.dataset.read_batch(list(range(200))) for e in split5.test_stream)
        ]
        accuracies.append((sum(found) / 5, found[-1]))
    (without, last_without), (settled, last) = accuracies
    assert settled > without + 0.2 and last > last_without + 0.2
