"""Pseudo-samples: inputs of the readout that stand for those of old classes, and how training moves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avalanche_sp.gate.classes import ReadoutSamples, class_means
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.settings import Settings


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


def _signed(rows: Tensor) -> Tensor:
    """Rows (..., d) with a sum that is not negative. The signs of eigenvectors differ from one machine to another."""
    return torch.where(rows.sum(-1, keepdim=True) < 0, -rows, rows)


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

    After each consolidation other vectors are drawn, from random numbers that follow from the number of samples that
    are remembered. They do not depend on the signs of eigenvectors.

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
    span = _signed(span.T).T
    roots = span.new_zeros(len(classes), 0, span.shape[1])
    if memory.class_roots is not None:
        roots = _signed(memory.class_roots[classes].to(span)) @ span
    centers = (means @ span).double()
    own = (roots * share.sqrt()[:, None, None]).flatten(0, 1).double()
    shared = moments.double().diag() - (centers.T * share) @ centers - own.T @ own
    values, vectors = torch.linalg.eigh(shared)
    root, k = (vectors * values.clamp_min(0).sqrt()) @ vectors.T, roots.shape[1]  # the symmetric one has no signs
    least = max(least, 2 * (len(root) + len(own)) + len(classes) * (k + 1))  # each class loses k + 1 dimensions
    number = (share * least).round().long().clamp_min(k + 2)
    which = torch.repeat_interleave(torch.arange(len(classes), device=number.device), number)
    generator = torch.Generator().manual_seed(memory.samples)
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
