"""The readout's step at the end of an experience: against plain linear algebra, and on real MNIST."""

import copy
from dataclasses import replace

import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import ReplayPlugin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityPlugin, Settings, reference
from avalanche_sp.gate.functional import newton_step
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.readout import ReadoutLoss, newton_readout
from avalanche_sp.gate.rows import StreamRows
from avalanche_sp.gate.stream import Moment, StreamWatch

from conftest import accuracy, mlp, strategy_of


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 8), st.integers(1, 4), st.floats(1e-6, 10), st.integers(0, 1000))
def test_a_newton_step_ends_at_the_damped_least_squares_solution(d, out, damping, seed):
    x, y, w = normal(seed, 3 * d, d), normal(seed + 1, 3 * d, out), normal(seed + 2, out, d)
    hessian = 2 * x.T @ x
    step = newton_step(2 * (x @ w.T - y).T @ x, hessian, damping)
    ridge = damping * hessian.diagonal().mean() / 2
    rows = torch.cat([x, ridge.sqrt() * torch.eye(d).double()])  # least squares that stays near w
    targets = torch.cat([y, ridge.sqrt() * w.T])
    torch.testing.assert_close(w + step, reference.least_squares(rows, targets))


def test_a_newton_step_without_curvature_is_none():
    assert torch.equal(newton_step(normal(0, 2, 3), torch.zeros(3, 3), 0.05), torch.zeros(2, 3).double())


def experience(seed, n, d, out):
    return normal(seed, n, d) @ normal(seed + 50, d, d), normal(seed + 100, n, out)


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1).to(x)], 1)


def learned(layer, x, y, old, rank, damping=None, settings=Settings()):  # noqa: B008
    """One more experience: the readout takes its step, and the experience is remembered."""
    ones = with_ones(x.float())
    gradient = 2 * (layer(x.float()).detach() - y.float()).T @ ones / len(x)
    kappa = torch.tensor(2.0)
    loss = ReadoutLoss("", gradient, ones, kappa, y.float().square().sum() / len(x), len(x))
    residual = newton_readout(GatedLayer(layer), [loss], old, kappa, settings, damping=damping)
    new = (old or LayerMemory.empty(ones.shape[1], ones)).merged(ones, len(x), 1.0, rank)
    return replace(new, anchor=GatedLayer(layer).along(new.vectors), residual=residual)


def test_undamped_it_is_recursive_least_squares():
    """However many experiences came, with all directions kept: the solution on all their samples at once."""
    torch.manual_seed(0)
    layer, old, parts = nn.Linear(5, 3), None, [experience(i, 40 + 10 * i, 5, 3) for i in range(4)]
    whole_steps = Settings(readout_old=1, readout_whole=1e-9, readout_damping=1e-9)
    for x, y in parts:
        old = learned(layer, x, y, old, rank=6, settings=whole_steps)
    x, y = (torch.cat(some) for some in zip(*parts))
    solution = reference.least_squares(with_ones(x), y)
    torch.testing.assert_close(GatedLayer(layer).weights_and_bias().double(), solution, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("trained", [True, False])
def test_it_is_the_step_that_its_docstring_says(trained, damping):
    """Only part of it if training has left little to gain."""
    torch.manual_seed(0)
    layer, (x, y), (x2, y2) = nn.Linear(7, 2), experience(0, 30, 7, 2), experience(1, 50, 7, 2)
    old = learned(layer, x, y, None, rank=3)
    anchor = GatedLayer(layer).weights_and_bias().double()
    with torch.no_grad():
        layer.weight.add_(normal(9, 2, 7) / 5)  # training
        y2 = layer(x2.float()).double() + y2 / 2 if trained else y2
    before = GatedLayer(layer).weights_and_bias()
    learned(layer, x2, y2, old, rank=3, damping=damping)
    residual = 2 * (with_ones(x) @ anchor.T - y).T @ with_ones(x) / 30
    values, vectors, mean = reference.merged_eigenpairs([with_ones(x)], 3)
    quadratic = anchor, vectors, reference.modelled_moment(values, vectors, mean), residual
    whole, found = (
        reference.readout_step(before, [(with_ones(x2), y2, 50)], quadratic, 30, whole=w, damping=damping or 0.05)
        for w in (1e-9, 0.05)
    )
    torch.testing.assert_close(GatedLayer(layer).weights_and_bias().double(), found, atol=1e-4, rtol=0)
    share = float((found - before).norm() / (whole - before).norm())
    assert 0.02 < share < 0.8 if trained else share == pytest.approx(1)


@pytest.mark.parametrize("joint", [True, False], ids=["joint loss", "plain loss"])
@pytest.mark.parametrize("first", [True, False], ids=["replay before", "replay after"])
def test_beside_a_memory_the_step_is_on_the_stored_samples_also(split5, joint, first):
    """Each class's 100 stand for 2 / 3 of the old loss, the quadratic for the rest."""
    memory, criterion = ReplayPlugin(400), OneHotMSELoss()

    class Check(SelectivePlasticityPlugin):
        def after_training_exp(self, strategy, **kwargs):
            layer, old = strategy.model[5], self.layers.get("5")
            if strategy.clock.train_exp_counter == 2:
                (stream, stored), before = strategy.dataloader.datasets, GatedLayer(layer).weights_and_bias()
                assert (len(stream), len(stored)) == (600, 400)
                trust, moment = 2 / 3, reference.modelled_moment(old.eigenvalues, old.vectors, old.mean_eigenvalue)
                parts = [(*self.seen(strategy, stream), 600), (*self.seen(strategy, stored), trust * 1200)]
                quadratic = old.anchor @ old.vectors.T, old.vectors, moment, old.residual
                self.expected = reference.readout_step(before, parts, quadratic, 1200, trust)
            super().after_training_exp(strategy, **kwargs)
            self.found = GatedLayer(layer).weights_and_bias().double()

        def seen(self, strategy, dataset):
            x, y = (torch.stack([torch.as_tensor(row[i]) for row in dataset]) for i in (0, 1))
            with torch.no_grad():
                return with_ones(strategy.model[:5](x)), nn.functional.one_hot(y, 10)

    plugin = Check(rank=10)
    if joint:
        criterion = JointReplayLoss(criterion)
    plugins = [memory, plugin] if first else [plugin, memory]
    strategy = strategy_of(mlp(), plugins, criterion=criterion, batch=25)  # the last of 24 iterations is a look
    for part in split5.train_stream[:3]:
        strategy.train(part)
    torch.testing.assert_close(plugin.found, plugin.expected, atol=1e-4, rtol=0)


def moved(benchmark, model, experiences=2, criterion=None, others=(), **settings):
    """Which layers the end of the last experience moved. Its iterations move none: their rate is 0."""

    class Note(SelectivePlasticityPlugin):
        def after_training_exp(self, strategy, **kwargs):
            before = copy.deepcopy(strategy.model.state_dict())
            super().after_training_exp(strategy, **kwargs)
            now = strategy.model.state_dict()
            self.moved = {name.rpartition(".")[0] for name in now if not torch.equal(now[name], before[name])}

    plugin = Note(rank=10, **settings)
    strategy = strategy_of(model, [*others, plugin], criterion=criterion or OneHotMSELoss())
    for number, part in enumerate(benchmark.train_stream[:experiences], 1):
        strategy.optimizer.param_groups[0]["lr"] = 0.02 if number < experiences else 0.0
        strategy.train(part)
    return plugin.moved


def test_the_readout_alone_takes_the_step_from_the_second_experience_on(split2):
    assert moved(split2, mlp(), experiences=1) == set()
    assert moved(split2, mlp()) == {"5"}
    assert moved(split2, mlp(), openness=1e9, pull_back=0.0) == {"5"}  # the step alone
    assert moved(split2, mlp(), criterion=nn.CrossEntropyLoss()) == {"5"}
    assert moved(split2, mlp(), others=[ReplayPlugin(40)]) == {"5"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"readout_step": False},
        {"criterion": lambda z, _: (z[:, 0].square() - z[:, 1].square()).mean() / 100},  # it has no least value
        {"openness": {"5": float("inf")}},
    ],
    ids=["off", "saddle", "ungated"],
)
def test_when_there_is_no_step(split2, kwargs):
    assert moved(split2, mlp(), **kwargs) == set()


def test_what_is_no_readout_takes_no_step(split2):
    frozen = mlp()
    frozen[5].bias.requires_grad_(False)
    squashed = nn.Sequential(*mlp(), nn.Tanh())
    assert moved(split2, frozen) == moved(split2, squashed) == set()


class At:
    """Finds changes at these iterations, as if no step since the last look had been surprising."""

    def __init__(self, *iterations):
        self.iterations, self.n, self.drift_detected = iterations, 0, False

    def update(self, x):
        self.n += 1
        self.drift_detected = self.n in self.iterations


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("consolidate", ["continuous", "surprise"])
def test_at_boundaries_that_are_found_the_readout_alone_takes_the_step(split2, consolidate, replay):
    ends = []
    for step in (True, False):

        class Until(SelectivePlasticityPlugin):
            def after_update(self, strategy, **kwargs):
                super().after_update(strategy, **kwargs)
                if len(self.consolidated_at) == 2 and not hasattr(self, "end"):
                    self.end = copy.deepcopy(strategy.model.state_dict())

        detector = At(4, 20) if consolidate == "surprise" else None
        settings = Settings(stream_chunk=16 * 32)
        plugin = Until(consolidate=consolidate, detector=detector, readout_step=step, settings=settings)
        plugins = [plugin, ReplayPlugin(40)] if replay else [plugin]
        strategy = strategy_of(mlp(), plugins, criterion=JointReplayLoss(OneHotMSELoss()), batch=16)
        torch.manual_seed(0)
        for part in split2.train_stream:
            strategy.train(part)
        ends.append(plugin.end)
    assert {name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])} == {"5.weight", "5.bias"}


def test_a_streams_moment_gives_the_mean_gradient_at_the_weights_that_follow():
    """Of squared error on inputs that don't move, whatever the weights were when they were seen."""
    moment, layer, parts = Moment(4, 2, 5120, torch.zeros(1)), nn.Linear(4, 3, bias=False), []
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


def test_a_streams_observation_is_that_of_its_samples():
    """Of batches with stored samples among them, which it leaves out; the weights move in between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    watch, criterion = StreamWatch(None, lambda *_: 6, True, Settings(stream_look=1)), OneHotMSELoss()
    xs, ys, rows = torch.randn(5, 12, 6), torch.randint(3, (5, 12)), StreamRows.unlike([False, True, False] * 4)
    for x, y in zip(xs, ys):
        model.zero_grad()
        outputs = model(x)
        watch.note("0", GatedLayer(model[0]), x, outputs)
        loss = criterion(outputs, y)
        watch.observe(x, outputs, y, loss, criterion, rows)
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 6) / 10)
        watch.look(model, {"0": GatedLayer(model[0])}, torch.optim.SGD(model.parameters()))
    seen = watch.observation({"0": GatedLayer(model[0])})
    x, y = xs[:, ::3].flatten(0, 1), ys[:, ::3].flatten()
    x, y = torch.cat([x, xs[:, 2::3].flatten(0, 1)]), torch.cat([y, ys[:, 2::3].flatten()])
    assert (seen.samples, seen.classes, seen.layers["0"].fed_by_data, seen.layers["0"].rows) == (40, 3, True, 1)
    assert float(seen.curvature) == pytest.approx(2) and float(seen.readout.wanted) == pytest.approx(1)  # one-hot
    moment = with_ones(x).T @ with_ones(x) / 40
    torch.testing.assert_close(seen.readout.moment, moment, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.layers["0"].mean_eigenvalue, moment.trace() / 7)
    gradient = 2 * (model(x) - nn.functional.one_hot(y, 3)).T @ with_ones(x) / 40
    torch.testing.assert_close(seen.readout.gradient, gradient, rtol=1e-3, atol=1e-3)


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
    for step in (False, True):
        torch.manual_seed(0)
        strategy = strategy_of(mlp(), [SelectivePlasticityPlugin(readout_step=step)], batch=100, epochs=1)
        for part in split5.train_stream:
            strategy.train(part)
        found = [accuracy(strategy.model, split5, task) for task in range(5)]
        accuracies.append((sum(found) / 5, found[-1]))
    (without, last_without), (stepped, last) = accuracies
    assert stepped > without + 0.2 and last > last_without + 0.2
