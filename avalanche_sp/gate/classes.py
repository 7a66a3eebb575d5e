"""The readout's inputs by class: samples, means and covariances, and how they compare with those remembered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_sp.gate.functional import leading_eigenpairs
from avalanche_sp.gate.links import Link
from avalanche_sp.gate.memory import LayerMemory
from avalanche_sp.gate.settings import Settings


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


def brings_classes(memory: LayerMemory | None, seen: ReadoutSamples) -> bool:
    """Whether an experience has a class that the readout's memory does not know, or a new task's head."""
    if memory is None or memory.class_counts is None:
        return True
    return not bool(_known(memory.class_counts, seen).all())


def repeats_classes(memory: LayerMemory, seen: ReadoutSamples) -> bool:
    """Whether an experience has a class that the readout's memory knows."""
    return memory.class_counts is None or bool(_known(memory.class_counts, seen).any())


def _known(counts: Tensor, seen: ReadoutSamples) -> Tensor:
    """True for each sample whose class has been counted, shape (n,)."""
    return torch.isin(seen.targets, counts.nonzero().flatten())


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
