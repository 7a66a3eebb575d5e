"""The equations of both gates against slow, obvious versions."""

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer, reference
from avalanche_sp.gate import functional as gates
from avalanche_sp.optim import functional as optim

RNG = np.random.default_rng(0)


def tensor(*shape, positive=False):
    a = RNG.normal(size=shape)
    return torch.tensor(np.abs(a) if positive else a, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_eligibility_coincidence_and_resistance_equal_reference(shape):
    g, m, v = tensor(*shape), tensor(*shape), tensor(*shape, positive=True)
    mean = np.mean(list(v.numpy().ravel()))
    e, c, r = optim.eligibility(v), optim.coincidence(g, m, v), optim.resistance(optim.eligibility(v), 3.0)
    for i in np.ndindex(shape):
        assert float(e[i]) == pytest.approx(float(v[i]) / mean)
        assert float(c[i]) == pytest.approx(float(g[i]) * float(m[i]) / float(v[i]))
        assert float(r[i]) == pytest.approx(1 + 3.0 * float(v[i]) / mean)


def test_eligibility_is_free_of_the_scale_of_the_loss_and_has_mean_one():
    v = tensor(50, positive=True)
    torch.testing.assert_close(optim.eligibility(1e6 * v), optim.eligibility(v))
    assert optim.eligibility(v).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_any_gradient_the_gate_is_open_and_finite(dtype):
    zero = torch.zeros(5, dtype=dtype)
    assert torch.equal(optim.resistance(optim.eligibility(zero), 5.0), torch.ones(5, dtype=dtype))
    assert torch.equal(optim.coincidence(zero, zero, zero), zero)


@pytest.mark.parametrize(
    "loss, mean, variance, expected", [(2.0, 2.0, 1.0, 0), (5.0, 2.0, 1.0, 1), (3.5, 2.0, 1.0, 0.5), (1.0, 2.0, 1.0, 0)]
)
def test_loss_surprise(loss, mean, variance, expected):
    assert gates.loss_surprise(*map(torch.tensor, (loss, mean, variance)), 3.0) == pytest.approx(expected)


@pytest.mark.parametrize("full, expected", [(1.0, 1.0), (3.0, 0.5), (6.0, 0.25)])
def test_full_surprise_is_so_many_deviations(full, expected):
    assert gates.loss_surprise(*map(torch.tensor, (3.5, 2.0, 1.0)), full) == pytest.approx(expected)


def test_loss_surprise_of_the_first_loss_is_none():
    assert gates.loss_surprise(torch.tensor(3.0), torch.tensor(3.0), torch.tensor(0.0), 3.0) == 0


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
    expected, basis, mean = reference.merged_eigenpairs([old_x, *[new_x] * 3], rank=d)
    torch.testing.assert_close(values, expected[-len(values) :])
    torch.testing.assert_close(values.sum() / d, mean)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, basis @ torch.diag(expected) @ basis.T)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64))


def test_merge_eigenspace_keeps_the_leading_directions():
    x = tensor(200, 8) * torch.tensor([5, 4, 3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    values, vectors = gates.merge_eigenspace(torch.zeros(0).double(), torch.zeros(8, 0).double(), 0.0, x, rank=3)
    assert vectors.shape == (8, 3)
    assert (vectors[3:].abs() < 1e-2).all()
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("n, d", [(300, 80), (90, 200)])
def test_few_eigenpairs_of_many_are_near_those_of_the_whole_decomposition(n, d, started):
    x = tensor(n, d) * 0.9 ** torch.arange(d)
    earlier = x + 0.05 * tensor(n, d).flip(0) * 0.9 ** torch.arange(d)
    start = torch.linalg.eigh(earlier.T @ earlier)[1][:, -8:] if started else None
    values, vectors = gates.leading_eigenpairs(x, 8, start)
    expected, basis = torch.linalg.eigh(x.T @ x)
    torch.testing.assert_close(values, expected[-8:], rtol=3e-3, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8, dtype=torch.float64))
    assert (vectors.T @ basis[:, -8:]).square().sum() > 8 * 0.999  # of the same space
    torch.testing.assert_close(values.sum(), (x @ vectors).square().sum())


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


def test_transfer_is_the_share_of_the_earlier_gain_that_a_new_experience_has():
    def share(*losses):
        return gates.transfer(*torch.tensor(losses).double())

    assert share(0.3, 0.1, 0.9) == pytest.approx(0.75)
    assert share(-2.0, -4.0, 0.0) == 0.5  # a loss can be negative
    assert share(0.1, 0.1, 0.9) == share(0.05, 0.1, 0.9) == 1
    assert share(0.9, 0.1, 0.9) == share(5.0, 0.1, 0.9) == 0
    assert share(0.5, 0.9, 0.9) == share(0.5, 1.2, 0.9) == 0  # nothing was learned before
    assert share(float("nan"), 0.1, 0.9) == share(float("inf"), 0.1, 0.9) == share(0.1, 0.1, float("inf")) == 0


def test_likeness_is_high_for_the_same_input_and_zero_for_a_random_one():
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
    new = x[:500] + 0.3 * torch.randn(500, d)
    slow = reference.likeness(new, reference.modelled_moment(values, vectors, mean))
    assert float(like(new)) == pytest.approx(slow)
    assert 0.2 < slow < 0.8
    moment = reference.modelled_moment(values, vectors, mean)
    used = moment.trace() ** 2 / moment.square().sum()
    torch.testing.assert_close(like(x), 1 - used / d, atol=0.02, rtol=0)
    one = values.new_ones(())  # a memory that prefers no direction is like nothing
    assert gates.likeness((x @ vectors).square().sum(0), x.square().sum(), one.expand(r), one, d) == 0
    torch.testing.assert_close(like(3 * x), like(x))  # free of scale
    assert like(torch.randn(500, d, dtype=torch.float64)) < 0.05
    assert like(x[:, torch.randperm(d)]) < 0.3
    assert like(x.flip(1)) == 0  # it prefers what C does not
    assert like(x[:0]) == 0
    assert gates.likeness(*(torch.zeros(0), torch.ones(())), torch.zeros(0), torch.ones(()), d) == 0  # C prefers none


@pytest.mark.parametrize("rank", [3, 6])  # with directions that are not kept, and without
def test_claim_and_held_back_equal_gating_each_sample_with_the_whole_matrix(rank):
    old, x, delta = tensor(20, 6), tensor(9, 6), tensor(9, 4)
    values, vectors, mean = reference.merged_eigenpairs([old], rank)
    f, f_rest = gates.claim(values, mean, 0.7), gates.claim(gates.remainder(values, mean, 6), mean, 0.7)
    gated = (1 - f_rest) * (delta.T @ x) - gates.held_back(delta, x @ vectors, f - f_rest) @ vectors.T
    gate = reference.gate_matrix(values, vectors, mean, 0.7)
    torch.testing.assert_close(gated, reference.gated_gradient(delta, x, gate))


@pytest.mark.parametrize("answer, held", [(0, 1), (1, 1), (-0.3, 0.5), (-0.6, 0), (-1, 0)])
def test_what_stored_samples_cancel_is_not_held_back(answer, held):
    stream, closed = tensor(4, 6), torch.full((6,), 0.6, dtype=torch.float64)
    gradient = stream + answer * stream  # with that of the stored samples
    assert float(gates.unanswered(gradient, stream * closed, closed)) == pytest.approx(held)
    opposed = tensor(4, 6)
    opposed -= (opposed * stream).sum() / stream.square().sum() * stream
    assert float(gates.unanswered(gradient + opposed, stream * closed, closed)) == pytest.approx(held)


def test_gradients_that_are_not_finite_open_nothing():
    for value in (torch.inf, -torch.inf, torch.nan):
        gradient = torch.full((4, 6), value)
        assert float(gates.unanswered(gradient, gradient, torch.full((6,), 0.5))) == 1


def test_a_stream_without_gradient_is_held_back():
    zero, closed = torch.zeros(4, 6), torch.tensor([0, 0, 0.2, 0.5, 0.9, 1])
    assert float(gates.unanswered(torch.ones(4, 6), zero, closed)) == 1


def test_the_penaltys_gradient_is_the_gated_gradient_of_its_quadratic():
    values, vectors, mean = reference.merged_eigenpairs([tensor(20, 6)], 3)
    anchor, w, f = tensor(4, 6), tensor(4, 6), gates.claim(values, mean, 0.7)
    gradient = reference.penalty_gradient(w, anchor, vectors @ values.diag() @ vectors.T, 0.7)
    expected = gradient @ reference.gate_matrix(values, vectors, mean, 0.7)
    torch.testing.assert_close(gates.penalty_gradient((w - anchor) @ vectors, values, f, 0.7) @ vectors.T, expected)


def test_loss_derivatives():
    z, y = tensor(40, 5).requires_grad_(), torch.randint(5, (40,))
    one_hot = nn.functional.one_hot(y, 5).double()
    gradient, curvature = gates.loss_derivatives(z, ((z - one_hot) ** 2).sum() / len(z), 5)
    assert curvature == pytest.approx(2.0)
    torch.testing.assert_close(gradient, (2 * (z - one_hot) / len(z)).detach())
    assert not gradient.requires_grad
    p = z.softmax(1).detach()
    exact = (p * (1 - p)).sum(1).mean() / 5
    z_many, y_many = z.repeat(500, 1).detach().requires_grad_(), y.repeat(500)  # one probe for many samples
    measured = gates.loss_derivatives(z_many, nn.functional.cross_entropy(z_many, y_many), 5)[1]
    assert measured == pytest.approx(exact.item(), rel=0.05)
    assert gates.loss_derivatives(z, z.abs().mean(), 5)[1] == 0
    assert gates.loss_derivatives(z, z.mean(), 5)[1] == 0


@pytest.mark.parametrize("threshold", [float("inf"), 0.1])
@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_the_optimizers_step_equals_one_synapse_after_another(path, threshold):
    p, m, v, c = RNG.normal(size=(4, 3)), np.zeros((4, 3)), np.zeros((4, 3)), None
    parameter = nn.Parameter(torch.tensor(p))
    numbers = {"lr": 1e-2, "beta1": 0.8, "eps": 1e-4}
    optimizer = SelectivePlasticityOptimizer(
        [parameter], warmup_steps=4, alignment_threshold=threshold, **numbers, **path
    )
    optimizer.observe_surprise(0.5)
    for t in range(1, 12):
        g = RNG.normal(size=p.shape)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        others = {"decay": 0.99, "k": 5.0, "warmup": 4, "weight": 0.3, "threshold": threshold}
        reference.optimizer_step(p, g, m, v, c, t, 0.5, **numbers, **others)
        np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=1e-12)
        if t in (4, 8):  # the end of a task
            optimizer.consolidate()
            c = np.maximum(v / v.mean(), 0 if c is None else c)
