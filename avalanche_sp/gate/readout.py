"""The readout's Newton step: the last layer moves to the minimum of the old and the new loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_sp.gate.functional import newton_step
from avalanche_sp.gate.layers import GatedLayer, along, set_weights, weights_and_bias
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.settings import Settings

__all__ = ["ReadoutLoss", "solve_readout"]


@dataclass
class ReadoutLoss:
    """A loss in the readout's weights, quadratic in its outputs, measured on samples.

    Attributes:
        layer: the readout's name.
        gradient: of its mean over samples in the weights, and bias if there is one: shape (out, d).
        moment: the mean second moment of the readout's input vectors, shape (d, d).
        curvature: of the loss in the outputs, 0-dim.
        wanted: the mean squared norm of the outputs at its minimum, 0-dim.
        weight: number of samples that it stands for.
    """

    layer: str
    gradient: Tensor
    moment: Tensor
    curvature: Tensor
    wanted: Tensor
    weight: float


@torch.no_grad()
def solve_readout(
    layer: GatedLayer,
    losses: Sequence[ReadoutLoss],
    old: LayerMemory | None,
    old_curvature: Tensor,
    settings: Settings,
    trust: float = 0.0,
    damping: float | None = None,
) -> Tensor:
    r"""Takes one damped Newton step on all losses and the quadratic of the old loss, in place.

    The quadratic is that of the penalty, with the gradient that remained at consolidation:

    .. math::
        \sum_i N_i L_i(W) + (1 - t) N_{old} \Big(\langle R, W - W^* \rangle
        + \tfrac{2 \kappa}{2} \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big)\Big)

    The step is scaled by s. Let q be the decrease of the samples' losses by the whole step, to first order and halved,
    in units of the loss of zero outputs. Then

    .. math::
        s = t + (1 - t) \min(1, q / 0.05)

    The whole step is the limit of gate and penalty for the last layer: for squared error, without damping and with
    inputs that do not move, it is recursive least squares (``docs/theory.md``, 4e).

    Args:
        layer: the network's last, a linear one.
        losses: the present experience's first, then those of stored samples, for t of the old loss.
        old: the layer's memory; None takes no step.
        old_curvature: of the loss at consolidation, 0-dim.
        settings: the constants.
        trust: t, the share of the old loss that stored samples stand for, 0 to 1.
        damping: of the step, in units of the Hessian's mean eigenvalue. Default: ``settings.readout_damping``.

    Returns:
        R, the mean gradient of old and new loss that remains: shape (out, d).
    """
    damping = settings.readout_damping if damping is None else damping
    kind = losses[0].gradient.dtype
    shown = torch.stack([loss.weight * loss.gradient.double() for loss in losses]).sum(0)
    hessian = torch.stack([loss.weight * loss.curvature * loss.moment.double() for loss in losses]).sum(0)
    total = sum(loss.weight for loss in losses)
    if old is None:
        return (shown / total).to(kind)
    kept = (1 - trust) * old.samples
    vectors, weight = old.vectors.double(), settings.readout_old * old_curvature * kept
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
    step *= trust + (1 - trust) * (gain / settings.readout_whole).clamp(0, 1)
    set_weights(layer, weights_and_bias(layer) + step.to(kind))
    return ((gradient + step @ hessian) / (total + kept)).to(kind)
