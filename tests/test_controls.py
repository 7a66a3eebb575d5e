"""The controls of the elementwise gate are what they are called, and the published rule is what was published."""


import numpy as np
import pytest
import torch
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer
from harness.methods.controls import UPGD, ConstantGate, RandomGate
from harness.methods.legacy import LegacySelectivePlasticity


def consolidated(cls, tasks=3):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(20))]
    optimizer = cls(params, plasticity_k=4.0)
    for _ in range(tasks):
        scales = [torch.rand_like(p) for p in params]
        for _ in range(5):
            for p, scale in zip(params, scales):
                p.grad = scale * torch.randn_like(p)
            optimizer.step()
        optimizer.consolidate()
    return params, optimizer


@pytest.mark.parametrize("cls", [RandomGate, ConstantGate])
def test_controls_are_as_open_as_the_true_gate_on_the_average(cls):
    _, truth = consolidated(SelectivePlasticityOptimizer, tasks=1)
    _, control = consolidated(cls, tasks=1)
    for a, b in zip(truth.get_diagnostics().values(), control.get_diagnostics().values()):
        assert b["openness"] == pytest.approx(a["openness"], rel=1e-5)


def test_random_gate_keeps_the_gates_and_changes_their_places():
    # No gradient here depends on the weights, so all three see the same ones in every task.
    for a, b in zip(*(p_and_o(cls) for cls in (SelectivePlasticityOptimizer, RandomGate))):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        assert not torch.equal(a, b)


def p_and_o(cls):
    params, optimizer = consolidated(cls)
    return [optimizer.get_param_eligibility(p) for p in params]


def test_constant_gate_is_constant():
    params, optimizer = consolidated(ConstantGate)
    for p in params:
        assert len(optimizer.get_param_eligibility(p).unique()) == 1


def test_upgd_holds_useful_weights_back():
    p = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = UPGD([p], lr=0.1, sigma=0.0)
    p.grad = torch.tensor([-1.0, -1.0])  # the first weight's utility -g w is 1, the second's -1
    optimizer.step()
    gates = 1 - 1 / (1 + np.exp([-1.0, 1.0]))
    np.testing.assert_allclose(p.detach().numpy(), [1 + 0.2 * gates[0], -1 + 0.2 * gates[1]], rtol=1e-6)


def test_legacy_rule_equals_its_formula():
    rng = np.random.default_rng(0)
    p = rng.normal(size=6)
    parameter = nn.Parameter(torch.tensor(p))
    optimizer = LegacySelectivePlasticity([parameter], lr=0.1, warmup_steps=4)
    trace = np.zeros(6)
    for t in range(1, 7):
        g = rng.normal(size=6)
        parameter.grad = torch.tensor(g)
        optimizer.step()
        trace = 0.99 * trace + 0.01 * abs(g)
        protection = trace / trace.max() * (1 - abs(g) / abs(g).max())
        p = p - 0.1 * g * np.clip(1 - 0.5 * min(1, t / 4) * protection, 0.1, 1)
        np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=1e-12)
