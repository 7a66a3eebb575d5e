"""Every fast path of the optimizer against the plain loop, over shapes, dtypes, strides and odd gradients."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer
from avalanche_sp.optim import functional

LOOP = {"foreach": False}
FAST = [{}, {"foreach": True}, {"fused": True}]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def laid_out(shape, layout):
    """A tensor of the shape with other strides than the usual ones."""
    t = torch.randn(shape)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.randn(*shape, 2)[..., 0]
    return t


def trained(path, shapes, dtype, layouts, gradients, seed, consolidate_at, **kwargs):
    torch.manual_seed(seed)
    params = [nn.Parameter(laid_out(s, a).to(dtype)) for s, (a, _) in zip(shapes, layouts)]
    optimizer = SelectivePlasticityOptimizer(params, **kwargs, **path)
    for t, kinds in enumerate(gradients):
        for p, shape, kind, (_, layout) in zip(params, shapes, kinds, layouts):
            size = {"none": None, "zero": 0.0, "usual": 1.0, "huge": 1e15, "tiny": 1e-15}[kind]
            p.grad = None if size is None else (laid_out(shape, layout) * size).to(dtype)
        optimizer.step()
        if t == consolidate_at:
            optimizer.consolidate()
    return params, [optimizer.state[p] for p in params]


def assert_same(one, other, dtype):
    rtol = TOLERANCE[dtype]
    for a, b in zip(one[0], other[0]):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    for a, b in zip(one[1], other[1]):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=0 if name == "step" else math.inf)


shape = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)
layout = st.sampled_from(["usual", "channels_last", "transposed", "strided"])
gradient = st.sampled_from(["none", "zero", "usual", "usual", "huge", "tiny"])
SETTINGS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "plasticity_k": st.sampled_from([0.0, 1.0, 10.0]),
        "warmup_steps": st.sampled_from([0, 3]),
        "alignment_threshold": st.sampled_from([math.inf, -math.log(3)]),
        "beta1": st.sampled_from([0.0, 0.9]),
        "eps": st.sampled_from([1e-8, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
)


@pytest.mark.parametrize("path", FAST[:2], ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fast_paths_equal_the_loop(path, data):
    shapes = data.draw(st.lists(shape, min_size=1, max_size=3))
    layouts = [data.draw(st.tuples(layout, layout)) for _ in shapes]
    gradients = [data.draw(st.tuples(*[gradient] * len(shapes))) for _ in range(4)]
    arguments = {
        "shapes": shapes,
        "dtype": data.draw(st.sampled_from(list(TOLERANCE))),
        "layouts": layouts,
        "gradients": gradients,
        "seed": data.draw(st.integers(0, 100)),
        "consolidate_at": data.draw(st.sampled_from([None, 1])),
        **data.draw(SETTINGS),
    }
    assert_same(trained(path, **arguments), trained(LOOP, **arguments), arguments["dtype"])


@pytest.mark.parametrize("path", FAST[:2] + [LOOP], ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_bad_gradient_anywhere_raises_and_leaves_everything_untouched(path, data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    params = [nn.Parameter(torch.randn(data.draw(shape)).to(dtype)) for _ in range(3)]
    optimizer = SelectivePlasticityOptimizer(params, **path)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    which = data.draw(st.integers(0, 2))
    bad = params[which].grad.view(-1)
    bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    with pytest.raises(FloatingPointError, match=f"in the gradient of parameter {which} .* at its step 2"):
        optimizer.step()
    for p, q in zip(params, before[0]):
        assert torch.equal(p, q)
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][i][name]) for name, value in state.items())


OTHERS = {"alignment_threshold": -1.0, "maximize": True, "weight_decay": 0.1, "beta1": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, kwargs, consolidate_at",
    [
        (torch.float32, {}, None),
        (torch.float64, OTHERS, 2),
        (torch.float32, OTHERS, 2),
        (torch.float64, {}, 2),
        (torch.float64, OTHERS, None),
    ],
    ids=str,
)
def test_compiled_path_equals_the_loop(dtype, kwargs, consolidate_at):
    layouts = [("usual", "usual"), ("channels_last", "usual"), ("usual", "transposed"), ("usual", "usual")]
    arguments = {
        "shapes": [(), (2, 3, 4, 5), (6, 7), (300, 20)],
        "layouts": layouts,
        "gradients": [("usual",) * 4, ("usual", "huge", "tiny", "zero"), ("zero",) * 4, ("usual",) * 4, ("usual",) * 4],
        "seed": 0,
        "consolidate_at": consolidate_at,
        "warmup_steps": 3,
        "dtype": dtype,
        **kwargs,
    }
    assert_same(trained({"fused": True}, **arguments), trained(LOOP, **arguments), dtype)


@pytest.mark.parametrize("plasticity_k", [0.0, 5.0])
@pytest.mark.parametrize("path", [{}, {"fused": True}], ids=str)
def test_gradients_laid_out_otherwise_than_their_parameters(path, plasticity_k):
    """torch's fused Adam takes such a gradient's elements in the wrong order, and says nothing."""
    arguments = {
        "shapes": [(4, 6)],
        "layouts": [("usual", "transposed")],
        "gradients": [("usual",)] * 3,
        "seed": 0,
        "consolidate_at": None,
        "dtype": torch.float32,
        "plasticity_k": plasticity_k,
        "lr": 0.1,
    }
    assert_same(trained(path, **arguments), trained(LOOP, **arguments), torch.float32)


@pytest.mark.parametrize("numel", [functional._BLOCK - 1, functional._BLOCK, 2 * functional._BLOCK + 1])
def test_blocks_cover_a_large_tensor(numel):
    arguments = {
        "shapes": [(numel,)],
        "layouts": [("usual", "usual")],
        "gradients": [("usual",)] * 3,
        "seed": 0,
        "consolidate_at": 1,
        "dtype": torch.float32,
    }
    assert_same(trained({}, **arguments), trained(LOOP, **arguments), torch.float32)


def test_half_precision_trains_where_torchs_loop_overflows():
    """With float16, torch's loop divides by sqrt(v) + eps, which underflows to 0; the default path doesn't."""
    a, b = (nn.Parameter(torch.ones(4, dtype=torch.float16)) for _ in range(2))
    for p, optimizer in (
        (a, SelectivePlasticityOptimizer([a], lr=0.01)),
        (b, torch.optim.AdamW([b], lr=0.01, betas=(0.9, 0.99))),
    ):
        for _ in range(5):
            p.grad = torch.full((4,), 1e-4, dtype=torch.float16)
            optimizer.step()
    assert a.isfinite().all() and (a < 1).all()
    assert not b.isfinite().all()


def groups_of(compiled, seed=0):
    """Parameters in groups of every kind, and their optimizer: compiled where asked, else the loop throughout."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(5)]
    groups = [
        {"params": params[:2], **({"fused": True} if compiled else LOOP)},
        {"params": params[2:3], **({"fused": True} if compiled else LOOP), "lr": 0.1, "beta1": 0.5, "maximize": True},
        {"params": params[3:4], **({"fused": True} if compiled else LOOP), "plasticity_k": 0.0, "weight_decay": 0.1},
        {"params": params[4:], **LOOP},
    ]
    return params, SelectivePlasticityOptimizer(groups, warmup_steps=3)


@pytest.mark.slow
def test_the_compiled_path_follows_every_change_between_steps():
    """No setting, gradient or state of an earlier step is kept anywhere but in the groups and the state."""
    runs = []
    for compiled in (False, True):
        params, optimizer = groups_of(compiled)
        torch.manual_seed(1)

        def steps(n=2):
            for _ in range(n):
                optimizer.zero_grad(set_to_none=True)
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()

        steps()
        optimizer.param_groups[0].update(lr=torch.tensor(0.05), eps=1e-3, beta1=0.0, trace_decay=0.9, weight_decay=0.2)
        optimizer.param_groups[1].update(maximize=False, plasticity_k=1.0, alignment_threshold=0.5)
        steps()
        optimizer.param_groups[2]["plasticity_k"] = 2.0  # from torch's own Adam to the compiled gate
        optimizer.observe_surprise(torch.tensor(0.7))
        params[0].grad = None  # takes no part: the others' step counts move on
        optimizer.step()
        added = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [added], "fused": True if compiled else None})
        params.append(added)
        steps()
        optimizer.consolidate()
        saved = copy.deepcopy(optimizer.state_dict())
        steps()
        optimizer.load_state_dict(saved)
        optimizer.state[params[1]]["exp_avg_sq"].data.mul_(3)
        steps()
        optimizer.reset_eligibility()
        steps()
        runs.append((params, [optimizer.state[p] for p in params]))
    assert_same(*runs, torch.float32)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("which", range(5))
def test_a_bad_gradient_in_one_group_leaves_the_others_untouched(which, first):
    params, optimizer = groups_of(compiled=True)
    for p in params:
        p.grad = torch.ones_like(p)
    if not first:
        optimizer.step()
    params[which].grad[1, 2] = 3e38
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    for nonfinite, caught in (
        ("raise", pytest.raises(FloatingPointError, match=f"overflows torch.float32 .* parameter {which} ")),
        ("skip", pytest.warns(UserWarning, match=f"overflows torch.float32 .* parameter {which} ")),
    ):
        for group in optimizer.param_groups:
            group["nonfinite"] = nonfinite
        with caught:
            optimizer.step()
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(p, q) for p, q in zip(params, before[0])) and after.keys() == before[1].keys()
        assert all(torch.equal(after[i][name], before[1][i][name]) for i in after for name in after[i])


def test_a_skipped_first_step_keeps_a_consolidated_eligibility():
    """Avalanche leaves a head that has grown an empty state, in which the old units' eligibility is put."""
    grown, new = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = SelectivePlasticityOptimizer([grown, new], fused=True, nonfinite="skip")
    optimizer.state[grown]["consolidated"] = torch.ones(4, 3)
    grown.grad, new.grad = torch.ones(4, 3), torch.full((4, 3), math.inf)
    with pytest.warns(UserWarning, match="infinity"):
        optimizer.step()
    assert list(optimizer.state) == [grown] and list(optimizer.state[grown]) == ["consolidated"]


@pytest.mark.parametrize("consolidate", [False, True])
def test_a_sparse_trace_stays_finite_in_half_precision(consolidate):
    """The trace over its mean exceeds float16, and that mean over plasticity_k is less than its least number."""
    ends = []
    for path in (LOOP, *FAST):
        p = nn.Parameter(torch.zeros(500, 500, dtype=torch.float16))
        optimizer = SelectivePlasticityOptimizer(
            [p], lr=1e-2, warmup_steps=0, surprise_weight=1.0, eps=1e-3, weight_decay=0.1, **path
        )
        p.grad = torch.zeros_like(p)
        p.grad[0, :2] = 1.0
        optimizer.step()
        if consolidate:
            optimizer.consolidate()
            assert optimizer.state[p]["consolidated"].max() == torch.finfo(torch.float16).max
        p.grad[1] = 1e-2
        optimizer.step()
        held = p[0, 0].item()
        optimizer.observe_surprise(1.0)  # k = 0: the gate is open
        optimizer.step()
        assert p.isfinite().all() and p[0, 0] < held - 0.005
        ends.append(p.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-2, atol=1e-4)


def test_the_kernel_uncompiled_stays_finite_in_half_precision(monkeypatch):
    """Dynamo runs it so after too many recompilations."""
    monkeypatch.setattr(functional, "_kernel_compiler", lambda: functional._kernel)
    test_a_sparse_trace_stays_finite_in_half_precision(consolidate=False)


@pytest.mark.parametrize("huge", [1e18, 1.5e19])  # the sum of squares of the second overflows
def test_the_compiled_path_accepts_huge_but_finite_gradients(huge):
    p = nn.Parameter(torch.ones(4))
    optimizer = SelectivePlasticityOptimizer([p], fused=True)
    for _ in range(2):
        p.grad = torch.full((4,), huge)
        optimizer.step()
        optimizer.consolidate()
    assert p.isfinite().all() and (p < 1).all() and optimizer.state[p]["exp_avg_sq"].isfinite().all()
