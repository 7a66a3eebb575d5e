"""The readout: the last layer, moved to the minimum of the old and the new loss at the end of an experience.

The old loss is known in two ways: on pseudo-samples with the old classes' means and covariances, and as its quadratic
at consolidation. If the experience brings new classes, the user's loss is minimised on pseudo-samples
(:class:`ReadoutProblem`); if it does not, on both. A loss that is quadratic itself takes a Newton step then
(:func:`newton_readout`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avalanche_sp.gate.classes import ReadoutSamples, class_means
from avalanche_sp.gate.functional import loss_derivatives, newton_step
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.links import Criterion, in_dtype, linked, units_of, with_gradient
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.pseudo_samples import PseudoSamples, extended
from avalanche_sp.gate.settings import Settings

_RIDGES = 4.0, 16.0, 64.0, 256.0  # factors of the ridge, where the one of the settings tells too little of new samples
_LOST = 0.5  # share of the present weights' gain over outputs of zero, at most, that a solution may lose


@dataclass
class ReadoutLoss:
    """A loss in the readout's weights, quadratic in its outputs, measured on samples.

    Attributes:
        layer: the readout's name.
        gradient: of its mean over samples in the weights, and bias if there is one: shape (out, d).
        inputs: the readout's input vectors (n, d), or others of the same second moment.
        curvature: of the loss in the outputs, 0-dim.
        wanted: the mean squared norm of the outputs at its minimum, 0-dim.
        weight: number of samples that it stands for.
    """

    layer: str
    gradient: Tensor
    inputs: Tensor
    curvature: Tensor
    wanted: Tensor
    weight: float

    @property
    def moment(self) -> Tensor:
        """The mean second moment of the input vectors, shape (d, d); large, so it is made only where it is needed."""
        return self.inputs.T @ self.inputs / len(self.inputs)


@torch.no_grad()
def newton_readout(
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
    drift = (layer.along(old.vectors)[:n] - old.anchor).double()
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
    layer.set_weights(layer.weights_and_bias() + step.to(kind))
    return ((gradient + step @ hessian) / (total + kept)).to(kind)


def old_quadratic(memory: LayerMemory, present: Tensor, curvature: Tensor) -> Callable[[Tensor], Tensor]:
    r"""The old loss of a readout's weights W (out, d), without its constant, as a quadratic about those remembered.

    .. math:: \tfrac{\kappa}{2} \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big)

    Args:
        memory: of the readout.
        present: weights (out, d), which stand for :math:`W^*` along directions that are not kept.
        curvature: :math:`\kappa`, 0-dim.
    """
    n, anchor = len(memory.anchor), present.clone()  # fewer output units than now where a head has grown
    anchor[:n] += (memory.anchor - memory.along(present[:n])) @ memory.vectors.T
    return lambda weights: 0.5 * curvature * memory.mean_square(weights - anchor)


def _outputs(inputs: Tensor, weights: Tensor, masked: Tensor) -> Tensor:
    """The network's outputs (n, out) from the readout's inputs (n, d) and weights (out, d)."""
    return torch.where(masked.isnan(), inputs @ weights.T, masked)


@dataclass(frozen=True)
class ReadoutProblem:
    r"""The weights W that minimise the loss on new samples and on the memory's classes.

    .. math::
        \min_W \; \frac{N_{new} L(X W^\top, y) + N_{old} \big((1 - t) (r L(X_{old} W^\top, y_{old}) + (1 - r) Q(W))
        + t L(X_{stored} W^\top, y_{stored})\big)}{N_{new} + N_{old}}
        + r \frac{\epsilon \kappa \bar\lambda}{2} \lVert W \rVert^2

    The old classes' X are pseudo-samples; :math:`\kappa` is the loss's curvature at outputs of zero. For a loss without
    curvature, such as a hinge, it is that of :func:`curvature_to_zero`.

    Attributes:
        present: the readout's weights, and bias if there is one: shape (out, d).
        new: samples of the experience.
        old: pseudo-samples of the old classes; None for a new task's head.
        merged: the memory with the experience.
        criterion: of (the network's outputs, class labels), a mean over samples.
        settings: the constants.
        stored: stored samples of the old classes.
        trust: t, the share of the old loss that they stand for, 0 to 1; 0 without.
        quadratic: Q, the old loss as a function of W (:func:`old_quadratic`); None if ``told`` is 1.
        told: r, the share of the rest that pseudo-samples tell (:func:`~avalanche_sp.gate.classes.told_by_classes`).
    """

    present: Tensor
    new: ReadoutSamples
    old: PseudoSamples | None
    merged: LayerMemory
    criterion: Criterion
    settings: Settings
    stored: Sequence[ReadoutSamples] = ()
    trust: float = 0.0
    quadratic: Callable[[Tensor], Tensor] | None = None
    told: float = 1.0

    @property
    def linked_criterion(self) -> Criterion:
        """The loss of (the readout's outputs, class labels)."""
        return linked(in_dtype(self.criterion, self.new.inputs.dtype), self.new.link)

    @torch.no_grad()
    def solution(self, ridge_factor: float = 1.0) -> Tensor | None:
        r"""The minimum, by L-BFGS.

        It is sought along the leading eigenvectors of all inputs and the remainders of the class means
        (:func:`~avalanche_sp.gate.pseudo_samples.extended`), in coordinates in which the second moment is the identity.
        It starts at the present weights, or at a Newton step from zero with the curvature :math:`\kappa` where the loss
        is lower there. For squared error and all eigenvectors the solution is the ridge regression on all data, if the
        old inputs have not moved. It does not depend on the optimizer, its learning rate or the number of its steps.

        Args:
            ridge_factor: of :math:`\epsilon` (:meth:`held_out_ridge`).

        Returns:
            Weights (out, d). None if the loss has no gradient at outputs of zero, or if the solution loses more than
            half of the present weights' gain over outputs of zero: the curvature at zero says too little of such a
            loss, for instance of a distance.
        """
        new, old, merged, told, settings = self.new, self.old, self.merged, self.told, self.settings
        share = 1 - int(new.weight) / merged.samples
        means, counts = class_means(new)
        shares = (1 - share) * counts / new.weight
        if old is not None:
            old_means, old_shares = old.means
            means, shares = torch.cat([means, old_means]), torch.cat([shares, share * old_shares])
        values, vectors = extended(merged, means, shares, new)
        ridge = ridge_factor * settings.solve_ridge * merged.eigenvalues.sum() / len(vectors)
        scale = (values + ridge).clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
        white = vectors * scale  # W = units white^T
        parts = [(new.inputs @ white, new.targets, 1 - share)]
        if old is not None:
            parts.append((old.coordinates @ (old.axes @ white), old.targets, share * (1 - self.trust) * told))
        total = sum(samples.weight for samples in self.stored)
        parts += [(s.inputs @ white, s.targets, share * self.trust * s.weight / total) for s in self.stored]
        zeros, criterion = torch.zeros_like(self.present), self.linked_criterion
        curvature = curvature_at(zeros, new, self.criterion)
        if not curvature > 0:  # piecewise linear, as a hinge
            curvature = curvature_to_zero(new.inputs @ zeros.T, new.targets, criterion)
        if not curvature > 0:  # nothing bounds the weights
            return None

        def size(units: Tensor) -> Tensor:
            return 0.5 * told * curvature * ridge * (units * scale).square().sum()

        def loss(units: Tensor) -> Tensor:
            value = size(units)
            if self.quadratic is not None:
                value = value + share * (1 - self.trust) * (1 - told) * self.quadratic(units @ white.T)
            return value + sum(weight * criterion(_outputs(x, units, new.masked), y) for x, y, weight in parts)

        present = self.present @ vectors / scale
        nothing = torch.zeros_like(present)
        at_nothing, gradient = with_gradient(loss, nothing)
        newton, at_present = -gradient / curvature, loss(present)
        before = at_present - size(present)
        units = newton if loss(newton) < at_present else present
        # In units in which the curvature is one, and the loss of zero outputs, or the gain that a Newton step promises.
        height = torch.maximum(at_nothing.abs(), gradient.square().sum() / (2 * curvature))
        height = torch.where(height > 0, height, curvature)  # zero may be the minimum
        unit = (height / curvature).sqrt()
        point = (units / unit).requires_grad_()
        search = torch.optim.LBFGS(
            [point],
            max_iter=settings.solve_steps,
            tolerance_grad=0.0,
            tolerance_change=settings.solve_tolerance * (1 - share),
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            value, slope = with_gradient(loss, point * unit)
            point.grad = slope * (unit / height)
            return value / height

        search.step(closure)
        units = point.detach() * unit
        weights = units @ white.T
        lost = loss(units) - size(units) - before
        if not weights.isfinite().all() or lost > _LOST * (at_nothing - before).clamp_min(0):
            return None
        return weights

    @torch.no_grad()
    def held_out_ridge(self) -> float:
        """The factor of the ridge with which half of the new samples tell the other half.

        A solution of few samples, or of ones with wrong labels or with augmented inputs, can tell these and no others.
        The solution of one half gains on both, over outputs of zero. If the other half's gain is less than the share
        ``solve_held_out`` of its own, larger ridges are tried until one gains less. The least one is chosen that gains
        this share of the most.

        Returns:
            1 for the ridge of the settings, also if there is no solution.
        """
        new, share, criterion = self.new, self.settings.solve_held_out, self.linked_criterion
        if len(new.targets) < 2:
            return 1.0
        order = new.targets.argsort(stable=True)  # each half has each class
        parts = order[::2], order[1::2]
        halves = [replace(new, inputs=new.inputs[rows], targets=new.targets[rows]) for rows in parts]

        def loss(weights: Tensor, half: ReadoutSamples) -> float:
            return float(criterion(_outputs(half.inputs, weights, half.masked), half.targets))

        gains, most = dict[float, float](), -math.inf
        at_nothing = [loss(torch.zeros_like(self.present), half) for half in halves]
        for factor in (1.0, *_RIDGES):
            weights = replace(self, new=halves[0]).solution(factor)
            if weights is None:
                break
            own, other = (nothing - loss(weights, half) for nothing, half in zip(at_nothing, halves))
            if other < most:
                break
            gains[factor] = most = other
            if factor == 1 and (own <= 0 or other >= share * own):
                break
        least = most - (1 - share) * abs(most)  # all may lose
        return next((factor for factor, gain in gains.items() if gain >= least), 1.0)


@torch.enable_grad()
def curvature_at(weights: Tensor, samples: ReadoutSamples, criterion: Criterion) -> Tensor:
    """Mean curvature of a loss in the outputs of a readout with these weights (out, d), 0-dim."""
    outputs = (samples.inputs @ weights.T).requires_grad_()
    loss = linked(in_dtype(criterion, outputs.dtype), samples.link)(outputs, samples.targets)
    return loss_derivatives(outputs, loss, units_of(outputs, samples.targets, samples.link))[1]


def curvature_to_zero(outputs: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
    r"""Curvature of the quadratic that falls from a loss to zero along its gradient, 0-dim.

    .. math:: \frac{1}{n} \sum_i \lVert g_i \rVert^2 / (2 L)

    The step to its minimum is B. Polyak's (Introduction to Optimization, 1987). A squared error has this curvature.

    Args:
        outputs: (n, out), at which the loss is L and has the gradient g of each sample.
        targets, criterion: a mean over samples.
    """
    loss, gradient = with_gradient(lambda z: criterion(z, targets), outputs)
    return torch.nan_to_num(gradient.square().sum() * len(outputs) / (2 * loss), nan=0.0, posinf=0.0)
