"""The optimizer against torch's Adam, against a numpy version of its rule, and against bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer

from conftest import mlp, weights


def train(model, optimizer, images, labels, steps=5):
    for i in range(steps):
        batch = slice(20 * i, 20 * (i + 1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return weights(model)


@pytest.fixture(scope="module")
def batch(request):
    split2 = request.getfixturevalue("split2")
    x, y, _ = split2.train_stream[0].dataset.read_batch(list(range(200)))
    return x, y


def reference_step(p, g, m, v, t, s, *, lr=1e-3, decay=0.99, k=5.0, warmup=1000, weight=0.3, threshold=0.1):
    """The docstring's equations, one synapse at a time."""
    m[:] = 0.9 * m + 0.1 * g
    v[:] = decay * v + (1 - decay) * g**2
    mean = np.sqrt(v).mean()
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - decay**t)
    k = k * min(1, t / warmup) * (1 - weight * s)
    for i in np.ndindex(p.shape):
        e = np.sqrt(v[i]) / mean
        gate = 1 / (1 + k * e * (g[i] * m_hat[i] / v_hat[i] <= threshold))
        p[i] -= lr * gate * m_hat[i] / (np.sqrt(v_hat[i]) + 1e-8)


def test_equals_the_reference():
    rng = np.random.default_rng(0)
    p = rng.normal(size=(4, 3))
    parameter = nn.Parameter(torch.tensor(p))
    optimizer = SelectivePlasticityOptimizer([parameter], warmup_steps=4)
    optimizer.observe_surprise(0.5)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(1, 9):
        g = rng.normal(size=p.shape)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        reference_step(p, g, m, v, t, 0.5, warmup=4)
        np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=1e-12)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_gate_it_is_adam_bit_for_bit(batch, maximize, weight_decay):
    ours, theirs = mlp(), mlp()
    kwargs = {"lr": 1e-3, "weight_decay": weight_decay, "maximize": maximize}
    a = SelectivePlasticityOptimizer(ours.parameters(), plasticity_k=0, trace_decay=0.99, **kwargs)
    b = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.99), foreach=False, **kwargs)
    for _ in range(3):
        assert torch.equal(train(ours, a, *batch), train(theirs, b, *batch))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-3},
        {"trace_decay": 0.9},
        {"plasticity_k": 1.0},
        {"warmup_steps": 0},
        {"surprise_weight": 1.0},
        {"alignment_threshold": 2.0},
        {"beta1": 0.5},
        {"eps": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_has_an_effect(batch, change):
    trained = []
    for kwargs in ({}, change):
        model = mlp()
        optimizer = SelectivePlasticityOptimizer(model.parameters(), **{"warmup_steps": 4, **kwargs})
        optimizer.observe_surprise(0.8)
        trained.append(train(model, optimizer, *batch))
    assert not torch.equal(*trained)


def test_no_state_beyond_adams(batch):
    model = mlp()
    optimizer = SelectivePlasticityOptimizer(model.parameters())
    train(model, optimizer, *batch)
    for p in model.parameters():
        assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_scale_of_the_loss_does_not_matter():
    results = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(50, dtype=torch.float64))
        optimizer = SelectivePlasticityOptimizer([p], lr=0.01, warmup_steps=5, eps=0)
        for _ in range(10):
            p.grad = scale * torch.randn(50, dtype=torch.float64)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_lr_zero_and_zero_gradients_change_nothing(batch):
    model = mlp()
    before = weights(model)
    assert torch.equal(train(model, SelectivePlasticityOptimizer(model.parameters(), lr=0.0), *batch), before)
    optimizer = SelectivePlasticityOptimizer(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weights(model), before)


def test_parameters_without_gradient_are_left_alone():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SelectivePlasticityOptimizer([a, b])
    a.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(b.detach(), torch.ones(3)) and not optimizer.state[b]


def test_groups_have_their_own_settings(batch):
    both = []
    for k in (0.0, 5.0):
        model = mlp()
        optimizer = SelectivePlasticityOptimizer(
            [{"params": model[1].parameters(), "plasticity_k": k}, {"params": model[3].parameters()}],
            warmup_steps=0,
            alignment_threshold=100.0,  # nothing is exempt, from the first step on
        )
        train(model, optimizer, *batch, steps=1)
        both.append(model)
    assert not torch.equal(both[0][1].weight, both[1][1].weight)
    assert torch.equal(both[0][3].weight, both[1][3].weight)


def test_surprise_opens_the_gate():
    moved = []
    for surprise in (0.0, 1.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(100))
        optimizer = SelectivePlasticityOptimizer([p], warmup_steps=0, alignment_threshold=100.0)
        optimizer.observe_surprise(surprise)
        p.grad = torch.randn(100)
        optimizer.step()
        moved.append(p.detach().abs())
    assert (moved[1] > moved[0]).all()


def test_closure_and_state_dict_resume_bit_for_bit(batch):
    whole, halves = mlp(), mlp()
    a = SelectivePlasticityOptimizer(whole.parameters())
    b = SelectivePlasticityOptimizer(halves.parameters())
    train(whole, a, *batch)
    train(halves, b, *batch)
    saved = copy.deepcopy((halves.state_dict(), b.state_dict()))
    resumed = mlp(seed=1)
    c = SelectivePlasticityOptimizer(resumed.parameters(), lr=9.0)
    resumed.load_state_dict(saved[0])
    c.load_state_dict(saved[1])
    assert torch.equal(train(whole, a, *batch), train(resumed, c, *batch))

    p = nn.Parameter(torch.ones(1))
    optimizer = SelectivePlasticityOptimizer([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1.0 and p < 1


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"lr": -1.0}, "Invalid lr value: -1.0"),
        ({"lr": float("nan")}, "Invalid lr value: nan"),
        ({"plasticity_k": -1}, "Invalid plasticity_k value: -1 (allowed: 0 or more)"),
        ({"trace_decay": 1.5}, "Invalid trace_decay value: 1.5 (allowed: 0 <= trace_decay < 1)"),
        ({"beta1": 1.0}, "Invalid beta1 value: 1.0"),
        ({"warmup_steps": -5}, "Invalid warmup_steps value: -5"),
        ({"surprise_weight": 1.1}, "Invalid surprise_weight value: 1.1 (allowed: 0 to 1)"),
        ({"alignment_threshold": float("inf")}, "Invalid alignment_threshold value: inf"),
        ({"eps": -1e-8}, "Invalid eps value: -1e-08"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError) as error:
        SelectivePlasticityOptimizer([parameter], **kwargs)
    assert words in str(error.value)
    with pytest.raises(ValueError):
        SelectivePlasticityOptimizer([{"params": [parameter], **kwargs}])


def test_bad_surprise_is_named():
    optimizer = SelectivePlasticityOptimizer([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="Invalid surprise value: 2.0"):
        optimizer.observe_surprise(2.0)


@pytest.mark.parametrize(
    "bad, word",
    [
        (math.nan, "NaN"),
        (math.inf, "infinity"),
        (-math.inf, "infinity"),
        (3e38, "a value whose square overflows torch.float32"),
    ],
)
def test_non_finite_gradients_raise_and_leave_everything_untouched(batch, bad, word):
    model = mlp()
    optimizer = SelectivePlasticityOptimizer(model.parameters())
    train(model, optimizer, *batch, steps=2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].weight.grad[0, 0] = bad
    with pytest.raises(FloatingPointError, match=f"{word} in the gradient of parameter 2 .* step 3"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state["state"][index][name])


@pytest.mark.parametrize("huge", [1e18, 1.5e19])  # the sum of squares of the second overflows
def test_huge_but_finite_gradients_are_accepted(huge):
    p = nn.Parameter(torch.ones(4))
    optimizer = SelectivePlasticityOptimizer([p])
    p.grad = torch.full((4,), huge)
    optimizer.step()
    assert p.isfinite().all() and optimizer.state[p]["exp_avg_sq"].isfinite().all()


def test_sparse_and_complex_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        SelectivePlasticityOptimizer(embedding.parameters()).step()
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        SelectivePlasticityOptimizer([p]).step()
