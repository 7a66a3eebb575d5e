"""The plugin beside optimizers that don't step along the gradient, and its hold on layers that it can't gate."""

import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin
from avalanche_sp.drift import DriftWatch
from avalanche_sp.gates import claim
from avalanche_sp.layers import along, gated_layers

from conftest import mlp, strategy_of, weights

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "selective plasticity": lambda p: SelectivePlasticityOptimizer(p, lr=1e-3, beta1=0.0, eps=1e-3, warmup_steps=5),
}


class GradientAlone(SelectivePlasticityPlugin):
    """Gates the gradient and lets the optimizer do what it will with it."""

    def after_update(self, strategy, **kwargs):
        pass

    def after_training_epoch(self, strategy, **kwargs):
        pass


def moved(split2, plugin, make):
    """How far the second experience moved the weights along what the first one claimed, relative to all it moved."""
    torch.manual_seed(0)
    model = mlp()
    strategy = strategy_of(model, [plugin], optimizer=make(model.parameters()))
    strategy.train(split2.train_stream[0])
    vectors = {name: activity.vectors for name, activity in plugin.layers.items()}
    before = {name: along(layer, vectors[name]) for name, layer in gated_layers(model).items()}
    start = weights(model)
    strategy.train(split2.train_stream[1])
    inside = sum((along(layer, vectors[n]) - before[n]).square().sum() for n, layer in gated_layers(model).items())
    return (inside.sqrt() / (weights(model) - start).norm()).item()


WATCHED = {"openness": 0.02, "pull_back": 0.0, "rank": 20, "readout_step": False}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gated_gradient_is_not_enough_and_the_update_is_gated_too(split2, name):
    alone = moved(split2, GradientAlone(**WATCHED), OPTIMIZERS[name])
    assert moved(split2, SelectivePlasticityPlugin(**WATCHED), OPTIMIZERS[name]) < alone / 2


class Watch(DriftWatch):
    """Sees every look at the weights: what the steps had done along the vectors, and what is left of it."""

    looks = 0

    def _look(self, beyond):
        before = {name: coordinates.clone() for name, coordinates in self._before.items()}
        there = {name: along(layer, activity.vectors) for name, layer, activity in self._gated}
        super()._look(beyond)
        for name, layer, activity in self._gated:
            if name in before:
                left = along(layer, activity.vectors) - before[name]
                expected = (there[name] - before[name]) * (1 - activity.closed)
                torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-3)
                self.looks += 1


class Watching(SelectivePlasticityPlugin):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._drift = Watch(self.pull_back)

    @property
    def looks(self):
        return self._drift.looks


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_of_a_step_along_a_claimed_direction_the_open_share_is_left(split2, name):
    plugin = Watching(rank=20)
    moved(split2, plugin, OPTIMIZERS[name])
    assert plugin.looks == 3 * 3  # 19 iterations: after the 8th, the 16th and at the end, three layers


def accuracy_on_first(benchmark, model):
    x, y, _ = benchmark.test_stream[0].dataset.read_batch(list(range(200)))
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_remembers_with_any_optimizer(split2, name):
    """Though a kernel is changed by, and acts on, every position of an image: the gate closes as many times further."""
    kept, plugin = [], SelectivePlasticityPlugin()
    for plugins in ([], [plugin]):
        torch.manual_seed(0)
        model = mlp()
        strategy = strategy_of(model, plugins, optimizer=OPTIMIZERS[name](model.parameters()), epochs=3)
        for experience in split2.train_stream:
            strategy.train(experience)
        kept.append(accuracy_on_first(split2, model))
    assert kept[0] < 0.4 < 0.6 < kept[1]


def test_gradients_accumulated_over_several_batches_are_gated_each_by_itself(split2):
    class Accumulating(torch.optim.SGD):
        calls = 0

        def zero_grad(self, set_to_none=True):
            if self.calls % 2 == 0:
                super().zero_grad(set_to_none)

        def step(self, closure=None):
            self.calls += 1
            if self.calls % 2 == 0:
                super().step(closure)

    results = []
    for make, batch, lr in ((torch.optim.SGD, 50, 0.05), (Accumulating, 25, 0.025)):
        torch.manual_seed(0)
        model = mlp()
        strategy = strategy_of(
            model,
            [GradientAlone(pull_back=0.0, rank=20)],  # steps are taken back every few batches, whatever these add up to
            optimizer=make(model.parameters(), lr=lr),
            batch=batch,
        )
        for experience in split2.train_stream:
            strategy.train(experience, shuffle=False)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def network_with_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


def norm_state(model):
    return torch.cat([t.detach().flatten() for i in (1, 5) for t in model[i].state_dict().values()]).clone()


@pytest.mark.parametrize("replay", [False, True])
def test_normalisation_layers_learn_once_and_then_hold_still_without_a_memory(split2, replay):
    model = network_with_norms()
    plugins = [SelectivePlasticityPlugin(rank=10)] + ([ReplayPlugin(30)] if replay else [])
    strategy = strategy_of(model, plugins, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1))
    states = [norm_state(model)]
    for experience in split2.train_stream:
        strategy.train(experience)
        states.append(norm_state(model))
        assert all(m.training for m in model.modules())
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2]) != replay


def test_a_convolutional_network_remembers(split2):
    """Though a kernel is changed by, and acts on, every position of an image: the gate closes as many times further."""
    kept, plugin = [], SelectivePlasticityPlugin()
    for plugins in ([], [plugin]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(400, 10),
        )  # fmt: skip
        strategy = strategy_of(model, plugins, criterion=OneHotMSELoss(), epochs=3)
        for experience in split2.train_stream:
            strategy.train(experience)
        kept.append(accuracy_on_first(split2, model))
    assert kept[0] < 0.3 and kept[1] > 0.8
    assert [activity.rows for activity in plugin.layers.values()] == [144, 25, 1]
    for activity in plugin.layers.values():
        closed = claim(activity.eigenvalues, activity.mean_eigenvalue, plugin.openness / activity.rows)
        torch.testing.assert_close(activity.closed, closed)


def test_a_penalty_on_a_layer_without_error_is_not_gated(split2):
    """A layer that is called but has no part in the outputs: its weights' gradient is the criterion's own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aside = mlp(), nn.Linear(784, 3)

        def forward(self, x):
            self.aside(x.flatten(1))
            return self.net(x)

    torch.manual_seed(0)
    model = Net()
    strategy = strategy_of(
        model,
        [SelectivePlasticityPlugin(rank=5)],
        criterion=lambda out, y: OneHotMSELoss()(out, y) + 0.1 * model.aside.weight.square().sum(),
    )
    norms = []
    for experience in split2.train_stream:
        strategy.train(experience)
        norms.append(model.aside.weight.norm().item())
    assert norms[1] < norms[0]
