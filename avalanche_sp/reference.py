"""Slow, obvious versions of the package's equations. The tests hold the fast ones against them.

They take whole matrices in double precision. Inputs x are rows (n, d); a bias is the weight of a last input of 1.
"""

import math
from itertools import product

import torch
from torch import Tensor


def merged_eigenpairs(experiences: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenpairs, and the mean eigenvalue, of all inputs' second moment C = sum_i x_i x_i^T / n."""
    x = torch.cat(experiences).double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return values[-rank:], vectors[:, -rank:], values.mean()


def modelled_moment(values: Tensor, vectors: Tensor, mean: Tensor) -> Tensor:
    """C_r + rho (I - V V^T), with rho the mean of the eigenvalues that are not kept."""
    values, vectors = values.double(), vectors.double()
    d, r = vectors.shape
    rest = max(d * float(mean) - float(values.sum()), 0.0) / max(d - r, 1)
    return vectors @ values.diag() @ vectors.T + rest * (torch.eye(d).double() - vectors @ vectors.T)


def gate_matrix(values: Tensor, vectors: Tensor, mean: Tensor, openness: float) -> Tensor:
    """P = alpha m (C + alpha m I)^-1, with C as modelled and m its mean eigenvalue."""
    floor = openness * float(mean) * torch.eye(len(vectors)).double()
    return floor @ torch.linalg.inv(modelled_moment(values, vectors, mean) + floor)


def gated_gradient(delta: Tensor, x: Tensor, gate: Tensor, stored: Tensor | None = None, opened: float = 1) -> Tensor:
    """sum_i delta_i (P x_i)^T over the stream's samples, and ``opened`` times delta_i x_i^T over the stored ones."""
    passed = [(opened * row if stored is not None and stored[i] else gate @ row) for i, row in enumerate(x.double())]
    return torch.stack([torch.outer(d, row) for d, row in zip(delta.double(), passed)]).sum(0)


def penalty_gradient(weights: Tensor, anchor: Tensor, moment: Tensor, strength: float) -> Tensor:
    """Gradient in W of (w / 2) tr((W - W*) C (W - W*)^T), by autograd."""
    w = weights.detach().double().requires_grad_()
    drift = w - anchor.double()
    return torch.autograd.grad(strength / 2 * torch.trace(drift @ moment @ drift.T), w)[0]


def likeness(x: Tensor, moment: Tensor) -> float:
    """(<C - m I, X> / tr X) / (<C, C> / tr C), clipped to [0, 1], with X the second moment of new inputs."""
    new = x.double().T @ x.double()
    above = moment - moment.trace() / len(moment) * torch.eye(len(moment)).double()
    like = (above * new).sum() / new.trace() * moment.trace() / moment.square().sum()
    return float(like.clamp(0, 1))


def four_bits(rows: Tensor) -> Tensor:
    """Each row rounded to the nearest of 15 levels, evenly spaced from minus to plus its largest magnitude."""
    level = rows.abs().amax(1, keepdim=True) / 7
    return (rows / level).round() * level


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The W of least squared error sum_i |W x_i - y_i|^2."""
    return torch.linalg.lstsq(x.double(), y.double()).solution.T


def readout_step(
    weights: Tensor,
    parts: list[tuple[Tensor, Tensor, float]],
    quadratic: tuple[Tensor, Tensor, Tensor, Tensor],
    old: float,
    trust: float = 0.0,
    whole: float = 0.05,
    damping: float = 0.05,
) -> Tensor:
    """The readout's damped Newton step: new weights.

        N = (1 - t) N_old,   G = sum_i N_i L_i'(W) + N (R + 2 kappa (W - W*) V V^T C)
        H = sum_i N_i L_i'' + 2 N kappa C
        D = -G (H + eps mean(diag H) I)^-1,   s = t + (1 - t) min(1, q / whole),   W + s D

    for squared error L_i (kappa = 2) on samples (x, y) that stand for N_i; q is the decrease -<sum_i N_i L_i', D> / 2
    in units of the loss of zero outputs.

    Args:
        parts: x, y and N_i of each loss.
        quadratic: W* and V, C as modelled, and the gradient R that remained.
    """
    (anchor, v, moment, residual), w = (t.double() for t in quadratic), weights.double()
    shown, hessian, zero = torch.zeros_like(w), torch.zeros_like(moment), 0.0
    for x, y, n in parts:
        x, y = x.double(), y.double()
        shown += n * 2 * (w @ x.T - y.T) @ x / len(x)
        hessian += n * 2 * x.T @ x / len(x)
        zero += n * float(y.square().sum()) / len(x)
    kept = (1 - trust) * old
    gradient = shown + kept * (residual + 4 * (w - anchor) @ v @ v.T @ moment)
    hessian += kept * 4 * moment
    damped = hessian + damping * hessian.trace() / len(moment) * torch.eye(len(moment)).double()
    step = -gradient @ torch.linalg.inv(damped)
    gain = -float((shown * step).sum()) / 2 / zero
    return w + (trust + (1 - trust) * min(1.0, max(0.0, gain / whole))) * step


def optimizer_step(p, g, m, v, c, t, s=0.0, *, lr, decay, k, warmup, weight, threshold, beta1, eps) -> None:
    """One step of SelectivePlasticityOptimizer in place, one synapse after another: its docstring's equations.

    p, g, m, v, c: numpy arrays: parameter, gradient, its running means, and consolidated eligibility or None.
    """
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = decay * v + (1 - decay) * g**2
    k = k * (1 - weight * s) * (1 if c is not None else min(1, t / warmup))
    for i in product(*map(range, p.shape)):
        m_hat, v_hat = m[i] / (1 - beta1**t), v[i] / (1 - decay**t)
        e = v[i] / v.mean() if c is None else c[i]
        gate = 1 / (1 + k * e * (g[i] * m_hat / v_hat <= threshold))
        p[i] -= lr * gate * m_hat / (math.sqrt(v_hat) + eps)
