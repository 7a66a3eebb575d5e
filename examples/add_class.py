"""Add a class to a trained network, in a loop of your own. Run it in the root of a checkout."""

import torch
from torch import nn

from avalanche_sp import split_mnist
from avalanche_sp.gate import PlasticityGate

streams = split_mnist(10, dataset_root="benchmarks/data/mnist")  # a digit an experience
digits = [e.dataset.read_batch(list(range(min(1000, len(e.dataset)))))[:2] for e in streams.train_stream]
tests = [e.dataset.read_batch(list(range(min(500, len(e.dataset)))))[:2] for e in streams.test_stream]


def batches(of):
    """The images and labels of some digits, shuffled, in batches of 64."""
    images, labels = (torch.cat(parts) for parts in zip(*of))
    return [(images[rows], labels[rows]) for rows in torch.randperm(len(labels)).split(64)]


def train(data):
    for x, y in data:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def accuracy(of):
    images, labels = (torch.cat(parts) for parts in zip(*of))
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).float().mean().item()


# A network that knows the digits 0 to 8. It has an output for the new class already.
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
criterion = nn.CrossEntropyLoss()
train(batches(digits[:9]))
few = batches([(images[:20], labels[:20]) for images, labels in digits[:9]])  # all that is left of the old data

gate = PlasticityGate(model, optimizer)
gate.consolidate(few, criterion)  # once; not needed afterwards
new = batches(digits[9:])
gate.prepare(new, criterion)  # solves the last layer for all classes
train(new)  # the loop as it was
gate.consolidate(new, criterion)  # the new class is protected too
print(f"digits 0 to 8: {accuracy(tests[:9]):.1f}%, digit 9: {accuracy(tests[9:]):.1f}%")
