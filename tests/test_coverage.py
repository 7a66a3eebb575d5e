"""Every trained weight is gated, frozen after the first experience and named, or of a normalisation layer."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from avalanche_sp import SelectivePlasticityPlugin
from avalanche_sp.gate import PlasticityGate, Settings
from avalanche_sp.gate.functional import claim
from avalanche_sp.gate.layers import gated_layers

from conftest import ROOT, sliced, strategy_of

TABLE = Path(ROOT, "docs", "coverage.md").read_text()
GATED, FROZEN, NORM = "gated", "frozen and named", "learns with the first experience, then frozen"


class Net(nn.Module):
    """A layer on real images of a given shape, and a linear head."""

    def __init__(self, layer, shape, after=lambda out: out):
        super().__init__()
        self.layer, self.shape, self.after = layer, shape, after
        self.head = nn.Linear(self.features(torch.zeros(2, 1, 28, 28)).shape[1], 10)

    def features(self, x):
        return self.after(self.layer(x.reshape(len(x), *self.shape))).flatten(1)

    def forward(self, x):
        return self.head(self.features(x).relu())


class SelfAttention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.inner = nn.MultiheadAttention(28, 4, batch_first=True, **kwargs)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Conv1D(nn.Module):
    """As in transformers, whose GPT-2 has it in place of linear layers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(0.05 * torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(14, 14, 16)

    def forward(self, x):
        return self.inner(x[:, 7:21, :14], x[:, 7:21, 14:])


class Steps(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, cell):
        super().__init__()
        self.inner = cell

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.inner(step, state)
        return state[0] if isinstance(state, tuple) else state


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(4, 3)

    def forward(self, x):
        return self.inner((x > 0).long() + 2 * (x > 1).long())


class Bags(nn.Module):
    """A bag of the places and shades of an image's bright pixels."""

    def __init__(self):
        super().__init__()
        self.inner = nn.EmbeddingBag(2 * 784 + 1, 16, mode="sum", padding_idx=0)

    def forward(self, x):
        return self.inner((x > 0) * (1 + torch.arange(784) + 784 * (x > 1)))


class LoRA(nn.Module):
    """A frozen linear layer and two small ones."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(784, 32), nn.Linear(784, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Functional(nn.Module):
    """A layer whose weight is used without calling it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(784, 32)

    def forward(self, x):
        return F.linear(x, self.inner.weight, self.inner.bias)


class Standardised(nn.Conv2d):
    """A convolution with another weight than its own."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, 2)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(784))

    def forward(self, x):
        return self.gamma * x


def last(out):
    return out[0][:, -1]


# Type, network, treatment of the layer's weights, names of the frozen weights.
ROWS, IMAGE, FLAT = (28, 28), (1, 28, 28), (784,)
TYPES = {
    "`nn.Linear`": (lambda: Net(nn.Linear(784, 32), FLAT), GATED),
    "`nn.Bilinear`": (lambda: Net(Pair(), ROWS), GATED),
    "`nn.Conv1d`": (lambda: Net(nn.Conv1d(28, 16, 3), ROWS), GATED),
    "`nn.Conv2d`": (lambda: Net(nn.Conv2d(1, 8, 3, 2), IMAGE), GATED),
    "`nn.Conv3d`": (lambda: Net(nn.Conv3d(1, 4, 3, 2), (1, 4, 14, 14)), GATED),
    "`nn.ConvTranspose1d`": (lambda: Net(nn.ConvTranspose1d(28, 8, 3, bias=False), ROWS), GATED),
    "`nn.ConvTranspose2d`": (lambda: Net(nn.ConvTranspose2d(16, 4, 3), (16, 7, 7)), GATED, "layer.bias"),
    "`nn.ConvTranspose3d`": (lambda: Net(nn.ConvTranspose3d(4, 2, 2), (4, 4, 7, 7)), GATED, "layer.bias"),
    "`nn.RNN`": (lambda: Net(nn.RNN(28, 32, batch_first=True), ROWS, last), GATED),
    "`nn.LSTM`": (
        lambda: Net(nn.LSTM(28, 32, 2, batch_first=True, proj_size=8), ROWS, last),
        GATED,
        "layer.weight_hr_l0",
        "layer.weight_hr_l1",
    ),
    "`nn.GRU`": (lambda: Net(nn.GRU(28, 32, 2, batch_first=True, bidirectional=True), ROWS, last), GATED),
    "`nn.RNNCell`": (lambda: Net(Steps(nn.RNNCell(28, 32)), ROWS), GATED),
    "`nn.LSTMCell`": (lambda: Net(Steps(nn.LSTMCell(28, 32)), ROWS), GATED),
    "`nn.GRUCell`": (lambda: Net(Steps(nn.GRUCell(28, 32)), ROWS), GATED),
    "`nn.MultiheadAttention`": (lambda: Net(SelfAttention(), ROWS), GATED),
    "`nn.TransformerEncoderLayer`": (
        lambda: Net(nn.TransformerEncoderLayer(28, 4, 32, 0.0, batch_first=True), ROWS),
        GATED,
    ),
    "`Conv1D` of Hugging Face's GPT-2": (lambda: Net(Conv1D(16, 28), ROWS), GATED),
    "LoRA made of linear layers": (lambda: Net(LoRA(), FLAT), GATED),
    "`nn.Embedding`": (lambda: Net(Tokens(), FLAT), GATED),
    "`nn.EmbeddingBag`": (lambda: Net(Bags(), FLAT), GATED),
    "a parametrised layer (`weight_norm`, `spectral_norm`, `orthogonal`)": (
        lambda: Net(parametrizations.weight_norm(nn.Linear(784, 32)), FLAT),
        FROZEN,
        "layer",
    ),
    "a pruned layer": (
        lambda: Net(prune.l1_unstructured(nn.Linear(784, 32), "weight", 0.5), FLAT),
        FROZEN,
        "layer",
    ),
    "a layer used functionally (`F.linear(x, layer.weight)`)": (
        lambda: Net(Functional(), FLAT),
        FROZEN,
        "layer.inner",
    ),
    "a subclass that changes its weight in `forward`": (lambda: Net(Standardised(1, 8, 3), IMAGE), FROZEN, "layer"),
    "an `nn.Parameter` of a module": (lambda: Net(Scale(), FLAT), FROZEN, "layer"),
    "`nn.BatchNorm1d`, `2d`, `3d`": (lambda: Net(nn.BatchNorm2d(1), IMAGE), NORM),
    "`nn.LayerNorm`, `nn.GroupNorm`, `nn.InstanceNorm`": (lambda: Net(nn.LayerNorm(784), FLAT), NORM),
}


def test_the_table_is_that_of_the_documents():
    rows = [line.split(" | ")[:2] for line in TABLE.splitlines() if line.startswith("| ")][1:]
    assert {kind.removeprefix("| "): what for kind, what in rows} == {kind: case[1] for kind, case in TYPES.items()}


@pytest.fixture(scope="module")
def small(split2):
    return sliced(split2, 300, 100)


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_gated_frozen_or_named(small, kind):
    make, what, *named = TYPES[kind]
    moved, start = [], None
    for plugins in ([], [SelectivePlasticityPlugin(openness=0.05)]):
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        strategy = strategy_of(model, plugins, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), batch=50)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            strategy.train(small.train_stream[0])
        old = small.test_stream[0].dataset.read_batch(list(range(100)))[0]
        features = model.eval().features(old).detach()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        strategy.train(small.train_stream[1])
        moved.append(float((model.eval().features(old) - features).norm()))
    plugin, said = plugins[0], " ".join(str(w.message) for w in said if "Not gated" in str(w.message))
    own = {n: p for n, p in model.named_parameters() if n.startswith("layer.") and p.requires_grad}
    gated = {p for n, layer in gated_layers(model).items() if n in plugin.layers for p in layer.parameters}
    assert "head" in plugin.layers
    if what == GATED:
        assert {n for n, p in own.items() if p not in gated and not any(n.startswith(f) for f in named)} <= {
            n for n in own if "norm" in n
        }
        assert any(not torch.equal(p, start[n]) for n, p in own.items())
    else:
        assert not gated.intersection(own.values())
        assert all(torch.equal(p, start[n]) for n, p in own.items())
    assert all(re.search(rf"\b{name}\b", said) for name in named) and bool(said) == bool(named)
    assert moved[1] < 0.5 * moved[0]


GRADIENTS = [kind for kind, case in TYPES.items() if case[1] == GATED]


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gated_gradient_is_the_gradient_times_the_gate_matrix(split2, kind):
    """Of each weight matrix with its bias; the gate's matrix is written out."""
    torch.manual_seed(0)
    model = TYPES[kind][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gate, criterion = PlasticityGate(model, optimizer, rank=6, pull_back=0, readout_step=False), nn.CrossEntropyLoss()
    x, y, _ = split2.train_stream[0].dataset.read_batch(list(range(100)))
    gate.consolidate([(x, y)], criterion)
    x, y, _ = split2.train_stream[1].dataset.read_batch(list(range(32)))
    criterion(model(x), y).backward()
    layers = gated_layers(model)
    before = {name: gradient(layer).double() for name, layer in layers.items()}
    optimizer.step()
    assert set(gate.memory.layers) == set(layers)
    for name, layer in layers.items():
        memory = gate.memory.layers[name]
        openness = 0.5 / max(memory.rows, 1) * (0 if layer.projects_attention else 1)
        f = claim(memory.eigenvalues, memory.mean_eigenvalue, openness).double()
        rest = claim(memory.rest, memory.mean_eigenvalue, openness).double()
        v = torch.eye(layer.inputs)[:, memory.vectors] if layer.of_rows else memory.vectors
        v = v.double()
        matrix = v @ (1 - f).diag() @ v.T + (1 - rest) * (torch.eye(len(v)) - v @ v.T)
        scale = before[name].abs().max()
        found, expected = gradient(layer).double() / scale, before[name] @ matrix / scale
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def gradient(layer):
    """With the bias's as a last column."""
    d = layer.inputs + (layer.bias is not None)
    return layer.gradient_along(torch.arange(d) if layer.of_rows else torch.eye(d))


@pytest.mark.parametrize("openness", [0.0, 1.0])
def test_queries_keys_and_values_are_held_unless_a_setting_opens_them(split2, openness):
    torch.manual_seed(0)
    model = Net(SelfAttention(), ROWS)
    settings = Settings(attention_openness=openness, vectors=10**6)  # all, so that no direction stays unknown
    plugin = SelectivePlasticityPlugin(settings=settings, rank=29)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    strategy = strategy_of(model, [plugin], optimizer=optimizer, criterion=nn.CrossEntropyLoss(), batch=100)
    strategy.train(split2.train_stream[0])
    inner = model.layer.inner
    old = next(iter(DataLoader(split2.train_stream[0].dataset, batch_size=100)))[0].reshape(-1, 28)
    before = F.linear(old, inner.in_proj_weight.detach(), inner.in_proj_bias.detach())
    strategy.train(split2.train_stream[1])
    after = F.linear(old, inner.in_proj_weight.detach(), inner.in_proj_bias.detach())
    moved = float((after - before).norm() / before.norm())  # directions that no input has are left open
    assert moved < 1e-5 if openness == 0 else moved > 1e-3


def test_hidden_states_are_those_of_a_cell_run_step_by_step():
    """Of a stacked network in both directions, from given first states, time first."""
    torch.manual_seed(0)
    model = nn.LSTM(5, 4, 2, bidirectional=True).eval()
    x, first = torch.randn(7, 3, 5), (torch.randn(4, 3, 4), torch.randn(4, 3, 4))
    output, found = model(x, first), {}
    for name, layer in gated_layers(model).items():
        found[name] = layer.input_of((x,), {"hx": first}, output)
    below = x
    for number in range(2):
        made = []
        for back in (False, True):
            suffix, place = f"_l{number}" + "_reverse" * back, 2 * number + back
            cell = nn.LSTMCell(below.shape[2], 4)
            cell.load_state_dict({n: getattr(model, n + suffix) for n in cell.state_dict()})
            state, before, after = (first[0][place], first[1][place]), [], []
            for step in below.flip(0) if back else below:
                before.append(state[0])
                state = cell(step, state)
                after.append(state[0])
            before, after = (torch.stack(s[::-1] if back else s) for s in (before, after))
            torch.testing.assert_close(found[f"weight_ih{suffix}"], below.transpose(0, 1))
            torch.testing.assert_close(found[f"weight_hh{suffix}"], before.transpose(0, 1))
            made.append(after)
        below = torch.cat(made, 2)
    torch.testing.assert_close(below, output[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_output_projection_of_its_input_is_the_attention(batch_first):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=5, vdim=6)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 7, 5), torch.randn(3, 7, 6)
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    layers, output = gated_layers(model), model(*given)
    x = layers["out_proj"].input_of(tuple(given), {}, output)
    torch.testing.assert_close(model.out_proj(x), output[0] if batch_first else output[0].transpose(0, 1))
    for name, expected in zip("qkv", (query, key, value)):
        assert torch.equal(layers[f"{name}_proj_weight"].input_of(tuple(given), {}, output), expected)
