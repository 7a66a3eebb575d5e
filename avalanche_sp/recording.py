"""How consolidated activity is seen: samples of an experience, run through the network as it is now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from avalanche.models import avalanche_forward
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avalanche_sp.activity import some_inputs
from avalanche_sp.gates import loss_curvature
from avalanche_sp.layers import GatedLayer, along
from avalanche_sp.readout import ReadoutLoss

__all__ = ["Recorded", "evenly_spread", "output_derivatives", "record_activity"]


@dataclass
class Recorded:
    """What samples of an experience did in the network.

    Attributes:
        inputs: input vectors (m, d) of each layer that was called, by name.
        rows: how many of them a sample gives a weight.
        curvature: the loss's mean curvature in the outputs, 0-dim; 0 without a loss.
        fed_by_data: the layers whose input is given, not made by anything that learns: the first, or one on a frozen
            trunk.
        readout: the linear layer whose output is the network's, but for masked units; None if there is none.
            Known only where the loss is quadratic in the outputs, and convex.
        loss: the mean loss in the readout's weights, a sample's worth; None where there is no readout.
    """

    inputs: dict[str, Tensor]
    rows: dict[str, float]
    curvature: Tensor
    fed_by_data: set[str]
    readout: str | None = None
    loss: ReadoutLoss | None = None

    def readout_loss(self, weight: float) -> ReadoutLoss | None:
        """The loss in the readout's weights, so many samples' worth; None where there is no readout."""
        return replace(self.loss, weight=weight) if self.loss is not None else None


def record_activity(
    strategy,
    dataset,
    layers: Mapping[str, GatedLayer],
    samples: int,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
) -> Recorded:
    """Runs samples of an Avalanche dataset, evenly spread over it, through the strategy's network as it is now.

    Leaves the modules' modes and the global random state alone.

    Args:
        layers: whose inputs are wanted, by name.
        samples: how many at most.
        criterion: loss whose derivatives in the outputs are wanted, a mean over samples; or None.

    Raises:
        TypeError: a loss is given and the network's output is not one tensor.
        FloatingPointError: an input is not finite.
    """
    model = strategy.model
    activity: dict[str, list[Tensor]] = {}
    vectors_seen: dict[str, int] = {}
    curvatures: list[Tensor] = []
    errors: list[tuple[str | None, Tensor]] = []
    last: tuple[str, GatedLayer, Tensor] | None = None

    def recorder(name):
        def hook(layer, inputs, output):
            nonlocal last
            last = name, layer, output
            x, count = some_inputs(layer, inputs[0])
            activity.setdefault(name, []).append(x)
            vectors_seen[name] = vectors_seen.get(name, 0) + count

        return hook

    modes = {module: module.training for module in model.modules()}
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices):
            with _after_each(layers, recorder):
                for batch in evenly_spread(dataset, samples):
                    x, y, task_labels = (column.to(strategy.device) for column in batch)
                    outputs = avalanche_forward(model, x, task_labels)
                    if criterion is not None:
                        curvature, name, error = output_derivatives(criterion, outputs, y, last)
                        curvatures.append(curvature)
                        errors.append((name, error))
            given = _fed_by_data(model, layers, x[:2], task_labels[:2])
    finally:
        for module, mode in modes.items():
            module.training = mode
    recorded = Recorded(
        inputs={name: torch.cat(parts) for name, parts in activity.items()},
        rows={name: count / min(len(dataset), samples) for name, count in vectors_seen.items()},
        curvature=torch.stack(curvatures).mean() if curvatures else torch.zeros(()),
        fed_by_data=given,
    )
    for name, x in recorded.inputs.items():
        if not x.square().sum().isfinite():
            raise FloatingPointError(
                f"the input of layer {name} is not finite, or its square is not, at the end of training experience "
                f"{strategy.clock.train_exp_counter}: nothing was consolidated. The usual cause is too high a learning "
                "rate."
            )
    readouts = {name for name, _ in errors}
    readout = readouts.pop() if len(readouts) == 1 else None
    if readout is not None:
        x, curvature = recorded.inputs[readout], recorded.curvature
        error = torch.cat([error for _, error in errors]).to(x.dtype)
        wanted = along(layers[readout], x.T).T - error / curvature
        recorded.readout = readout
        recorded.loss = ReadoutLoss(
            error.T @ x / len(x), x.T @ x / len(x), curvature, wanted.square().sum() / len(x), weight=1
        )
    return recorded


def evenly_spread(dataset, samples: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """So many samples of an Avalanche dataset at most, in batches: inputs, targets and task labels."""
    chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), samples)).long()
    loader = DataLoader(
        dataset.subset(chosen.tolist()),
        batch_size=512,
        collate_fn=getattr(dataset, "collate_fn", None),
        generator=torch.Generator(),  # its own: a loader draws from the global one even without shuffling
    )
    for batch in loader:
        yield batch[0], batch[1], batch[-1]


def output_derivatives(
    criterion: Callable[[Tensor, Tensor], Tensor],
    outputs: Tensor,
    targets: Tensor,
    last: tuple[str, GatedLayer, Tensor] | None,
) -> tuple[Tensor, str | None, Tensor]:
    """The loss's mean curvature in the outputs, 0-dim; the readout's name; its gradient in the readout's output.

    That has a row a sample. The name is None where the last layer isn't a readout or part of it is frozen, or the loss
    isn't quadratic in the outputs, or isn't convex.

    Args:
        criterion: a mean over samples.
        outputs, targets: the network's outputs (n, C), what they should be.
        last: the last layer that was called, its name before and its output after it.

    Raises:
        TypeError: the network's output is not one tensor.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"Invalid model: its output is a {type(outputs).__name__} (the pull-back and the readout's step measure "
            "the loss on one output tensor; pull_back=0 and readout_step=False leave the gate alone)"
        )
    with torch.enable_grad():
        varied = outputs.detach().requires_grad_()
        curvature = loss_curvature(varied, criterion(varied, targets))
    if last is None:
        return curvature, None, outputs
    name, layer, made = last
    if made.shape != outputs.shape or outputs.dim() != 2 or not all(p.requires_grad for p in layer.parameters()):
        return curvature, None, outputs
    kept = (outputs == made).all(0)  # the others are masked: Avalanche's incremental heads do it
    nothing, error, twice = (_gradient(criterion, scale * outputs, targets) for scale in (0.0, 1.0, 2.0))
    quadratic = (nothing + twice - 2 * error).abs().max() <= 1e-3 * error.abs().max() and (nothing != twice).any()
    is_readout = kept.any() and quadratic and curvature > 0
    return curvature, name if is_readout else None, error * kept * len(outputs)


@torch.enable_grad()
def _gradient(criterion: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = outputs.detach().requires_grad_()
    return torch.autograd.grad(criterion(outputs, targets), outputs)[0]


def _fed_by_data(model: nn.Module, layers: Mapping[str, GatedLayer], x: Tensor, task_labels: Tensor) -> set[str]:
    """Names of the layers whose input nothing that learns has made, seen on a few samples ``x``."""
    given: dict[str, bool] = {}

    def note(name):
        return lambda layer, inputs, _: given.update({name: given.get(name, True) and not inputs[0].requires_grad})

    with torch.enable_grad(), _after_each(layers, note):
        avalanche_forward(model, x, task_labels)
    return {name for name, is_given in given.items() if is_given}


@contextmanager
def _after_each(layers: Mapping[str, GatedLayer], hook_of: Callable[[str], Callable]) -> Iterator[None]:
    """Within it, each layer's forward pass is followed by the hook of its name."""
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
