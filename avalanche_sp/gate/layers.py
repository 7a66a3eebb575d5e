"""Layers as linear maps: what presynaptic activity, postsynaptic signal and weights are to each kind.

A linear layer's input vector is its input; a convolution's is the patch under its kernel, once for every position. A
bias is the weight of one more input, which is always 1. The groups of a grouped convolution share one input space.
"""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "GatedLayer",
    "NORMALISATION",
    "gated_layers",
    "ungated_modules",
    "trained_parameters",
    "presynaptic",
    "presynaptic_at",
    "energy",
    "project",
    "postsynaptic",
    "along",
    "gradient_along",
    "add_along",
    "gate_gradient",
    "gated_gradient",
    "add_to_gradient",
    "drift_from",
    "weights_and_bias",
    "set_weights",
]

GatedLayer = nn.Linear | nn.Conv2d
NORMALISATION = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)


def gated_layers(model: nn.Module) -> dict[str, GatedLayer]:
    """The trainable layers that the coincidence gate knows, by name.

    A layer whose weight is computed from other parameters (a parametrisation, pruning) is none of them.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, GatedLayer)}
    return {n: m for n, m in layers.items() if _trains(m._parameters.get("weight"))}


def _trains(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def ungated_modules(model: nn.Module, gated: Container[str]) -> dict[str, list[nn.Parameter]]:
    """The other modules' own trainable parameters, by module name; without normalisation layers."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and name not in gated and not isinstance(module, NORMALISATION):
            found.setdefault(name.split(".parametrizations")[0], []).extend(own)
    return found


def trained_parameters(layer: GatedLayer) -> list[nn.Parameter]:
    """A layer's own trainable parameters: its weight, and its bias if it has one."""
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def presynaptic(layer: GatedLayer, x: Tensor) -> Tensor:
    """A layer's input vectors, one a row.

    Args:
        x: the layer's input; (..., in_features) of a linear layer, (n, channels, height, width) of a convolution.

    Returns:
        Shape (rows, d): d is the number of weights that an output unit has, its bias among them.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, layer.in_features)
    else:
        patches = F.unfold(_by_group(layer, _padded(layer, x)), layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def presynaptic_at(layer: GatedLayer, x: Tensor, places: Tensor) -> Tensor:
    """``presynaptic(layer, x)[places]``; of a convolution's patches only these are laid out."""
    if isinstance(layer, nn.Linear):
        return presynaptic(layer, x)[places]
    windows = _by_group(layer, _padded(layer, x))
    for dim, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation), 2):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    height, width = windows.shape[2:4]
    of_sample, position = places // (height * width), places % (height * width)
    rows = windows[of_sample, :, position // width, position % width].flatten(1)
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def energy(layer: GatedLayer, x: Tensor) -> Tensor:
    """``presynaptic(layer, x).square().sum()``, 0-dim; a linear layer's input vectors not being laid out."""
    if isinstance(layer, nn.Linear):
        flat, ones = x.flatten(), x.numel() // layer.in_features if layer.bias is not None else 0
    else:
        flat, ones = presynaptic(layer, x).flatten(), 0  # there already
    return flat.dot(flat) + ones


def project(layer: GatedLayer, x: Tensor, vectors: Tensor) -> Tensor:
    """``presynaptic(layer, x) @ vectors``, a convolution's patches never being laid out.

    Args:
        x: as above.
        vectors: V, shape (d, r).

    Returns:
        Shape (rows, r); (groups, rows, r) of a grouped convolution.
    """
    inputs = layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        projection = x.reshape(-1, inputs) @ vectors[:inputs]
        return projection if layer.bias is None else projection.add_(vectors[-1])
    kernels = vectors[:inputs].T.reshape(-1, *layer.weight.shape[1:])
    bias = None if layer.bias is None else vectors[-1]
    projection = F.conv2d(
        _by_group(layer, _padded(layer, x)), kernels, bias, stride=layer.stride, dilation=layer.dilation
    )
    return _rows(layer, projection.reshape(len(x), -1, *projection.shape[2:]))


def postsynaptic(layer: GatedLayer, delta: Tensor) -> Tensor:
    """The gradient in a layer's output, one row for each of its input vectors.

    Returns:
        Shape (rows, out); (groups, rows, out / groups) of a grouped convolution.
    """
    return delta.reshape(-1, delta.shape[-1]) if isinstance(layer, nn.Linear) else _rows(layer, delta)


def along(layer: GatedLayer, vectors: Tensor) -> Tensor:
    """A layer's weights along each vector, W V: shape (out, r)."""
    bias = None if layer.bias is None else layer.bias.detach()
    return _along(layer.weight.detach(), bias, vectors)


def gradient_along(layer: GatedLayer, vectors: Tensor) -> Tensor:
    """And its gradient; no gradient is zeros."""
    weight, bias = layer.weight, layer.bias
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return _along(grad, None if bias is None else bias.grad, vectors)


def _along(weight: Tensor, bias: Tensor | None, vectors: Tensor) -> Tensor:
    if weight.dim() > 2:
        weight = weight.flatten(1)
    weight = weight.to(vectors.dtype)
    product = weight @ vectors[: weight.shape[1]]
    return product if bias is None else product.addr_(bias.to(vectors.dtype), vectors[-1])


def add_along(layer: GatedLayer, coordinates: Tensor, vectors: Tensor) -> None:
    """Moves a layer's weights by ``coordinates`` (out, r) along the vectors, in place: W + coordinates V^T."""
    inputs = layer.weight[0].numel()
    _add_product(layer.weight.detach(), coordinates, vectors[:inputs].T)
    if layer.bias is not None:
        _add_product(layer.bias.detach(), coordinates, vectors[-1])


def _add_product(rows: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> None:
    """beta * rows + alpha * a b, in place; rows (out, ...), or a vector (out,), of any type."""
    if rows.dtype == a.dtype and rows.dim() == 2:
        rows.addmm_(a, b, beta=beta, alpha=alpha)
    elif rows.dtype == a.dtype and rows.dim() == 1:
        rows.addmv_(a, b, beta=beta, alpha=alpha)
    else:
        rows.mul_(beta).add_((a @ b).view_as(rows), alpha=alpha)


def gate_gradient(layer: GatedLayer, held: Tensor, vectors: Tensor, open_rest: float = 1.0) -> None:
    """Takes ``held`` (out, r) along the vectors from a layer's gradient, in place: open_rest * grad - held V^T.

    A layer without a gradient is left alone.
    """
    grad = layer.weight.grad
    if grad is None:
        return
    _add_product(grad, held, vectors[: grad[0].numel()].T, beta=open_rest, alpha=-1)
    if layer.bias is not None and layer.bias.grad is not None:
        _add_product(layer.bias.grad, held, vectors[-1], beta=open_rest, alpha=-1)


def gated_gradient(grad: Tensor, held: Tensor, vectors: Tensor, open_rest: float) -> Tensor:
    """``open_rest * grad - held V^T`` for the gradient of a layer's weight (out, ...) or bias (out,)."""
    grad = grad.clone()
    rows = vectors[: grad[0].numel()].T if grad.dim() > 1 else vectors[-1]
    _add_product(grad, held, rows, beta=open_rest, alpha=-1)
    return grad


def add_to_gradient(layer: GatedLayer, rows: Tensor, weight: Tensor) -> None:
    """Adds weight (0-dim) times (rows, d) to the gradient of the layer's first output units, in place.

    No gradient is left alone.
    """
    grad = layer.weight.grad
    if grad is None:
        return
    grad = grad[: len(rows)]
    grad.addcmul_(rows[:, : grad[0].numel()].view_as(grad), weight.to(grad))
    if layer.bias is not None and layer.bias.grad is not None:
        layer.bias.grad[: len(rows)].addcmul_(rows[:, -1], weight.to(grad))


def drift_from(layer: GatedLayer, rows: Tensor) -> Tensor:
    """How far its first output units' weights are from such (rows, d), in place of these."""
    weight = layer.weight.detach()[: len(rows)].flatten(1)
    rows.neg_()[:, : weight.shape[1]].add_(weight)
    if layer.bias is not None:
        rows[:, -1].add_(layer.bias.detach()[: len(rows)])
    return rows


def weights_and_bias(layer: GatedLayer) -> Tensor:
    """A copy of a layer's weights in the coordinates of its input vectors: shape (out, d), float32."""
    weight = layer.weight.detach().flatten(1).float()
    return weight.clone() if layer.bias is None else torch.cat([weight, layer.bias.detach().float().unsqueeze(1)], 1)


def set_weights(layer: GatedLayer, rows: Tensor) -> None:
    """Puts such weights (rows, d) into the layer's first output units, in place."""
    inputs = layer.weight[0].numel()
    layer.weight.detach()[: len(rows)].copy_(rows[:, :inputs].view(-1, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias.detach()[: len(rows)].copy_(rows[:, -1])


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    padding = layer._reversed_padding_repeated_twice  # for every way to give it, "same" too
    if not any(padding):
        return x
    return F.pad(x, padding, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _by_group(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(n, channels, h, w) to (n * groups, channels / groups, h, w)."""
    return x.reshape(-1, layer.in_channels // layer.groups, *x.shape[2:])


def _rows(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    """Feature maps (n, groups * c, h, w) to rows (n * h * w, c), a leading dimension for groups if there are any."""
    rows = maps.reshape(len(maps), layer.groups, -1, maps[0, 0].numel()).permute(1, 0, 3, 2)
    rows = rows.reshape(layer.groups, -1, rows.shape[-1])
    return rows if layer.groups > 1 else rows[0]
