"""The gate's part of a step waits for no result on the device; on a GPU it is run there, under autocast.

``python -m pytest -m cuda`` runs what needs a GPU.
"""

import copy

import overhead
import pytest
import torch
from avalanche.training import Naive
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_sp import OneHotMSELoss, PlasticityGate, SelectivePlasticityOptimizer, SelectivePlasticityPlugin

from conftest import MNIST, accuracy, weights

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# Operations whose result, or the size of whose result, the host has to wait for.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}


class Waits(TorchDispatchMode):
    """Names the operations for which the host would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put_") else ()
        if name in WAITS or any(isinstance(m, torch.Tensor) and m.dtype == torch.bool for m in masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(28, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.rnn(x.squeeze(1))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(28, 24)
        self.block = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.block(self.embed(x.squeeze(1))).mean(1))


NETWORKS = {
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
    "CNN with BatchNorm": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 10)
    ),
    "GRU": Recurrent,
    "attention": Attentive,
}


def squared_error(outputs, targets):
    """As OneHotMSELoss, whose ``one_hot`` looks at the labels on a CPU and not on a GPU."""
    return (outputs - torch.eye(10, device=outputs.device)[targets]).square().sum() / len(outputs)


LOSSES = {"cross-entropy": nn.CrossEntropyLoss(), "squared error": squared_error}


def tasks(split5, device="cpu"):
    """The first images of the first two experiences, as batches."""
    found = []
    for experience in split5.train_stream[:2]:
        x, y, _ = experience.dataset.read_batch(list(range(320)))
        found.append([(a.to(device), b.to(device)) for a, b in zip(x.split(32), y.split(32))])
    return found


def gated(network, device="cpu", optimizer=lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9)):
    torch.manual_seed(0)
    model = NETWORKS[network]().to(device)
    step = optimizer(model.parameters())
    return model, step, PlasticityGate(model, step)


def learn(model, step, gate, batches, criterion, autocast=None):
    for x, y in batches:
        step.zero_grad()
        with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = criterion(model(x), y)
        loss.backward()
        step.step()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_waits_for_nothing(split5, network, loss):
    (first, second), criterion = tasks(split5), LOSSES[loss]
    model, step, gate = gated(network)
    learn(model, step, gate, first, criterion)
    gate.consolidate(first, criterion)
    gate.prepare(second, criterion)
    gate.begin(320)
    with Waits() as waits:  # ten steps: looks and both penalties are among them
        learn(model, step, gate, second, criterion)
    assert waits.found == []
    with Waits() as waits:
        gate.consolidate(second, criterion)
    assert waits.found  # which the mode finds where there are some


def test_a_step_with_stored_samples_waits_for_nothing(split5):
    first, second = tasks(split5)
    model, step, gate = gated("perceptron")
    learn(model, step, gate, first, squared_error)
    gate.consolidate(first, squared_error)
    gate.begin(320, stored=32)
    for (x, y), (old, labels) in zip(second, first):
        gate.replayed([False] * 32 + [True] * 32)  # the host's
        with Waits() as waits:
            learn(model, step, gate, [(torch.cat([x, old]), torch.cat([y, labels]))], squared_error)
        assert waits.found == []


@pytest.mark.slow
def test_overhead_measures_a_network_with_and_without_the_gate():
    timers = overhead.gated(
        overhead.Settings(dataset_root=MNIST, images=(256,)), "100-100", 256, "Adam", torch.optim.Adam, 64, False
    )
    rows = overhead.measure(timers, rounds=2)
    assert [row["name"] for row in rows] == ["Adam", "Adam, gate"]
    assert rows[0]["ratio"] == 1 < rows[1]["ratio_min"] <= rows[1]["ratio"] <= rows[1]["ratio_max"]
    assert 0 < overhead.state_share("100-100", str(MNIST)) < 2
    with pytest.raises(ValueError, match=r"Invalid images: 100 \(allowed: 256 to 10000\)"):
        overhead.Settings(dataset_root=MNIST, images=(100,))


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_on_a_gpu_a_step_waits_for_nothing_under_autocast(split5, network, loss):
    (first, second), criterion = tasks(split5, "cuda"), LOSSES[loss]
    model, step, gate = gated(network, "cuda")
    learn(model, step, gate, first, criterion, torch.bfloat16)
    gate.consolidate(first, criterion)
    gate.prepare(second, criterion)
    gate.begin(320)
    learn(model, step, gate, second[:1], criterion, torch.bfloat16)  # libraries wait once
    torch.cuda.set_sync_debug_mode("error")
    try:
        learn(model, step, gate, second[1:], criterion, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gate.consolidate(second, criterion)
    assert all(w.isfinite().all() for w in model.parameters())


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("network", NETWORKS)
def test_a_gpu_learns_what_a_cpu_learns(split5, network):
    ends = []
    for device in ("cpu", "cuda"):
        model, step, gate = gated(network, device)
        for batches in tasks(split5, device):
            learn(model, step, gate, batches, squared_error)
            gate.consolidate(batches, squared_error)
        ends.append(weights(model.cpu()))
    torch.testing.assert_close(*ends, rtol=0.01, atol=0.01)


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("fused", [False, True])
def test_plugin_and_optimizer_keep_more_than_naive_training_on_a_gpu(split5, fused):
    torch.manual_seed(0)
    start, kept = NETWORKS["perceptron"](), []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        model = copy.deepcopy(start).cuda()
        step = SelectivePlasticityOptimizer.for_continual_learning(
            model.parameters(), with_gate=bool(plugins), fused=fused
        )
        settings = {"criterion": OneHotMSELoss(), "train_mb_size": 32, "evaluator": None, "device": "cuda"}
        strategy = Naive(model=model, optimizer=step, plugins=plugins, **settings)
        for experience in split5.train_stream[:2]:
            strategy.train(experience)
        kept.append(accuracy(model.cpu(), split5, 0))
    assert kept[1] > kept[0] + 0.2
