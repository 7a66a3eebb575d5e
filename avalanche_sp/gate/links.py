"""The function that makes a network's outputs from its last layer's, such as a softmax."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
Link = Callable[[Tensor], Tensor]
LINKS = (partial(F.log_softmax, dim=1), partial(F.softmax, dim=1), torch.sigmoid, F.logsigmoid)
_MASKED = -1000.0  # an output that is none, as in Avalanche's incremental heads


def unlinked(made: Tensor, outputs: Tensor, known: Link | None = None) -> tuple[Tensor, Link | None]:
    """A network's outputs before the function that makes them from a layer's, and that function.

    Args:
        made: the layer's outputs (n, out).
        outputs: the network's, (n, out), (n, k) of its first k units, or (n,) of a single unit.
        known: the function, if other samples have told; it is tried first.

    Returns:
        ``made`` and one of ``LINKS``, a multiple, the removal of the single unit's dimension, an affine function of
        each unit, or the first units, of which all others are masked; ``outputs`` and None if no unit needs one, or
        none is known.
    """
    if outputs.dim() == 1 and made.shape == (len(outputs), 1) and torch.equal(made[:, 0], outputs):
        return made.detach(), partial(torch.squeeze, dim=1)
    if made.dim() != 2 or outputs.dim() != 2 or len(made) != len(outputs) or made.shape[1] < outputs.shape[1]:
        return outputs, None
    made, outputs = made.detach(), outputs.detach()
    if made.shape != outputs.shape:
        first = partial(torch.narrow, dim=1, start=0, length=outputs.shape[1])
        if not torch.equal(first(made), outputs):
            return outputs, None
        return torch.cat([outputs, torch.full_like(made[:, outputs.shape[1] :], _MASKED)], 1), first
    if (outputs == made).all(0).any():
        return outputs, None
    scale = partial(torch.mul, (made * outputs).sum() / made.square().sum())
    candidates: list[Link | None] = [known, *LINKS, scale, _affine(made, outputs) if len(made) > 2 else None]
    link = next((f for f in candidates if f is not None and close(f(made), outputs).all()), None)
    return (outputs if link is None else made), link


def close(one: Tensor, other: Tensor) -> Tensor:
    """Whether outputs are the same, to rounding."""
    return torch.isclose(one, other, rtol=1e-3, atol=1e-4)


def _affine(made: Tensor, outputs: Tensor) -> Link:
    """The function of each unit, a x + b, that is nearest to the outputs of several samples."""
    deviations = made - made.mean(0)
    slope = (deviations * outputs).sum(0) / deviations.square().sum(0)
    slope = torch.where(slope.isfinite() & (slope != 0), slope, 1.0)
    shift = outputs.mean(0) - slope * made.mean(0)
    return lambda x: slope * x + shift


def in_dtype(criterion: Criterion, dtype: torch.dtype) -> Criterion:
    """A loss module with its floating-point tensors, such as class weights, in a precision; another loss as it is."""
    if not isinstance(criterion, nn.Module) or all(
        t.dtype == dtype for t in (*criterion.parameters(), *criterion.buffers()) if t.is_floating_point()
    ):
        return criterion
    return deepcopy(criterion).to(dtype)


def linked(criterion: Criterion, link: Link | None) -> Criterion:
    """The loss of (the readout's outputs, targets)."""
    return criterion if link is None else lambda outputs, targets: criterion(link(outputs), targets)


def units_of(outputs: Tensor, targets: Tensor, link: Link | None) -> int:
    """Number of a network's output units, from its outputs before a link.

    They stand in the second dimension if each of their places has a class label.
    """
    outputs = outputs if link is None else link(outputs)
    if outputs.dim() > 2 and targets.shape == (len(outputs), *outputs.shape[2:]):
        return outputs.shape[1]
    return outputs.shape[-1] if outputs.dim() > 1 else 1


@torch.enable_grad()
def with_gradient(loss: Callable[[Tensor], Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient at these weights."""
    weights = weights.detach().requires_grad_()
    value = loss(weights)
    return value.detach(), torch.autograd.grad(value, weights)[0]
