"""The networks of the comparison."""

from functools import partial

import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.models.packnet import PackNetModel
from avalanche.models.slim_resnet18 import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F

from avalanche_sp import SelectivePlasticityPlugin
from harness.settings import DATA, NETWORKS

CHANNELS = (16, 32)


def build_network(name: str = "256-256", heads: int = 1, data: str = "mnist") -> nn.Module:
    """One of ``settings.NETWORKS`` for a data set. Several heads share the outputs evenly."""
    if name not in NETWORKS:
        raise ValueError(f"Invalid network: {name} (allowed: {', '.join(NETWORKS)})")
    shape, classes = DATA[data].shape, DATA[data].classes
    if name in _OTHERS:
        network = _OTHERS[name](shape, classes)
    else:
        network = perceptron(*map(int, name.split("-")), inputs=DATA[data].inputs, classes=classes)
    return network if heads == 1 else MultiHead(network, heads)


class MultiHead(MultiTaskModule):
    """A network with one of Avalanche's heads for each task in place of its last layer.

    All heads are made at the start, so that equal seeds give equal weights for all strategies.
    """

    def __init__(self, network: nn.Module, n_tasks: int):
        super().__init__()
        name, last = [(name, module) for name, module in network.named_children()][-1]
        classes = last.out_features // n_tasks
        setattr(network, name, nn.Identity())
        self.features = network
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


def perceptron(*widths: int, inputs: int = 784, classes: int = 10) -> nn.Sequential:
    sizes = (inputs, *widths)
    hidden = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def small_cnn(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, normalised: bool = False) -> nn.Sequential:
    first, second = CHANNELS
    norms = [[nn.BatchNorm2d(width)] if normalised else [] for width in CHANNELS]
    return nn.Sequential(
        nn.Conv2d(shape[0], first, 5, stride=2, padding=2),
        *norms[0],
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        *norms[1],
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * (shape[1] // 4) * (shape[2] // 4), classes),
    )


class SlimResNet18(ResNet):
    """Avalanche's, which has 3 x 32 x 32 inputs alone, for images of any size."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__(BasicBlock, [2, 2, 2, 2], classes, nf=20)
        self.conv1 = nn.Conv2d(shape[0], 20, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.linear(x.mean((2, 3)))


class _Block(nn.Module):
    """Attention and a perceptron of two layers, each behind a normalisation and with a skip connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (batch, tokens, 3 width) to three of (batch, heads, tokens, width / heads)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A small one: patches of 4 x 4 pixels (8 x 8 of larger images), four blocks, the mean of the tokens.

    A. Dosovitskiy et al.: An image is worth 16x16 words, ICLR 2021.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 64):
        super().__init__()
        patch = 4 if shape[1] <= 32 else 8
        self.patches = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((shape[1] // patch) * (shape[2] // patch), width))
        self.blocks = nn.Sequential(*(_Block(width, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


_OTHERS = {
    "cnn": small_cnn,
    "cnn-bn": partial(small_cnn, normalised=True),
    "slim-resnet18": SlimResNet18,
    "vit": VisionTransformer,
}


def network_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def gate_bytes(model: nn.Module) -> int:
    """Memory of ``SelectivePlasticityPlugin()`` with a network, in single precision."""
    total, gate = 0, SelectivePlasticityPlugin()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    first, *_, last = layers
    for name, layer in layers.items():
        units, inputs = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
        kept = min(gate.gate.rank_of(name, inputs, name == last), inputs)
        total += 4 * (kept * (inputs + units + 1) + 1)
        if kept < inputs:
            total += units * ((inputs + 1) // 2 + 4)  # the weights in four bits each, and a scale for each unit
    if isinstance(layers[first], nn.Linear) and len(layers[first].weight) >= units:
        total += 4 * units * (layers[first].in_features + 1)  # the data's sums by class
    # Of the readout: the gradient that is left, and its inputs' sums and numbers by class.
    return total + 4 * units * (2 * inputs + 1)
