"""The elementwise gate: its equations, and the step on lists of tensors, as in torch.optim's functional forms."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_BLOCK = 262144  # elements: with 4 bytes each, what an operation writes is still in the cache for the next


def eligibility(trace: Tensor) -> Tensor:
    """How much each synapse has taken part in learning, relative to its tensor's mean.

        e = a / mean(a)

    The trace a is an average of squared gradients, the diagonal of the empirical Fisher information; dividing by its
    mean makes it free of the loss's scale. The eligibility trace: Gerstner et al., Eligibility traces and plasticity
    on behavioral time scales, Frontiers in Neural Circuits 2018.

    Args:
        trace: not negative, any shape.

    Returns:
        Tensor of the same shape, mean 1 (all zeros where there has been no gradient at all). In float16 a value is at
        most 65504, and the mean is less if that bounds any.
    """
    e = trace / trace.mean().clamp_min(trace_floor(trace.dtype))
    # e is at most the number of elements, which only float16 can't hold. An infinite e has no gate if k is 0.
    return e.clamp_(max=torch.finfo(e.dtype).max) if e.dtype == torch.float16 else e


def trace_floor(dtype: torch.dtype) -> float:
    """Mean trace below which there has been no gradient to speak of: far enough from 0 to divide by."""
    limits = torch.finfo(dtype)
    return max(1e-32, limits.tiny * limits.eps)


def coincidence(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    """Agreement of the present gradient with the running one, element by element.

        c = g m / v

    Positive where both point the same way. Free of scale, as numerator and denominator are both squared
    gradients. Zero where v is zero.
    """
    return (grad * exp_avg).div_(exp_avg_sq.clamp_min(torch.finfo(grad.dtype).tiny))


def resistance(eligibility: Tensor, plasticity_k: float | Tensor) -> Tensor:
    """What the elementwise gate divides an optimizer's update by.

        r = 1 + k e,   gate = 1 / r in (0, 1]

    A synapse's step shrinks in proportion to its importance, as in Bayesian gradient descent, where a weight's step is
    proportional to its posterior variance (Zeno et al., Task-agnostic continual learning using online variational
    Bayes, Neural Computation 2021), and as with a natural gradient whose metric is the diagonal Fisher information of
    what was learned before (NCL, Kao et al., NeurIPS 2021).

    Args:
        eligibility: e, not negative, any shape.
        plasticity_k: sharpness k of the gate, 0 or more; 0 leaves it open. A float or a 0-dim tensor.
    """
    return (eligibility * plasticity_k).add_(1)


def selective_plasticity(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    consolidated: list[Tensor | None], state_steps: list[Tensor], square_sums: list[Tensor], group: dict,
) -> None:  # fmt: skip
    """One step of :class:`~avalanche_sp.SelectivePlasticityOptimizer`, in place.

    Adam's displacement comes from torch's own Adam, run on zeros in the parameters' place; the gate scales it. So every
    way that torch has to compute Adam is a way to compute this. ``foreach=False`` is the plain loop over tensors, which
    the others equal up to rounding. With ``plasticity_k=0`` torch's Adam steps by itself.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: n tensors each, of pairwise equal shapes.
        consolidated: for each the consolidated eligibility, or None.
        state_steps: n singleton tensors, the steps done so far.
        square_sums: each gradient's sum of squares, 0-dim.
        group: the parameter group. ``foreach`` and ``fused`` are as in ``torch.optim.Adam``, but ``fused`` tells only
            where the gate is off (:func:`compiled_selective_plasticity` is fused with it on). With neither given,
            foreach on CUDA, blocks of torch's fused Adam on a CPU, and the loop for sharded tensors.
    """
    if not params:
        return
    lr, foreach, weight_decay, maximize = (group[name] for name in ("lr", "foreach", "weight_decay", "maximize"))
    plasticity_k, alignment_threshold = group["plasticity_k"], group["alignment_threshold"]
    if isinstance(lr, Tensor):
        lr = lr.squeeze()
    beta1, trace_decay = group["beta1"], group["trace_decay"]
    adam = {"beta1": beta1, "beta2": trace_decay, "eps": group["eps"], "maximize": maximize}
    if plasticity_k == 0:
        if group["fused"]:
            grads = [_as_laid_out(g, p) for g, p in zip(grads, params)]
        _adam(params, grads, exp_avgs, exp_avg_sqs, state_steps, foreach, group["fused"], lr, weight_decay, **adam)
        return
    opening = 1 - group["surprise_weight"] * group["surprise"]
    sharpness = [
        plasticity_k * (1.0 if c is not None else warmup(step, group["warmup_steps"])) * opening
        for c, step in zip(consolidated, state_steps)
    ]
    if foreach is None:
        foreach = all(p.is_cuda for p in params) and not isinstance(lr, Tensor)
        if all(is_plain(p) and p.device.type == "cpu" and p.is_floating_point() for p in params):
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
        resistances = torch._foreach_mul(eligibilities, sharpness)  # type: ignore[arg-type]  # all floats or all tensors
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


def warmup(step: float | Tensor, warmup_steps: int) -> float:
    """Share of an unconsolidated gate that is in force in the step after ``step`` steps."""
    return min(1.0, (float(step) + 1) / warmup_steps) if warmup_steps else 1.0


def _threshold(alignment_threshold: float, beta1: float, beta2: float, step: Tensor) -> float:
    """The threshold is on g m^ / v^: here the bias corrections have moved to its side."""
    t = step.item()
    return alignment_threshold * (1 - beta1**t) / (1 - beta2**t)


def _next_mean(exp_avg_sq: Tensor, square_sum: Tensor, beta2: float) -> float:
    """The mean of v after the step that comes now, without making it."""
    total = exp_avg_sq.sum(dtype=None if exp_avg_sq.dtype == torch.float64 else torch.float32).item()
    mean = (beta2 * total + (1 - beta2) * square_sum.item()) / max(exp_avg_sq.numel(), 1)
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
            if half == math.inf:
                p.add_(displacement)
            elif p.dtype == torch.float16:  # in which half can be 0
                p.addcdiv_(displacement, resistance(trace, 1 / half))
            else:
                p.addcdiv_(displacement, trace + half, value=half)


def compiled_selective_plasticity(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    consolidated: list[Tensor | None],
    state_steps: list[Tensor],
    groups: list[dict],
) -> bool:
    """The same step in one compiled pass over memory, after one that looks whether every gradient is finite.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps: as above, all on one device.
        groups: each tensor's parameter group.

    Returns:
        False where a gradient is not finite or its square is not: then nothing has been written.
    """
    rows, known = [], {}
    for group, step, c in zip(groups, state_steps, consolidated):
        key = id(group), step.item(), c is None
        if key not in known:
            known[key] = _numbers(group, step.item(), c is not None)
        rows.append(known[key])
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    # What changes from step to step goes in as a tensor: numbers would be compiled in.
    numbers = torch.tensor(rows, dtype=dtype, device=params[0].device)
    maximize = [group["maximize"] for group in groups]
    aligning = [group["alignment_threshold"] != math.inf for group in groups]
    kernel = _kernel_compiler()
    finite, _ = kernel(params, grads, exp_avgs, exp_avg_sqs, consolidated, numbers, maximize, aligning)
    if not finite.item():
        return False
    torch._foreach_add_(state_steps, 1)
    return True


def _numbers(group: dict, step: float, consolidated: bool) -> tuple[float, ...]:
    """What a tensor's step after ``step`` steps takes from its group, in the order in which the kernel reads it."""
    lr, beta1, beta2 = float(group["lr"]), group["beta1"], group["trace_decay"]
    k = group["plasticity_k"] * (1 - group["surprise_weight"] * float(group["surprise"]))
    correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
    return (
        k if consolidated else k * warmup(step, group["warmup_steps"]),
        lr / correction1,
        correction2**-0.5,
        group["eps"],
        1 - lr * group["weight_decay"],
        group["alignment_threshold"] * correction1 / correction2,
        1 - beta1,
        beta2,
        1 - beta2,
    )


@cache
def _kernel_compiler():
    # Sizes and strides are guarded by dynamo already.
    return torch.compile(_kernel, dynamic=False, options={"size_asserts": False})


def _kernel(params, grads, exp_avgs, exp_avg_sqs, consolidated, numbers, maximize, aligning):
    # Compiled code computes with float16 in single precision. So does this when dynamo gives up compiling it.
    grads = [g.float() if g.dtype == torch.float16 else g for g in grads]
    # Each summand is divided by their number, so that a sum overflows only where a square has.
    means = [
        ((g * g if c is not None else v * n[7] + g * g * n[8]) * (0.5 / max(g.numel(), 1))).sum(dtype=numbers.dtype)
        for g, v, c, n in zip(grads, exp_avg_sqs, consolidated, numbers)
    ]
    finite = torch.stack(means).sum().isfinite()
    divided = []  # returned, as the compiler would divide for each element a value that is not
    for i, (p, g, m, v, trace) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, consolidated)):
        k, step_size, bias_correction2_rsqrt, eps, shrink, threshold, rise1, decay2, rise2 = numbers[i]
        if maximize[i]:
            g = -g
        new_m = m + (g - m) * rise1
        new_v = v * decay2 + g * g * rise2
        if trace is None:
            k = k / (2 * means[i]).clamp_min(trace_floor(v.dtype))
            divided.append(k)
            trace = new_v
        if aligning[i]:
            trace = torch.where(coincidence(g, new_m, new_v) <= threshold, trace, 0)
        new_p = p * shrink - new_m * step_size / ((new_v.sqrt() * bias_correction2_rsqrt + eps) * (1 + k * trace))
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(finite, new, old))
    return finite, divided
