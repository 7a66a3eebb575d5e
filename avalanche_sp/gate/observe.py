"""What samples of an experience do in the network as it is now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from avalanche_sp.gate.classes import ReadoutSamples
from avalanche_sp.gate.functional import leading_eigenvalue, loss_derivatives
from avalanche_sp.gate.layers import GatedLayer, gated_layers
from avalanche_sp.gate.links import Criterion, Link, close, in_dtype, linked, units_of, unlinked, with_gradient
from avalanche_sp.gate.readout import ReadoutLoss
from avalanche_sp.gate.settings import Settings

BATCH = 256  # samples a forward pass
_NUMBERS = 2**22  # numbers of the inputs of a forward pass, in samples that are large
_SENSITIVITY = 100  # samples of a sensitivity, which is a mean over samples
_GOLDEN = 0.6180339887498949  # a step whose multiples, modulo 1, are evenly spread
_SOME = 256  # a layer's input vectors, of a mean that need not be exact
_QUADRATIC = 1e-3  # a loss is quadratic if its gradient is linear in the outputs to this precision

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class LayerObservation:
    """A layer's inputs.

    Attributes:
        inputs: input vectors (n, d), or others of the same leading second moment; of an embedding, whose input vectors
            are one-hot, the frequency of each (d,).
        rows: number of input vectors that a sample gives a weight.
        mean_eigenvalue: of the second moment, over all directions; None for that of ``inputs``.
        fed_by_data: True if no trained layer makes this layer's input.
        shared: True if a batch's samples share one input, as those of position embeddings do.
    """

    inputs: Tensor
    rows: float
    mean_eigenvalue: Tensor | None
    fed_by_data: bool
    shared: bool = False

    @property
    def dead(self) -> float:
        """Share of the units below that are zero for every sample; 0 for inputs that data feed."""
        if self.fed_by_data or self.inputs.dim() == 1:
            return 0.0
        return float((self.inputs == 0).all(0).float().mean())

    def mean_square(self, weights: Tensor) -> Tensor:
        """Mean squared norm of the outputs that weights (out, d) make of the inputs, 0-dim."""
        if self.inputs.dim() == 1:
            return (weights.square() * self.inputs).sum()
        x = some_rows(self.inputs)
        return (x @ weights.T).square().sum() / len(x)

    def leading_eigenvalue(self, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The largest eigenvalue of the second moment, behind a gate (:func:`leading_eigenvalue`)."""
        if self.inputs.dim() == 1:
            axes = torch.ones_like(self.inputs).unsqueeze(0)
            return (self.inputs * (axes if through is None else through(axes))).max()
        return leading_eigenvalue(some_rows(self.inputs), through)


@dataclass(frozen=True)
class Observation:
    """What was observed of an experience, or of a stream since the last boundary: all that consolidation needs.

    Attributes:
        layers: by name, in the order of the forward pass.
        samples, classes: numbers of the experience.
        curvature: of the loss in the network's outputs, mean over samples, 0-dim; 0 without a loss.
        classified: the last layer's inputs and their classes; None if the last layer does not make the network's
            output, or if the targets are not class labels.
        inputs: the network's, of at most 100 samples, on its device; None for a stream.
        loss: mean over samples, 0-dim; None without a loss, and for a stream.
        zero_loss: of outputs of zero, 0-dim; None without a loss, for a stream, and if ``classified`` is known.
        readout: the loss in the last layer's weights; None if the last layer does not make the network's output, or if
            the loss is not quadratic and convex in it.
    """

    layers: dict[str, LayerObservation]
    samples: int
    classes: int
    curvature: Tensor
    readout: ReadoutLoss | None
    classified: ReadoutSamples | None = None
    inputs: Any = None
    loss: Tensor | None = None
    zero_loss: Tensor | None = None

    def counting_as(self, samples: int) -> Observation:
        """The same observation, with another number of samples that it counts as."""
        classified = None if self.classified is None else replace(self.classified, weight=samples)
        readout = None if self.readout is None else replace(self.readout, weight=samples)
        return replace(self, samples=samples, classified=classified, readout=readout)

    @property
    def entrance(self) -> str | None:
        """Name of the layer that alone is fed by data, if it has one input vector a sample and is not the readout."""
        fed = [name for name, seen in self.layers.items() if seen.fed_by_data]
        if len(fed) != 1 or self.classified is None or fed[0] == self.classified.layer:
            return None
        seen = self.layers[fed[0]]
        return fed[0] if seen.rows == 1 and seen.inputs.dim() == 2 else None

    @property
    def last(self) -> str | None:
        """Name of the layer that makes the network's outputs; of the last layer, if that is not known."""
        known = self.classified or self.readout
        return known.layer if known is not None else next(reversed(self.layers), None)

    @property
    def shared(self) -> set[str]:
        """Names of the layers of which a batch's samples share one input."""
        return {name for name, seen in self.layers.items() if seen.shared}


@dataclass(frozen=True)
class Samples:
    """Samples of an experience, evenly spread over it.

    Attributes:
        batches: pairs of inputs and targets.
        number: of samples in these.
        total, classes: numbers of samples and classes of the whole experience.
        one_hot: whether the data have one-hot rows for targets. The batches have their class labels.
    """

    batches: Iterable[tuple[Any, Tensor]]
    number: int
    total: int
    classes: int
    one_hot: bool = False

    @classmethod
    def of(cls, data: Dataset | Iterable[tuple[Any, Tensor]], limit: Callable[[int, int], int]) -> Samples:
        """Samples of a map-style dataset of pairs, or of an iterable of batches of pairs.

        Of a DataLoader the dataset is read, if the loader gives each of its samples once. Another iterable is read
        once, to its end.

        Args:
            limit: the largest number of samples, for the numbers of all samples and of classes; it does not fall.

        Raises:
            ValueError: there is no sample.
            TypeError: it is no such data.
        """
        if not isinstance(data, (Dataset, Iterable)):
            allowed = "allowed: a dataset of pairs (x, y), or an iterable of batches of pairs"
            raise TypeError(f"Invalid data: {type(data).__name__} ({allowed})")
        dataset, collate, largest = data, None, 1
        if _gives_each_once(data):
            dataset, collate, largest = data.dataset, data.collate_fn, data.batch_size or 1
        if isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            total = len(dataset)  # type: ignore[arg-type]
            batches = _read(dataset, first := min(limit(total, 1), total), collate)
            if (more := min(limit(total, _classes(batches)), total)) > first:
                batches = _read(dataset, more, collate)
        else:
            total, batches = _spread(data, limit)  # type: ignore[arg-type]  # an iterable dataset is one
            largest = max((len(y) for _, y in batches), default=1)
        if not total:
            raise ValueError("Invalid data: no sample (allowed: one or more)")
        classes, labels = _classes(batches), [_labels_of_rows(y) for _, y in batches]
        if one_hot := all(rows is not None for rows in labels):
            batches = [(x, rows) for (x, _), rows in zip(batches, labels) if rows is not None]
        return cls(_rebatched(batches, largest), sum(len(y) for _, y in batches), total, classes, one_hot)

    def of_labels(self, criterion: Criterion) -> Criterion:
        """A criterion of the targets that the data have, as one of (outputs, the batches' targets)."""
        if not self.one_hot:
            return criterion
        return lambda outputs, labels: criterion(outputs, F.one_hot(labels, outputs.shape[1]).to(outputs))

    def few(self) -> list[tuple[Any, Tensor]]:
        """Samples of all batches, in number one batch; the first batch if the inputs have no row a sample."""
        batches = list(self.batches)
        number = len(batches)
        if not all(has_rows(x, len(y)) for x, y in batches):
            return batches[:1]
        return [(each_tensor(x, lambda tensor: tensor[::number].contiguous()), y[::number]) for x, y in batches]


def _classes(batches: list[tuple[Any, Tensor]]) -> int:
    """Number of classes among the targets; 1 for numbers that are no labels."""
    return len(torch.cat([_labels(y) for _, y in batches]).unique()) if batches else 0


def _labels(targets: Tensor) -> Tensor:
    labels = _labels_of_rows(targets)
    if labels is None:
        labels = targets.new_zeros(1) if targets.is_floating_point() else targets
    return labels.unique()


def _labels_of_rows(targets: Tensor) -> Tensor | None:
    """The class labels (n,) of one-hot rows (n, classes) of floating-point numbers; None for other targets."""
    if targets.dim() != 2 or targets.shape[1] < 2 or not targets.is_floating_point():
        return None
    labels = targets.argmax(1)
    return labels if torch.equal(F.one_hot(labels, targets.shape[1]).to(targets), targets) else None


def _gives_each_once(data: Any) -> TypeGuard[DataLoader]:
    """Whether it is a DataLoader whose batches have each sample of a map-style dataset once, in any order."""
    if type(data) is not DataLoader or type(data.batch_sampler) is not BatchSampler:
        return False
    sampler = data.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler


def _read(data: Dataset, limit: int, collate: Callable | None) -> list[tuple[Any, Tensor]]:
    """Samples of a dataset, evenly spread, in batches."""
    places = evenly_spread(len(data), limit)  # type: ignore[arg-type]
    loader = DataLoader(Subset(data, places), BATCH, collate_fn=collate, generator=torch.Generator())
    return [_pair(batch) for batch in loader]


def _pair(batch: Any) -> tuple[Any, Tensor]:
    """A batch of inputs and targets.

    Raises:
        TypeError: it is no pair, or its targets are no tensor with a row a sample.
    """
    allowed = "allowed: pairs (x, y), y a tensor with a row a sample"
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"Invalid data: a batch is a {type(batch).__name__}{length} ({allowed})")
    x, y = batch
    if not isinstance(y, Tensor) or not y.dim():
        what = "of one number" if isinstance(y, Tensor) else f"of type {type(y).__name__}"
        raise TypeError(f"Invalid data: a batch's targets are {what} ({allowed})")
    return x, y


def evenly_spread(total: int, limit: int) -> list[int]:
    """At most ``limit`` of the places 0 to ``total - 1``: all, or one in each of ``limit`` equal parts.

    The place in a part goes on in golden steps: of labels that come in turn all are met.
    """
    if total <= limit:
        return list(range(total))
    parts = torch.arange(limit)
    begin, end = parts * total // limit, (parts + 1) * total // limit
    return (begin + (parts.double() * _GOLDEN % 1 * (end - begin)).long()).tolist()


def _spread(
    data: Iterable[tuple[Any, Tensor]], limit: Callable[[int, int], int]
) -> tuple[int, list[tuple[Any, Tensor]]]:
    """Batches of an iterable, evenly spread, with ``limit`` samples to a batch; at most twice the limit is held."""
    total, every, kept = 0, 1, []
    classes: set[float] = set()
    for number, batch in enumerate(data):
        x, y = _pair(batch)
        total += len(y)
        classes.update(_labels(y).tolist())
        if number % every == 0:
            kept.append((x, y))
        while len(kept) > 1 and sum(len(y) for _, y in kept) > 2 * limit(total, total):  # more classes may come
            kept, every = kept[::2], 2 * every
    held, most = sum(len(y) for _, y in kept), limit(total, len(classes))
    if held > most:
        kept = [kept[i] for i in evenly_spread(len(kept), max(len(kept) * most // held, 1))]
    return total, kept


def _rebatched(batches: list[tuple[Any, Tensor]], largest: int) -> list[tuple[Any, Tensor]]:
    """The same samples in other batches, if the inputs are tensors of one shape with a row a sample.

    A batch has 256 samples, or fewer large ones.

    Args:
        largest: of the batches in training, which is not split: it may be all nodes of a graph.
    """
    first = batches[0][0]
    if not all(isinstance(x, Tensor) and x.shape[1:] == first.shape[1:] and len(x) == len(y) for x, y in batches):
        return batches
    x, y = (torch.cat(column) for column in zip(*batches))
    size = max(min(BATCH, _NUMBERS // max(first[:1].numel(), 1)), largest)
    return list(zip(x.split(size), y.split(size)))


def observe(
    model: nn.Module,
    samples: Samples,
    layers: Mapping[str, GatedLayer],
    criterion: Criterion | None,
    settings: Settings,
    forward: Forward,
) -> Observation:
    """Runs samples through the network, in evaluation mode.

    Leaves the modules' modes and the global random state alone.

    Args:
        layers: whose inputs are wanted, by name.
        criterion: loss whose derivatives in the outputs are wanted, a mean over samples; or None.
        forward: computes the outputs from model and inputs.

    Raises:
        FloatingPointError: an input is not finite.
        ValueError: no sample has a label, the criterion does not return one value, or ``torch.inference_mode`` is on.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Invalid call: within torch.inference_mode() (allowed outside, as the loss has gradients)")
    inputs: dict[str, list[Tensor]] = {}
    vectors_seen: dict[str, int] = {}
    curvatures: list[Tensor] = []
    losses: list[Tensor] = []
    zero_losses: list[Tensor] = []
    errors: list[tuple[str | None, Tensor]] = []
    targets: list[Tensor] = []
    units: list[tuple[str, Tensor] | None] = []
    called: list[tuple[str, GatedLayer, Tensor | None]] = []
    count, most, whole, some, link = 0, 0, None, None, None
    of_first: dict[str, int] = {}  # input vectors of the first batch
    pooled_layers: set[str] = set()  # a sample gives their weights one input vector
    latest = torch.zeros(0)  # input of the layer that was called last

    def record(name, layer, x, output):
        nonlocal latest
        called.append((name, layer, output if layer.per_row and isinstance(output, Tensor) else None))
        if len(called) > 1 and not _is_row_a_sample(called[-2][2]):
            called.pop(-2)  # its output need not be held
        latest = x
        x, vectors = some_inputs(layer, x, most)
        inputs.setdefault(name, []).append(x)
        vectors_seen[name] = vectors_seen.get(name, 0) + vectors

    with torch.no_grad(), evaluation_mode(model) as device:
        with after_each(layers, record):
            for x, y in samples.batches:
                x, y = _labelled(on_device(device, x), y.to(device), criterion)
                if not len(y):
                    continue
                if not count:
                    whole, some = x, _first(x, _SENSITIVITY, len(y))
                count += len(y)
                most = max(settings.vectors * len(y) // samples.number, len(y))
                called.clear()
                outputs = forward(model, x)
                of_first = of_first or dict(vectors_seen)
                if called and (pooled := _pooled(*called[-1][1:], latest, outputs, link)) is not None:
                    which, layer, _ = called[-1]
                    inputs[which][-1], called[-1] = pooled[0], (which, layer, pooled[1])
                    pooled_layers.add(which)
                network_outputs = outputs
                last, outputs, link = output_layer(called, outputs, link)
                units.append(_masked_units(outputs, y, last))
                targets.append(y)
                if criterion is not None:
                    check_outputs(outputs)
                    quadratic = errors[0][0] is not None if errors else None
                    loss, curvature, name, error = output_derivatives(criterion, outputs, y, last, link, quadratic)
                    curvatures.append(curvature)
                    losses.append(loss * len(y))
                    errors.append((name, error))
                    if layers and units[-1] is None:
                        zero_losses.append(criterion(torch.zeros_like(network_outputs), y).detach() * len(y))
        if not count:
            raise ValueError("Invalid data: no sample has a label (allowed: one or more)")
        two = _first(some, 2, min(len(targets[0]), _SENSITIVITY))
        try:
            given, explained, of_two = _fed_by_data(model, layers, two, forward)
        except (RuntimeError, IndexError):  # part of a batch is no batch, as some nodes of a graph are no graph
            some = two = whole
            given, explained, of_two = _fed_by_data(model, layers, whole, forward)
    inputs = {name: parts for name, parts in inputs.items() if name in explained}
    for name, parts in inputs.items():
        if not torch.stack([part.square().sum() for part in parts]).sum().isfinite():
            raise FloatingPointError(
                f"the input of layer {name} is not finite, or its square is not, at the end of an experience: nothing "
                f"was consolidated. The usual cause is {'the data' if name in given else 'too high a learning rate'}."
            )
    observed = {}
    for name, parts in inputs.items():
        shared = two is not some and len(targets[0]) > 2 and of_first.get(name) == of_two[name]
        rows = 1.0 if name in pooled_layers else vectors_seen[name] / (len(targets) if shared else count)
        x = torch.stack(parts).sum(0) / max(vectors_seen[name], 1) if layers[name].of_rows else torch.cat(parts)
        observed[name] = LayerObservation(x, rows, None, name in given, shared)
    curvature = torch.stack(curvatures).mean() if curvatures else torch.zeros(())
    readout, names = None, {name for name, _ in errors}
    if len(names) == 1 and (name := names.pop()) is not None:
        x, error = observed[name].inputs, torch.cat([error for _, error in errors])
        readout = _readout_loss(name, layers[name], x, error.to(x.dtype), curvature, samples.total)
    classified = None
    if units and (found := units[-1]) is not None and all(u is not None and u[0] == found[0] for u in units):
        x = observed[found[0]].inputs
        labels = torch.cat(targets).long()
        classified = ReadoutSamples(found[0], x, labels, found[1], samples.total, link)
    mean_loss = torch.stack(losses).sum() / count if losses else None
    zero_loss = torch.stack(zero_losses).sum() / count if len(zero_losses) == len(losses) > 0 else None
    return Observation(
        observed, samples.total, samples.classes, curvature, readout, classified, some, mean_loss, zero_loss
    )


def _is_row_a_sample(output: Tensor | None) -> TypeGuard[Tensor]:
    return output is not None and output.dim() == 2


def _before_link(made: Tensor, outputs: Tensor, known: Link | None) -> tuple[Tensor, Link | None] | None:
    """As ``unlinked``; None if the network's outputs are not made of a layer's (n, out)."""
    before, link = unlinked(made, outputs, known)
    is_made = link is not None or (made.shape == outputs.shape and bool((made == outputs).all(0).any()))
    return (before, link) if is_made else None


def _pooled(
    layer: GatedLayer, made: Tensor | None, x: Tensor, outputs: Any, known: Link | None
) -> tuple[Tensor, Tensor] | None:
    """Input vectors (n, d) and outputs (n, out) of a layer whose outputs are pooled over the places of a sample.

    Examples are a convolution with a unit a class and a mean over the image, and logits for each token of which those
    of the last one are chosen. The map is linear. So pooled inputs give pooled outputs.

    Args:
        made: the layer's output at each place; samples in its first dimension, or in the second of three.
        x: the layer's input.
        outputs: the network's: a mean over the places, those of one place, or a function of such (``unlinked``).
        known: the function, if other samples have told.

    Returns:
        None if the layer has one place a sample, or pools in another way.
    """
    if made is None or made.dim() < 3 or layer.groups > 1 or not isinstance(outputs, Tensor) or outputs.dim() != 2:
        return None
    n = len(outputs)
    if n not in made.shape[: 2 if made.dim() == 3 else 1]:
        return None

    def by_sample(rows: Tensor) -> Tensor:  # (n, places, ...)
        return rows.unflatten(0, (n, -1)) if len(made) == n else rows.unflatten(0, (-1, n)).transpose(0, 1)

    rows = by_sample(layer.postsynaptic(made))
    places = rows.shape[1]
    last, first = torch.eye(places).to(rows)[[-1, 0]].unsqueeze(1).expand(-1, n, -1)
    weights = [torch.full_like(last, 1 / places), last, first]
    if rows.shape[2] == outputs.shape[1]:
        same = close(rows, outputs.unsqueeze(1)).all(2)
        if same.any(1).all():
            weights.insert(0, F.one_hot(same.int().argmax(1), places).to(rows))
    for weight in weights:
        pooled = (weight.unsqueeze(1) @ rows).squeeze(1)
        if pooled.shape == outputs.shape:
            pooled = torch.where(close(pooled, outputs).all(0), outputs, pooled)  # without rounding
        if _before_link(pooled, outputs, known) is not None:
            inputs = by_sample(layer.presynaptic(x.float()))
            return (weight.to(inputs).unsqueeze(1) @ inputs).squeeze(1), pooled
    return None


def output_layer(
    called: Sequence[tuple[str, GatedLayer, Tensor | None]], outputs: Any, known: Link | None = None
) -> tuple[tuple[str, GatedLayer, Tensor] | None, Any, Link | None]:
    """The layer that makes a network's outputs; the outputs before the function after it, and the function.

    Args:
        called: layers in the order of the forward pass, by name, with their outputs (n, out); None for an output that
            is not the layer's alone.
        outputs: the network's.
        known: the function, if other samples have told.

    Returns:
        The last layer, if no layer is known to make the outputs; None if its output is not its own.
    """
    if isinstance(outputs, Tensor):
        for name, layer, made in reversed(called):
            if _is_row_a_sample(made) and (found := _before_link(made, outputs, known)) is not None:
                return (name, layer, made), *found
    last = None
    if called and (made := called[-1][2]) is not None:
        last = (called[-1][0], called[-1][1], made)
    return last, outputs, None


def _masked_units(
    outputs: Tensor, targets: Tensor, last: tuple[str, GatedLayer, Tensor] | None
) -> tuple[str, Tensor] | None:
    """The readout's name, and the outputs of the units that the network masks (out,), NaN for all others.

    None if the last layer does not make the network's outputs or part of it is frozen, or if the targets are not class
    labels. Avalanche's incremental heads mask the units without a class.
    """
    if last is None or not isinstance(outputs, Tensor) or targets.dim() != 1:
        return None
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    name, layer, made = last
    if not _is_readout(layer, made, outputs):
        return None
    own = (outputs == made).all(0)
    if not own.any() or int(targets.max()) >= outputs.shape[1] or int(targets.min()) < 0:
        return None
    return name, torch.where(own, torch.nan, outputs[0].detach().float())


def _readout_loss(
    name: str, layer: GatedLayer, x: Tensor, error: Tensor, curvature: Tensor, weight: float
) -> ReadoutLoss:
    """The mean loss in a layer's weights, from its inputs (n, d) and the loss's gradients in its outputs (n, out)."""
    wanted = layer.along(x.T).T - error / curvature
    square = wanted.square().sum() / len(x)
    return ReadoutLoss(name, error.T @ x / len(x), x, curvature, square, weight)


def some_rows(inputs: Tensor) -> Tensor:
    """Some of the input vectors (n, d), evenly spread: enough for a mean over a layer's inputs."""
    return inputs[:: -(-len(inputs) // _SOME)]


def some_inputs(layer: GatedLayer, x: Tensor, most: int) -> tuple[Tensor, int]:
    """At most ``most`` input vectors of a layer (n, d), and the number of all for a weight.

    Each sample gives the same number of vectors, evenly spread over its places; the first place moves from sample to
    sample in golden steps. If there are more samples than ``most``, evenly spread ones give one vector each. Of an
    embedding the uses of each row (d,).
    """
    if layer.of_rows:
        rows = layer.uses(x)
        return rows, int(rows.sum())
    each = len(layer.presynaptic(x[:1].float()))  # of a sample, or of a row of a flattened sequence
    every, uses = each * len(x), each * len(x) // layer.groups
    if every <= most:
        return layer.presynaptic(x.float()), uses
    rows = torch.tensor(evenly_spread(len(x), most)).unsqueeze(1)
    number = most // len(rows)
    begin = (torch.arange(len(rows), dtype=torch.float64).unsqueeze(1) * _GOLDEN % 1 * each).long()
    places = rows * each + (begin + torch.arange(number) * each // number) % each
    return layer.presynaptic_at(x.float(), places.flatten().to(x.device)), uses


def frozen_readout(model: nn.Module, samples: Samples, forward: Forward) -> str | None:
    """Name of the layer that makes a network's outputs, if it is frozen and the targets are class labels; else None."""
    inputs, targets = next(iter(samples.batches))
    if targets.is_floating_point():
        return None
    called: list[tuple[str, GatedLayer, Tensor | None]] = []

    def record(name: str, layer: GatedLayer, x: Tensor, output: Any) -> None:
        called.append((name, layer, output if isinstance(output, Tensor) else None))

    layers = gated_layers(model, dict(model.named_modules()))
    if all(layer.trains for layer in layers.values()):
        return None
    with torch.no_grad(), evaluation_mode(model) as device, after_each(layers, record):
        outputs = forward(model, on_device(device, inputs))
    last, outputs, _ = output_layer(called[-1:], outputs)
    if last is None or not isinstance(outputs, Tensor) or last[2].shape != outputs.shape or last[1].trains:
        return None
    return last[0]


def check_outputs(outputs: Any) -> None:
    """Raises TypeError if a network's outputs are not one tensor, on which a loss can be measured."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"Invalid model: its output is a {type(outputs).__name__} (allowed: one tensor, on which the loss is "
            "measured. PlasticityGate(forward=...) can choose it. With pull_back=0 and readout_step=False no loss is "
            "measured, and new classes are learned little)"
        )


def check_mean(criterion: Any) -> None:
    """Raises TypeError if a criterion can't be called, and ValueError if it says that it is no mean over samples."""
    if not callable(criterion) or isinstance(criterion, type):
        what = f"the class {criterion.__name__}" if isinstance(criterion, type) else type(criterion).__name__
        raise TypeError(f"Invalid criterion: {what} (allowed: a function of outputs and targets)")
    reduction = getattr(criterion, "reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"Invalid criterion: its reduction is {reduction!r} (allowed: 'mean', over samples)")


def output_derivatives(
    criterion: Criterion,
    outputs: Tensor,
    targets: Tensor,
    last: tuple[str, GatedLayer, Tensor] | None,
    link: Link | None = None,
    quadratic: bool | None = None,
) -> tuple[Tensor, Tensor, str | None, Tensor]:
    """The loss and its mean curvature in the outputs, 0-dim; the readout's name; the gradient in the readout's output.

    The gradient has a row a sample. The name is None if the last layer is not a readout or part of it is frozen, or if
    the loss is not quadratic and convex in the outputs.

    Args:
        criterion: of the network's outputs and the targets, a mean over samples.
        outputs: the network's (n, C), before ``link``.
        targets: the samples' targets.
        last: of the layer that makes the outputs (:func:`output_layer`): its name before and its output after it.
        link: the function after the layer, such as a softmax (:func:`~avalanche_sp.gate.links.unlinked`).
        quadratic: whether the loss is quadratic and convex in the outputs, if another batch has told.
    """
    exact = outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    criterion = linked(in_dtype(criterion, exact.dtype), link)
    with torch.enable_grad():
        varied = exact.detach().requires_grad_()
        value = criterion(varied, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(f"Invalid criterion: its value is of {what} (allowed: one number, the mean over samples)")
        error, curvature = loss_derivatives(varied, value, units_of(outputs, targets, link))
        loss = value.detach()
    if last is None:
        return loss, curvature, None, outputs
    name, layer, made = last
    if not _is_readout(layer, made, outputs):
        return loss, curvature, None, outputs
    kept = (outputs == made).all(0)  # the others are masked: Avalanche's incremental heads do it
    if quadratic is None:
        nothing, twice = (with_gradient(lambda z: criterion(z, targets), scale * exact)[1] for scale in (0.0, 2.0))
        curved = (nothing + twice - 2 * error).abs().max()
        quadratic = bool(curved <= _QUADRATIC * error.abs().max() and (nothing != twice).any())
    is_readout = kept.any() and quadratic and curvature > 0
    return loss, curvature, name if is_readout else None, error * kept * len(outputs)


def _fed_by_data(
    model: nn.Module, layers: Mapping[str, GatedLayer], inputs: Any, forward: Forward
) -> tuple[set[str], set[str], dict[str, int]]:
    """Names of layers whose input no trained layer makes, and of those whose gradient the input explains.

    Both are measured on a few samples, and so are the layers' numbers of input vectors.
    """
    vectors: dict[str, int] = {}
    given: dict[str, bool] = {}
    explained: dict[str, bool] = {}

    def note(name, layer, x, output):
        given[name] = given.get(name, True) and not x.requires_grad
        explained[name] = explained.get(name, True) and layer.explains(x, output)
        vectors[name] = vectors.get(name, 0) + some_inputs(layer, x.detach(), 1)[1]

    with torch.enable_grad(), after_each(layers, note):
        forward(model, inputs)
    return {name for name in given if given[name]}, {name for name in explained if explained[name]}, vectors


def _is_readout(layer: GatedLayer, made: Tensor, outputs: Tensor) -> bool:
    """Whether what a layer made has the shape of the network's outputs (n, out), and the whole layer is trained."""
    return made.shape == outputs.shape and outputs.dim() == 2 and all(p.requires_grad for p in layer.parameters)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """Puts the network into evaluation mode, leaves the global random state alone, and gives the network's device."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    # A compiled model does not run hooks that come after it was compiled. torch before 2.6 can't be told to.
    uncompiled = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()  # it makes nested tensors of masked sequences
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with uncompiled, torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield device
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def after_each(
    layers: Mapping[str, GatedLayer], note: Callable[[str, GatedLayer, Tensor, Any], None]
) -> Iterator[None]:
    """Within it, each forward pass of a layer's module is noted: name, layer, input, and the module's output."""
    def hook_of(name, layer):
        def hook(module, args, kwargs, output):
            if (x := layer.input_of(args, kwargs, output)) is not None:
                note(name, layer, x, output)

        return hook

    handles = [
        layer.module.register_forward_hook(hook_of(name, layer), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def each_tensor(inputs: Any, change: Callable[[Any], Any], others: Callable[[Any], Any] = lambda value: value) -> Any:
    """A batch of inputs, tensors in mappings, lists and tuples, with each tensor changed; lists become tuples.

    Args:
        change: of a tensor.
        others: of any other object in the batch.
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: each_tensor(value, change, others) for name, value in inputs.items()}
    if not isinstance(inputs, (list, tuple)) or isinstance(inputs, PackedSequence):
        return others(inputs)
    values = tuple(each_tensor(value, change, others) for value in inputs)
    return type(inputs)(*values) if hasattr(inputs, "_fields") else values  # a namedtuple


def on_device(device: torch.device, inputs: Any) -> Any:
    """A batch of inputs, or a state, on a device."""

    def moved(value: Any) -> Any:
        return value.to(device) if hasattr(value, "to") else value

    return each_tensor(inputs, moved, moved)


def has_rows(inputs: Any, n: int | None = None) -> bool:
    """Whether a batch is of tensors with a row a sample, n rows if n is given."""
    lengths: set[int | None] = set() if n is None else {n}

    def note(tensor: Tensor) -> None:
        lengths.add(len(tensor) if tensor.dim() and tensor.layout == torch.strided else None)

    each_tensor(inputs, note, lambda value: lengths.add(None) if hasattr(value, "__len__") else None)
    return len(lengths) == 1 and None not in lengths


def _first(inputs: Any, n: int, batch: int) -> Any:
    """The first n samples of a batch of inputs; the inputs themselves if these have no row a sample."""
    return each_tensor(inputs, lambda tensor: tensor[:n]) if has_rows(inputs, batch) else inputs


def _labelled(inputs: Any, targets: Tensor, criterion: Criterion | None) -> tuple[Any, Tensor]:
    """A batch without the samples whose label the criterion ignores: ``ignore_index``, -100 by torch's default."""
    if targets.dim() != 1 or targets.is_floating_point() or not has_rows(inputs, len(targets)):
        return inputs, targets
    kept = targets != getattr(criterion, "ignore_index", -100)
    return (inputs, targets) if kept.all() else (each_tensor(inputs, lambda tensor: tensor[kept]), targets[kept])
