"""The networks of the comparison."""

from __future__ import annotations

import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.models.packnet import PackNetModel
from torch import nn

from avalanche_sp import SelectivePlasticityPlugin
from harness.settings import NETWORKS

CHANNELS = (16, 32)


def build_network(name: str = "256-256", heads: int = 1) -> nn.Module:
    """One of ``settings.NETWORKS``: a ReLU perceptron by the widths of its hidden layers, or the small CNN.

    With several heads, these share the ten outputs evenly.
    """
    if name not in NETWORKS:
        raise ValueError(f"Invalid network: {name} (allowed: {', '.join(NETWORKS)})")
    network = small_cnn() if name == "cnn" else perceptron(*(int(width) for width in name.split("-")))
    return network if heads == 1 else MultiHead(network, heads)


class MultiHead(MultiTaskModule):
    """A network with one of Avalanche's heads for each task in place of its last layer.

    All heads are made at the start, so that equal seeds give equal weights for all strategies.
    """

    def __init__(self, network: nn.Sequential, n_tasks: int):
        super().__init__()
        last = network[-1]
        classes = last.out_features // n_tasks
        self.features = network[:-1]
        self.heads = MultiHeadClassifier(last.in_features, classes, masking=False)
        for task in range(1, n_tasks):
            head = IncrementalClassifier(last.in_features, classes, masking=False, auto_adapt=False)
            self.heads.classifiers[str(task)] = head

    def forward(self, x: torch.Tensor, task_labels: torch.Tensor) -> torch.Tensor:
        return self.heads(self.features(x), task_labels)


class PackNetMultiHead(PackNetModel):
    """The same for Avalanche's PackNet: tasks share out the hidden layers, and each has its head to itself.

    A. Mallya, S. Lazebnik: PackNet: Adding multiple tasks to a single network by iterative pruning, CVPR 2018.
    """

    def __init__(self, network: MultiHead):
        super().__init__(network.features)
        self.heads = network.heads

    def forward(self, x: torch.Tensor, task_labels: torch.Tensor) -> torch.Tensor:
        return self.heads(super().forward(x, task_labels), task_labels)


def perceptron(*widths: int) -> nn.Sequential:
    sizes = (784, *widths)
    hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def small_cnn() -> nn.Sequential:
    first, second = CHANNELS
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 49, 10),
    )


def network_bytes(model: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def gate_bytes(model: nn.Module) -> int:
    """Memory of ``SelectivePlasticityPlugin()`` with a network, in single precision."""
    total, gate = 0, SelectivePlasticityPlugin()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    last = list(layers)[-1]
    for name, layer in layers.items():
        units, inputs = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
        kept = min(gate.gate.rank_of(name, inputs, name == last), inputs)
        total += 4 * (kept * (inputs + units + 1) + 1)
        if kept < inputs:
            total += units * ((inputs + 1) // 2 + 4)  # the weights in four bits each, and a scale for each unit
    # Of the readout: the gradient that is left, and its inputs' sums and numbers by class.
    return total + 4 * units * (2 * inputs + 1)
