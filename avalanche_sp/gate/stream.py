"""A stream without told boundaries: when to consolidate, and the observation since the last boundary."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from avalanche_sp.gate.detection import ChangeDetector, ChangeWatch, InputWatch
from avalanche_sp.gate.layers import NORMALISATION, GatedLayer
from avalanche_sp.gate.observe import (
    Criterion,
    LayerObservation,
    Observation,
    output_derivatives,
    output_layer,
    some_inputs,
)
from avalanche_sp.gate.readout import ReadoutLoss
from avalanche_sp.gate.rows import StreamRows
from avalanche_sp.gate.settings import Settings
from avalanche_sp.gate.warn import warn_of_unobserved


class Moment:
    r"""Running second moment :math:`C = E[x x^\top]` of a layer's input vectors, as a sketch of its leading eigenspace.

    Kept is :math:`C \Omega` for a random :math:`\Omega` (d, 2 rank). It is linear in C, so mini-batches of any size
    simply add up; and :math:`C \Omega (\Omega^\top C \Omega)^+ \Omega^\top C` is C but for its weakest directions.

    Args:
        inputs: d.
        rank: leading eigenvectors that are wanted.
        memory: input vectors for which older ones stand, at most.
        like: a tensor of the device and type.

    References:
        J. Tropp, A. Yurtsever, M. Udell, V. Cevher: Fixed-rank approximation of a positive-semidefinite matrix from
        streaming data, NeurIPS 2017.
    """

    def __init__(self, inputs: int, rank: int, memory: int, like: Tensor):
        generator = torch.Generator(like.device).manual_seed(0)
        self.memory = memory
        size = inputs, min(2 * rank, inputs)
        self.test = torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
        self.sketch, self.mean_eigenvalue, self.weight = like.new_zeros(size), like.new_zeros(()), 0
        self._waiting = like.new_zeros(size), like.new_zeros(()), 0
        self.targets, self._waiting_targets = like.new_zeros(0, inputs), like.new_zeros(0, inputs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.test, self.sketch, self._waiting[0], self.targets, self._waiting_targets

    def add(self, x: Tensor, targets: Tensor | None = None) -> None:
        """Adds input vectors (n, d), which wait until they are kept or dropped.

        Args:
            targets: what a linear layer should make of them (n, out).
        """
        sketch, energy, n = self._waiting
        self._waiting = sketch.addmm_(x.T, x @ self.test), energy + x.square().sum() / x.shape[1], n + len(x)
        if targets is not None:
            self._waiting_targets = _grown(self._waiting_targets, targets.shape[1]).addmm_(targets.T, x)

    def keep(self) -> None:
        """Takes in what waits. What came earlier fades."""
        sketch, energy, n = self._waiting
        if n == 0:
            return
        share = self.weight / (self.weight + n)
        self.weight = min(self.weight + n, self.memory)
        self.sketch.mul_(share).add_(sketch, alpha=(1 - share) / n)
        self.targets = _grown(self.targets, len(self._waiting_targets)).mul_(share)
        self.targets.add_(self._waiting_targets, alpha=(1 - share) / n)
        self.mean_eigenvalue = share * self.mean_eigenvalue + (1 - share) / n * energy
        self.drop()

    def drop(self) -> None:
        sketch, energy, _ = self._waiting
        self._waiting = sketch.zero_(), torch.zeros_like(energy), 0
        self._waiting_targets.zero_()

    def factor(self) -> Tensor:
        """Vectors (r, d), r at most 2 rank, of this second moment."""
        core = self.test.double().T @ self.sketch.double()
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        some = values > len(values) * torch.finfo(self.sketch.dtype).eps * values[-1]
        rows = (self.sketch.double() @ vectors[:, some] / values[some].sqrt()).T
        return (rows * len(rows) ** 0.5).to(self.sketch.dtype)


class RowFrequencies(Moment):
    """The same of an embedding, whose second moment is diagonal: running frequencies of its rows.

    Args:
        inputs: number of rows.
        memory, like: as above.
    """

    def __init__(self, inputs: int, memory: int, like: Tensor):
        super().__init__(inputs, 0, memory, like)
        self.sketch = like.new_zeros(inputs)
        self._waiting = like.new_zeros(inputs), like.new_zeros(()), 0

    def add(self, x: Tensor, targets: Tensor | None = None) -> None:
        """Adds the uses of each row (d,)."""
        uses, energy, n = self._waiting
        self._waiting = uses.add_(x), energy + x.mean(), n + int(x.sum())

    def factor(self) -> Tensor:
        """The frequencies (d,)."""
        return self.sketch


def _grown(rows: Tensor, n: int) -> Tensor:
    """Rows (n, d), the new ones zero: an output unit that was not there should have been silent."""
    return torch.cat([rows, rows.new_zeros(n - len(rows), rows.shape[1])]) if len(rows) < n else rows


class StreamWatch:
    """Follows a stream without told boundaries.

    At every look, some steps apart, the layers' inputs join a running second moment of the stream since the last
    consolidation. No sample is kept from one step to the next.

    With a detector a boundary is a rise of the loss, or a move of the inputs' mean. A detector finds it some steps
    late. So a look at which something is surprising, but not enough to be a change, adds nothing to the second moments;
    every other look copies the weights, the normalisation layers and the optimizer's state. :meth:`rewind` goes back to
    that copy. A slow drift of the inputs away from those of the last consolidation is a boundary also.

    Without a detector a boundary is every 4096 samples.

    Args:
        detector: or None.
        rank_of: eigenvectors of a layer's second moment, by its name, the number of its inputs and whether it is
            called last.
        measure_loss: whether to measure its curvature and its minimum in the outputs.
    """

    def __init__(
        self,
        detector: ChangeDetector | None,
        rank_of: Callable[[str, int, bool], float],
        measure_loss: bool,
        settings: Settings,
    ):
        self.changes = ChangeWatch(detector, settings) if detector is not None else None
        self.rank_of = rank_of
        self.measure_loss = measure_loss
        self.settings = settings
        self.steps = 0
        self._inputs = InputWatch(settings.detection_decay)
        # The losses since the last look, and distances of the inputs: read together, one device sync a look.
        self._losses: list[Tensor] = []
        self._distances: list[Tensor] = []
        self._called: list[tuple[str, GatedLayer, Tensor, Tensor | None]] = []  # in this step, with input and output
        self._targets = torch.zeros(0)  # of the stream's samples in this step
        self._observed = self._told_of_unobserved = False  # in this step; and once
        self._curvature, self._square = torch.zeros(()), torch.zeros(())
        self._learned: set[str] = set()  # layers whose input a trained layer makes
        self._rows: dict[str, float] = {}  # input vectors that a sample gives a weight
        self._weights: dict[str, Tensor] = {}  # at the last calm look
        self._norms: dict[str, list[Tensor]] = {}  # and all that normalisation layers held then
        self._optimizer: list[tuple[Tensor, Tensor]] = []  # and the optimizer's state: its own tensors, their copies
        self._start()

    def _start(self) -> None:
        self.samples = 0  # of the stream, since the last consolidation
        self.classes: set[int] = set()  # among those at the looks
        self.curvature, self.square = torch.zeros(()), torch.zeros(())  # of loss and targets, means over the looks
        self.readout: str | None = None
        self.looks = 0
        self.moments: dict[str, Moment] = {}

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that is kept from one step to the next."""
        tensors = [t for m in self.moments.values() for t in m.tensors]
        tensors += [*self._weights.values(), *(t for held in self._norms.values() for t in held)]
        tensors += [copy for _, copy in self._optimizer] + [*self._inputs.tensors]
        return sum(t.nbytes for t in tensors)

    def listens(self, samples: int) -> bool:
        """Whether the coming forward pass, of ``samples`` samples of the stream, joins the second moments."""
        return -(self.steps + 1) % self.settings.stream_look * samples < self.settings.stream_samples

    def note(self, name: str, layer: GatedLayer, x: Tensor, output: Tensor | None) -> None:
        """Notes a layer's input and output in a forward pass; None for an output that is not the layer's alone."""
        if x.requires_grad:
            self._learned.add(name)
        self._called.append((name, layer, x.detach(), None if output is None else output.detach()))

    @torch.no_grad()
    def observe(
        self, inputs: Tensor, outputs: Tensor, targets: Tensor, loss: Tensor, criterion: Criterion, stream: StreamRows
    ) -> None:
        """Notes the loss of the stream's samples and the layers' inputs, before a step."""
        n = stream.count
        self._observed = True
        self.samples += n
        self._targets = stream.of(targets)
        if n < stream.batch and isinstance(outputs, Tensor):
            outputs = stream.of(outputs)
            loss = criterion(outputs, self._targets)
        if self.changes is not None:
            self._losses.append(loss.detach().squeeze())
            if isinstance(inputs, Tensor) and inputs.is_floating_point():
                self._distances.append(self._inputs.observe(stream.of(inputs)))
        readout, wanted = None, None
        if self._called and self.measure_loss:
            readout, wanted = self._wanted(outputs, criterion, stream)
        for name, layer, x, _ in self._called:
            shared = len(x) % stream.batch != 0  # by all samples, as positions are
            x, count = some_inputs(layer, x if shared else stream.of(x), self.settings.stream_vectors * n)
            if name not in self.moments and layer.of_rows:
                self.moments[name] = RowFrequencies(len(x), self.settings.stream_memory, x)
            elif name not in self.moments:
                rank = int(self.rank_of(name, x.shape[1], name == self._called[-1][0]))
                self.moments[name] = Moment(x.shape[1], rank, self.settings.stream_memory, x)
            self.moments[name].add(x, wanted if name == readout else None)
            self._rows[name] = count if shared else count / n
        self._called.clear()

    def _wanted(self, outputs: Tensor, criterion: Criterion, stream: StreamRows) -> tuple[str | None, Tensor | None]:
        """The readout, and its outputs for the stream's samples at the minimum of the loss, if that is quadratic."""
        called = [(name, layer, made if made is None else stream.of(made)) for name, layer, _, made in self._called]
        last, outputs, link = output_layer(called, outputs)
        _, self._curvature, readout, errors = output_derivatives(criterion, outputs, self._targets, last, link)
        if readout is None or last is None:
            return None, None
        self.readout = readout
        wanted = (last[2] - errors / self._curvature).float()
        self._square = wanted.square().sum(1).mean()
        return readout, wanted

    @torch.no_grad()
    def look(self, model: nn.Module, layers: Mapping[str, GatedLayer], optimizer: torch.optim.Optimizer) -> bool:
        """Ends a step. True at a boundary."""
        self.steps += 1
        self._called.clear()
        if not (self._observed or self._told_of_unobserved):
            self._told_of_unobserved = True
            warn_of_unobserved()
        self._observed = False
        if self.steps % self.settings.stream_look:
            return False
        if self.changes is None:
            self._take(model, layers, optimizer)
            found = self.samples >= self.settings.stream_chunk
        else:
            found = self._look_for_changes(self.changes, model, layers, optimizer)
        for moment in self.moments.values():
            moment.drop()
        return found and self.looks > 0 and any(moment.weight for moment in self.moments.values())

    def _look_for_changes(self, changes: ChangeWatch, model, layers, optimizer) -> bool:
        """Whether the stream has changed; if nothing is surprising, the steps since the last look are taken in."""
        if not self._losses:
            return False
        n, device = len(self._losses), self._losses[0].device
        numbers = [*self._losses, *self._distances, self._inputs.moved]
        *shown, drift = torch.stack([t.to(device, torch.float32) for t in numbers]).tolist()
        self._losses, self._distances = [], []
        found, calm = changes.look(zip(*(shown[i : i + n] for i in range(0, len(shown), n))))
        if calm and not found:
            self._take(model, layers, optimizer)
            self._inputs.keep()
            found = drift > self.settings.stream_drift
        self._inputs.drop()
        if found:
            changes.restart()
            self._inputs.restart()
        return found

    def _take(self, model, layers, optimizer) -> None:
        for moment in self.moments.values():
            moment.keep()
        self.looks += 1
        self.classes.update(self._targets.flatten().tolist())
        if self.measure_loss:
            self.curvature = self.curvature + (self._curvature - self.curvature) / self.looks
            self.square = self.square + (self._square - self.square) / self.looks
        if self.changes is not None:
            self._weights = {n: layer.weights_and_bias() for n, layer in layers.items()}
            self._norms = {n: [t.clone() for t in held] for n, held in _held_by_norms(model).items()}
            states = optimizer.state.values()
            self._optimizer = [(t, t.clone()) for s in states for t in s.values() if isinstance(t, Tensor)]

    @torch.no_grad()
    def rewind(self, model: nn.Module, layers: Mapping[str, GatedLayer]) -> dict[str, Tensor]:
        """Puts weights, normalisation layers and the optimizer's state back to the last calm look.

        Returns:
            By layer, the change of the weights since then (rows, d).
        """
        changes = {}
        for name, layer in layers.items():
            if name in self._weights:
                weights = self._weights[name]  # of fewer output units where a head has grown
                changes[name] = layer.weights_and_bias()[: len(weights)] - weights
                layer.set_weights(weights)
        for name, held in _held_by_norms(model).items():
            for now, before in zip(held, self._norms.get(name, ())):
                now.copy_(before)
        for now, before in self._optimizer:
            now.copy_(before)
        return changes

    @torch.no_grad()
    def observation(self, layers: Mapping[str, GatedLayer]) -> Observation:
        """The observation since the last boundary, at the layers' present weights. The next one starts empty."""
        seen, readout = {}, None
        for name, moment in self.moments.items():  # in the order of the forward pass
            if name in layers and moment.weight:
                x = moment.factor()
                seen[name] = LayerObservation(x, self._rows[name], moment.mean_eigenvalue, name not in self._learned)
                if name == self.readout:
                    readout = self._readout_loss(name, layers[name], moment, x)
        observation = Observation(seen, self.samples, len(self.classes), self.curvature, readout)
        self._start()
        return observation

    def _readout_loss(self, name: str, layer: GatedLayer, moment: Moment, x: Tensor) -> ReadoutLoss:
        """The loss in the readout's weights, from its inputs' second moment, of factor ``x``, and its minimum."""
        weights, second = layer.weights_and_bias(), x.T @ x / len(x)
        known = torch.linalg.qr(x.T).Q  # the sketch knows these directions, the targets all
        made, wanted = weights @ second, _grown(moment.targets, len(weights)) @ known @ known.T
        gradient = self.curvature * (made - wanted)
        return ReadoutLoss(name, gradient, x, self.curvature, self.square, self.samples)


def _held_by_norms(model: nn.Module) -> dict[str, list[Tensor]]:
    """Scale, shift and running statistics of each normalisation layer."""
    return {
        name: [t.detach() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
        for name, module in model.named_modules()
        if isinstance(module, NORMALISATION)
    }
