"""Hooks on a network and its optimizer: where the gradient of a training step is gated."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avalanche_sp.gate.functional import unanswered
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.penalty import Drift, Gated
from avalanche_sp.gate.precision import outside_autocast
from avalanche_sp.gate.processes import mean_over_processes, several_processes
from avalanche_sp.gate.rows import StreamRows
from avalanche_sp.gate.stream import StreamWatch

_LAST: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by optimizer, the hooks that were last put on it


@dataclass(frozen=True)
class Epoch:
    """The part of an epoch's state that the hooks need.

    Attributes:
        protected: the layers whose gate is not switched off, by name.
        gated: those of them that have a memory.
        norms: the frozen normalisation layers.
        frozen: their parameters, and the others that are neither gated nor trained.
        has_stored: whether its batches have stored samples.
    """

    protected: Mapping[str, GatedLayer] = field(default_factory=dict)
    gated: Mapping[str, Gated] = field(default_factory=dict)
    norms: Sequence[nn.Module] = ()
    frozen: Sequence[nn.Parameter] = ()
    has_stored: bool = False


class StepHooks:
    """Gate the gradient before an optimizer's step, and take back the gated part of the updates after it.

    Without stored samples the gradient of a layer is gated before the step. With them only the stream's part of it is,
    in the backward pass, where the rows of a batch can be told apart.

    Args:
        drift: the penalty, and the part of the updates that is taken back.
        stream: follows a stream without told boundaries; None if they are told.
        ended: called with the optimizer after each step.

    Attributes:
        listening: whether forward passes are those of training.
        gating: whether backward passes are those of training.
        epoch: the present one.
        rows: rows of the present batch that come from the stream; None for all.
        sees_steps: whether they were put on, also if they have been taken off since.
        saw_steps: whether they saw a step of the present experience.
        trained: names of the parameters that have been trained.
        device_type: of the model's parameters.
    """

    def __init__(self, drift: Drift, stream: StreamWatch | None, ended: Callable[[torch.optim.Optimizer], None]):
        self.listening = self.gating = True
        self.epoch = Epoch()
        self.rows: StreamRows | None = None
        self.sees_steps = self.saw_steps = False
        self.trained: set[str] = set()
        self._drift, self._stream, self._ended = drift, stream, ended
        self._untrained: dict[str, nn.Parameter] = {}  # parameters that have not been trained
        self.device_type = "cpu"
        self._handles: list = []
        self._hooked: set[nn.Module] = set()  # modules with a hook; also if the hooks rest
        # Of the present step.
        # The part of the stream's gradient that the gate holds back, by layer and parameter.
        self._held: dict[tuple[str, nn.Parameter], Tensor] = {}
        # At a look, by layer: the gradient along the gated vectors, and the part of it that the gate holds back.
        self._along: dict[str, list[Tensor]] = {}
        self._withheld: dict[nn.Parameter, Tensor | None] = {}  # gradients of frozen parameters
        self._kept: list[tuple[nn.Parameter, Tensor]] = []  # frozen parameters before a step with a closure
        self._resting: set[nn.Module] = set()  # frozen layers in the midst of their forward pass

    @property
    def are_on(self) -> bool:
        """Whether they are on a model."""
        return bool(self._handles)

    def is_taken(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether others are on an optimizer."""
        last = _LAST.get(optimizer, lambda: None)()
        return last is not None and last is not self and last.are_on

    def put(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: Epoch) -> None:
        """Puts the hooks on a model's layers and on its optimizer, and takes them off those before."""
        self.take_off()
        self.epoch, self.sees_steps = epoch, True
        self.device_type = next(model.parameters()).device.type
        self._untrained = {name: p for name, p in model.named_parameters() if name not in self.trained}
        _LAST[optimizer] = weakref.ref(self)
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        hooked = set(epoch.norms)
        if self._stream is not None or epoch.gated:
            hooked.update(layer.module for layer in epoch.protected.values())
            for name, layer in epoch.protected.items():
                hook = _Hook(layer.module, self._after_forward, name, layer)
                self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        for g in epoch.gated.values() if epoch.has_stored else ():
            self._handles += [p.register_hook(partial(self._gate_backward, g, p)) for p in g.layer.trained_parameters]
        for norm in epoch.norms:
            self._handles.append(norm.register_forward_pre_hook(_Hook(norm, self._freeze)))
            self._handles.append(norm.register_forward_hook(_Hook(norm, self._unfreeze), always_call=True))
        if hooked != self._hooked and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # a compiled model does not see hooks that come later
        self._hooked = hooked

    def take_off(self) -> None:
        """Takes all hooks off, also after an error in the midst of a step."""
        for handle in self._handles:
            handle.remove()
        for norm in self._resting:
            norm.train()
        self._handles.clear()
        self._resting.clear()
        self._held.clear()
        self._along.clear()
        self.rows = None

    def __getstate__(self) -> dict:
        """For pickle: the copy is on no model."""
        fresh: dict[str, Any] = {"_handles": [], "_hooked": set(), "_untrained": {}, "sees_steps": False, "rows": None}
        return vars(self) | fresh | {"_held": {}, "_along": {}, "_withheld": {}, "_kept": [], "_resting": set()}

    # -- Forward and backward pass ---------------------------------------------------------------------------------

    def _after_forward(
        self, name: str, layer: GatedLayer, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        """Notes the layer's input, and waits for the error that comes back to its output."""
        made = output if isinstance(output, Tensor) else None
        if not (self.listening and torch.is_grad_enabled()) or (
            layer.per_row and (made is None or not made.requires_grad)
        ):
            return
        looked = name in self.epoch.gated and (self._drift.is_looking or self.epoch.has_stored)
        if not (looked or self._stream) or (x := layer.input_of(args, kwargs, output)) is None:
            return
        stream = self.rows
        if self._stream is not None and self._stream.listens(stream.count if stream else len(x)):
            self._stream.note(name, layer, x, made if layer.per_row else None)
        if looked:
            x = x.detach()
            if made is not None and layer.per_row:
                made.register_hook(lambda delta: self._hold_back(self.epoch.gated[name], x, delta, stream))
            else:  # what comes back is the error of the module's output, not of the map's
                self._look_at(self.epoch.gated[name], x if stream is None else stream.of(x))

    @outside_autocast
    def _hold_back(self, g: Gated, x: Tensor, delta: Tensor, stream: StreamRows | None) -> None:
        """Hook on a layer's output: the part of its gradient that the gate holds back. Sums over uses of a layer."""
        if not self.gating:
            return
        x, delta = ((t if stream is None else stream.of(t)).to(g.memory.vectors.dtype) for t in (x, delta))
        if not len(x):
            return
        if self._drift.is_looking:
            self._look_at(g, x)
        if self.epoch.has_stored:
            held = g.gate.held_activity(g.layer, x, delta)
            for key in ((g.name, parameter) for parameter in g.layer.trained_parameters):
                self._held[key] = self._held[key] + held if key in self._held else held

    @outside_autocast
    def _look_at(self, g: Gated, x: Tensor) -> None:
        x = x.to(g.memory.vectors.dtype)
        g.statistics.add(g.gate, g.layer.energy(x), g.layer.power(x, g.memory.vectors))

    @outside_autocast
    def _gate_backward(self, g: Gated, parameter: nn.Parameter, grad: Tensor) -> Tensor | None:
        """Hook on a parameter: gates the stream's part of the gradient of a backward pass, before it is accumulated."""
        held = self._held.pop((g.name, parameter), None)
        if held is None:
            return None
        if self._drift.is_looking:
            self._note(g, parameter, grad, held)
        held = held * g.statistics.holding
        return g.layer.gated_gradient(grad, held, g.gate.leading, 1 - g.gate.closed_rest)

    def _note(self, g: Gated, parameter: nn.Parameter, grad: Tensor, held: Tensor) -> None:
        """Adds a backward pass to the step's gradient along the gated vectors."""
        known = self._along.setdefault(g.name, [torch.zeros_like(held)] * 2)
        known[0] = known[0] + g.layer.part_along(parameter, grad, g.gate.leading)
        if parameter is g.layer.weight:  # it is of weight and bias together
            known[1] = known[1] + held

    def _freeze(self, norm: nn.Module, args: tuple) -> None:
        if norm.training:
            self._resting.add(norm.eval())

    def _unfreeze(self, norm: nn.Module, args: tuple, output: Any) -> None:
        if norm in self._resting:
            self._resting.remove(norm.train())

    # -- Step ------------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict):
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args begins with the optimizer
        if closure is None:
            self._gate_gradients(optimizer)
            return None

        self._kept = [(p, p.detach().clone()) for p in self.epoch.frozen]

        def gated_closure():
            self._put_back()
            loss = closure()
            self._gate_gradients(optimizer)
            return loss

        return (args[0], gated_closure), {}

    def _put_back(self) -> None:
        """Puts frozen parameters back: LBFGS moves them along earlier directions, though they have no gradient."""
        for parameter, kept in self._kept:
            parameter.data.copy_(kept)

    @torch.no_grad()
    @outside_autocast
    def _gate_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.epoch.frozen:  # without a gradient: zeros still follow momentum and decay weights
            self._withheld[parameter], parameter.grad = parameter.grad, None
        # A GradScaler leaves it to fused optimizers to unscale the gradients.
        scale = getattr(optimizer, "grad_scale", None)
        for name, g in self.epoch.gated.items():
            if g.layer.weight.grad is None:
                continue
            if g.step < 1:
                g.layer.scale_gradient(g.step)
            penalty = self._drift.gradient(name, scale)
            if not self.epoch.has_stored:
                g.gate.gate(g.layer, g.memory, penalty)
            elif penalty is not None:
                new_units = g.layer.units - len(penalty)
                g.layer.gate_gradient(F.pad(-penalty, (0, 0, 0, new_units)), g.memory.vectors)
            self._drift.add_gradient_beyond(name, scale)
        for name in [name for name, p in self._untrained.items() if p.grad is not None]:
            self.trained.add(name)
            del self._untrained[name]

    @outside_autocast
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for parameter, grad in self._withheld.items():  # plugins such as Synaptic Intelligence read it after the step
            parameter.grad = grad
        self._withheld = {}
        self._put_back()
        self._kept = []
        self.rows = None
        self.saw_steps = True
        gated = self.epoch.gated
        if self.epoch.has_stored and self._drift.is_looking and several_processes():
            for name, g in gated.items():  # a process without rows of one kind takes part with zeros
                nothing = g.gate.leading.new_zeros(g.layer.units, g.gate.leading.shape[-1])
                self._along.setdefault(name, [nothing, nothing])
        for name, g in gated.items():  # in the same order in each process
            if name in self._along:
                along, held = (mean_over_processes(part) for part in self._along[name])
                g.statistics.holding = unanswered(along, held, g.gate.closed_leading)
        self._along.clear()
        self._drift.end_step()
        self._ended(optimizer)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer in a wrapper that has no hooks of its own, such as accelerate's."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """All parameters that an optimizer trains."""
    return {p for group in optimizer.param_groups for p in group["params"]}


class _Hook:
    """A hook on one module. In a copy of the module, or unpickled with it, it does nothing."""

    def __init__(self, module: nn.Module | None = None, call: Callable | None = None, *first: Any):
        self.module, self.call, self.first = module, call, first

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if module is self.module and self.call is not None:
            self.call(*self.first, module, *args)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook()

    def __reduce__(self):
        return _Hook, ()
