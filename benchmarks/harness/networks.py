"""The networks of the comparison."""

from __future__ import annotations

from torch import nn

from avalanche_sp.layers import gated_layers
from harness.settings import NETWORKS

CHANNELS = (16, 32)


def build_network(name: str = "256-256") -> nn.Module:
    """One of ``settings.NETWORKS``: a ReLU perceptron by the widths of its hidden layers, or the small CNN."""
    if name not in NETWORKS:
        raise ValueError(f"Invalid network: {name} (allowed: {', '.join(NETWORKS)})")
    return small_cnn() if name == "cnn" else perceptron(*(int(width) for width in name.split("-")))


def perceptron(*widths: int) -> nn.Module:
    sizes = (784, *widths)
    hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def small_cnn() -> nn.Module:
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
    """What a network's parameters and buffers take."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def gate_bytes(model: nn.Module, rank: int) -> int:
    """What ``SelectivePlasticityPlugin`` keeps beside a network, in single precision."""
    total = 0
    for layer in gated_layers(model).values():
        units, inputs = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
        kept = min(rank, inputs)
        total += 4 * (kept * (inputs + units + 2) + 1)
    return total
