"""SelectivePlasticityOptimizer: Adam with an elementwise plasticity gate on the update."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from avalanche_sp.arguments import AT_LEAST_0, Condition, check_number
from avalanche_sp.optim.functional import (
    compiled_selective_plasticity,
    eligibility,
    is_plain,
    resistance,
    selective_plasticity,
    warmup,
)


class SelectivePlasticityOptimizer(Optimizer):
    r"""Adam whose update passes a gate: synapses that mattered to what was learned before resist change.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
        v_t = \tau v_{t-1} + (1-\tau) g_t^2 \\
        e_t &= C \text{ where consolidated, else } v_t / \operatorname{mean}(v_t)
            &&\text{eligibility, the mean over the tensor} \\
        k_t &= k\, w_t\,(1 - \omega s_t)
            &&\text{surprise; warm-up } w_t = \min(1, t/T) \text{ where not consolidated, else } 1 \\
        c_t &= g_t \hat m_t / \hat v_t &&\text{coincidence of the present gradient with the running one} \\
        G_t &= 1 / (1 + k_t\, e_t\, [c_t \le \theta]) &&\text{gate} \\
        p_t &= p_{t-1} - \eta\, G_t\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    with Adam's bias-corrected :math:`\hat m, \hat v` (Kingma and Ba, ICLR 2015). The gate is on the update, as Adam
    would divide a rescaled gradient right back. No quantity in it carries the scale of the loss. With
    ``plasticity_k=0`` the result is ``torch.optim.AdamW(betas=(beta1, trace_decay))``, bit for bit.

    **Consolidation.** :meth:`consolidate`, called when something has been learned that is to stay, keeps the present
    eligibility in one buffer more:

    .. math:: C \leftarrow \max\big(C,\; v_t / \operatorname{mean}(v_t)\big)

    From then on a synapse resists as it did for the experience that it mattered to most. This is what protects: the
    running trace forgets the past as fast as it learns the present. Without :meth:`consolidate` the state is Adam's
    own: step, exp_avg and exp_avg_sq.

    **For continual learning** use :meth:`for_continual_learning` and :meth:`consolidate`. The defaults of the class are
    Adam's. ``eps`` leads from Adam (1e-8) to SGD (1, with SGD's learning rates). Between them, without momentum, the
    gate protects most (``docs/trials/optimizer.csv``). If ``eps`` is not small compared with the gradient, the scale
    of the loss matters as it does to SGD.

    Args:
        params: parameters or parameter groups; every setting below can be given per group.
        lr: learning rate :math:`\eta`, 0 or more; a float or a 1-element tensor (default 1e-3).
        trace_decay: decay :math:`\tau` of the eligibility trace, which is Adam's second moment (``betas[1]``);
            in [0, 1) (default 0.99, useful .95 to .999).
        plasticity_k: sharpness :math:`k` of the gate, 0 or more (default 5, useful 1 to 10).
        warmup_steps: steps :math:`T` over which an unconsolidated gate comes into force, as the trace settles; 0 or
            more (default 1000).
        surprise_weight: how far full surprise opens the gate again, :math:`\omega` in [0, 1] (default 0.3). Surprise
            :math:`s_t` is what :meth:`observe_surprise` was last told; 0 until then.
        alignment_threshold: coincidence :math:`\theta` above which a synapse is fully plastic (default ``math.inf``:
            none is. The rule as first published has one; it has cost retention wherever we tried it).
        beta1: decay of the running gradient, in [0, 1) (default 0.9).
        eps: added to the denominator, 0 or more (default 1e-8).
        weight_decay: decoupled weight decay as in AdamW, 0 or more (default 0). It is not gated.
        maximize: maximise the objective (default False).
        foreach: compute on all tensors at once (default None: on CUDA).
        fused: compile the whole step into one kernel, by ``torch.compile``: the fastest, for some seconds at the first
            step and a C++ compiler on a CPU (default None: no).
        nonfinite: what a gradient that is not finite, or whose square is not, does: "raise" (default), or "skip" the
            step with a warning. Either way parameters and state are untouched. Looking costs one device sync a step.

    ``capturable`` and ``differentiable`` are not supported. ``OneCycleLR`` and ``CyclicLR`` need
    ``cycle_momentum=False``, because there is no setting ``momentum`` or ``betas``. In float16 an eligibility is at
    most 65504.

    Raises:
        ValueError: at construction, for an argument out of range.
        RuntimeError: in :meth:`step`, for sparse gradients or complex parameters, and for a gradient or a state of
            another shape than its parameter's. Nothing was updated.
        FloatingPointError: in :meth:`step`, for a gradient that is not finite or whose square is not (it would stay
            in the second moment for good), unless ``nonfinite="skip"``.

    References:
        D. Kingma, J. Ba: Adam, ICLR 2015. J. Kirkpatrick et al.: Overcoming catastrophic forgetting (EWC), PNAS 2017.
        C. Zeno et al.: Task-agnostic continual learning using online variational Bayes, Neural Computation 2021.
        T.-C. Kao et al.: Natural continual learning (NCL), NeurIPS 2021.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        trace_decay: float = 0.99,
        plasticity_k: float = 5.0,
        warmup_steps: int = 1000,
        surprise_weight: float = 0.3,
        alignment_threshold: float = math.inf,
        *,
        beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        nonfinite: str = "raise",
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
            "foreach": foreach,
            "fused": fused,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    @classmethod
    def for_continual_learning(
        cls, params: ParamsT, *, with_gate: bool = False, **settings
    ) -> SelectivePlasticityOptimizer:
        """An optimizer with the settings that this project recommends for a sequence of tasks.

        Args:
            params: parameters or parameter groups.
            with_gate: False (default): the optimizer alone, with :meth:`consolidate` after each task; ``lr=3e-3,
                beta1=0, eps=1e-3``. True: together with a :class:`~avalanche_sp.SelectivePlasticityPlugin`;
                ``lr=1e-3, plasticity_k=1, beta1=0, eps=1e-3``.
            settings: further arguments of the class. They take precedence.
        """
        preset = {"lr": 1e-3, "plasticity_k": 1.0} if with_gate else {"lr": 3e-3}
        return cls(params, **{"beta1": 0.0, "eps": 1e-3, **preset, **settings})

    def add_param_group(self, param_group: dict) -> None:
        _validate({**self.defaults, **param_group})
        super().add_param_group({"surprise": 0.0, **param_group})

    def __setstate__(self, state: dict) -> None:
        """Takes states of older versions too, and Adam's: a run can switch from Adam to this in mid-training."""
        before: list[dict] = self.__dict__.get("param_groups", [])  # none when an optimizer is unpickled
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and it is no argument here
        for i, group in enumerate(self.param_groups):
            own = before[i] if before else {}
            if "betas" in group:
                group["beta1"], group["trace_decay"] = group.pop("betas")
                if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False):
                    warnings.warn("Adam's weight decay in this state goes on as decoupled weight decay", stacklevel=3)
                for name in ("amsgrad", "capturable", "differentiable", "decoupled_weight_decay"):
                    group.pop(name, None)
            for name, value in {**self.defaults, "surprise": 0.0, **own}.items():
                group.setdefault(name, value)
            for p in group["params"]:
                if "step" in self.state.get(p, {}):
                    self.state[p].pop("max_exp_avg_sq", None)
                    self.state[p]["step"] = torch.as_tensor(self.state[p]["step"], dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):  # type: ignore[override]
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss (optional).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiled: list[dict] = []
        others: list[dict] = []
        for group in self.param_groups:
            (compiled if group["fused"] and group["plasticity_k"] != 0 else others).append(group)
        square_sums = self._square_sums(others)
        if square_sums is None or not self._compiled_step(compiled):
            return loss
        for group, sums in zip(others, square_sums):
            lists: tuple[list, list, list, list, list, list] = ([], [], [], [], [], [])
            self._init_group(group, *lists)
            selective_plasticity(*lists, sums, group)
        return loss

    def observe_surprise(self, value: float | Tensor) -> None:
        """Tells the gate how unexpected the present data is, from 0 (as usual) to 1.

        It stays in force until the next call. :class:`~avalanche_sp.SelectivePlasticityPlugin` calls this every
        iteration with the surprise of the stream's loss.

        Args:
            value: a float in [0, 1], or a 0-dim tensor, which is clamped to [0, 1] without a device sync.

        Raises:
            ValueError: not a number, or out of range.
        """
        if isinstance(value, Tensor):
            value = value.detach().clamp(0, 1)
        else:
            check_number("surprise value", value, _ALLOWED["surprise_weight"])
        for group in self.param_groups:
            group["surprise"] = value

    @torch.no_grad()
    def consolidate(self) -> None:
        """Keeps the present eligibility: what has been learned so far is to stay.

        Call it at the end of a task (:class:`~avalanche_sp.ConsolidationPlugin` does). It takes one more buffer of each
        parameter's size, ``state["consolidated"]``. From then on the gate reads that buffer alone, in full force. A
        parameter that has not been trained is left out.
        """
        for state in self.state.values():
            if "exp_avg_sq" in state:
                present = eligibility(state["exp_avg_sq"])
                state["consolidated"] = torch.maximum(state.get("consolidated", present), present)

    def reset_eligibility(self) -> None:
        """Forgets all eligibility, consolidated or running, so that every synapse is as plastic as a new one.

        The running trace is Adam's second moment, which shares its step count with the first: all three start again.
        """
        for state in self.state.values():
            state.clear()

    @torch.no_grad()
    def get_param_eligibility(self, param: Tensor) -> Tensor:
        """Eligibility e of a parameter's synapses as the gate reads it, of the parameter's shape; zeros before a step.

        Raises:
            ValueError: the parameter is not one of this optimizer's.
        """
        if not any(param is p for group in self.param_groups for p in group["params"]):
            raise ValueError(f"Invalid param: a tensor of shape {tuple(param.shape)} that this optimizer doesn't train")
        state = self.state.get(param, {})
        if "consolidated" in state:
            return state["consolidated"].clone()
        return eligibility(state["exp_avg_sq"]) if "step" in state else torch.zeros_like(param)

    @torch.no_grad()
    def get_diagnostics(self) -> dict[str, dict[str, float]]:
        """The gate's state, parameter by parameter, computed when asked.

        Returns:
            For each parameter with elements, by its name where it was given one, else by its number: its ``step``;
            ``openness``, the mean of the gate (alignment, which lets more through, left aside); ``protected``, the
            share of synapses whose gate is less than half open; ``max_eligibility``; ``consolidated``, 1 or 0; and
            ``surprise``.
        """
        diagnostics: dict[str, dict[str, float]] = {}
        for _, name, p, group in self._named_params():
            if p.numel() == 0:
                continue
            state = self.state.get(p, {})
            e = self.get_param_eligibility(p)
            k = group["plasticity_k"] * (1 - group["surprise_weight"] * float(group["surprise"]))
            if "consolidated" not in state:
                k *= warmup(state["step"] - 1, group["warmup_steps"]) if "step" in state else 0.0
            gate = 1 / resistance(e, k)
            diagnostics[str(name)] = {
                "step": float(state.get("step", 0.0)),
                "openness": gate.mean().item(),
                "protected": (gate < 0.5).float().mean().item(),
                "max_eligibility": e.max().item(),
                "consolidated": float("consolidated" in state),
                "surprise": float(group["surprise"]),
            }
        return diagnostics

    def _named_params(self) -> Iterator[tuple[int, str | int, Tensor, dict]]:
        """Of each parameter the number of its group, its name or its number among all, itself, and its group."""
        first = 0
        for g, group in enumerate(self.param_groups):
            params = group["params"]
            for name, p in zip(group.get("param_names", range(first, first + len(params))), params):
                yield g, name, p, group
            first += len(params)

    def _init_group(self, group: dict, params, grads, exp_avgs, exp_avg_sqs, consolidated, state_steps) -> bool:
        """Fills the lists with the group's tensors that take part in a step. (torch.compile knows this by its name.)"""
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "step" not in state:  # also the case for a head that has grown: Avalanche leaves it an empty state
                state["step"] = torch.tensor(0.0, dtype=torch.float32)  # half precision would stop counting
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            consolidated.append(state.get("consolidated"))
            state_steps.append(state["step"])
        return False  # no complex parameters

    def _refuse_other_shapes(self) -> None:
        """Refuses gradients and states of other shapes than the parameters', beyond which fused kernels would read."""
        for _, name, p, _ in self._named_params():
            state = self.state.get(p, {})
            for key in ("grad", "exp_avg", "exp_avg_sq", "consolidated"):
                known = p.grad if key == "grad" else state.get(key)
                if known is not None and known.shape != p.shape:
                    raise RuntimeError(
                        f"{key} of parameter {name} has shape {tuple(known.shape)}, and the parameter has shape "
                        f"{tuple(p.shape)}: nothing was updated. The usual causes are a state of another model, "
                        "and data of the parameter that were replaced."
                    )

    def _square_sums(self, groups: list[dict]) -> list[list[Tensor]] | None:
        """Every gradient's sum of squares, by group; refuses what a step could not undo, before anything has changed.

        Returns:
            None where the step is to be skipped.
        """
        self._refuse_other_shapes()
        sums = []
        for group in groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            _refuse_unsupported(grads, group["fused"])
            sums.append(_squared_norms(grads))
        # A finite sum of squares has finite squares only. One that overflowed is looked into, element by element.
        if _all_finite([s for group in sums for s in group]) or self._look_for_non_finite():
            return sums
        return None

    def _compiled_step(self, groups: list[dict]) -> bool:
        """Steps these groups' parameters, all or none; False where the step is to be skipped."""
        _refuse_unsupported([p.grad for g in groups for p in g["params"] if p.grad is not None], fused=True)
        lists: tuple[list, ...] = ([], [], [], [], [], [], [])
        for group in groups:
            self._init_group(group, *lists[:6])
            lists[6].extend([group] * (len(lists[0]) - len(lists[6])))
        params = lists[0]
        devices = {p.device for p in params}
        calls = [lists]
        if len(devices) != 1:  # one call knows nothing of the other's gradients
            if devices and not self._look_for_non_finite():
                return False
            calls = [tuple([x for x, p in zip(column, params) if p.device == d] for column in lists) for d in devices]
        if all(compiled_selective_plasticity(*call) for call in calls):
            return True
        for p in params:
            if self.state[p]["step"] == 0:  # made for this step
                made = self.state.pop(p)
                if "consolidated" in made:
                    self.state[p] = {"consolidated": made["consolidated"]}
        if self._look_for_non_finite():
            raise FloatingPointError("exp_avg_sq is not finite in the optimizer's state: nothing was updated")
        return False

    def _look_for_non_finite(self) -> bool:
        """False, or an error, where a gradient is not finite or its square is not."""
        for g, name, p, group in self._named_params():
            if p.grad is None or p.grad.square().isfinite().all():
                continue
            if p.grad.isnan().any():
                cause = "NaN"
            else:
                cause = "infinity" if p.grad.isinf().any() else f"a value whose square overflows {p.grad.dtype}"
            step = int(self.state.get(p, {}).get("step", 0)) + 1
            message = (
                f"{cause} in the gradient of parameter {name} (group {g}, shape {tuple(p.shape)}) at its step "
                f"{step}: nothing was updated. The usual causes are too high a learning rate or a loss that "
                "overflowed."
            )
            if group["nonfinite"] == "raise":
                raise FloatingPointError(message)
            warnings.warn(message, stacklevel=4)
            return False
        return True


def _refuse_unsupported(grads: list[Tensor], fused: bool | None) -> None:
    for grad in grads:
        if grad.is_sparse:
            raise RuntimeError("SelectivePlasticityOptimizer does not support sparse gradients")
        if grad.is_complex():
            raise RuntimeError("SelectivePlasticityOptimizer does not support complex parameters")
        if fused and not (grad.is_floating_point() and is_plain(grad) and grad.device.type in ("cpu", "cuda")):
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors on CPU or CUDA")


def _squared_norms(grads: list[Tensor]) -> list[Tensor]:
    if all(is_plain(g) and g.device.type == "cpu" and g.dtype in (torch.float32, torch.float64) for g in grads):
        flat = [g.view(-1) if g.is_contiguous() else g.flatten() for g in grads]
        return [torch.dot(g, g) for g in flat]
    norms: list = list(torch._foreach_norm(grads))
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]  # of all shards: all processes agree
    return [n.float().square() for n in norms]


def _all_finite(values: list[Tensor]) -> bool:
    if all(v.device.type == "cpu" for v in values):
        return all(math.isfinite(v.item()) for v in values)
    return bool(torch.stack([v.to(values[0].device) for v in values]).isfinite().all())


_ALLOWED: dict[str, Condition] = {
    **dict.fromkeys(("lr", "plasticity_k", "warmup_steps", "eps", "weight_decay"), AT_LEAST_0),
    "trace_decay": (lambda v: 0.0 <= v < 1.0, "0 <= trace_decay < 1"),
    "beta1": (lambda v: 0.0 <= v < 1.0, "0 <= beta1 < 1"),
    "surprise_weight": (lambda v: 0.0 <= v <= 1.0, "0 to 1"),
    "alignment_threshold": (lambda v: v > -math.inf, "a number, or math.inf"),
}


def _validate(group: dict) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if group["foreach"]:
            raise ValueError("lr as a Tensor is not supported for foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        lr = lr.item()
    for name, allowed in _ALLOWED.items():
        check_number(f"{name} value", lr if name == "lr" else group[name], allowed)
    if group["nonfinite"] not in ("raise", "skip"):
        raise ValueError(f"Invalid nonfinite value: {group['nonfinite']!r} (allowed: 'raise' or 'skip')")
    if group["foreach"] and group["fused"]:
        raise ValueError("`fused` and `foreach` cannot be `True` together.")
