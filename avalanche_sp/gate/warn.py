"""Warnings of a consolidation: ungated weights, an unlearned experience, dead units, an unsolved last layer."""

import sys
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType

from torch import Tensor, nn

from avalanche_sp.gate.layer_gate import StreamStatistics
from avalanche_sp.gate.memory import Memory
from avalanche_sp.gate.observe import Observation
from avalanche_sp.gate.per_layer import PerLayer, value_of

_PACKAGE = str(Path(__file__).parents[1])
_MOSTLY = 0.5  # of a layer's inputs are dead
_HARDLY = 0.9  # an experience is hardly learned if this share of its loss, or more, is left


def _warn(message: str) -> None:
    """Warns at the line that called the package."""
    frame: FrameType | None = sys._getframe()
    depth = level = 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            level = depth + 1
        frame, depth = frame.f_back, depth + 1
    warnings.warn(f"selective plasticity{message}", stacklevel=level)


def warn_of_ungated(
    model: nn.Module,
    trained: Collection[str],
    gated: Collection[nn.Parameter],
    others: Mapping[str, list[nn.Parameter]],
    ungated: str,
) -> None:
    """Names the trained parameters that are not gated.

    Args:
        trained: names of the parameters that have been trained.
        gated: the gated parameters.
        others: parameters without a memory, by the name of their module.
        ungated: what happens to these, as of the gate: ``"freeze"`` or ``"train"``.
    """
    parameters = {p for name, p in model.named_parameters() if name in trained}
    names = [name for name, own in others.items() if parameters.intersection(own)]
    if names:
        share = sum(p.numel() for p in parameters.intersection(gated)) / sum(p.numel() for p in parameters)
        kinds = {name: type(module).__name__ for name, module in model.named_modules() if name in others}
        named = ", ".join(f"{name} ({kinds[name]})" if name in kinds else name for name in names)
        freezes = ungated == "freeze"
        frozen = "They are frozen from now on, unless stored samples are trained on"
        happens = frozen if freezes else "They train ungated and may forget"
        happens += f" (ungated={'train' if freezes else 'freeze'!r} changes this)"
        if not gated:
            happens = "They train on and may forget, as the forward pass calls no layer that can be gated"
        shown = "over 99" if share > 0.995 else f"{100 * share:.0f}"
        _warn(f" gates {shown}% of the trained parameters. Not gated: {named}. {happens}.")


def warn_of_unlearned(
    before: Tensor | None,
    observation: Observation,
    memory: Memory,
    statistics: Mapping[str, StreamStatistics],
    openness: PerLayer[float],
) -> None:
    """Says so if an experience's loss hardly fell, and earlier experiences reached a lower one.

    Args:
        before: the loss on its samples before it, 0-dim; None if it is not known.
        observation: after it.
        memory: of the earlier experiences.
        statistics: of the gated layers' inputs, by name.
        openness: the gate's.
    """
    now = observation.loss
    if before is None or now is None or not statistics or not now > max(_HARDLY * before, 2 * memory.loss):
        return
    passed = {name: s.openness for name, s in statistics.items()}
    least = min(passed, key=lambda name: passed[name])
    advice = (
        f"Of its input's energy the gate let {100 * passed[least]:.1f}% through at layer {least}, the least. A larger "
        f"openness (now {value_of(openness, least):g}), a lower pull_back, a higher learning rate or more steps let it "
        "learn more; openness=math.inf switches the gate off."
    )
    if now > before:
        advice = "The usual cause of a loss that rises is too high a learning rate."
    _warn(
        f": experience {memory.consolidations + 1} was hardly learned. Its loss went from {float(before):.3g} to "
        f"{float(now):.3g}, and earlier experiences ended at {float(memory.loss):.3g}. {advice}"
    )


def warn_of_dead(observation: Observation) -> None:
    """Says so if the first experience has left a layer few live inputs, for no gate can bring them back."""
    dead = {name: seen.dead for name, seen in observation.layers.items()}
    name, share = max(dead.items(), key=lambda layer: layer[1], default=("", 0.0))
    if share > _MOSTLY:
        _warn(
            f": {100 * share:.0f}% of the inputs of layer {name} are zero for every sample of the first experience "
            "(dead units). Later experiences learn from the others. A lower learning rate in the first experience "
            "leaves more of them alive."
        )


def warn_of_unsolved(observation: Observation) -> None:
    """Says so if the readout cannot be solved, for without it new classes are learned little."""
    if observation.layers and observation.classified is None and observation.readout is None:
        _warn(
            " cannot solve the last layer for old and new classes together, and gates it as any other. Without classes "
            "this is as it should be. It is solved if the whole layer trains, the network returns its outputs (n, "
            "classes), a mean of them over places or those of one place, an affine function of each, or their "
            "softmax, log-softmax or sigmoid, and the targets of prepare and consolidate are class labels or one-hot "
            "rows, or the loss is a squared error."
        )


def warn_of_left(layer: str) -> None:
    """Says so if the readout was not solved."""
    _warn(
        f": layer {layer} is not solved for this loss, and is gated as any other, so new classes are learned less. The "
        "search starts at outputs of zero. There the loss has no gradient, or the search ends at a higher loss than "
        "training did. With readout_step=False there is no attempt, nor this warning."
    )


def warn_of_frozen_readout(layer: str) -> None:
    """Says so if an experience trains without the gate because the network's last layer is frozen."""
    _warn(
        f": layer {layer} makes the network's outputs and is frozen, so the layers below alone can learn new classes. "
        "This experience trains without the gate."
    )


def warn_of_lacking(classes: list[int]) -> None:
    """Names earlier classes without a stored sample."""
    if classes:
        named = ", ".join(map(str, classes[:10])) + ("" if len(classes) <= 10 else f" and {len(classes) - 10} more")
        _warn(
            f": no stored sample is of class {named}. Stored samples open the gate, so these are forgotten. Store some "
            "of each earlier class, or none at all."
        )


def warn_of_unseen(layers: list[str]) -> None:
    """Names gated layers that another optimizer has trained."""
    if layers:
        _warn(
            f": {', '.join(layers)} changed, but in no step that the gate saw. Earlier experiences may be lost. A new "
            "optimizer needs gate.attach(model, optimizer), and so does a copy of the model. A gate has one optimizer, "
            "with a parameter group for each learning rate."
        )


def warn_of_unobserved() -> None:
    """Says so if a gate that finds boundaries is not told the loss of a step."""
    _warn(
        ": an optimizer step came without gate.observe(inputs, outputs, targets, loss, criterion). A gate that finds "
        "boundaries needs it before every step. Without it boundaries are missed, and earlier classes are lost."
    )


def warn_of_other_samples() -> None:
    """Says so if the samples after an experience are not those before it."""
    _warn(
        ": consolidate was given other samples than prepare, or the same in another order. The drift of old inputs is "
        "not measured, so more is forgotten. Give both the same dataset, DataLoader or list of batches."
    )


def warn_of_unconsolidated() -> None:
    """Says so if an experience was trained and not consolidated."""
    _warn(
        ": prepare was called again, and the experience since the last call was not consolidated. Nothing protects it. "
        "Call gate.consolidate(data, criterion) when an experience has been learned."
    )


def warn_of_thawed(layers: list[str]) -> None:
    """Names layers that train now and were frozen when earlier experiences were consolidated."""
    if layers:
        _warn(
            f": {', '.join(layers)} train from now on, but were frozen at the last consolidation. The gate has no "
            "memory of their inputs, so nothing protects them. Layers that will train must not be frozen before."
        )
