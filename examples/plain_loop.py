"""Add classes to a trained network without the old data, in a loop of your own.

    python examples/plain_loop.py

trains an MLP on the digits 0 to 4 and then on 5 to 9, without and with the gate. The loop needs torch alone.
"""

import argparse

import torch
from torch import nn

from avalanche_sp import split_mnist
from avalanche_sp.gate import PlasticityGate


def tasks_of(stream, images):
    """A tensor of images and one of labels for each task."""
    return [e.dataset.read_batch(list(range(min(images, len(e.dataset)))))[:2] for e in stream]


def train(tasks, test, gated):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = nn.CrossEntropyLoss()
    gate = PlasticityGate(model, optimizer) if gated else None
    for images, labels in tasks:
        shuffled = torch.randperm(len(labels)).split(64)
        batches = [(images[rows], labels[rows]) for rows in shuffled]
        if gate is not None:
            gate.prepare(batches, criterion)
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        if gate is not None:
            gate.consolidate(batches, criterion)
    model.eval()
    with torch.no_grad():
        return [100 * float((model(x).argmax(1) == y).float().mean()) for x, y in test]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="training images a task (default: 10000)")
    parser.add_argument("--data", default="benchmarks/data/mnist", help="folder with MNIST (default: %(default)s)")
    arguments = parser.parse_args()
    benchmark = split_mnist(2, dataset_root=arguments.data)
    tasks, test = tasks_of(benchmark.train_stream, arguments.images), tasks_of(benchmark.test_stream, 5000)
    for gated in (False, True):
        old, new = train(tasks, test, gated)
        print(f"{'with' if gated else 'without'} the gate: digits 0 to 4 {old:.1f}%, digits 5 to 9 {new:.1f}%")


if __name__ == "__main__":
    main()
