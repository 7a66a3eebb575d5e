"""Gate mathematics against slow, obvious numpy versions."""

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_sp import gates

RNG = np.random.default_rng(0)


def tensor(*shape, positive=False):
    a = RNG.normal(size=shape)
    return torch.tensor(np.abs(a) if positive else a, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_eligibility_coincidence_and_resistance_equal_reference(shape):
    g, m, v = tensor(*shape), tensor(*shape), tensor(*shape, positive=True)
    mean = np.mean(list(v.numpy().ravel()))
    e, c, r = gates.eligibility(v), gates.coincidence(g, m, v), gates.resistance(gates.eligibility(v), 3.0)
    for i in np.ndindex(shape):
        assert float(e[i]) == pytest.approx(float(v[i]) / mean)
        assert float(c[i]) == pytest.approx(float(g[i]) * float(m[i]) / float(v[i]))
        assert float(r[i]) == pytest.approx(1 + 3.0 * float(v[i]) / mean)


def test_eligibility_is_free_of_the_scale_of_the_loss_and_has_mean_one():
    v = tensor(50, positive=True)
    torch.testing.assert_close(gates.eligibility(1e6 * v), gates.eligibility(v))
    assert gates.eligibility(v).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_any_gradient_the_gate_is_open_and_finite(dtype):
    zero = torch.zeros(5, dtype=dtype)
    assert torch.equal(gates.resistance(gates.eligibility(zero), 5.0), torch.ones(5, dtype=dtype))
    assert torch.equal(gates.coincidence(zero, zero, zero), zero)


@pytest.mark.parametrize(
    "loss, mean, variance, expected", [(2.0, 2.0, 1.0, 0), (5.0, 2.0, 1.0, 1), (3.5, 2.0, 1.0, 0.5), (1.0, 2.0, 1.0, 0)]
)
def test_loss_surprise(loss, mean, variance, expected):
    assert gates.loss_surprise(*map(torch.tensor, (loss, mean, variance))) == pytest.approx(expected)


def test_loss_surprise_of_the_first_loss_is_none():
    assert gates.loss_surprise(torch.tensor(3.0), torch.tensor(3.0), torch.tensor(0.0)) == 0


def test_claim_closes_where_activity_was_and_opens_with_openness():
    values = torch.tensor([0.0, 1.0, 4.0])
    f = gates.claim(values, torch.tensor(2.0), 0.5)
    torch.testing.assert_close(f, torch.tensor([0.0, 0.5, 0.8]))
    assert torch.equal(gates.claim(values, torch.tensor(2.0), float("inf")), torch.zeros(3))
    assert torch.equal(gates.claim(torch.zeros(3), torch.tensor(0.0), 0.1), torch.zeros(3))


@pytest.mark.parametrize("n, d", [(40, 6), (5, 30)])  # more samples than directions, and fewer
def test_merge_eigenspace_equals_the_eigenspace_of_the_mixed_second_moment(n, d):
    old_x, new_x = tensor(n, d), tensor(n, d)
    nothing = (torch.zeros(0, dtype=torch.float64), torch.zeros(d, 0, dtype=torch.float64))
    old = gates.merge_eigenspace(*nothing, 0.0, old_x, rank=d)
    values, vectors = gates.merge_eigenspace(*old, 0.25, new_x, rank=d)
    expected = 0.25 * old_x.T @ old_x / n + 0.75 * new_x.T @ new_x / n
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, expected)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64))


def test_merge_eigenspace_keeps_the_leading_directions():
    x = tensor(200, 8) * torch.tensor([5, 4, 3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    values, vectors = gates.merge_eigenspace(torch.zeros(0).double(), torch.zeros(8, 0).double(), 0.0, x, rank=3)
    assert vectors.shape == (8, 3)
    assert (vectors[3:].abs() < 1e-2).all()
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("n, d", [(40, 6), (5, 30)])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_merge_eigenspace_keeps_as_many_as_have_a_share_of_the_energy(n, d, share):
    x = tensor(n, d) * 0.7 ** torch.arange(d)
    nothing = torch.zeros(0).double(), torch.zeros(d, 0).double()
    every, _ = gates.merge_eigenspace(*nothing, 0.0, x, rank=d)
    values, vectors = gates.merge_eigenspace(*nothing, 0.0, x, rank=share)
    kept = len(values)
    assert vectors.shape == (d, kept)
    torch.testing.assert_close(values, every[-kept:])
    assert every[-kept:].sum() >= share * every.sum() > every[len(every) - kept + 1 :].sum()
    silent, _ = gates.merge_eigenspace(*nothing, 0.0, torch.zeros(n, d).double(), rank=share)
    assert silent.tolist() == [0.0]  # no energy at all


def test_likeness_is_one_for_the_same_input_and_zero_for_a_random_one():
    torch.manual_seed(0)
    d, r = 60, 8
    x = torch.randn(4000, d, dtype=torch.float64) * 0.8 ** torch.arange(d)
    nothing = torch.zeros(0).double(), torch.zeros(d, 0).double()
    values, vectors = gates.merge_eigenspace(*nothing, 0.0, x, rank=r)
    mean = x.square().mean(0).mean()

    def like(new, values=values, vectors=vectors):
        return gates.likeness((new @ vectors).square().sum(0), new.square().sum(), values, mean, d)

    rest = gates.remainder(values, mean, d)
    torch.testing.assert_close(rest, (d * mean - values.sum()) / (d - r))
    c = vectors @ torch.diag(values) @ vectors.T + rest * (torch.eye(d) - vectors @ vectors.T)
    above = c - mean * torch.eye(d)
    new = x[:500] + 0.3 * torch.randn(500, d)
    slow = torch.trace(above @ new.T @ new) / new.square().sum() * torch.trace(c) / torch.trace(above @ c)
    torch.testing.assert_close(like(new), slow)
    assert 0.2 < slow < 0.8
    torch.testing.assert_close(like(x), torch.ones((), dtype=torch.float64), atol=0.02, rtol=0)
    torch.testing.assert_close(like(3 * x), like(x))  # free of scale
    assert like(torch.randn(500, d, dtype=torch.float64)) < 0.05
    assert like(x[:, torch.randperm(d)]) < 0.3
    assert like(x.flip(1)) == 0  # it prefers what C does not
    assert like(x[:0]) == 0
    assert gates.likeness(*(torch.zeros(0), torch.ones(())), torch.zeros(0), torch.ones(()), d) == 0  # C prefers none


def test_held_back_equals_gating_each_sample():
    x, delta, v = tensor(9, 6), tensor(9, 4), torch.linalg.qr(tensor(6, 3)).Q
    f = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    gated = torch.zeros(4, 6, dtype=torch.float64)
    for x_i, delta_i in zip(x, delta):
        x_gated = x_i - v @ torch.diag(f) @ v.T @ x_i
        gated += torch.outer(delta_i, x_gated)
    torch.testing.assert_close(delta.T @ x - gates.held_back(delta, x @ v, f) @ v.T, gated)


def test_pull_back_is_the_gated_gradient_of_the_surrogate():
    v = torch.linalg.qr(tensor(6, 3)).Q
    values, f = tensor(3, positive=True), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    anchor, w = tensor(4, 6), tensor(4, 6).requires_grad_()
    surrogate = 0.7 / 2 * torch.trace((w - anchor) @ v @ torch.diag(values) @ v.T @ (w - anchor).T)
    (gradient,) = torch.autograd.grad(surrogate, w)
    gated = gradient - gradient @ v @ torch.diag(f) @ v.T
    drift = (w - anchor).detach() @ v
    torch.testing.assert_close(gates.pull_back(drift, values, f, 0.7) @ v.T, gated)


def test_loss_curvature():
    z, y = tensor(40, 5).requires_grad_(), torch.randint(5, (40,))
    one_hot = nn.functional.one_hot(y, 5).double()
    squared = ((z - one_hot) ** 2).sum() / len(z)
    assert gates.loss_curvature(z, squared) == pytest.approx(2.0)
    p = z.softmax(1).detach()
    exact = (p * (1 - p)).sum(1).mean() / 5
    z_many, y_many = z.repeat(500, 1).detach().requires_grad_(), y.repeat(500)  # one probe for many samples
    measured = gates.loss_curvature(z_many, nn.functional.cross_entropy(z_many, y_many))
    assert measured == pytest.approx(exact.item(), rel=0.05)
    assert gates.loss_curvature(z, z.abs().mean()) == 0
    assert gates.loss_curvature(z, z.mean()) == 0
