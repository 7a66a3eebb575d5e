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


def reference_step(p, g, m, v, c, t, s, *, lr=1e-3, decay=0.99, k=5.0, warmup=1000, weight=0.3, threshold=math.inf):
    """The docstring's equations, one synapse at a time."""
    m[:] = 0.9 * m + 0.1 * g
    v[:] = decay * v + (1 - decay) * g**2
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - decay**t)
    k = k * (1 - weight * s) * (1 if c is not None else min(1, t / warmup))
    for i in np.ndindex(p.shape):
        e = v[i] / v.mean() if c is None else c[i]
        gate = 1 / (1 + k * e * (g[i] * m_hat[i] / v_hat[i] <= threshold))
        p[i] -= lr * gate * m_hat[i] / (np.sqrt(v_hat[i]) + 1e-8)


@pytest.mark.parametrize("threshold", [math.inf, 0.1])
@pytest.mark.parametrize("path", [{"foreach": False}, {}])
def test_equals_the_reference(path, threshold):
    rng = np.random.default_rng(0)
    p = rng.normal(size=(4, 3))
    parameter = nn.Parameter(torch.tensor(p))
    optimizer = SelectivePlasticityOptimizer([parameter], warmup_steps=4, alignment_threshold=threshold, **path)
    optimizer.observe_surprise(0.5)
    m, v, c = np.zeros_like(p), np.zeros_like(p), None
    for t in range(1, 15):
        g = rng.normal(size=p.shape)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        reference_step(p, g, m, v, c, t, 0.5, warmup=4, threshold=threshold)
        np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=1e-12)
        if t in (6, 10):  # the end of a task
            optimizer.consolidate()
            c = np.maximum(v / v.mean(), 0 if c is None else c)
            np.testing.assert_allclose(optimizer.get_param_eligibility(parameter).numpy(), c, rtol=1e-12)


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_gate_it_is_adam_bit_for_bit(batch, maximize, weight_decay, path):
    ours, theirs = mlp(), mlp()
    kwargs = {"lr": 1e-3, "weight_decay": weight_decay, "maximize": maximize, **path}
    a = SelectivePlasticityOptimizer(ours.parameters(), plasticity_k=0, trace_decay=0.99, **kwargs)
    b = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.99), **kwargs)
    for _ in range(3):
        assert torch.equal(train(ours, a, *batch), train(theirs, b, *batch))
        a.consolidate()  # nothing to hold on to where the gate is off


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-3},
        {"trace_decay": 0.9},
        {"plasticity_k": 1.0},
        {"warmup_steps": 0},
        {"surprise_weight": 1.0},
        {"alignment_threshold": 0.1},
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
    optimizer.consolidate()
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
        )
        train(model, optimizer, *batch, steps=1)
        both.append(model)
    assert not torch.equal(both[0][1].weight, both[1][1].weight)
    assert torch.equal(both[0][3].weight, both[1][3].weight)


def test_consolidated_synapses_resist_and_the_others_do_not():
    moved = []
    for consolidating in (False, True):
        p = nn.Parameter(torch.zeros(100))
        optimizer = SelectivePlasticityOptimizer([p], lr=0.1)
        for task in range(2):
            used = slice(0, 50) if task == 0 else slice(0, 100)
            for _ in range(5):
                p.grad = torch.zeros(100)
                p.grad[used] = 1.0
                optimizer.step()
            if consolidating and task == 0:
                optimizer.consolidate()
                learned = p.detach().clone()
            elif task == 0:
                learned = p.detach().clone()
        moved.append((p - learned).detach().abs())
    assert (moved[1][:50] < moved[0][:50] / 5).all()  # k = 5, e = 2: a gate of 1 / 11
    assert (moved[1][50:] >= moved[0][50:]).all()


def test_consolidation_remembers_the_task_that_a_synapse_mattered_to_most():
    p = nn.Parameter(torch.zeros(2))
    optimizer = SelectivePlasticityOptimizer([p])
    for gradient in ((3.0, 1.0), (1.0, 1.0), (0.0, 1e-3)):  # the loss's scale does not count
        if optimizer.state[p]:
            optimizer.state[p]["exp_avg_sq"].zero_()
        p.grad = torch.tensor(gradient)
        optimizer.step()
        optimizer.consolidate()
    torch.testing.assert_close(optimizer.get_param_eligibility(p), torch.tensor([1.8, 2.0]))


def test_diagnostics_say_what_the_gate_does():
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))
    optimizer = SelectivePlasticityOptimizer([("a", a), ("b", b)], warmup_steps=10)
    assert optimizer.get_diagnostics()["a"]["openness"] == 1.0
    a.grad = torch.tensor([2.0, 0.0, 0.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(optimizer.get_param_eligibility(a), torch.tensor([4.0, 0.0, 0.0, 0.0]))
    found = optimizer.get_diagnostics()
    assert found["a"]["openness"] == pytest.approx((1 / (1 + 5 * 0.1 * 4) + 3) / 4)
    assert found["a"]["step"] == 1 and found["a"]["consolidated"] == 0 and found["a"]["max_eligibility"] == 4
    optimizer.consolidate()
    optimizer.observe_surprise(1.0)
    found = optimizer.get_diagnostics()
    assert found["a"]["openness"] == pytest.approx((1 / (1 + 5 * 0.7 * 4) + 3) / 4)
    assert found["a"]["protected"] == 0.25 and found["a"]["consolidated"] == 1 and found["a"]["surprise"] == 1
    assert found["b"]["step"] == 0 and found["b"]["openness"] == 1.0
    optimizer.reset_eligibility()
    assert not optimizer.get_param_eligibility(a).any() and optimizer.get_diagnostics()["a"]["step"] == 0
    with pytest.raises(ValueError, match="Invalid param"):
        optimizer.get_param_eligibility(torch.zeros(4))


PATHS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": True, "plasticity_k": 0.0}]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [3, 500])
def test_a_state_of_another_shape_is_refused_before_anything_is_updated(path, width):
    first, second = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, out)) for out in (5, width))
    optimizers = [SelectivePlasticityOptimizer(model.parameters(), **path) for model in (first, second)]
    first(torch.ones(2, 4)).sum().backward()
    if path != PATHS[3]:  # whose compilation takes long
        optimizers[0].step()
        optimizers[0].consolidate()
        state = optimizers[0].state_dict()
    else:
        plain = SelectivePlasticityOptimizer(first.parameters())
        plain.step()
        state = plain.state_dict()
        state["param_groups"][0]["fused"] = True
    optimizers[1].load_state_dict(state)
    second(torch.ones(2, 4)).sum().backward()
    before = weights(second)
    with pytest.raises(RuntimeError, match=rf"exp_avg of parameter 2 has shape \(5, 8\), .* has shape \({width}, 8\)"):
        optimizers[1].step()
    assert torch.equal(weights(second), before)


def test_a_gradient_of_another_shape_is_refused():
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.ones(5)
    p.data = torch.zeros(500)
    with pytest.raises(RuntimeError, match=r"grad of parameter 0 has shape \(5,\), .* has shape \(500,\)"):
        SelectivePlasticityOptimizer([p]).step()


@pytest.mark.parametrize("path", PATHS)
def test_a_parameter_without_elements_steps(path):
    empty, full = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(3))
    optimizer = SelectivePlasticityOptimizer([empty, full], **path)
    for _ in range(2):
        empty.grad, full.grad = torch.zeros(0, 3), torch.ones(3)
        optimizer.step()
        optimizer.consolidate()
    assert (full < 1).all()
    assert list(optimizer.get_diagnostics()) == ["1"] and optimizer.get_param_eligibility(empty).shape == (0, 3)


def test_surprise_opens_the_gate():
    moved = []
    for surprise in (0.0, 1.0):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(100))
        optimizer = SelectivePlasticityOptimizer([p], warmup_steps=0)
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
        ({"alignment_threshold": math.nan}, "Invalid alignment_threshold value: nan"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "lr as a Tensor is not supported for foreach=True"),
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together."),
        ({"nonfinite": "ignore"}, "Invalid nonfinite value: 'ignore' (allowed: 'raise' or 'skip')"),
        ({"eps": -1e-8}, "Invalid eps value: -1e-08"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"lr": "0.1"}, "Invalid lr value: '0.1' (allowed: 0 or more)"),
        ({"plasticity_k": None}, "Invalid plasticity_k value: None (allowed: 0 or more)"),
        ({"trace_decay": "0.9"}, "Invalid trace_decay value: '0.9'"),
        ({"surprise_weight": None}, "Invalid surprise_weight value: None"),
        ({"alignment_threshold": "inf"}, "Invalid alignment_threshold value: 'inf'"),
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
    for bad in (2.0, "0.5", None):
        with pytest.raises(ValueError, match=f"Invalid surprise value: {bad!r}"):
            optimizer.observe_surprise(bad)


def test_it_can_be_built_from_the_defaults_of_another(batch):
    model = mlp()
    first = SelectivePlasticityOptimizer(model.parameters(), lr=3e-3, plasticity_k=2, nonfinite="skip")
    first.observe_surprise(0.5)
    second = SelectivePlasticityOptimizer(model.parameters(), **first.defaults)
    assert second.defaults == first.defaults
    assert second.param_groups[0]["surprise"] == 0.0  # the surprise is of the stream, not a setting
    train(model, second, *batch)


@pytest.mark.parametrize(
    "with_gate, expected",
    [
        (False, {"lr": 3e-3, "plasticity_k": 5.0, "beta1": 0.0, "eps": 1e-3}),
        (True, {"lr": 1e-3, "plasticity_k": 1.0, "beta1": 0.0, "eps": 1e-3}),
    ],
)
def test_presets_for_continual_learning(with_gate, expected):
    p = nn.Parameter(torch.ones(1))
    preset = SelectivePlasticityOptimizer.for_continual_learning([p], with_gate=with_gate)
    assert preset.defaults == SelectivePlasticityOptimizer([p], **expected).defaults
    changed = SelectivePlasticityOptimizer.for_continual_learning([p], with_gate=with_gate, lr=0.1, weight_decay=0.2)
    assert changed.defaults == {**preset.defaults, "lr": 0.1, "weight_decay": 0.2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_step_count_does_not_depend_on_the_default_dtype(dtype):
    p = nn.Parameter(torch.ones(4))
    torch.set_default_dtype(dtype)
    try:
        optimizer = SelectivePlasticityOptimizer([p])
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].dtype == torch.float32 and optimizer.state[p]["step"] == 300


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

    def untouched():
        after = optimizer.state_dict()["state"]
        same = (torch.equal(v, state["state"][i][name]) for i in after for name, v in after[i].items())
        return torch.equal(weights(model), before) and all(same)

    with pytest.raises(FloatingPointError, match=f"{word} in the gradient of parameter 2 .* step 3"):
        optimizer.step()
    assert untouched()

    for group in optimizer.param_groups:
        group["nonfinite"] = "skip"
    with pytest.warns(UserWarning, match=f"{word} in the gradient of parameter 2 .* step 3"):
        optimizer.step()
    assert untouched()


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
