"""Real MNIST, in small slices, and a small network for all tests."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import avalanche_sp

ROOT = Path(__file__).resolve().parents[1]
MNIST = ROOT / "benchmarks" / "data" / "mnist"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_avalanche():
    """Avalanche's deprecation decorator resets the warning filters at every call; put them back."""
    with warnings.catch_warnings():
        yield


def sliced(benchmark, train=600, test=200, experiences=None):
    """The first samples of every experience, or of the first few."""
    from avalanche_sp.data import benchmark_of  # here: Avalanche takes seconds, also where no test runs

    streams = benchmark.train_stream[:experiences], benchmark.test_stream[:experiences]
    return benchmark_of(*([e.dataset[:n] for e in stream] for stream, n in zip(streams, (train, test))))


@pytest.fixture(scope="session")
def slices():
    """Benchmarks of the harness that were made, in slices."""
    return {}


@pytest.fixture
def tiny(monkeypatch, slices):
    """The harness trains on the first 320 images of each task, and tests on 100."""
    from harness import run as harness

    whole = harness.build_benchmark

    def build(run, dataset_root):
        what = run.benchmark, run.n_tasks, run.seed, run.stream, run.task_incremental, run.validation
        if what not in slices:
            slices[what] = sliced(whole(run, dataset_root), train=320, test=100)
        return slices[what]

    monkeypatch.setattr(harness, "build_benchmark", build)


@pytest.fixture(scope="session")
def split2():
    return sliced(avalanche_sp.split_mnist(2, dataset_root=MNIST))


@pytest.fixture(scope="session")
def split5():
    return sliced(avalanche_sp.split_mnist(5, dataset_root=MNIST))


@pytest.fixture(scope="session")
def permuted3():
    return sliced(avalanche_sp.permuted_mnist(3, dataset_root=MNIST))


def mlp(hidden=32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, hidden, bias=bias),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=bias),
        nn.ReLU(),
        nn.Linear(hidden, 10, bias=bias),
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@torch.no_grad()
def accuracy(model, benchmark, task):
    """Share of a task's test images, 200 at most, whose class the model knows."""
    dataset = benchmark.test_stream[task].dataset
    x, y, _ = dataset.read_batch(list(range(min(len(dataset), 200))))
    return (model(x).argmax(1) == y).float().mean().item()


def strategy_of(model, plugins, *, optimizer=None, criterion=None, batch=32, epochs=1):
    from avalanche.training import Naive

    return Naive(
        model=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.02),
        criterion=criterion or avalanche_sp.OneHotMSELoss(),
        train_mb_size=batch,
        train_epochs=epochs,
        eval_mb_size=500,
        plugins=plugins,
        evaluator=None,
    )
