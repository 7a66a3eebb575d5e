"""SelectivePlasticityOptimizer: Adam with an elementwise plasticity gate on the update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from avalanche_sp.gates import elementwise_gate

__all__ = ["SelectivePlasticityOptimizer"]


class SelectivePlasticityOptimizer(Optimizer):
    r"""Adam whose update passes a gate: synapses that matter resist, unless activity coincides.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
        v_t = \tau v_{t-1} + (1-\tau) g_t^2 \\
        e_t &= \sqrt{v_t} / \operatorname{mean}(\sqrt{v_t})
            &&\text{eligibility, the mean over the tensor} \\
        c_t &= g_t \hat m_t / \hat v_t &&\text{coincidence} \\
        k_t &= k \min(1, t/T)\,(1 - \omega s_t) &&\text{warm-up and surprise} \\
        G_t &= 1 / (1 + k_t\, e_t\, [c_t \le \theta]) &&\text{gate} \\
        p_t &= p_{t-1} - \eta\, G_t\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with Adam's bias-corrected :math:`\hat m, \hat v` (Kingma and Ba, ICLR 2015). The gate is on the update, as
    Adam would divide a rescaled gradient right back. It is computed from Adam's own two buffers, so it takes no
    memory of its own, and no quantity in it carries the scale of the loss. With ``plasticity_k=0`` the result is
    ``torch.optim.Adam(betas=(beta1, trace_decay))``, bit for bit.

    Args:
        params: parameters or parameter groups; every setting below can be given per group.
        lr: learning rate :math:`\eta`, 0 or more (default 1e-3).
        trace_decay: decay :math:`\tau` of the eligibility trace, which is Adam's second moment (``betas[1]``);
            in [0, 1) (default 0.99, useful .95 to .999).
        plasticity_k: sharpness :math:`k` of the gate, 0 or more (default 5, useful 1 to 10).
        warmup_steps: steps :math:`T` over which the gate comes into force, 0 or more (default 1000).
        surprise_weight: how far full surprise opens the gate again, :math:`\omega` in [0, 1] (default 0.3). Surprise
            :math:`s_t` is what :meth:`observe_surprise` was last told; 0 until then.
        alignment_threshold: coincidence :math:`\theta` above which a synapse is fully plastic (default 0.1).
        beta1: decay of the running gradient, in [0, 1) (default 0.9).
        eps: added to the denominator, 0 or more (default 1e-8).
        weight_decay: decoupled weight decay as in AdamW, 0 or more (default 0).
        maximize: maximise the objective (default False).

    Raises:
        ValueError: at construction, for an argument out of range.
        RuntimeError: in :meth:`step`, for sparse gradients or complex parameters.
        FloatingPointError: in :meth:`step`, for a gradient that is not finite or whose square is not (it would stay
            in the second moment for good); parameters and state are untouched.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        trace_decay: float = 0.99,
        plasticity_k: float = 5.0,
        warmup_steps: int = 1000,
        surprise_weight: float = 0.3,
        alignment_threshold: float = 0.1,
        *,
        beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "trace_decay": trace_decay,
            "plasticity_k": plasticity_k,
            "warmup_steps": warmup_steps,
            "surprise_weight": surprise_weight,
            "alignment_threshold": alignment_threshold,
            "beta1": beta1,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "surprise": 0.0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self.defaults, **param_group}
        for name in ("lr", "plasticity_k", "warmup_steps", "eps", "weight_decay"):
            if not 0.0 <= group[name] < float("inf"):
                raise ValueError(f"Invalid {name} value: {group[name]} (allowed: 0 or more)")
        for name in ("trace_decay", "beta1"):
            if not 0.0 <= group[name] < 1.0:
                raise ValueError(f"Invalid {name} value: {group[name]} (allowed: 0 <= {name} < 1)")
        if not 0.0 <= group["surprise_weight"] <= 1.0:
            raise ValueError(f"Invalid surprise_weight value: {group['surprise_weight']} (allowed: 0 to 1)")
        if not abs(group["alignment_threshold"]) < float("inf"):
            raise ValueError(
                f"Invalid alignment_threshold value: {group['alignment_threshold']} (allowed: a finite number)"
            )
        super().add_param_group(param_group)

    def observe_surprise(self, value: float | Tensor) -> None:
        """Tells the gate how unexpected the present data is, from 0 (as usual) to 1.

        It stays in force until told anew. :class:`~avalanche_sp.SelectivePlasticityPlugin` calls this every
        iteration with the surprise of the stream's loss.

        Args:
            value: a float in [0, 1], or a 0-dim tensor, which is clamped to [0, 1] without a device sync.

        Raises:
            ValueError: a float out of range.
        """
        if isinstance(value, Tensor):
            value = value.detach().clamp(0, 1)
        elif not 0.0 <= value <= 1.0:
            raise ValueError(f"Invalid surprise value: {value} (allowed: 0 to 1)")
        for group in self.param_groups:
            group["surprise"] = value

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss (optional).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad, self._state_of(p), group)
        return loss

    def _state_of(self, p: Tensor) -> dict:
        state = self.state[p]
        if len(state) == 0:  # also the case for a head that has grown: Avalanche leaves it an empty state
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _check_gradients(self) -> None:
        """Refuses what a step could not undo, before anything has changed."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in params:
            if p.grad.is_sparse:
                raise RuntimeError("SelectivePlasticityOptimizer does not support sparse gradients")
            if p.is_complex():
                raise RuntimeError("SelectivePlasticityOptimizer does not support complex parameters")
        # A finite norm has finite squares only. One that overflowed is looked into, element by element.
        norms = torch._foreach_norm([p.grad for p in params]) if params else []
        if norms and not torch.stack([n.to(norms[0]) for n in norms]).isfinite().all():
            self._raise_if_non_finite()

    def _raise_if_non_finite(self) -> None:
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names", range(len(group["params"])))
            for name, p in zip(names, group["params"]):
                if p.grad is None or p.grad.square().isfinite().all():
                    continue
                if p.grad.isnan().any():
                    cause = "NaN"
                else:
                    cause = "infinity" if p.grad.isinf().any() else f"a value whose square overflows {p.grad.dtype}"
                step = int(self.state[p]["step"]) + 1 if self.state.get(p) else 1
                raise FloatingPointError(
                    f"{cause} in the gradient of parameter {name} (group {g}, shape {tuple(p.shape)}) at its step "
                    f"{step}: nothing was updated. The usual causes are too high a learning rate or a loss that "
                    "overflowed."
                )


def _update(p: Tensor, grad: Tensor, state: dict, group: dict) -> None:
    """One parameter's step, in the order of torch.optim's single-tensor Adam (its bits, where k = 0)."""
    lr, beta1, beta2 = group["lr"], group["beta1"], group["trace_decay"]
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if group["maximize"]:
        grad = -grad
    state["step"] += 1
    step = state["step"].item()  # lies on the CPU: no device sync
    if group["weight_decay"] != 0:
        p.mul_(1 - lr * group["weight_decay"])

    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = (v.sqrt() / correction2**0.5).add_(group["eps"])
    update = m
    if group["plasticity_k"] != 0:
        warmup = min(1.0, step / group["warmup_steps"]) if group["warmup_steps"] else 1.0
        k = group["plasticity_k"] * warmup * (1 - group["surprise_weight"] * group["surprise"])
        # The threshold is on g m^ / v^: the bias corrections move to its side.
        threshold = group["alignment_threshold"] * correction1 / correction2
        update = m * elementwise_gate(grad, m, v, plasticity_k=k, alignment_threshold=threshold)
    p.addcdiv_(update, denominator, value=-lr / correction1)
