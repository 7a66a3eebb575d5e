"""Statements 1 to 3 of docs/theory.md in numbers: that they hold, and that a smaller bound would not.

Each test's name begins with the statements that it checks.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from avalanche_sp import SelectivePlasticityPlugin, reference

from conftest import ROOT, strategy_of
from theory import (
    HOLDS,
    KAPPA,
    TIGHT,
    consolidate,
    error,
    eye,
    fixed,
    inputs,
    largest,
    normal,
    olds,
    seeds,
    solve,
    squared_error,
    with_spectrum,
)

# -- 1. The gate is a soft projection ----------------------------------------------------------------------------------


@fixed
@given(olds(), seeds)
def test_1_the_gate_is_a_damped_inverse(old, seed):
    d, v, f, m = len(old.vectors), old.vectors, old.closed, old.floor
    definition = v @ torch.diag(1 - f) @ v.T + (1 - old.closed_rest) * (eye(d) - v @ v.T)
    torch.testing.assert_close(old.gate, definition)
    torch.testing.assert_close(old.gate, m * torch.linalg.inv(old.modelled + m * eye(d)))
    spectrum = torch.linalg.eigvalsh(old.gate)
    assert 0 < spectrum[0] and spectrum[-1] < HOLDS
    if old.gate_rest:
        torch.testing.assert_close(old.gate, reference.gate_matrix(old.values, old.vectors, old.mean, old.openness))
        assert torch.trace(old.modelled) == pytest.approx(torch.trace(old.second_moment).item())
    delta, x = normal(seed, 5, 3), normal(seed + 1, 5, d)  # a gradient is gated as the identity is
    torch.testing.assert_close(old.gated(delta, x), delta.T @ x @ definition)


@fixed
@given(olds(all_kept=True))
def test_1_with_all_directions_kept_it_is_owms_projector(old):
    a, n = old.x.T, len(old.x)
    owm = eye(len(a)) - a @ torch.linalg.inv(a.T @ a + n * old.floor * eye(n)) @ a.T
    torch.testing.assert_close(old.gate, owm)


@fixed
@given(olds(), seeds)
def test_1_the_gated_step_weighs_the_new_loss_against_the_change_of_old_answers(old, seed):
    delta, x, eta = normal(seed, 5, 3), normal(seed + 1, 5, len(old.vectors)), 0.3
    gradient = delta.T @ x

    def objective(step):
        change = torch.trace(step @ old.modelled @ step.T) / old.floor
        return (gradient * step).sum() + (step.square().sum() + change) / (2 * eta)

    step = (-eta * old.gated(delta, x)).requires_grad_()
    (slope,) = torch.autograd.grad(objective(step), step)
    assert slope.norm() < 1e-9 * gradient.norm()  # the objective is strictly convex: this is its minimum


@fixed
@given(olds())
def test_1_limits_of_the_openness(old):
    d, r = old.vectors.shape
    hard = eye(d) - old.vectors @ old.vectors.T
    distance = max(float(1 - old.closed.min()), float(old.closed_rest) if r < d else 0)
    assert torch.linalg.matrix_norm(old.gate - hard, 2) == pytest.approx(distance, abs=1e-9)
    assert torch.linalg.matrix_norm(eye(d) - old.gate, 2) <= d / (d + old.openness) * HOLDS
    old.openness = float("inf")
    assert torch.equal(old.gate, eye(d))


def test_1_limits_of_the_openness_are_reached():
    all_in_one = with_spectrum([0, 0, 0, 1], rank=1, openness=2.0)  # nothing discarded, one direction kept
    assert torch.linalg.matrix_norm(eye(4) - all_in_one.gate, 2) > TIGHT * 4 / (4 + 2)
    all_in_one.openness = 1e-9
    torch.testing.assert_close(all_in_one.gate, eye(4) - all_in_one.vectors @ all_in_one.vectors.T)  # GPM
    some_discarded = with_spectrum([0, 0.1, 1, 1], rank=2, openness=1e-9)
    assert torch.linalg.matrix_norm(some_discarded.gate, 2) < 1e-6  # closed for everything
    some_discarded.gate_rest = False
    torch.testing.assert_close(some_discarded.gate, eye(4) - some_discarded.vectors @ some_discarded.vectors.T)


@fixed
@given(olds())
def test_1_the_gate_never_fills_up(old):
    d = len(old.vectors)
    assert torch.trace(eye(d) - old.gate) <= d / (1 + old.openness) * HOLDS


def test_1_the_gate_is_fullest_where_all_eigenvalues_are_equal():
    old = with_spectrum([1, 1, 1, 1], rank=2, openness=0.5)
    assert torch.trace(eye(4) - old.gate) > TIGHT * 4 / 1.5


@fixed
@given(olds(), st.floats(-3, 3), seeds)
def test_1_the_gate_is_free_of_scale_and_turns_with_the_inputs(old, scale, seed):
    d, r = old.vectors.shape
    turn = torch.linalg.qr(normal(seed, d, d)).Q
    other = consolidate(10**scale * old.x @ turn.T, rank=r, openness=old.openness)
    other.gate_rest = old.gate_rest
    if old.values[0] - largest(old.discarded) > 1e-3 * old.values[-1]:  # else rounding decides which ones are kept
        torch.testing.assert_close(other.gate, turn @ old.gate @ turn.T, rtol=1e-6, atol=1e-8)


# -- 2. Change of the old answers --------------------------------------------------------------------------------------


@fixed
@given(olds(), seeds, st.integers(1, 12))
def test_2a_the_change_of_old_answers_is_bounded(old, seed, steps):
    d = len(old.vectors)
    drift, total, path = torch.zeros(3, d).double(), torch.zeros(3, d).double(), 0.0
    for t in range(steps):  # any errors, any new inputs
        delta, x = normal(seed + 2 * t, 4, 3), inputs(seed + 2 * t + 1, 4, d)
        drift = drift - 0.1 * old.gated(delta, x)
        total = total + 0.1 * delta.T @ x
        path += 0.1 * (delta.T @ x).norm()
    kept = ((1 - old.closed) ** 2 * old.values * (total @ old.vectors).square().sum(0)).sum()
    rest = (1 - old.closed_rest) ** 2 * torch.trace(total @ old.discarded @ total.T)
    torch.testing.assert_close(old.change(drift).square(), kept + rest)
    assert old.change(drift) <= total.norm() * old.factor() * HOLDS <= path * old.factor() * HOLDS**2
    if old.rest > 1e-9 * old.mean:
        unevenness = largest(old.discarded) / old.rest
        assert old.factor() <= (unevenness * old.floor).sqrt() / 2 * HOLDS


@pytest.mark.parametrize(
    "spectrum, rank, openness, worst",
    [
        ([0.5, 1.0, 2.0, 4.5], 4, 1.0, 2),  # a kept direction with lambda = m = 2
        ([0, 0, 0, 0, 0, 0, 4.0, 100.0], 1, 0.01, 6),  # the strongest discarded direction
        ([0, 0, 0, 4.0, 100.0], 1, 1 / 20.8, 3),  # the same with rho = m
    ],
)
def test_2a_the_bound_is_reached(spectrum, rank, openness, worst):
    old = with_spectrum(spectrum, rank, openness)
    direction = torch.linalg.eigh(old.second_moment).eigenvectors[:, worst]
    drift = sum(-0.1 * old.gated(torch.ones(1, 1).double(), direction[None]) for _ in range(5))
    bound = 0.5 * old.factor()
    assert TIGHT * bound < old.change(drift) <= bound * HOLDS
    if openness == 1 / 20.8:
        torch.testing.assert_close(bound, 0.5 * (4 * old.floor).sqrt() / 2)  # unevenness 4


@fixed
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(3, 12), st.floats(-3, 2), seeds, st.data())
def test_2b_after_several_experiences(sizes, d, openness, seed, data):
    parts = [inputs(seed + 2 * i, n, d) for i, n in enumerate(sizes)]
    old = consolidate(*parts, rank=data.draw(st.integers(1, d)), openness=10**openness)
    r, tiny = old.vectors.shape[1], 1e-9 * d * old.mean
    assert torch.linalg.eigvalsh(old.discarded)[0] > -tiny
    assert abs(torch.trace(old.discarded) - old.rest * (d - r)) < tiny
    assert largest(old.discarded) < old.dropped + tiny
    total = normal(seed + 99, 3, d)
    change, openest = old.change(old.projected(total)), torch.linalg.matrix_norm(old.gate, 2)
    assert change <= total.norm() * (old.floor / 4 + openest**2 * old.dropped).sqrt() * HOLDS
    first = (parts[0] @ old.projected(total).T).square().sum(1).mean().sqrt()
    assert first <= change * (len(old.x) / len(parts[0])) ** 0.5 * HOLDS


def test_2b_after_several_experiences_one_may_bear_all_of_the_change():
    d = 4
    first, second = torch.zeros(10, d).double(), torch.zeros(90, d).double()
    first[:, 0], second[:, 1] = 1, 1
    old = consolidate(first, second, rank=d, openness=0.5)
    drift = old.projected(eye(d)[:1])
    borne = (first @ drift.T).square().sum(1).mean().sqrt()
    assert borne > TIGHT * old.change(drift) * 10**0.5


@settings(fixed, max_examples=15)
@given(st.lists(st.integers(1, 8), min_size=3, max_size=5), st.integers(1, 6), st.floats(-3, 1), seeds)
def test_2c_through_several_layers(widths, rank, openness, seed):
    """A ReLU network with biases, all layers gated, every layer consolidated once."""

    def forward(weights, x):
        taken, z = [], x
        for i, w in enumerate(weights):
            h = z.relu() if i else z
            taken.append(torch.cat([h, torch.ones(len(h), 1).double()], dim=1))
            z = taken[-1] @ w.T
        return taken, z

    start = [normal(seed + i, after, before + 1) for i, (before, after) in enumerate(itertools.pairwise(widths))]
    x, x_new = normal(seed + 10, 20, widths[0]), normal(seed + 11, 20, widths[0])
    inputs_of_layers, z = forward(start, x)
    layers = [consolidate(taken, rank=rank, openness=10**openness) for taken in inputs_of_layers]
    weights, paths = start, [0.0] * len(start)
    for _ in range(5):
        weights = [w.detach().requires_grad_() for w in weights]
        gradients = torch.autograd.grad((forward(weights, x_new)[1] - 1).square().mean(), weights)
        paths = [path + 0.01 * g.norm() for path, g in zip(paths, gradients)]
        weights = [w.detach() - 0.01 * old.projected(g) for w, old, g in zip(weights, layers, gradients)]
    bound = 0.0
    for w, old, path in zip(weights, layers, paths):
        bound = path * old.factor() + torch.linalg.matrix_norm(w[:, :-1], 2) * bound
    assert (forward(weights, x)[1] - z).square().sum(1).mean().sqrt() <= bound * HOLDS


def test_2c_the_bound_is_reached_where_a_layer_holds_still_and_its_inputs_move():
    """The upper layer is left alone, so its own bound is 0."""
    old = with_spectrum([0.5, 1.0, 2.0, 4.5], rank=4, openness=1.0)
    worst, unit = torch.linalg.eigh(old.second_moment).eigenvectors[:, 2], normal(0, 3, 1)
    unit = unit / unit.norm()
    lower = torch.linalg.solve(old.x, 10 * torch.ones(4, 3).double()).T  # all pre-activations are 10: no ReLU is off
    moved, upper = lower - old.projected(unit @ worst[None]), 5 * unit.T
    answers = (old.x @ moved.T).relu() @ upper.T - (old.x @ lower.T).relu() @ upper.T
    change = answers.square().sum(1).mean().sqrt()
    assert TIGHT * 5 * old.factor() < change <= 5 * old.factor() * HOLDS


def images(benchmark) -> list[tuple[Tensor, Tensor]]:
    """Inputs, with the bias's 1, and one-hot targets of each experience."""
    out = []
    for experience in benchmark.train_stream:
        x, y, *_ = experience.dataset.read_batch(list(range(600)))
        x = torch.cat([x.flatten(1), torch.ones(len(x), 1)], dim=1).double()
        out.append((x, nn.functional.one_hot(y, 10).double()))
    return out


def test_2a_and_3a_on_real_images(split2):
    """One linear layer knows 0 to 4 and learns 5 to 9 by gated SGD in batches of 20."""
    (x, y), (x_new, y_new) = images(split2)
    old = consolidate(x, rank=100, openness=0.2)
    start = solve(old.second_moment + 0.1 * eye(785), y.T @ x / len(x))

    def learn(gated: bool):
        w, path = start, 0.0
        for rows in torch.arange(600).split(20) * 2:
            delta, x_t = error(w, x_new[rows], y_new[rows]), x_new[rows]
            path += 0.002 * (delta.T @ x_t).norm()
            w = w - 0.002 * (old.gated(delta, x_t) if gated else delta.T @ x_t)
        return w, path

    w, path = learn(gated=True)
    bound = path * old.factor()
    assert bound / 30 < old.change(w - start) < bound
    assert squared_error(w, x, y).sqrt() < squared_error(start, x, y).sqrt() + (KAPPA / 2) ** 0.5 * bound
    assert squared_error(w, x_new, y_new) < 0.7 * squared_error(start, x_new, y_new)  # it does learn
    w, path = learn(gated=False)
    assert old.change(w - start) > path * old.factor()


class Path(SupervisedPlugin):
    """Sum of the step sizes times the ungated gradients' norms: the gate acts later, in the optimizer's step."""

    length = 0.0

    def after_backward(self, strategy, **kwargs):
        gradients = [p.grad.flatten() for p in strategy.model.parameters()]
        self.length += strategy.optimizer.param_groups[0]["lr"] * float(torch.cat(gradients).norm())


@pytest.mark.parametrize("openness", [0.2, float("inf")])
def test_2a_with_the_plugin_on_real_images(split2, openness):
    """The same by a strategy. The bound is the one that holds for f_rest = 0 already."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    path, plugin = Path(), SelectivePlasticityPlugin(openness=openness, pull_back=0, rank=200, readout_step=False)
    strategy = strategy_of(model, [path, plugin], optimizer=torch.optim.SGD(model.parameters(), lr=0.002), batch=20)
    strategy.train(split2.train_stream[0])
    x = images(split2)[0][0]
    before, path.length = model[1](x[:, :-1].float()).detach(), 0.0
    strategy.train(split2.train_stream[1])
    change = (model[1](x[:, :-1].float()) - before).square().sum(1).mean().sqrt()
    old = consolidate(x, rank=200, openness=0.2)
    bound = path.length * max(old.floor.sqrt() / 2, largest(old.discarded).sqrt())
    assert change < bound if openness == 0.2 else change > bound


# -- 3. Forgetting of a linear layer -----------------------------------------------------------------------------------


@fixed
@given(olds(), seeds)
def test_3a_the_old_loss_is_exactly_quadratic(old, seed):
    d = len(old.vectors)
    y, start, drift = normal(seed, len(old.x), 3), normal(seed + 1, 3, d), normal(seed + 2, 3, d)
    gradient = error(start, old.x, y).T @ old.x
    quadratic = KAPPA / 2 * old.change(drift) ** 2
    expected = squared_error(start, old.x, y) + (gradient * drift).sum() + quadratic
    torch.testing.assert_close(squared_error(start + drift, old.x, y), expected)
    minimum = torch.linalg.lstsq(old.x, y, driver="gelsd").solution.T
    forgetting = squared_error(minimum + drift, old.x, y) - squared_error(minimum, old.x, y)
    torch.testing.assert_close(forgetting, quadratic)


@fixed
@given(olds(), seeds)
def test_3a_forgetting_is_bounded(old, seed):
    d = len(old.vectors)
    y, start, total = normal(seed, len(old.x), 3), normal(seed + 1, 3, d), normal(seed + 2, 3, d)
    end = squared_error(start - old.projected(total), old.x, y)
    added = (KAPPA / 2) ** 0.5 * total.norm() * old.factor()
    assert end.sqrt() <= (squared_error(start, old.x, y).sqrt() + added) * HOLDS


def test_3a_the_bound_is_reached():
    old = with_spectrum([0.5, 1.0, 2.0, 4.5], rank=4, openness=1.0)
    start, total = normal(0, 1, 4), torch.linalg.eigh(old.second_moment).eigenvectors[:, 2][None]
    drift = -old.projected(total)
    y = old.x @ (start - 0.5 * drift).T  # the first error points the way that the answers drift
    bound = squared_error(start, old.x, y).sqrt() + (KAPPA / 2) ** 0.5 * total.norm() * old.factor()
    assert TIGHT * bound < squared_error(start + drift, old.x, y).sqrt() <= bound * HOLDS


@fixed
@given(olds(), seeds, st.floats(-1, 1))
def test_3b_classes_change_no_more_often_than_their_margins_allow(old, seed, log_margin):
    start, total = normal(seed, 3, len(old.vectors)), 10**log_margin * normal(seed + 1, 3, len(old.vectors))
    drift, answers = -old.projected(total), old.x @ start.T
    changed = (answers.argmax(1) != (answers + old.x @ drift.T).argmax(1)).double().mean()
    best = answers.topk(2).values
    for margin in (0.1, 0.3, 1.0, 3.0):
        narrow = (best[:, 0] - best[:, 1] < margin).double().mean()
        assert changed <= narrow + 2 * (total.norm() * old.factor() / margin) ** 2


def test_3b_the_share_is_reached():
    old = with_spectrum([1.0, 1.0], rank=2, openness=1.0)
    answers = torch.tensor([0.99, 0.0]).double().expand(2, 2)  # both old inputs have this margin
    moved = torch.tensor([-0.5, 0.5]).double().expand(2, 2)  # just enough
    drift = old.projected(2 * torch.linalg.solve(old.x, moved).T)  # lambda = m: the gate halves
    changed = (answers.argmax(1) != (answers + old.x @ drift.T).argmax(1)).double().mean()
    bound = 2 * old.change(drift) ** 2 / 0.99**2
    assert TIGHT * bound < changed <= bound * HOLDS


# -- The page ----------------------------------------------------------------------------------------------------------


def test_every_statement_has_a_test_and_every_test_a_statement():
    page = (ROOT / "docs" / "theory.md").read_text()
    files = "".join(path.read_text() for path in (ROOT / "tests").glob("test_theory*.py"))
    tests = " ".join(re.findall(r"^def (test_\d\w+)", files, re.MULTILINE))
    assert set(re.findall(r"`test_(\d[a-e]?)`", page)) == set(re.findall(r"_(\d[a-e]?)(?=_)", tests))
