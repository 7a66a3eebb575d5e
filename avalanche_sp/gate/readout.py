"""The readout: the last layer, moved to the minimum of the old and the new loss at the end of an experience.

The old loss is known in two ways: on pseudo-samples with the old classes' means and covariances, and as its quadratic
at consolidation. If the experience brings new classes, the user's loss is minimised on pseudo-samples
(:func:`solve_readout`); if it does not, on both. A loss that is quadratic itself takes a Newton step then
(:func:`newton_readout`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_sp.gate.functional import leading_eigenpairs, loss_derivatives, newton_step
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.settings import Settings

Criterion = Callable[[Tensor, Tensor], Tensor]
Link = Callable[[Tensor], Tensor]
_MASKED = -1000.0  # an output that is none, as in Avalanche's incremental heads
_RIDGES = 4.0, 16.0, 64.0, 256.0  # factors of the ridge, where the one of the settings tells too little of new samples
_LOST = 0.5  # share of the present weights' gain over outputs of zero, at most, that a solution may lose
LINKS = (partial(F.log_softmax, dim=1), partial(F.softmax, dim=1), torch.sigmoid, F.logsigmoid)


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


@dataclass(frozen=True)
class ReadoutSamples:
    """Inputs of the readout and their classes.

    Attributes:
        layer: the readout's name.
        inputs: input vectors, shape (n, d).
        targets: class labels, shape (n,), integers.
        masked: (out,), the network's outputs for the units that it masks, NaN for all others.
        weight: number of samples that they stand for.
        link: makes the network's outputs from the readout's (n, out), as a softmax does; None if they are the same.
    """

    layer: str
    inputs: Tensor
    targets: Tensor
    masked: Tensor
    weight: float
    link: Link | None = None


def class_sums(samples: ReadoutSamples) -> tuple[Tensor, Tensor]:
    """Sums of the input vectors by class (out, d), and numbers of samples (out,), scaled to the samples' weight."""
    scale, units = samples.weight / len(samples.inputs), len(samples.masked)
    sums = samples.inputs.new_zeros(units, samples.inputs.shape[1]).index_add_(0, samples.targets, samples.inputs)
    counts = torch.bincount(samples.targets, minlength=units).to(sums)
    return sums * scale, counts * scale


def class_means(samples: ReadoutSamples) -> tuple[Tensor, Tensor]:
    """Means of the input vectors by class (out, d), zero without samples, and numbers of samples as above (out,)."""
    sums, counts = class_sums(samples)
    return sums / counts.clamp_min(torch.finfo(counts.dtype).tiny).unsqueeze(1), counts


def class_roots(samples: ReadoutSamples, old: LayerMemory | None, settings: Settings) -> Tensor:
    r"""Rows whose second moment is the leading part of each class's covariance, over old and new samples.

    A class's covariance over both is the mean of both covariances and :math:`s (1 - s) m m^\top`, with s the share of
    the old samples and m the difference of the two means.

    Args:
        samples: of an experience.
        old: the readout's memory; None before the first.

    Returns:
        Shape (out, k, d), in half precision (bfloat16); zeros for classes that have not come.
    """
    units, d = len(samples.masked), samples.inputs.shape[1]
    rank = min(settings.class_rank, settings.class_vectors // units)
    roots = torch.zeros(units, rank, d, dtype=torch.bfloat16, device=samples.inputs.device)
    sums, counts = samples.inputs.new_zeros(units, d), samples.inputs.new_zeros(units)
    if old is not None and old.class_roots is not None and old.class_sums is not None and old.class_counts is not None:
        roots[: len(old.class_roots)] = old.class_roots[:, :rank]
        sums[: len(old.class_sums)], counts[: len(old.class_counts)] = old.class_sums, old.class_counts
    if not rank:
        return roots
    scale = samples.weight / len(samples.inputs)
    for label in samples.targets.unique().tolist():
        x = samples.inputs[samples.targets == label]
        mean, rows = x.mean(0), [(x - x.mean(0)) / len(x) ** 0.5]
        before = counts[label]
        if before > 0:
            share = before / (before + scale * len(x))
            shift = sums[label] / before - mean
            rows = [
                rows[0] * (1 - share).sqrt(),
                roots[label].to(x) * share.sqrt(),
                shift.unsqueeze(0) * (share * (1 - share)).sqrt(),
            ]
        values, vectors = leading_eigenpairs(torch.cat(rows), rank)
        roots[label].zero_()[: len(values)] = (vectors * values.sqrt()).T.flip(0)
    return roots


@dataclass(frozen=True)
class PseudoSamples:
    """Input vectors that stand for those of old classes: ``coordinates @ axes``.

    Attributes:
        coordinates, axes: shapes (n, k) and (k, d).
        targets: class labels, shape (n,), integers.
    """

    coordinates: Tensor
    axes: Tensor
    targets: Tensor

    @property
    def inputs(self) -> Tensor:
        """The input vectors (n, d)."""
        return self.coordinates @ self.axes

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of the classes there are (classes, d), and their shares of the samples (classes,)."""
        _, places, counts = self.targets.unique(return_inverse=True, return_counts=True)
        sums = self.axes.new_zeros(len(counts), len(self.axes)).index_add_(0, places, self.coordinates)
        return sums / counts.unsqueeze(1) @ self.axes, counts / len(self.targets)

    def moved(self, drift: Callable[[Tensor], Tensor]) -> PseudoSamples:
        """The same after a linear drift, which moves input vectors (m, d)."""
        return replace(self, axes=drift(self.axes))


def extended(memory: LayerMemory, means: Tensor, shares: Tensor, seen: ReadoutSamples) -> tuple[Tensor, Tensor]:
    r"""Directions in which classes can be told apart: a memory's eigenvectors, and the remainders of the class means.

    The remainder of a class mean is its part outside of the eigenvectors' span. The principal directions of all
    remainders are taken. A memory knows no variance within classes along them. It is measured on present samples, on
    average over these directions. If each sample has a class of its own, the mean of the eigenvalues that are not kept
    stands for it. Directions in which the means differ by less than the standard error of the mean of all samples are
    left out.

    Args:
        memory: of a layer.
        means, shares: of classes, shapes (classes, d) and (classes,).
        seen: samples of the layer's inputs.

    Returns:
        Second moments along the directions (k,), eigenvectors first, and the directions (d, k).
    """
    values, vectors = memory.eigenvalues, memory.vectors
    if memory.is_complete:
        return values, vectors
    remainders = (means - (means @ vectors) @ vectors.T) * shares.sqrt().unsqueeze(1)
    _, between, beyond = torch.linalg.svd(remainders, full_matrices=False)
    many = min(len(beyond), len(vectors) - len(values))
    between, beyond = between[:many].square(), beyond[:many].T
    beyond = beyond - vectors @ (vectors.T @ beyond)  # small remainders are not orthogonal to the vectors: rounding
    centers, counts = class_means(seen)
    n = len(seen.inputs)
    free = n - int((counts > 0).sum())
    within = ((seen.inputs - centers[seen.targets]) @ beyond).square().sum() / (free * many) if free else memory.rest
    beyond = beyond * (between > within / n)
    return torch.cat([values, within + between]), torch.cat([vectors, beyond], 1)


def pseudo_samples(memory: LayerMemory, least: int, seen: ReadoutSamples) -> PseudoSamples:
    r"""Input vectors with the class means and covariances of a readout's memory.

    With the second moment :math:`C`, class means :math:`\mu_c`, class roots :math:`R_c` and shares :math:`p_c`, a
    class's covariance is :math:`R_c^\top R_c + S`. All classes share S:

    .. math:: S = C - \sum_c p_c (\mu_c \mu_c^\top + R_c^\top R_c)

    The vectors have these means and covariances exactly, along the memory's eigenvectors. Along the remainders of the
    means the variance is that of :func:`extended`. All other directions are left out. So a quadratic loss, for which
    the sum over classes is enough, is exact if the memory keeps all eigenvectors. Without class roots it is the model
    of linear discriminant analysis, and between that and quadratic discriminant analysis with them (compare J. H.
    Friedman: Regularized discriminant analysis, JASA 1989).

    Args:
        memory: of a readout, with class sums.
        least: number of vectors, at least; two for each direction of a covariance are made in any case, and one more
            for each class and direction of its own.
        seen: present samples of the layer's inputs.
    """
    assert memory.class_sums is not None and memory.class_counts is not None
    classes = memory.class_counts.nonzero().flatten()
    counts = memory.class_counts[classes]
    share, means = counts / counts.sum(), memory.class_sums[classes] / counts.unsqueeze(1)
    moments, span = extended(memory, means, share, seen)
    roots = span.new_zeros(len(classes), 0, span.shape[1])
    if memory.class_roots is not None:
        roots = memory.class_roots[classes].to(span) @ span
    centers = (means @ span).double()
    own = (roots * share.sqrt()[:, None, None]).flatten(0, 1).double()
    shared = moments.double().diag() - (centers.T * share) @ centers - own.T @ own
    values, vectors = torch.linalg.eigh(shared)
    root, k = vectors * values.clamp_min(0).sqrt(), roots.shape[1]
    least = max(least, 2 * (len(root) + len(own)) + len(classes) * (k + 1))  # each class loses k + 1 dimensions
    number = (share * least).round().long().clamp_min(k + 2)
    which = torch.repeat_interleave(torch.arange(len(classes), device=number.device), number)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(which), k + len(root), generator=generator).to(means)
    coordinates = centers.to(means)[which]
    for part, drawn, seen in zip(coordinates.split(number.tolist()), noise.split(number.tolist()), roots):
        # The class's own noise has unit covariance. Both noises have zero mean, and no covariance with each other.
        frame = torch.linalg.qr(torch.cat([torch.ones_like(drawn[:, :1]), drawn[:, :k]], 1)).Q
        part += frame[:, 1:] @ seen * len(drawn) ** 0.5
        drawn -= frame @ (frame.T @ drawn)
    noise = noise[:, k:]
    # N^T N / n = S S^T: the noise N S^-T has unit covariance, and still zero mean in each class.
    unit = torch.linalg.cholesky((noise.T @ noise / len(noise)).double())
    colour = torch.linalg.solve_triangular(unit.mT, root.mT, upper=True)
    return PseudoSamples(coordinates.addmm_(noise, colour.to(means.dtype)), span.T, classes[which])


def drift_map(before: Tensor, after: Tensor, basis: Tensor, settings: Settings) -> Callable[[Tensor], Tensor]:
    r"""How the inputs of a readout have moved: a linear map D, learned on samples.

    .. math:: D = B (B^\top X^\top X B + \epsilon \bar\lambda I)^{-1} B^\top X^\top (X' - X)

    As linear drift compensation (A. Gomez-Villa et al., ECCV 2024), in the leading eigenspace of the inputs.

    Args:
        before, after: X and X', the inputs (n, d) of the same samples before and after training.
        basis: B, orthonormal, shape (d, k).

    Returns:
        The function of other inputs x, or of their means or eigenvectors, (m, d): the changes x D, (m, d).
    """
    ridge = settings.drift_ridge * before.square().sum().double() / len(basis)
    inputs = before @ basis
    gram = (inputs.T @ inputs).double()
    gram.diagonal().add_(ridge.clamp_min(torch.finfo(before.dtype).tiny))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).to(before.dtype)
    moved = inverse @ (inputs.T @ (after - before))
    return lambda rows: (rows @ basis) @ moved


def agreement(targets: Tensor, changes: Callable[[Tensor], Tensor]) -> float:
    """Whether a drift is the same for all classes: how alike two halves of the new classes say that old inputs move.

    In a deep convolutional network with BatchNorm most of the drift is common to all inputs. In a perceptron it is not:
    the gate holds old inputs still, and each class has a drift of its own.

    Args:
        targets: classes (n,) of new samples.
        changes: of old inputs (m, d), by a map that is learned on the new samples of a mask (n,).

    Returns:
        The cosine of the changes by the maps that the two halves teach, -1 to 1; 0 for a single class.
    """
    half = torch.isin(targets, targets.unique()[::2])
    if half.all():
        return 0.0
    one, other = changes(half), changes(~half)
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(torch.finfo(one.dtype).tiny))


def told_by_classes(memory: LayerMemory, seen: ReadoutSamples) -> float:
    r"""The share of the old loss that pseudo-samples tell, if classes have come in several experiences: 0 to 1.

    A class with a different kind of input in each experience has a wide covariance and a mean that says little. The
    share is the classes' separability in the memory over that in one experience, at most 1. Separability is the trace
    of the covariance between class means over that within classes (R. A. Fisher: The use of multiple measurements in
    taxonomic problems, 1936).

    Args:
        memory: of a readout, with class sums.
        seen: samples of the experience.
    """
    assert memory.class_sums is not None and memory.class_counts is not None
    energy = memory.mean_eigenvalue * len(memory.vectors)
    old_between, old_within = _between_and_within(memory.class_sums, memory.class_counts, energy)
    between, within = _between_and_within(*class_sums(seen), seen.inputs.square().sum() / len(seen.inputs))
    least = torch.finfo(energy.dtype).tiny
    return float((old_between * within / (old_within * between).clamp_min(least)).clamp(0, 1))


def class_shift(memory: LayerMemory, seen: ReadoutSamples) -> float:
    r"""How far the class means of an experience are from those remembered, squared, in variances between classes.

    .. math::
        \max\Big(0, \sum_c p_c \big(\lVert \mu_c - m_c \rVert^2 - s^2 (1 / n_c + 1 / N_c)\big) / b\Big) + \sum_a N_a / N

    The shares :math:`p_c` of the classes, the variances :math:`s^2` within them and b between them are those of the
    experience. The subtracted term is the expected value for equal distributions, with :math:`n_c` samples of the
    experience and :math:`N_c` of the memory. A class a that the experience lacks counts as moved by one such variance.

    Args:
        memory: of a readout, with class sums.
        seen: samples of the experience.

    Returns:
        Infinite if the experience has a class that is not known.
    """
    assert memory.class_sums is not None and memory.class_counts is not None
    sums, counts = class_sums(seen)
    here, old_counts = counts > 0, torch.zeros_like(counts)
    old_counts[: len(memory.class_counts)] = memory.class_counts  # fewer where a head has grown
    if (old_counts[here] == 0).any():
        return float("inf")
    known, lacking = here.nonzero().flatten(), old_counts[~here].sum() / old_counts.sum()
    between, within = _between_and_within(sums, counts, seen.inputs.square().sum() / len(seen.inputs))
    shares, old_counts = counts[known] / counts.sum(), old_counts[known]
    moved = sums[known] / counts[known].unsqueeze(1) - memory.class_sums[known] / old_counts.unsqueeze(1)
    expected = within * (len(known) / len(seen.inputs) + (shares / old_counts).sum())
    shift = ((shares * moved.square().sum(1)).sum() - expected) / between.clamp_min(torch.finfo(between.dtype).tiny)
    return max(float(shift), 0.0) + float(lacking)


def _between_and_within(sums: Tensor, counts: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """The trace of the covariance between class means and of that within classes, 0-dim, of inputs of an energy."""
    known = counts > 0
    shares, means = counts[known] / counts.sum(), sums[known] / counts[known].unsqueeze(1)
    of_means = (shares * means.square().sum(1)).sum()
    return of_means - (shares @ means).square().sum(), (energy - of_means).clamp_min(0)


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


@torch.no_grad()
def solve_readout(
    layer: GatedLayer,
    new: ReadoutSamples,
    old: PseudoSamples | None,
    merged: LayerMemory,
    criterion: Criterion,
    settings: Settings,
    stored: Sequence[ReadoutSamples] = (),
    trust: float = 0.0,
    quadratic: Callable[[Tensor], Tensor] | None = None,
    told: float = 1.0,
    *,
    ridge_factor: float = 1.0,
) -> bool:
    r"""Puts the weights into the readout that minimise the loss on new samples and on the memory's classes.

    .. math::
        \min_W \; \frac{N_{new} L(X W^\top, y) + N_{old} \big((1 - t) (r L(X_{old} W^\top, y_{old}) + (1 - r) Q(W))
        + t L(X_{stored} W^\top, y_{stored})\big)}{N_{new} + N_{old}}
        + r \frac{\epsilon \kappa \bar\lambda}{2} \lVert W \rVert^2

    by L-BFGS, along the leading eigenvectors of all inputs and the remainders of the class means (:func:`extended`), in
    coordinates in which the second moment is the identity. The old classes' X are
    pseudo-samples; :math:`\kappa` is the loss's curvature at outputs of zero. It starts at the present weights, or at
    a Newton step from zero with the curvature :math:`\kappa` where the loss is lower there. For squared error and all
    eigenvectors the solution is the ridge regression on all data, if the old inputs have not moved. It does not depend
    on the optimizer, its learning rate or the number of its steps. For a loss without curvature, such as a hinge,
    :math:`\kappa` is that of :func:`curvature_to_zero`. A loss without a gradient at outputs of zero leaves the weights
    as they are, and False is returned. So does a solution that loses more than half of the present weights' gain over
    outputs of zero: the curvature at zero says too little of such a loss, for instance of a distance.

    Args:
        layer: the network's last, a linear one.
        new: samples of the experience.
        old: pseudo-samples of the old classes; None for a new task's head.
        merged: the memory with the experience.
        criterion: of (the network's outputs, class labels), a mean over samples.
        stored: stored samples of the old classes.
        trust: t, the share of the old loss that they stand for, 0 to 1; 0 without.
        quadratic: Q, the old loss as a function of W (:func:`old_quadratic`); None if ``told`` is 1.
        told: r, the share of the rest that pseudo-samples tell (:func:`told_by_classes`).
        ridge_factor: of :math:`\epsilon` (:func:`held_out_ridge`).
    """
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
        parts.append((old.coordinates @ (old.axes @ white), old.targets, share * (1 - trust) * told))
    total = sum(samples.weight for samples in stored)
    parts += [(s.inputs @ white, s.targets, share * trust * s.weight / total) for s in stored]
    start = layer.weights_and_bias()
    curvature = curvature_at(torch.zeros_like(start), new, criterion)
    criterion = linked(in_dtype(criterion, new.inputs.dtype), new.link)
    if not curvature > 0:  # piecewise linear, as a hinge
        curvature = curvature_to_zero(new.inputs.new_zeros(len(new.inputs), len(start)), new.targets, criterion)
    if not curvature > 0:  # nothing bounds the weights
        return False

    def size(units: Tensor) -> Tensor:
        return 0.5 * told * curvature * ridge * (units * scale).square().sum()

    def loss(units: Tensor) -> Tensor:
        value = size(units)
        if quadratic is not None:
            value = value + share * (1 - trust) * (1 - told) * quadratic(units @ white.T)
        return value + sum(weight * criterion(_outputs(x, units, new.masked), y) for x, y, weight in parts)

    present = start @ vectors / scale
    nothing = torch.zeros_like(present)
    at_nothing, gradient = with_gradient(loss, nothing)
    newton, at_present = -gradient / curvature, loss(present)
    before = at_present - size(present)  # now, because the search moves its start in place
    units = (newton if loss(newton) < at_present else present).requires_grad_()
    search = torch.optim.LBFGS(
        [units],
        max_iter=settings.solve_steps,
        tolerance_change=settings.solve_tolerance * float(at_nothing),
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, units.grad = with_gradient(loss, units)
        return value

    search.step(closure)
    units = units.detach()
    weights = units @ white.T
    lost = loss(units) - size(units) - before
    if not weights.isfinite().all() or lost > _LOST * (at_nothing - before).clamp_min(0):
        return False
    layer.set_weights(weights)
    return True


@torch.no_grad()
def held_out_ridge(
    layer: GatedLayer,
    new: ReadoutSamples,
    old: PseudoSamples | None,
    merged: LayerMemory,
    criterion: Criterion,
    settings: Settings,
    *others: Any,
) -> float:
    """The factor of the ridge with which half of the new samples tell the other half.

    A solution of few samples, or of ones with wrong labels or with augmented inputs, can tell these and no others. The
    solution of one half gains on both, over outputs of zero. If the other half's gain is less than the share
    ``solve_held_out`` of its own, larger ridges are tried until one gains less. The least one is chosen that gains this
    share of the most.

    Args:
        layer, new, old, merged, criterion, settings, others: of :func:`solve_readout`. The layer's weights stay.

    Returns:
        1 for the ridge of the settings, also if the loss leaves the weights as they are.
    """
    if len(new.targets) < 2:
        return 1.0
    order = new.targets.argsort(stable=True)  # each half has each class
    halves = [replace(new, inputs=new.inputs[rows], targets=new.targets[rows]) for rows in (order[::2], order[1::2])]
    linked_loss = linked(in_dtype(criterion, new.inputs.dtype), new.link)
    before, gains, most = layer.weights_and_bias(), dict[float, float](), -math.inf

    def loss(weights: Tensor, half: ReadoutSamples) -> float:
        return float(linked_loss(_outputs(half.inputs, weights, half.masked), half.targets))

    problem = layer, halves[0], old, merged, criterion, settings, *others
    at_nothing = [loss(torch.zeros_like(before), half) for half in halves]
    try:
        for factor in (1.0, *_RIDGES):
            layer.set_weights(before)
            if not solve_readout(*problem, ridge_factor=factor):
                break
            weights = layer.weights_and_bias()
            own, other = (lost - loss(weights, half) for lost, half in zip(at_nothing, halves))
            if other < most:
                break
            gains[factor] = most = other
            if factor == 1 and (own <= 0 or other >= settings.solve_held_out * own):
                break
    finally:
        layer.set_weights(before)
    least = most - (1 - settings.solve_held_out) * abs(most)  # all may lose
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


@torch.enable_grad()
def with_gradient(loss: Callable[[Tensor], Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient at these weights."""
    weights = weights.detach().requires_grad_()
    value = loss(weights)
    return value.detach(), torch.autograd.grad(value, weights)[0]
