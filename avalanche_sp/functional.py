"""The elementwise gate's step on lists of tensors, as in torch.optim's functional forms."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from avalanche_sp.gates import coincidence, eligibility, resistance, trace_floor

__all__ = ["selective_plasticity", "is_plain", "warmup"]

_BLOCK = 262144  # elements: with 4 bytes each, what an operation writes is still in the cache for the next


def selective_plasticity(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    consolidated: list[Tensor | None],
    state_steps: list[Tensor],
    square_sums: list[Tensor],
    *,
    foreach: bool | None = None,
    fused: bool | None = None,
    lr: float | Tensor,
    beta1: float,
    trace_decay: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    plasticity_k: float,
    warmup_steps: int,
    surprise_weight: float,
    surprise: float | Tensor,
    alignment_threshold: float,
) -> None:
    """One step of :class:`~avalanche_sp.SelectivePlasticityOptimizer`, in place.

    Adam's displacement comes from torch's own Adam, run on zeros in the parameters' place; the gate scales it. So every
    way that torch has to compute Adam is a way to compute this. ``foreach=False`` is the plain loop over tensors, which
    the others equal up to rounding. With ``plasticity_k=0`` torch's Adam steps by itself.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: n tensors each, of pairwise equal shapes.
        consolidated: for each the consolidated eligibility, or None.
        state_steps: n singleton tensors, the steps done so far.
        square_sums: each gradient's sum of squares, 0-dim.
        foreach, fused: as in ``torch.optim.Adam``; ``fused=True`` compiles one kernel for Adam and the gate
            (``torch.compile``). With neither given, foreach on CUDA, blocks of torch's fused Adam on a
            CPU, and the loop for sharded tensors.

    The other arguments are those of :class:`~avalanche_sp.SelectivePlasticityOptimizer`.
    """
    if not params:
        return
    if isinstance(lr, Tensor):
        lr = lr.squeeze()
    adam = {"beta1": beta1, "beta2": trace_decay, "eps": eps, "maximize": maximize}
    if plasticity_k == 0:
        if fused:
            grads = [_as_laid_out(g, p) for g, p in zip(grads, params)]
        _adam(params, grads, exp_avgs, exp_avg_sqs, state_steps, foreach, fused, lr, weight_decay, **adam)
        return
    opening = 1 - surprise_weight * surprise
    sharpness = [
        plasticity_k * (1.0 if c is not None else warmup(step, warmup_steps)) * opening
        for c, step in zip(consolidated, state_steps)
    ]
    if fused:
        _compiled(
            params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps, square_sums,
            lr, weight_decay, sharpness, alignment_threshold, **adam,
        )  # fmt: skip
        return

    if foreach is None:
        foreach = all(p.is_cuda for p in params) and not isinstance(lr, Tensor)
        if fused is None and all(is_plain(p) and p.device.type == "cpu" and p.is_floating_point() for p in params):
            _blockwise(
                params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps, square_sums,
                lr, weight_decay, sharpness, alignment_threshold, **adam,
            )  # fmt: skip
            return
    displacements = [torch.zeros_like(p) for p in params]
    _adam(displacements, grads, exp_avgs, exp_avg_sqs, state_steps, foreach, False, lr, 0.0, **adam)
    eligibilities = [eligibility(v) if c is None else c for v, c in zip(exp_avg_sqs, consolidated)]
    if alignment_threshold != math.inf:
        for i, (g, m, v, step) in enumerate(zip(grads, exp_avgs, exp_avg_sqs, state_steps)):
            limit = _threshold(alignment_threshold, beta1, trace_decay, step)
            eligibilities[i] = eligibilities[i] * (coincidence(-g if maximize else g, m, v) <= limit)
    if foreach:
        if weight_decay != 0:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        resistances = torch._foreach_mul(eligibilities, sharpness)
        torch._foreach_add_(resistances, 1)
        torch._foreach_addcdiv_(params, displacements, resistances)
        return
    for p, displacement, e, k in zip(params, displacements, eligibilities, sharpness):
        if weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        p.addcdiv_(displacement, resistance(e, k))


def is_plain(tensor: Tensor) -> bool:
    """False for a sharded tensor (DTensor) and other subclasses, which know the usual operations only."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _adam(params, grads, exp_avgs, exp_avg_sqs, state_steps, foreach, fused, lr, weight_decay, **settings) -> None:
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], state_steps,
        foreach=foreach, fused=fused, amsgrad=False, lr=lr, weight_decay=weight_decay, **settings,
    )  # fmt: skip


def _as_laid_out(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient, in memory as the parameter is: torch's fused kernels run along memory and would not notice."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def warmup(step: Tensor, warmup_steps: int) -> float:
    """Share of an unconsolidated gate that is in force in the step after ``step`` steps."""
    return min(1.0, (step.item() + 1) / warmup_steps) if warmup_steps else 1.0


def _threshold(alignment_threshold: float, beta1: float, beta2: float, step: Tensor) -> float:
    """The threshold is on g m^ / v^: here the bias corrections have moved to its side."""
    t = step.item()
    return alignment_threshold * (1 - beta1**t) / (1 - beta2**t)


def _next_mean(exp_avg_sq: Tensor, square_sum: Tensor, beta2: float) -> float:
    """The mean of v after the step that comes now, without making it."""
    total = exp_avg_sq.sum(dtype=None if exp_avg_sq.dtype == torch.float64 else torch.float32).item()
    mean = (beta2 * total + (1 - beta2) * square_sum.item()) / exp_avg_sq.numel()
    return max(mean, trace_floor(exp_avg_sq.dtype))


def _blocks(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike into blocks; whole where they are small or not contiguous."""
    n = tensors[0].numel()
    if n <= _BLOCK or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    flat = [t.view(-1) for t in tensors]
    return [tuple(t[i : i + _BLOCK] for t in flat) for i in range(0, n, _BLOCK)]


def _blockwise(
    params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps, square_sums,
    lr, weight_decay, sharpness, alignment_threshold, *, beta1, beta2, eps, maximize,
) -> None:  # fmt: skip
    """torch's fused Adam and the gate, block by block: a block stays in the cache from one operation to the next."""
    torch._foreach_add_(state_steps, 1)
    for p, g, m, v, c, step, square_sum, k in zip(
        params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps, square_sums, sharpness
    ):
        # The gate 1 / (1 + k a / mean(a)) is half / (half + a), which takes one operation less.
        k = float(k)
        half = (1.0 if c is not None else _next_mean(v, square_sum, beta2)) / k if k else math.inf
        limit = None
        if alignment_threshold != math.inf:
            limit = _threshold(alignment_threshold, beta1, beta2, step)
        g = _as_laid_out(g, p)
        if weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        tensors = (p, g, m, v, v if c is None else c)
        for p, g, m, v, trace in _blocks(tensors):
            displacement = torch.zeros_like(p)
            torch._fused_adam_(
                [displacement], [g], [m], [v], [], [step], amsgrad=False, lr=lr, beta1=beta1, beta2=beta2,
                weight_decay=0.0, eps=eps, maximize=maximize,
            )  # fmt: skip
            if limit is not None:
                trace = trace * (coincidence(-g if maximize else g, m, v) <= limit)
            if half < math.inf:
                p.addcdiv_(displacement, trace + half, value=half)
            else:
                p.add_(displacement)


def _compiled(
    params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps, square_sums,
    lr, weight_decay, sharpness, alignment_threshold, **adam,
) -> None:  # fmt: skip
    """Adam and the gate in one pass over memory: see :func:`_kernel`."""
    lr, beta1, beta2 = float(lr), adam["beta1"], adam["beta2"]
    aligning = alignment_threshold != math.inf
    torch._foreach_add_(state_steps, 1)
    rows = np.empty((len(params), 5))
    for i, (v, c, step, square_sum) in enumerate(zip(exp_avg_sqs, consolidated, state_steps, square_sums)):
        t = step.item()
        rows[i, 0] = sharpness[i] if c is not None else sharpness[i] / _next_mean(v, square_sum, beta2)
        rows[i, 1] = lr / (1 - beta1**t)
        rows[i, 2] = (1 - beta2**t) ** -0.5
        rows[i, 3] = 1 - lr * weight_decay
        rows[i, 4] = _threshold(alignment_threshold, beta1, beta2, step) if aligning else 0.0
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    # What changes from step to step goes in as a tensor: numbers would be compiled in.
    scalars = torch.from_numpy(rows).to(params[0].device, dtype)
    _kernel_compiler()(params, grads, exp_avgs, exp_avg_sqs, consolidated, scalars, aligning=aligning, **adam)


@cache
def _kernel_compiler():
    return torch.compile(_kernel, dynamic=False)


def _kernel(
    params, grads, exp_avgs, exp_avg_sqs, consolidated, scalars, *, beta1, beta2, eps, maximize, aligning
) -> None:
    for i, (p, g, m, v, trace) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, consolidated)):
        k, step_size, bias_correction2_rsqrt, shrink, threshold = scalars[i]
        if maximize:
            g = -g
        new_m = m + (g - m) * (1 - beta1)
        new_v = v * beta2 + g * g * (1 - beta2)
        if trace is None:
            trace = new_v
        if aligning:
            trace = torch.where(coincidence(g, new_m, new_v) <= threshold, trace, 0)
        denominator = (new_v.sqrt() * bias_correction2_rsqrt + eps) * (1 + k * trace)
        p.copy_(p * shrink - new_m * step_size / denominator)
        m.copy_(new_m)
        v.copy_(new_v)
