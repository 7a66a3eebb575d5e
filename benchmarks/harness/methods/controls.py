"""Optimizers that the elementwise gate is compared with: its controls, and UPGD's gate."""

import torch
from torch.optim import Optimizer

from avalanche_sp import SelectivePlasticityOptimizer


class RandomGate(SelectivePlasticityOptimizer):
    """The same gates, handed to the wrong synapses: consolidated eligibility, shuffled within each tensor."""

    @torch.no_grad()
    def consolidate(self) -> None:
        orders = [
            torch.randperm(state["exp_avg_sq"].numel(), generator=torch.Generator().manual_seed(number))
            for number, state in enumerate(self.state.values())
        ]
        for order, state in zip(orders, self.state.values()):
            if "consolidated" in state:  # back in place, to take in the new experience
                kept = state["consolidated"].flatten()
                state["consolidated"] = torch.empty_like(kept).index_copy_(0, order, kept).view_as(state["exp_avg_sq"])
        super().consolidate()
        for order, state in zip(orders, self.state.values()):
            state["consolidated"] = state["consolidated"].flatten()[order].view_as(state["exp_avg_sq"])


class ConstantGate(SelectivePlasticityOptimizer):
    """One gate for all synapses of a tensor, of the mean openness that the true one has."""

    def __init__(self, params, *args, **kwargs):
        # A group a parameter, as each has its own openness.
        super().__init__([{"params": [p]} for p in params], *args, **kwargs)
        self.kept: list[torch.Tensor | None] = [None] * len(self.param_groups)

    @torch.no_grad()
    def consolidate(self) -> None:
        k = self.defaults["plasticity_k"]
        for number, group in enumerate(self.param_groups):
            state = self.state[group["params"][0]]
            if self.kept[number] is not None:
                state["consolidated"] = self.kept[number]
        super().consolidate()
        for number, group in enumerate(self.param_groups):
            state = self.state[group["params"][0]]
            self.kept[number] = state["consolidated"]
            openness = (1 / (1 + k * state["consolidated"])).mean().item()
            state["consolidated"] = torch.ones_like(state["consolidated"])
            group["plasticity_k"] = 1 / openness - 1


class UPGD(Optimizer):
    """Utility-based perturbed gradient descent, first order, globally scaled.

    A weight's step is scaled by 1 - sigmoid(u / max u), with u the running mean of -g w (algorithm 1 of M. Elsayed,
    A. R. Mahmood: Addressing loss of plasticity and catastrophic forgetting in continual learning, ICLR 2024).
    """

    def __init__(self, params, lr: float, beta_utility: float = 0.999, sigma: float = 1e-3):
        super().__init__(params, {"lr": lr, "beta_utility": beta_utility, "sigma": sigma})

    @torch.no_grad()
    def step(self, closure=None):
        rows = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["utility"] = 0, torch.zeros_like(p)
                state["step"] += 1
                state["utility"].lerp_(-p.grad * p, 1 - group["beta_utility"])
                rows.append((p, state["utility"] / (1 - group["beta_utility"] ** state["step"]), group))
        largest = torch.stack([u.max() for _, u, _ in rows]).max()
        for p, utility, group in rows:
            gate = 1 - torch.sigmoid(utility / largest)
            noise = torch.randn_like(p) * group["sigma"]
            p.sub_(2 * group["lr"] * (p.grad + noise) * gate)  # the 2 makes a weight of no use move as in SGD
