"""The readout, settled: the network's last layer at the best that its inputs, old and new, allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_sp.activity import LayerActivity
from avalanche_sp.gates import newton_step
from avalanche_sp.layers import GatedLayer, along, set_weights, weights_and_bias

__all__ = ["ReadoutLoss", "settle"]

# How hard the old loss's quadratic holds, against its own: the network that makes its inputs has moved since.
_OLD_WEIGHT = 2
# The step is taken whole where it would lower the samples' losses by this share of what silent outputs would cost, and
# in proportion where by less. What it gains there is known; what the quadratic promises isn't.
_WHOLE = 0.05


@dataclass
class ReadoutLoss:
    """A loss in the readout's weights, quadratic in its outputs, as samples show it.

    Attributes:
        gradient: of its mean over samples in the weights, and bias if there is one: shape (out, d).
        moment: the mean second moment of the readout's input vectors, shape (d, d).
        curvature: of the loss in the outputs, 0-dim.
        wanted: the mean squared norm of the outputs that it would have, 0-dim.
        weight: how many samples it stands for.
    """

    gradient: Tensor
    moment: Tensor
    curvature: Tensor
    wanted: Tensor
    weight: float


@torch.no_grad()
def settle(
    layer: GatedLayer,
    losses: Sequence[ReadoutLoss],
    old: LayerActivity | None,
    old_curvature: Tensor,
    trust: float = 0.0,
    damping: float = 0.05,
) -> Tensor:
    r"""Takes one damped Newton step on all losses and the quadratic that stands for the old one, in place.

    The quadratic is that of the pull-back, with the gradient that was left where it was made:

    .. math::
        \sum_i N_i L_i(W) + (1 - t) N_{old} \Big(\langle R, W - W^* \rangle
        + \tfrac{2 \kappa}{2} \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big)\Big)

    It goes s of the way, as far as the samples need it: q is what the whole step would take away of their losses, to
    first order and halved, as Newton steps gain, in units of what outputs of zero would cost, and

    .. math::
        s = t + (1 - t) \min(1, q / 0.05)

    Whole, it is the limit of gate and pull-back for a layer that nothing follows: for squared error, undamped and with
    inputs that don't move, recursive least squares (``docs/theory.md``, 4e).

    Args:
        layer: the network's last, a linear one.
        losses: the present experience's first; stored samples', for t of the old ones.
        old: what was consolidated; None takes no step.
        old_curvature: the loss's then, 0-dim.
        trust: t, how much of the old loss stored samples stand for, 0 to 1.
        damping: of the step, in units of the Hessian's mean eigenvalue.

    Returns:
        R, the mean gradient that is left, of old and new loss: shape (out, d).
    """
    kind = losses[0].gradient.dtype
    shown = torch.stack([loss.weight * loss.gradient.double() for loss in losses]).sum(0)
    hessian = torch.stack([loss.weight * loss.curvature * loss.moment.double() for loss in losses]).sum(0)
    total = sum(loss.weight for loss in losses)
    if old is None:
        return (shown / total).to(kind)
    kept = (1 - trust) * old.samples
    vectors, weight = old.vectors.double(), _OLD_WEIGHT * old_curvature * kept
    n = len(old.anchor)  # fewer output units than now where a head has grown
    drift = (along(layer, old.vectors)[:n] - old.anchor).double()
    gradient = shown.clone()
    gradient[:n] += weight * (drift * old.eigenvalues) @ vectors.T
    if old.residual is not None:
        gradient[:n] += kept * old.residual
    beyond = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device) - vectors @ vectors.T
    hessian += weight * ((vectors * old.eigenvalues) @ vectors.T + old.rest * beyond)
    step = newton_step(gradient, hessian, damping)
    silent = torch.stack([loss.weight * loss.curvature * loss.wanted for loss in losses]).sum()
    gain = -(shown * step).sum() / silent.clamp_min(torch.finfo(kind).tiny)
    step *= trust + (1 - trust) * (gain / _WHOLE).clamp(0, 1)
    set_weights(layer, weights_and_bias(layer) + step.to(kind))
    return ((gradient + step @ hessian) / (total + kept)).to(kind)
