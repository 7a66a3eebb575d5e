"""The originally published rule and buffer, to reproduce their results (docs/original.md). No part of the library."""

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor
from torch.optim import Optimizer


class LegacySelectivePlasticity(Optimizer):
    """SGD with gate = clamp(1 - w (k / 10) e (1 - |g| / max |g|), 0.1, 1), w the warm-up, e = EMA(|g|) / max EMA(|g|).

    ``plasticity_k=0`` fixes the gate at 1: the same SGD without it.
    """

    def __init__(self, params, lr: float, trace_decay=0.99, plasticity_k=5.0, warmup_steps=1000):
        defaults = {"lr": lr, "trace_decay": trace_decay, "plasticity_k": plasticity_k, "warmup_steps": warmup_steps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"], state["trace"] = 0, torch.zeros_like(p)
                state["step"] += 1
                size = p.grad.abs()
                trace = state["trace"].lerp_(size, 1 - group["trace_decay"])
                protection = trace / trace.max().clamp_min(1e-12) * (1 - size / size.max().clamp_min(1e-12))
                strength = group["plasticity_k"] / 10 * min(1.0, state["step"] / group["warmup_steps"])
                p.sub_(group["lr"] * p.grad * (1 - strength * protection).clamp_(0.1, 1))


class LegacyReplay(SupervisedPlugin):
    """Half a batch of stored samples joins every batch.

    As published (``fifo``) the joint batch is stored at once and the oldest samples fall out. Without it an
    experience's last samples are stored at its end, so that samples of the old task are there in the next one.
    """

    def __init__(self, mem_size: int, fifo: bool = True):
        super().__init__()
        self.mem_size, self.fifo = mem_size, fifo
        self.memory: list[Tensor] = []
        self.latest: list[Tensor] = []

    def before_training_iteration(self, strategy, **kwargs):
        if not self.fifo:
            self.latest = self._joined(self.latest, strategy.mbatch)
        if self.memory:
            rows = torch.randperm(len(self.memory[0]))[: strategy.train_mb_size // 2]
            strategy.mbatch = [torch.cat([new, old[rows]]) for new, old in zip(strategy.mbatch, self.memory)]

    def after_training_iteration(self, strategy, **kwargs):
        if self.fifo:
            self.memory = self._joined(self.memory, strategy.mbatch)

    def after_training_exp(self, strategy, **kwargs):
        if not self.fifo:
            self.memory, self.latest = self.latest, []

    def _joined(self, old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
        return [torch.cat([a, b])[-self.mem_size :] for a, b in zip(old, new)] if old else list(new)
