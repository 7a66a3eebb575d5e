"""The plugin with optimizers that don't step along the gradient, and its hold on layers that it can't gate."""

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, Settings, reference
from avalanche_sp.gate.functional import claim
from avalanche_sp.gate.layers import gated_layers

from conftest import accuracy, mlp, strategy_of, weights

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "selective plasticity": lambda p: SelectivePlasticityOptimizer(p, lr=1e-3, beta1=0.0, eps=1e-3, warmup_steps=5),
}


WATCHED = {"openness": 0.02, "pull_back": 0.0, "rank": 20, "readout_step": False}


def moved(split2, make, gradient_alone=False):
    """How far the second experience moved the weights along what the first one claimed, relative to all it moved."""
    torch.manual_seed(0)
    model, plugin = mlp(), SelectivePlasticityPlugin(**WATCHED)
    strategy = strategy_of(model, [plugin], optimizer=make(model.parameters()))
    strategy.train(split2.train_stream[0])
    layers, memories = gated_layers(model), plugin.layers
    before, start = {name: layer.along(memories[name].vectors) for name, layer in layers.items()}, weights(model)
    if gradient_alone:
        strategy.plugins.remove(plugin)
        gates = {
            name: reference.gate_matrix(m.eigenvalues, m.vectors, m.mean_eigenvalue, 0.02).float()
            for name, m in memories.items()
        }

        def gate(*_):
            for name, layer in layers.items():
                gated = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1) @ gates[name]
                layer.weight.grad, layer.bias.grad = gated[:, :-1].contiguous(), gated[:, -1].clone()

        strategy.optimizer.register_step_pre_hook(gate)
    strategy.train(split2.train_stream[1])
    inside = sum((layer.along(memories[n].vectors) - before[n]).square().sum() for n, layer in layers.items())
    return (inside.sqrt() / (weights(model) - start).norm()).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gated_gradient_is_not_enough_and_the_update_is_gated_too(split2, name):
    alone = moved(split2, OPTIMIZERS[name], gradient_alone=True)
    assert moved(split2, OPTIMIZERS[name]) < alone / 2


class Looks(SupervisedPlugin):
    """Compares what the gate leaves of the steps with their open share, at every look. It stands after the plugin."""

    def __init__(self, optimizer, plugin):
        super().__init__()
        self.plugin, self.looks, self.gated = plugin, 0, False
        optimizer.register_step_post_hook(lambda *_: self.stepped())  # before the gate's own, which it puts on later

    def coordinates(self):
        return {name: self.layers[name].along(m.vectors) for name, m in self.memories.items()}

    def before_training_epoch(self, strategy, **kwargs):
        self.layers, self.memories = gated_layers(strategy.model), dict(self.plugin.layers)
        self.steps, self.last = 0, self.coordinates()

    def stepped(self):
        self.there = self.coordinates()

    def after_update(self, strategy, **kwargs):
        self.steps += 1
        if self.steps % 8 == 0:
            self.compare()
        else:
            now = self.coordinates()
            assert all(torch.equal(now[name], self.there[name]) for name in now)

    def after_training_exp(self, strategy, **kwargs):
        self.compare()

    def compare(self):
        now = self.coordinates()
        for name, memory in self.memories.items():
            left, closed = now[name] - self.last[name], memory.closed(0.5)[0]
            expected = (self.there[name] - self.last[name]) * (1 - closed)
            torch.testing.assert_close(left, expected, atol=2e-6, rtol=1e-3)
            assert (left - expected / (1 - closed)).abs().max() > 1e-3
            self.looks += 1
        self.last = now


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_of_a_step_along_a_claimed_direction_the_open_share_is_left(split2, name):
    torch.manual_seed(0)
    few_in_step = Settings(gated_vectors=1)
    model, plugin = mlp(), SelectivePlasticityPlugin(0.5, 0, rank=20, readout_step=False, settings=few_in_step)
    optimizer = OPTIMIZERS[name](model.parameters())
    looks = Looks(optimizer, plugin)
    strategy = strategy_of(model, [plugin, looks], optimizer=optimizer)
    for experience in split2.train_stream:
        strategy.train(experience)
    assert looks.looks == 3 * 3  # 19 iterations: after the 8th, the 16th and at the end, three layers


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
        kept.append(accuracy(model, split2, 0))
    assert kept[0] < 0.4 < 0.6 < kept[1]


class Sums(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        pass


class Accumulating(Naive):
    """Steps after every second batch."""

    def optimizer_step(self):
        if self.clock.train_exp_iterations % 2:
            self.optimizer.step()
            torch.optim.SGD.zero_grad(self.optimizer)


def test_gradients_accumulated_over_two_batches_are_those_of_a_whole_one(split2):
    """To rounding, which the Newton step of the readout enlarges; how much depends on the machine."""
    ends, below = [], []
    for strategy_class, make, batch, lr in (
        (Naive, torch.optim.SGD, 50, 0.05),
        (Accumulating, Sums, 25, 0.025),
    ):
        model = mlp()
        strategy = strategy_class(
            model=model,
            optimizer=make(model.parameters(), lr=lr),
            criterion=OneHotMSELoss(),
            train_mb_size=batch,
            plugins=[SelectivePlasticityPlugin(pull_back=0.0, rank=20, settings=Settings(solve_tolerance=1e-6))],
            evaluator=None,
        )
        for experience in split2.train_stream:
            strategy.train(experience, shuffle=False)
        ends.append(weights(model))
        below.append(weights(model[:-1]))
    torch.testing.assert_close(*below, rtol=0, atol=1e-5)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


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
        kept.append(accuracy(model, split2, 0))
    assert kept[0] < 0.3 and kept[1] > 0.8
    assert [activity.rows for activity in plugin.layers.values()] == [144, 25, 1]
    for memory in plugin.layers.values():
        closed = claim(memory.eigenvalues, memory.mean_eigenvalue, 0.5 / memory.rows)
        torch.testing.assert_close(memory.closed(0.5)[0], closed)


@pytest.mark.parametrize("replay", [False, True])
def test_a_penalty_of_the_criterion_acts_on_a_layer_without_error(split2, replay):
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
        [SelectivePlasticityPlugin(rank=5), *[ReplayPlugin(20)] * replay],
        criterion=lambda out, y: OneHotMSELoss()(out, y) + 0.1 * model.aside.weight.square().sum(),
    )
    norms = [model.aside.weight.norm().item()]
    for experience in split2.train_stream:
        strategy.train(experience)
        norms.append(model.aside.weight.norm().item())
    free, gated = norms[1] / norms[0], norms[2] / norms[1]
    assert free == pytest.approx((1 - 0.02 * 0.2) ** 19, rel=1e-4)
    assert free < gated < 0.99
