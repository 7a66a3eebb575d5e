"""What the gate takes for a layer's inputs, errors and weights, against autograd, for all kinds of layers."""

import pytest
import torch
from torch import nn

from avalanche_sp.gate.layers import (
    add_along,
    add_to_gradient,
    along,
    drift_from,
    energy,
    gate_gradient,
    gated_gradient,
    gradient_along,
    postsynaptic,
    presynaptic,
    project,
    trained_parameters,
)

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
}


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    layer, shape = LAYERS[request.param]()
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    size = layer.weight[0].numel() + (layer.bias is not None)
    vectors = torch.linalg.qr(torch.randn(size, 4, dtype=torch.float64)).Q
    return layer, x, vectors


def test_projection_is_that_of_the_input_vectors(case):
    layer, x, vectors = case
    rows, groups = presynaptic(layer, x), getattr(layer, "groups", 1)
    expected = rows.reshape(len(x), groups, -1, rows.shape[1]).transpose(0, 1) @ vectors  # groups lead
    torch.testing.assert_close(project(layer, x, vectors).reshape(-1, 4), expected.reshape(-1, 4))


def test_errors_times_projection_are_the_gradient_along_the_vectors(case):
    layer, x, vectors = case
    output = layer(x)
    delta = torch.randn_like(output)
    (output * delta).sum().backward()
    gradient = joined(layer, lambda p: p.grad)
    coincidences = postsynaptic(layer, delta).mT @ project(layer, x, vectors)
    torch.testing.assert_close(coincidences.flatten(0, -2), gradient @ vectors)


def test_energy_is_that_of_the_input_vectors(case):
    layer, x, _ = case
    torch.testing.assert_close(energy(layer, x), presynaptic(layer, x).square().sum())


def joined(layer, of=lambda p: p.detach()):
    """A layer's weights, or what is taken of them, with the bias as a last column."""
    weight = of(layer.weight).flatten(1)
    return weight.clone() if layer.bias is None else torch.cat([weight, of(layer.bias)[:, None]], 1)


def test_a_gradient_is_gated_along_the_vectors(case):
    layer, x, vectors = case
    assert (gradient_along(layer, vectors) == 0).all()  # no gradient
    layer(x).square().sum().backward()
    before = joined(layer, lambda p: p.grad)
    along_vectors = gradient_along(layer, vectors)
    torch.testing.assert_close(along_vectors, before @ vectors)
    closed = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=x.dtype)
    gate_gradient(layer, along_vectors * closed, vectors, 0.75)
    gate = 0.75 * torch.eye(len(vectors), dtype=x.dtype) - vectors @ closed.diag() @ vectors.T
    torch.testing.assert_close(joined(layer, lambda p: p.grad), before @ gate)


def test_a_gradient_of_one_parameter_is_gated_as_the_layers_is(case):
    layer, x, vectors = case
    layer(x).square().sum().backward()
    held = gradient_along(layer, vectors) * torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=x.dtype)
    before = [p.grad.clone() for p in trained_parameters(layer)]
    gated = [gated_gradient(p.grad, held, vectors, 0.75) for p in trained_parameters(layer)]
    assert all(torch.equal(p.grad, b) for p, b in zip(trained_parameters(layer), before))  # a copy
    gate_gradient(layer, held, vectors, 0.75)
    for p, g in zip(trained_parameters(layer), gated):
        torch.testing.assert_close(g, p.grad)


def test_drift_is_counted_from_the_first_units_weights(case):
    layer = case[0]
    rows = torch.randn(3, along_inputs(layer), dtype=torch.float64)
    torch.testing.assert_close(drift_from(layer, rows.clone()), joined(layer)[:3] - rows)


def test_weights_move_along_the_vectors_alone(case):
    layer, x, vectors = case
    before = along(layer, vectors)
    weights = joined(layer)
    step = torch.randn_like(before)
    add_along(layer, step, vectors)
    torch.testing.assert_close(along(layer, vectors), before + step)
    torch.testing.assert_close(joined(layer) - weights, step @ vectors.T)


def test_rows_are_added_to_the_gradient_of_the_first_units(case):
    layer = case[0]
    d = along_inputs(layer)
    rows = torch.randn(3, d, dtype=torch.float64)
    add_to_gradient(layer, rows, torch.tensor(2.0))  # no gradient: nothing happens
    assert layer.weight.grad is None
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    add_to_gradient(layer, rows, torch.tensor(2.0))
    grads = joined(layer, lambda p: p.grad)
    torch.testing.assert_close(grads[:3] - 1, 2 * rows)
    assert (grads[3:] == 1).all()


def along_inputs(layer):
    return layer.weight[0].numel() + (layer.bias is not None)
