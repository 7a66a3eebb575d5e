"""Running statistics of normalisation layers: measured when they are frozen."""

import copy

import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_sp import PlasticityGate, SelectivePlasticityPlugin

from conftest import strategy_of


def network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


def images(benchmark, task=0, n=600):
    x, y, *_ = benchmark.train_stream[task].dataset.read_batch(list(range(n)))
    order = y.argsort()  # a data set that is sorted by class
    return x.view(-1, 1, 28, 28)[order], y[order]


def trained(model, data, steps=8, mode=True):
    optimizer, criterion = torch.optim.Adam(model.parameters(), 1e-3), nn.CrossEntropyLoss()
    gate = PlasticityGate(model, optimizer)
    x, y = data.tensors
    model.train(mode)
    for rows in torch.randperm(len(x)).split(32)[:steps]:
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return gate, criterion


def statistics(model):
    return [(m.running_mean.clone(), m.running_var.clone()) for m in model if isinstance(m, nn.BatchNorm2d)]


def test_statistics_are_those_of_the_experience_with_the_present_weights(split5):
    model, data = network(), TensorDataset(*images(split5))
    gate, criterion = trained(model, data)
    lagging = statistics(model)
    gate.consolidate(data, criterion)
    first = model[0](data.tensors[0])
    second = model[3](model[2](nn.functional.batch_norm(first, None, None, model[1].weight, model[1].bias, True)))
    for z, (mean, variance), (mean_before, _) in zip((first, second), statistics(model), lagging):
        torch.testing.assert_close(mean, z.mean((0, 2, 3)), atol=0.02, rtol=0.02)
        torch.testing.assert_close(variance, z.var((0, 2, 3)), atol=0.02, rtol=0.05)
        assert (mean_before - mean).abs().max() > 0.1
    assert model.training and all(m.momentum == 0.1 and m.num_batches_tracked == 8 for m in (model[1], model[4]))
    frozen = statistics(model)
    gate.consolidate(TensorDataset(*images(split5, 1)), criterion)
    assert all(torch.equal(a, b) for before, after in zip(frozen, statistics(model)) for a, b in zip(before, after))


@pytest.mark.parametrize("why", ["evaluation mode", "momentum 0", "stored samples", "no gate"])
def test_statistics_that_were_not_trained_or_train_on_stay(split5, why):
    model = network(0.0 if why == "momentum 0" else 0.1)
    data = TensorDataset(*images(split5))
    gate, criterion = trained(model, data, mode=why != "evaluation mode")
    if why == "no gate":
        gate = PlasticityGate(model, torch.optim.SGD(model.parameters(), 0.1), openness=float("inf"))
    if why == "stored samples":
        gate.begin(stored=10)
    before = statistics(model)
    gate.consolidate(data, criterion)
    assert all(torch.equal(a, b) for known, now in zip(before, statistics(model)) for a, b in zip(known, now))


def test_samples_by_name_are_mixed_also(split5):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = network()

        def forward(self, inputs):
            return self.whole(inputs["x"])

    x, y = images(split5, n=257)  # a batch more than 256, of one sample
    ends = []
    for model, samples, first in (
        (network(), x, x[:32]),
        (ByName(), [{"x": image} for image in x], {"x": x[:32]}),
    ):
        gate = PlasticityGate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model(first)
        gate.consolidate(DataLoader(list(zip(samples, y)), 16), nn.CrossEntropyLoss())
        ends.append(statistics(getattr(model, "whole", model)))
    assert all(torch.equal(a, b) for one, other in zip(*ends) for a, b in zip(one, other))


def test_statistics_that_are_not_finite_leave_the_state_as_it_was(split5):
    model, data = network(), TensorDataset(*images(split5))
    gate, criterion = trained(model, data)
    state = copy.deepcopy(model.state_dict())
    data.tensors[0][3] = torch.inf
    with pytest.raises(FloatingPointError, match="is not finite"):
        gate.consolidate(data, criterion)
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())


def test_an_error_leaves_the_state_as_it_was(split5):
    model, data = network(), TensorDataset(*images(split5))
    gate, criterion = trained(model, data)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        gate.consolidate(TensorDataset(data.tensors[0][..., :5], data.tensors[1]), criterion)
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
    assert model[1].momentum == 0.1 and gate.listening


def test_with_replay_they_train_on(split5):
    model = network()
    strategy = strategy_of(model, [ReplayPlugin(50), SelectivePlasticityPlugin()], criterion=nn.CrossEntropyLoss())
    known = []
    for experience in split5.train_stream[:2]:
        strategy.train(experience)
        known.append(statistics(model)[0][0])
    assert not torch.equal(*known)
