"""What the gate takes for a layer's inputs, errors and weights, against autograd, for all kinds of layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avalanche_sp.gate.layers import gated_layers

LAYERS = {
    "linear": lambda: (nn.Linear(6, 5), (7, 6)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), (7, 6)),
    "linear on sequences": lambda: (nn.Linear(6, 5), (7, 3, 6)),
    "convolution": lambda: (nn.Conv2d(3, 8, 3), (4, 3, 9, 7)),
    "without bias": lambda: (nn.Conv2d(3, 8, 3, bias=False), (4, 3, 9, 7)),
    "stride, padding, dilation": lambda: (nn.Conv2d(3, 8, (3, 2), (2, 1), (1, 2), (1, 2)), (4, 3, 9, 7)),
    "same": lambda: (nn.Conv2d(3, 8, 4, padding="same"), (4, 3, 9, 7)),
    "circular": lambda: (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (4, 3, 9, 7)),
    "groups": lambda: (nn.Conv2d(6, 8, 3, groups=2), (4, 6, 9, 7)),
    "depthwise": lambda: (nn.Conv2d(6, 6, 3, stride=2, groups=6), (4, 6, 9, 7)),
    "convolution in one dimension": lambda: (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 4, 9)),
    "convolution in three": lambda: (nn.Conv3d(2, 6, (1, 2, 3), padding=1), (4, 2, 4, 5, 6)),
    "transposed convolution": lambda: (nn.ConvTranspose2d(3, 5, 3, 2, 1, 1), (4, 3, 5, 4)),
    "transposed, in groups": lambda: (nn.ConvTranspose1d(6, 4, 3, groups=2, dilation=2, bias=False), (4, 6, 7)),
    "transposed, in three dimensions": lambda: (nn.ConvTranspose3d(2, 3, (1, 2, 3)), (4, 2, 3, 4, 5)),
    "bilinear": lambda: (nn.Bilinear(3, 4, 5), (7, 3), (7, 4)),
    "pads in forward": lambda: (PadsInForward(3, 8, 3, stride=2), (4, 3, 9, 8)),
}


class PadsInForward(nn.Conv2d):
    """As TensorFlow pads for "same" with strides; EfficientNets have such."""

    def forward(self, x):
        lacks = [(-(-n // s) - 1) * s + k - n for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride)]
        padding = [p for m in reversed(lacks) for p in (max(m, 0) // 2, max(m, 0) - max(m, 0) // 2)]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride)


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    module, *shapes = LAYERS[request.param]()
    layer = gated_layers(module.double())[""]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    rank = min(4, along_inputs(layer))
    vectors = torch.linalg.qr(torch.randn(along_inputs(layer), rank, dtype=torch.float64)).Q
    return layer, given, vectors


def run(layer, given):
    """The map's input and the module's output."""
    output = layer.module(*given)
    return layer.input_of(tuple(given), {}, output), output


def test_projection_is_that_of_the_input_vectors(case):
    layer, given, vectors = case
    x, _ = run(layer, given)
    rows, groups = layer.presynaptic(x), layer.groups
    expected = rows.reshape(len(x), groups, -1, rows.shape[1]).transpose(0, 1) @ vectors  # groups lead
    torch.testing.assert_close(layer.project(x, vectors).flatten(0, -2), expected.flatten(0, -2))


def test_errors_times_projection_are_the_gradient_along_the_vectors(case):
    layer, given, vectors = case
    x, output = run(layer, given)
    assert layer.explains(x, output)
    delta = torch.randn_like(output)
    (output * delta).sum().backward()
    gradient = joined(layer, lambda p: p.grad)
    coincidences = layer.postsynaptic(delta).mT @ layer.project(x, vectors)
    torch.testing.assert_close(coincidences.flatten(0, -2), gradient @ vectors)


def test_energy_is_that_of_the_input_vectors(case):
    layer, given, _ = case
    x, _ = run(layer, given)
    torch.testing.assert_close(layer.energy(x), layer.presynaptic(x).square().sum())


def joined(layer, of=lambda p: p.detach()):
    """A layer's weights, or a part of them, with the bias as a last column."""
    weight = of(layer.weight)
    if isinstance(layer.module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return torch.cat([group.flatten(1).T for group in weight.chunk(layer.groups)])
    weight = weight.flatten(1)
    return weight.clone() if layer.bias is None else torch.cat([weight, of(layer.bias)[:, None]], 1)


def test_a_gradient_is_gated_along_the_vectors(case):
    layer, given, vectors = case
    assert (layer.gradient_along(vectors) == 0).all()  # no gradient
    layer.module(*given).square().sum().backward()
    before = joined(layer, lambda p: p.grad)
    along_vectors = layer.gradient_along(vectors)
    torch.testing.assert_close(along_vectors, before @ vectors)
    closed = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)[: vectors.shape[1]]
    layer.gate_gradient(along_vectors * closed, vectors, 0.75)
    gate = 0.75 * torch.eye(len(vectors), dtype=torch.float64) - vectors @ closed.diag() @ vectors.T
    torch.testing.assert_close(joined(layer, lambda p: p.grad), before @ gate)


def test_the_gradients_of_the_parameters_along_the_vectors_add_up_to_the_layers(case):
    layer, given, vectors = case
    layer.module(*given).square().sum().backward()
    parts = [layer.part_along(p, p.grad, vectors) for p in layer.trained_parameters]
    torch.testing.assert_close(sum(parts), layer.gradient_along(vectors))


def test_a_gradient_of_one_parameter_is_gated_as_the_layers_is(case):
    layer, given, vectors = case
    layer.module(*given).square().sum().backward()
    held = layer.gradient_along(vectors) * torch.tensor([0.1, 0.5, 0.9, 1.0])[: vectors.shape[1]]
    before = [p.grad.clone() for p in layer.trained_parameters]
    gated = [layer.gated_gradient(p.grad, held, vectors, 0.75) for p in layer.trained_parameters]
    assert all(torch.equal(p.grad, b) for p, b in zip(layer.trained_parameters, before))  # a copy
    layer.gate_gradient(held, vectors, 0.75)
    for p, g in zip(layer.trained_parameters, gated):
        torch.testing.assert_close(g, p.grad)


def test_drift_is_counted_from_the_first_units_weights(case):
    layer = case[0]
    n = first_units(layer)
    rows = torch.randn(n, along_inputs(layer), dtype=torch.float64)
    torch.testing.assert_close(layer.drift_from(rows.clone()), joined(layer)[:n] - rows)


def test_weights_move_along_the_vectors_alone(case):
    layer, _, vectors = case
    before = layer.along(vectors)
    weights = joined(layer)
    step = torch.randn_like(before)
    layer.add_along(step, vectors)
    torch.testing.assert_close(layer.along(vectors), before + step)
    torch.testing.assert_close(joined(layer) - weights, step @ vectors.T)


def test_rows_are_added_to_the_gradient_of_the_first_units(case):
    layer = case[0]
    n = first_units(layer)
    rows = torch.randn(n, along_inputs(layer), dtype=torch.float64)
    layer.add_to_gradient(rows, torch.tensor(2.0))  # no gradient: nothing happens
    assert layer.weight.grad is None
    for p in layer.parameters:
        p.grad = torch.ones_like(p)
    layer.add_to_gradient(rows, torch.tensor(2.0))
    grads = joined(layer, lambda p: p.grad)
    torch.testing.assert_close(grads[:n] - 1, 2 * rows)
    assert (grads[n:] == 1).all()


def along_inputs(layer):
    return layer.inputs + (layer.bias is not None)


def first_units(layer):
    """All of a transposed convolution, which never grows."""
    return 3 if joined(layer).shape[0] == len(layer.weight) else layer.units


def test_weights_are_written_back(case):
    layer = case[0]
    rows = torch.randn(layer.units, along_inputs(layer), dtype=torch.float64)
    layer.set_weights(rows)
    torch.testing.assert_close(joined(layer), rows)
    torch.testing.assert_close(layer.weights_and_bias(), rows.float())


def test_chosen_input_vectors_are_those_of_all(case):
    layer, given, _ = case
    x, _ = run(layer, given)
    places = torch.tensor([0, 1, 5, 3])
    assert torch.equal(layer.presynaptic_at(x, places), layer.presynaptic(x)[places])
