"""Means with intervals, and paired comparisons."""

from __future__ import annotations

import numpy as np
from scipy import stats


def interval(values: list[float]) -> dict:
    """Mean and half-width of Student's 95% interval; the half-width is None for a single value."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else None
    return {"mean": float(np.mean(values)), "ci95": half}


def bootstrap(values: list[float]) -> tuple[float, float]:
    """Ends of the mean's 95% bootstrap interval (bias-corrected and accelerated, B. Efron, 1987; always the same)."""
    if len(values) < 2 or max(values) == min(values):
        return min(values), max(values)
    result = stats.bootstrap((values,), np.mean, n_resamples=9999, rng=np.random.default_rng(0))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def wilcoxon(differences: list[float]) -> float:
    """p of the signed-rank test that paired differences are symmetric about 0; 1 if all are 0."""
    return float(stats.wilcoxon(differences).pvalue) if any(differences) else 1.0


def rank_biserial(differences: list[float]) -> float:
    """Effect size of the signed-rank test (D. Kerby, 2014): the share of ranks that favours a gain minus the share that
    favours a loss. 1: every pair gains, 0: as much either way, -1: every pair loses."""
    d = np.array([value for value in differences if value])
    if not len(d):
        return 0.0
    ranks = stats.rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum())


def holm(ps: list[float]) -> list[float]:
    """p values corrected for their number (S. Holm, 1979)."""
    if not ps:
        return []
    from statsmodels.stats.multitest import multipletests  # here, as it is slow to load

    return [float(p) for p in multipletests(ps, method="holm")[1]]
