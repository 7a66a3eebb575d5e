"""Means with intervals, and comparisons paired by seed. scipy's own functions of these are slow, or slow to load."""

import functools
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit


def student(values: Sequence[float]) -> float:
    """Half-width of the mean's 95% interval by Student's t; NaN for a single value."""
    n = len(values)
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")


@functools.cache
def _resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, (9999, n))


@functools.cache
def bootstrap(values: tuple[float, ...]) -> tuple[float, float]:
    """Ends of the mean's 95% bootstrap interval (bias-corrected and accelerated, B. Efron, 1987). Always the same."""
    if len(values) < 2 or max(values) == min(values):
        return min(values), max(values)
    x = np.array(values)
    means, mean = x[_resamples(len(x))].mean(axis=1), x.mean()
    bias = ndtri((np.mean(means < mean) + np.mean(means <= mean)) / 2)
    skew = x - mean  # proportional to the jackknife's
    acceleration = (skew**3).sum() / (6 * (skew**2).sum() ** 1.5)
    z = bias + ndtri([0.025, 0.975])
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def _signed_ranks(differences: Sequence[float]) -> np.ndarray:
    """Ranks of the sizes from 1 on, ties at their mean, with the signs; zeros are left out."""
    d = np.asarray(differences)
    d = d[d != 0]
    size = np.abs(d)
    return np.sign(d) * ((size[:, None] > size).sum(1) + (size[:, None] >= size).sum(1) + 1) / 2


def wilcoxon(differences: Sequence[float]) -> float:
    """p of the signed-rank test that paired differences are symmetric about 0; 1 if all are 0.

    Up to 13 pairs it is exact, as scipy's is: all choices of signs are counted.
    """
    ranks = _signed_ranks(differences)
    if len(ranks) > 13:
        from scipy import stats

        return float(stats.wilcoxon(ranks).pvalue)
    signs = 1 - 2 * (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks)) & 1)
    return float(np.mean(np.abs(signs @ ranks) >= abs(ranks.sum()) - 1e-9))


def rank_biserial(differences: Sequence[float]) -> float:
    """Effect size of the signed-rank test (D. Kerby, 2014): 1 if every pair gains, 0 if as much gains as loses, -1 if
    every pair loses. It is the ranks' share with a gain minus their share with a loss."""
    ranks = _signed_ranks(differences)
    return float(ranks.sum() / np.abs(ranks).sum()) if len(ranks) else 0.0


def holm(ps: Sequence[float]) -> np.ndarray:
    """p values corrected for their number (S. Holm, 1979)."""
    order = np.argsort(ps)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected
