"""Means with intervals, and comparisons paired by seed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from scipy import stats


def student(values: Sequence[float]) -> float:
    """Half-width of the mean's 95% interval by Student's t; NaN for a single value."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else float("nan")


@functools.cache
def bootstrap(values: tuple[float, ...]) -> tuple[float, float]:
    """Ends of the mean's 95% bootstrap interval (bias-corrected and accelerated, B. Efron, 1987). Always the same."""
    if len(values) < 2 or max(values) == min(values):
        return min(values), max(values)
    result = stats.bootstrap((values,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def wilcoxon(differences: Sequence[float]) -> float:
    """p of the signed-rank test that paired differences are symmetric about 0; 1 if all are 0.

    Up to 13 pairs it is exact, as scipy's is: all choices of signs are counted. With ties scipy takes 100 times longer.
    """
    d = np.asarray(differences)
    d = d[d != 0]
    if len(d) > 13:
        return float(stats.wilcoxon(d).pvalue)
    ranks = stats.rankdata(np.abs(d))
    signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    return float(np.mean(np.abs(signs @ ranks) >= abs(np.sign(d) @ ranks) - 1e-9))


def rank_biserial(differences: Sequence[float]) -> float:
    """Effect size of the signed-rank test (D. Kerby, 2014): 1 if every pair gains, 0 if as much gains as loses, -1 if
    every pair loses. It is the ranks' share with a gain minus their share with a loss."""
    d = np.asarray(differences)
    d = d[d != 0]
    ranks = stats.rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum()) if len(d) else 0.0


def holm(ps: Sequence[float]) -> np.ndarray:
    """p values corrected for their number (S. Holm, 1979)."""
    order = np.argsort(ps)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected
