"""Consolidation: what a gate remembers after one more experience. Nowhere else is a layer's memory merged."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from avalanche_sp.gate.classes import class_roots, class_sums
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory, Memory, packed_bytes
from avalanche_sp.gate.observe import Observation
from avalanche_sp.gate.packed import PackedRows
from avalanche_sp.gate.readout import ReadoutLoss, newton_readout
from avalanche_sp.gate.settings import Settings


@torch.no_grad()
def consolidate(
    memory: Memory,
    observation: Observation,
    layers: Mapping[str, GatedLayer],
    merged: Mapping[str, LayerMemory],
    trained: Mapping[str, Tensor | None],
    rank_of: Callable[[str, int, bool], float],
    remembers_weights: Collection[str],
    settings: Settings,
    stored: Sequence[ReadoutLoss] | None = (),
    trust: float = 0.0,
    damping: float | None = None,
) -> Memory:
    """Merges an observation into the memory, and takes the readout's Newton step before, if it is due, in place.

    Args:
        layers: the network's gated layers by name; their weights become the anchors.
        merged: second moments that are merged already, by layer.
        trained: weights from which the next experience is trained if it continues this one, by layer.
        rank_of: eigenvectors to keep, by layer name, number of inputs, and whether it makes the network's outputs.
        remembers_weights: the layers whose weights are remembered along all directions, at four bits each.
        stored: losses of stored samples in the readout's weights; None takes no step of the readout.
        trust: the share of the old loss that stored samples stand for, 0 to 1.
        damping: of the readout's step.
    """
    remembered = dict(memory.layers)
    for name, seen in observation.layers.items():
        layer, old, residual = layers[name], memory.layers.get(name), None
        readout = observation.readout
        if readout is not None and readout.layer == name and stored is not None:
            losses = [readout, *stored]
            residual = newton_readout(layer, losses, old, memory.curvature, settings, trust, damping)
        sums = counts = roots = data_sums = None
        classified = observation.classified
        if classified is not None and classified.layer == name:
            if readout is None:  # the loss is not quadratic
                roots = class_roots(classified, old, settings)
            sums, counts = class_sums(classified)
            if old is not None and old.class_sums is not None and old.class_counts is not None:
                sums, counts = _sum(old.class_sums, sums), _sum(old.class_counts, counts)
        elif classified is not None and name == observation.entrance:
            heads = {n for n, m in memory.layers.items() if m.class_sums is not None} | {classified.layer}
            if len(heads) == 1 and len(classified.masked) <= layer.units:  # no larger than the layer's weights
                data_sums = class_sums(replace(classified, inputs=seen.inputs))[0]
            if old is not None and data_sums is not None:
                data_sums = None if old.data_sums is None else _sum(old.data_sums, data_sums)
        inputs = seen.inputs.shape[-1]
        rank = rank_of(name, inputs, name == observation.last)
        new = merged.get(name) or (old or LayerMemory.empty(inputs, seen.inputs)).merged(
            seen.inputs, observation.samples, seen.rows, rank, seen.mean_eigenvalue
        )
        keeps_weights = name in remembers_weights and not new.is_complete
        remembered[name] = replace(
            new,
            anchor=layer.along(new.vectors),
            rough_anchor=PackedRows.of(layer.weights_and_bias()) if keeps_weights else None,
            residual=residual,
            class_sums=sums,
            class_counts=counts,
            class_roots=roots,
            data_sums=data_sums,
            trained=trained.get(name),
            sharpness=old.sharpness if old is not None else None,
            fed_by_data=seen.fed_by_data,
        )
    old_samples, samples = memory.samples, observation.samples

    def mean(old: Tensor, new: Tensor) -> Tensor:
        return (old_samples * old + samples * new) / (old_samples + samples)

    return Memory(
        remembered,
        mean(memory.curvature, observation.curvature),
        memory.classes + observation.classes,
        memory.consolidations + 1,
        memory.loss if observation.loss is None else mean(memory.loss, observation.loss),
    )


def least_bytes(memory: Memory, layers: Mapping[str, GatedLayer]) -> int:
    """Bytes that the memory of a network takes at least: rounded, with one eigenvector a layer.

    Args:
        memory: so far. Layers that have left the network stay in it.
        layers: the network's gated layers by name. If no readout is known so far, the last layer counts as the readout.
            A layer without memory counts as another head if its number of inputs is that of a known readout.
    """
    left = [known for name, known in memory.layers.items() if name not in layers]
    total = sum(known.leading(1).rounded().state_bytes for known in left)
    readouts = {n: m for n, m in memory.layers.items() if m.residual is not None or m.class_sums is not None}
    widths, last = {len(known.vectors) for known in readouts.values()}, list(layers)[-1:]
    for name, layer in layers.items():
        units, inputs = layer.units, layer.inputs + (layer.bias is not None)
        is_new_head = name not in memory.layers and (inputs in widths if widths else name in last)
        total += 8  # eigenvalue and mean eigenvalue; then the eigenvector, an embedding's is a place, and the anchor
        if layer.of_rows:
            total += 8 + 4 * units
        else:
            total += packed_bytes("vectors", inputs, 1) + packed_bytes("anchor", units, 1)
        if name in readouts or is_new_head:  # residual, class counts and class sums
            total += 4 * units * (inputs + 1) + packed_bytes("class_sums", units, inputs)
    return total


def check_fits(name: str, layer: GatedLayer, memory: LayerMemory) -> None:
    """Raises ValueError if a layer has fewer units, or other inputs, than its memory knows."""
    units, inputs = layer.units, layer.inputs + (layer.bias is not None)
    known = len(memory.anchor), inputs if layer.of_rows else len(memory.vectors)
    if units < known[0] or inputs != known[1]:
        raise ValueError(
            f"Invalid model: layer {name} has {units} units and {inputs} inputs with the bias's, and its memory is of "
            f"{known[0]} and {known[1]} (allowed: the same inputs, and no fewer units; a new head needs a new name)"
        )


@torch.no_grad()
def inherited(memory: LayerMemory, layer: GatedLayer) -> LayerMemory:
    """The memory of a layer's inputs for another layer with the same inputs, its present weights the anchor."""
    rough = None if memory.rough_anchor is None else PackedRows.of(layer.weights_and_bias())
    of_weights: dict = dict.fromkeys(("residual", "class_sums", "class_counts", "class_roots", "trained"))
    return replace(memory, anchor=layer.along(memory.vectors), rough_anchor=rough, packed={}, **of_weights)


def _sum(old: Tensor, new: Tensor) -> Tensor:
    """Their sum; a head that has grown has more rows now."""
    new = new.clone()
    new[: len(old)] += old
    return new
