"""The setting of docs/theory.md, for its tests: old inputs, and the gate that the library makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from avalanche_sp.gate.functional import claim, held_back, merge_eigenspace, penalty_gradient, remainder

KAPPA = 2.0  # curvature of squared error, summed over the outputs
HOLDS = 1 + 1e-6  # room for rounding
TIGHT = 0.9  # a bound smaller by this factor is false

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=20)
seeds = st.integers(0, 10**6)


@dataclass
class Old:
    """Consolidated activity and the gate that it makes, by the library's functions."""

    x: Tensor  # (n, d): the old inputs themselves, which the library doesn't keep
    values: Tensor
    vectors: Tensor
    mean: Tensor
    openness: float
    dropped: Tensor  # eps <- share eps + lambda_{r+1} at every merge
    gate_rest: bool = True

    @property
    def floor(self) -> Tensor:
        """m, the openness times the mean eigenvalue."""
        return self.openness * self.mean

    @property
    def rest(self) -> Tensor:
        """rho, the mean eigenvalue of the discarded directions; 0 if they are left open."""
        d, r = self.vectors.shape
        return remainder(self.values, self.mean, d) * (r < d and self.gate_rest)

    @property
    def closed(self) -> Tensor:
        return claim(self.values, self.mean, self.openness)

    @property
    def closed_rest(self) -> Tensor:
        return claim(self.rest, self.mean, self.openness)

    @property
    def second_moment(self) -> Tensor:
        """C."""
        return self.x.T @ self.x / len(self.x)

    @property
    def kept(self) -> Tensor:
        """C_r."""
        return self.vectors @ torch.diag(self.values) @ self.vectors.T

    @property
    def discarded(self) -> Tensor:
        """E = C - C_r."""
        return self.second_moment - self.kept

    @property
    def modelled(self) -> Tensor:
        """C_r and rho along everything else."""
        return self.kept + self.rest * (eye(len(self.vectors)) - self.vectors @ self.vectors.T)

    @property
    def gate(self) -> Tensor:
        """Pi, read off from what the library does to the gradient I = I^T I."""
        return self.gated(eye(len(self.vectors)), eye(len(self.vectors)))

    def gated(self, delta: Tensor, x: Tensor) -> Tensor:
        """G Pi for G = delta^T x, with nothing of size (d, d)."""
        held = held_back(delta, x @ self.vectors, self.closed - self.closed_rest)
        return (1 - self.closed_rest) * (delta.T @ x) - held @ self.vectors.T

    def projected(self, update: Tensor) -> Tensor:
        """U Pi."""
        return self.gated(eye(len(update)), update)

    def gated_pull(self, drift: Tensor, weight: float) -> Tensor:
        """w D C_r Pi."""
        return penalty_gradient(drift @ self.vectors, self.values, self.closed, weight) @ self.vectors.T

    def change(self, drift: Tensor) -> Tensor:
        """sqrt(E ||D x||^2), over the old inputs."""
        return (self.x @ drift.T).square().sum(1).mean().sqrt()

    def factor(self) -> Tensor:
        """B of statement 2."""
        return torch.maximum(self.floor.sqrt() / 2, (1 - self.closed_rest) * largest(self.discarded).sqrt())

    def slow_factor(self) -> Tensor:
        """B' of statement 5."""
        return torch.maximum(self.floor, (1 - self.closed_rest) * largest(self.discarded)).sqrt()


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def largest(symmetric: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric)[-1].clamp_min(0)


def power(positive: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(positive)
    return vectors @ torch.diag(values.clamp_min(0) ** exponent) @ vectors.T


def solve(h: Tensor, b: Tensor) -> Tensor:
    """W with W h = b."""
    return torch.linalg.solve(h, b.T).T


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int, n: int, d: int, decay: float = 0.5) -> Tensor:
    """n rows with a falling spectrum in a random basis; the last column is the bias's input of 1."""
    x = normal(seed, n, d) * torch.exp(-decay * torch.arange(d) / 2)
    x = x @ torch.linalg.qr(normal(seed + 1, d, d)).Q
    return torch.cat([x[:, :-1], torch.ones(n, 1).double()], dim=1)


def consolidate(*experiences: Tensor, rank: int, openness: float) -> Old:
    """As the plugin does it, one experience after another."""
    d, zero, samples = experiences[0].shape[1], torch.zeros((), dtype=torch.float64), 0
    values, vectors, mean, dropped = zero.new_zeros(0), zero.new_zeros(d, 0), zero, zero
    for x in experiences:
        share = samples / (samples + len(x))
        everything, _ = merge_eigenspace(values, vectors, share, x, d)
        values, vectors = merge_eigenspace(values, vectors, share, x, rank)
        mean = share * mean + (1 - share) * x.square().mean()
        dropped = share * dropped + (everything.flip(0)[rank] if len(everything) > rank else 0)
        samples += len(x)
    return Old(torch.cat(experiences), values, vectors, mean, openness, dropped)


def with_spectrum(spectrum: list[float], rank: int, openness: float, seed: int = 0) -> Old:
    """Old inputs whose second moment has exactly these eigenvalues, in a random basis."""
    values, d = torch.tensor(spectrum).double(), len(spectrum)
    basis = torch.linalg.qr(normal(seed, d, d)).Q
    return consolidate((basis * (d * values).sqrt()).T, rank=rank, openness=openness)


@st.composite
def olds(draw, all_kept: bool = False):
    d = draw(st.integers(2, 12))
    n = draw(st.integers(2 * d, 4 * d) if all_kept else st.integers(1, 4 * d))
    x = inputs(draw(seeds), n, d, draw(st.floats(0, 2)))
    old = consolidate(x, rank=d if all_kept else draw(st.integers(1, d)), openness=10 ** draw(st.floats(-3, 2)))
    old.gate_rest = draw(st.booleans())
    return old


def squared_error(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return KAPPA / 2 * (x @ w.T - y).square().sum(1).mean()


def error(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """delta of the squared error: the gradient is delta^T x."""
    return KAPPA * (x @ w.T - y) / len(x)
