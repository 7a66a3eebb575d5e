"""The readout, settled: the network's last layer at the best that its inputs, old and new, allow."""

from __future__ import annotations

import torch
from torch import Tensor

from avalanche_sp.activity import LayerActivity
from avalanche_sp.gates import newton_step
from avalanche_sp.layers import GatedLayer, along, set_weights, weights_and_bias

__all__ = ["settle"]

# How hard the old loss's quadratic holds, against its own: the network that makes its inputs has moved since.
_OLD_WEIGHT = 2


@torch.no_grad()
def settle(
    layer: GatedLayer,
    gradient: Tensor,
    moment: Tensor,
    samples: int,
    curvature: Tensor,
    old: LayerActivity | None,
    old_curvature: Tensor,
    damping: float = 0.05,
) -> Tensor:
    r"""Takes one damped Newton step on the new loss and the quadratic that stands for the old one, in place.

    The quadratic is that of the pull-back, with the gradient that was left where it was made:

    .. math::
        N_{new} L_{new}(W) + N_{old} \Big(\langle R, W - W^* \rangle
        + \tfrac{2 \kappa}{2} \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big)\Big)

    It is the limit of gate and pull-back for a layer that nothing follows: for squared error, undamped and with inputs
    that don't move, recursive least squares (``docs/theory.md``, 4e).

    Args:
        layer: the network's last, a linear one.
        gradient: of an experience's mean loss in its weights, and bias if it has one: shape (out, d).
        moment: the mean second moment of its input vectors there, shape (d, d).
        samples: how many the experience has.
        curvature: the loss's in the outputs, 0-dim.
        old: what was consolidated; None takes no step.
        old_curvature: the loss's then, 0-dim.
        damping: of the step, in units of the Hessian's mean eigenvalue.

    Returns:
        R, the mean gradient that is left, of old and new loss: shape (out, d).
    """
    if old is None:
        return gradient
    kind, gradient, hessian = gradient.dtype, samples * gradient.double(), samples * curvature * moment.double()
    vectors, weight = old.vectors.double(), _OLD_WEIGHT * old_curvature * old.samples
    n = len(old.anchor)  # fewer output units than now where a head has grown
    drift = (along(layer, old.vectors)[:n] - old.anchor).double()
    gradient[:n] += weight * (drift * old.eigenvalues) @ vectors.T
    if old.residual is not None:
        gradient[:n] += old.samples * old.residual
    beyond = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device) - vectors @ vectors.T
    hessian += weight * ((vectors * old.eigenvalues) @ vectors.T + old.rest * beyond)
    step = newton_step(gradient, hessian, damping)
    set_weights(layer, weights_and_bias(layer) + step.to(kind))
    return ((gradient + step @ hessian) / (samples + old.samples)).to(kind)
