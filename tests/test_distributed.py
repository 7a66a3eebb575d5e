"""Two processes of torch.distributed, each with half of every mini-batch, learn what one process learns."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from avalanche.distributed.distributed_helper import DistributedHelper
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import (
    ConsolidationPlugin,
    OneHotMSELoss,
    PlasticityGate,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
)

from conftest import mlp, sliced, strategy_of, weights


def learn(model, tasks, stored, rank=0, processes=1):
    """Weights after these tasks with gate and optimizer, and the surprise of each step.

    Stored samples of the first task are half of each later batch.
    """
    optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)
    gate, criterion, surprises = PlasticityGate(model, optimizer), OneHotMSELoss(), []
    for number, (x, y) in enumerate(tasks):
        memory = torch.utils.data.TensorDataset(*tasks[0])
        replays = stored and number > 0
        gate.begin(len(x), [memory] if replays else 0)
        if number:
            gate.prepare([(x, y)], criterion)
        for start in range(0, len(x), 32):
            rows = range(start + rank, start + 32, processes)
            xs, ys, old = x[rows], y[rows], torch.zeros(len(rows), dtype=torch.bool)
            if replays:
                xs, ys = torch.cat([xs, tasks[0][0][rows]]), torch.cat([ys, tasks[0][1][rows]])
                old = torch.cat([old, ~old])
                gate.replayed(old)
            optimizer.zero_grad()
            loss = criterion(model(xs), ys)
            loss.backward()
            gate.observe(xs, None, ys, loss, criterion)
            optimizer.observe_surprise(gate.surprise)
            surprises.append(gate.surprise.clone())
            optimizer.step()
        gate.consolidate([(x, y)], criterion)
        optimizer.consolidate()
    gate.detach()
    return weights(model), torch.stack(surprises)


def one_process(rank, port, tasks, benchmark, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    DistributedHelper.init_distributed(random_seed=1, backend="gloo", use_cuda=False)
    for stored in (False, True):
        results[stored, rank] = learn(nn.parallel.DistributedDataParallel(mlp()), tasks, stored, rank, 2)
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)
    strategy = strategy_of(model, [ReplayPlugin(40), SelectivePlasticityPlugin()], optimizer=optimizer)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    results["avalanche", rank] = weights(model)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(split2):
    benchmark = sliced(split2, train=128, test=50)
    tasks = [e.dataset.read_batch(list(range(128)))[:2] for e in benchmark.train_stream]
    tasks.append((tasks[0][0], (tasks[0][1] + 1) % 5))  # other labels for the first images, which is a surprise
    port = 20000 + os.getpid() % 20000
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(one_process, (port, tasks, benchmark, results), nprocs=2)
        return tasks, dict(results)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_two_processes_equal_one_on_the_whole_batch(stored, two_processes):
    tasks, results = two_processes
    (ours, surprises), others, (whole, expected) = results[stored, 0], results[stored, 1], learn(mlp(), tasks, stored)
    assert torch.equal(ours, others[0]) and torch.equal(surprises, others[1])
    torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(surprises, expected, rtol=1e-3, atol=1e-3)
    assert stored or float(surprises.max()) > 0.5


@pytest.mark.slow
def test_two_processes_of_avalanche_end_with_equal_weights(two_processes):
    _, results = two_processes
    assert torch.equal(results["avalanche", 0], results["avalanche", 1])


@pytest.mark.parametrize("plugin", [SelectivePlasticityPlugin, ConsolidationPlugin])
def test_the_plugins_say_that_they_support_several_processes(plugin):
    assert plugin.supports_distributed
