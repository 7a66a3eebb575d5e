"""When and what to consolidate on a stream that doesn't say where a task ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from avalanche_sp.activity import LayerActivity, some_inputs
from avalanche_sp.detection import ChangeDetector, ChangeWatch, InputWatch
from avalanche_sp.layers import NORMALISATION, GatedLayer, set_weights, weights_and_bias
from avalanche_sp.readout import ReadoutLoss
from avalanche_sp.recording import output_derivatives
from avalanche_sp.replay import stream_part, stream_rows

__all__ = ["StreamWatch"]

# Iterations from one look at the stream to the next: one device sync a look. As often steps are taken back there.
LOOK = 4
# Samples that a look adds to the second moments: the last mini-batches', as many as it takes, or all there were.
_SAMPLES = 16
# Samples from one consolidation to the next, where nothing is to be detected.
_CHUNK = 4096
# Input vectors for which older ones stand in a second moment, at most: the older ones' network is no longer there.
_MEMORY = 5120
# The stream has drifted, too slowly for any iteration to be surprising, when its inputs' mean is so far from that of
# what was learned: squared, in units of their variance.
_DRIFTED = 0.2
# Of the readout's step: what it should make of its inputs was noted while these still moved.
_DAMPING = 0.3


class Moment:
    r"""Running second moment :math:`C = E[x x^\top]` of a layer's input vectors, as a sketch of its leading eigenspace.

    Kept is :math:`C \Omega` for a random :math:`\Omega` (d, 2 rank). It is linear in C, so mini-batches of any size
    simply add up; and :math:`C \Omega (\Omega^\top C \Omega)^+ \Omega^\top C` is C but for its weakest directions.

    Args:
        inputs: d.
        rank: leading eigenvectors that are wanted.
        like: a tensor of the device and type.

    References:
        J. Tropp, A. Yurtsever, M. Udell, V. Cevher: Fixed-rank approximation of a positive-semidefinite matrix from
        streaming data, NeurIPS 2017.
    """

    def __init__(self, inputs: int, rank: int, like: Tensor):
        generator = torch.Generator(like.device).manual_seed(0)
        self.rank = rank
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
        self.weight = min(self.weight + n, _MEMORY)
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


def _grown(rows: Tensor, n: int) -> Tensor:
    """Rows (n, d), the new ones zero: an output unit that was not there should have been silent."""
    return torch.cat([rows, rows.new_zeros(n - len(rows), rows.shape[1])]) if len(rows) < n else rows


class StreamWatch:
    """Follows a stream without told boundaries, and says when to consolidate what.

    Every 4 iterations it looks: what were the losses, what are the layers' inputs? The inputs join a running second
    moment of what was learned since the last consolidation; no sample is kept from one iteration to the next.

    With a detector it consolidates when the loss has risen, or the inputs have left the place where they were. That is
    seen some iterations late, when the new task has been learned over the old one for a while. So a look at which
    something is surprising, though not enough to be a change, adds nothing to the second moments; and the weights are
    copied at every look without, and with them the optimizer's state. To that copy they go back, and of the steps since
    then only what the gate lets through, once it is closed for what was learned before the change, is done again. It
    consolidates, too, when the inputs have drifted away, little by little, from those that were learned.

    Without a detector it consolidates every 4096 samples.

    Args:
        detector: or None.
        rank_of: eigenvectors of a layer's second moments, by its name, the number of its inputs and whether it is
            called last.
        measure_loss: whether to measure its curvature in the outputs, and where it would have them.
    """

    def __init__(
        self,
        detector: ChangeDetector | None,
        rank_of: Callable[[str, int, bool], float],
        measure_loss: bool,
    ):
        self.changes = ChangeWatch(detector) if detector is not None else None
        self.rank_of = rank_of
        self.measure_loss = measure_loss
        self.iteration = 0
        self._inputs = InputWatch()
        # The losses since the last look, and how far inputs were from those before: read together, one sync a look.
        self._losses: list[Tensor] = []
        self._distances: list[Tensor] = []
        self._called: list[tuple[str, GatedLayer, Tensor, Tensor]] = []  # in this iteration, with input and output
        self._curvature, self._square = torch.zeros(()), torch.zeros(())
        self._learned: set[str] = set()  # layers whose input comes from something that learns
        self._rows: dict[str, float] = {}  # input vectors that a sample gives a weight
        self._weights: dict[str, Tensor] = {}  # at the last calm look
        self._norms: dict[str, list[Tensor]] = {}  # and all that normalisation layers held then
        self._optimizer: list[tuple[Tensor, Tensor]] = []  # and the optimizer's state: its own tensors, their copies
        self._start()

    def _start(self) -> None:
        self.samples = 0  # of the stream, since the last consolidation
        self.classes: set[int] = set()  # among those looked at
        self.curvature, self.square = torch.zeros(()), torch.zeros(())  # of loss and targets, means over the looks
        self.readout: str | None = None
        self.looks = 0
        self.moments: dict[str, Moment] = {}

    @property
    def state_bytes(self) -> int:
        """Bytes of what is kept from one iteration to the next."""
        tensors = [t for m in self.moments.values() for t in m.tensors]
        tensors += [*self._weights.values(), *(t for held in self._norms.values() for t in held)]
        tensors += [copy for _, copy in self._optimizer] + [*self._inputs.tensors]
        return sum(t.numel() * t.element_size() for t in tensors)

    def listen(self, strategy, layers: Mapping[str, GatedLayer]) -> list:
        """Hooks that note the layers' inputs in the coming forward pass, if a look takes them in."""
        self._called.clear()
        if -(self.iteration + 1) % LOOK * stream_rows(strategy) >= _SAMPLES:
            return []
        return [
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: self._note(name, layer, inputs[0], output)
            )
            for name, layer in layers.items()
        ]

    def _note(self, name: str, layer: GatedLayer, x: Tensor, output: Tensor) -> None:
        if x.requires_grad:
            self._learned.add(name)
        self._called.append((name, layer, x.detach(), output.detach()))

    @torch.no_grad()
    def observe(self, strategy) -> None:
        """Notes the loss of the stream's samples and the layers' inputs, after the backward pass."""
        batch, n, loss = len(strategy.mb_x), stream_rows(strategy), strategy.loss
        self.samples += n
        if n < batch and isinstance(strategy.mb_output, Tensor):
            loss = strategy._criterion(strategy.mb_output[:n], strategy.mb_y[:n])
        if self.changes is not None:
            self._losses.append(loss.detach().squeeze())
            if isinstance(strategy.mb_x, Tensor) and strategy.mb_x.is_floating_point():
                self._distances.append(self._inputs.observe(strategy.mb_x[:n]))
        readout, targets = self._wanted(strategy, n) if self._called and self.measure_loss else (None, None)
        for name, layer, inputs, _ in self._called:
            x, count = some_inputs(layer, stream_part(inputs, batch, n))
            if name not in self.moments:
                rank = int(self.rank_of(name, x.shape[1], name == self._called[-1][0]))
                self.moments[name] = Moment(x.shape[1], rank, x)
            self.moments[name].add(x, targets if name == readout else None)
            self._rows[name] = count / n
        self._called.clear()

    def _wanted(self, strategy, n: int) -> tuple[str | None, Tensor | None]:
        """The readout, and what the loss, being quadratic, would have it make of the n samples of the stream."""
        outputs, y = strategy.mb_output, strategy.mb_y[:n]
        outputs = outputs[:n] if isinstance(outputs, Tensor) and n < len(outputs) else outputs
        name, layer, _, made = self._called[-1]
        made = made[:n]
        self._curvature, readout, errors = output_derivatives(strategy._criterion, outputs, y, (name, layer, made))
        if readout is None:
            return None, None
        self.readout = readout
        wanted = (made - errors / self._curvature).float()
        self._square = wanted.square().sum(1).mean()
        return readout, wanted

    @torch.no_grad()
    def look(self, strategy, layers: Mapping[str, GatedLayer]) -> bool:
        """Ends an iteration. True when it is time to consolidate."""
        self.iteration += 1
        if self.iteration % LOOK:
            return False
        if self.changes is None:
            self._take(strategy, layers)
            found = self.samples >= _CHUNK
        else:
            found = self._look_for_changes(self.changes, strategy, layers)
        for moment in self.moments.values():
            moment.drop()
        return self.looks > 0 and found

    def _look_for_changes(self, changes: ChangeWatch, strategy, layers: Mapping[str, GatedLayer]) -> bool:
        """Whether the stream has changed since what was learned; if nothing shows that it has, this is learned, too."""
        n, device = len(self._losses), self._losses[0].device
        numbers = [*self._losses, *self._distances, self._inputs.moved]
        *shown, drift = torch.stack([t.to(device, torch.float32) for t in numbers]).tolist()
        self._losses, self._distances = [], []
        found, calm = changes.look(zip(*(shown[i : i + n] for i in range(0, len(shown), n))))
        if calm and not found:
            self._take(strategy, layers)
            self._inputs.keep()
            found = drift > _DRIFTED
        self._inputs.drop()
        if found:
            changes.restart()
            self._inputs.restart()
        return found

    def _take(self, strategy, layers: Mapping[str, GatedLayer]) -> None:
        for moment in self.moments.values():
            moment.keep()
        self.looks += 1
        self.classes.update(strategy.mb_y[: stream_rows(strategy)].flatten().tolist())
        if self.measure_loss:
            self.curvature = self.curvature + (self._curvature - self.curvature) / self.looks
            self.square = self.square + (self._square - self.square) / self.looks
        if self.changes is not None:
            self._weights = {n: weights_and_bias(layer) for n, layer in layers.items()}
            self._norms = {n: [t.clone() for t in held] for n, held in _held_by_norms(strategy.model).items()}
            states = strategy.optimizer.state.values()
            self._optimizer = [(t, t.clone()) for s in states for t in s.values() if isinstance(t, Tensor)]

    @torch.no_grad()
    def consolidate(
        self,
        model: nn.Module,
        layers: Mapping[str, GatedLayer],
        activities: dict[str, LayerActivity],
        pulled: Collection[str],
        settles: Callable[[str, GatedLayer, ReadoutLoss, float], Tensor | None] | None,
    ) -> dict[str, Tensor]:
        """Merges what was learned since the last time into ``activities``, at the weights of the last calm look.

        Args:
            pulled: the layers that remember all their weights, roughly.
            settles: settles the readout, by its name, on the new loss; None if it isn't to be.

        Returns:
            By layer, what the steps since that look had changed (rows, d); the weights are now without it.
        """
        changes = {}
        for name, layer in layers.items():
            if name in self._weights:
                weights = self._weights[name]  # of fewer output units where a head has grown
                changes[name] = weights_and_bias(layer)[: len(weights)] - weights
                set_weights(layer, weights)
        for name, held in _held_by_norms(model).items():
            for now, before in zip(held, self._norms.get(name, ())):
                now.copy_(before)
        for name, layer in layers.items():
            if name in self.moments and self.moments[name].weight:
                moment = self.moments[name]
                x, old, residual = moment.factor(), activities.get(name), None
                if settles is not None and name == self.readout:
                    residual = settles(name, layer, self._readout_loss(layer, moment, x), _DAMPING)
                activities[name] = (old or LayerActivity.empty(x.shape[1], x)).merged(
                    layer,
                    x,
                    self._rows[name],
                    self.samples,
                    moment.rank,
                    moment.mean_eigenvalue,
                    remembers_all=name in pulled,
                    fed_by_data=name not in self._learned,
                    residual=residual,
                )
        for now, before in self._optimizer:
            now.copy_(before)
        self._start()
        return changes

    def _readout_loss(self, layer: GatedLayer, moment: Moment, x: Tensor) -> ReadoutLoss:
        """The loss in the readout's weights, by its inputs' second moment, of factor ``x``, and what was wanted."""
        weights, second = weights_and_bias(layer), x.T @ x / len(x)
        known = torch.linalg.qr(x.T).Q  # the sketch knows these directions, the targets all
        made, wanted = weights @ second, _grown(moment.targets, len(weights)) @ known @ known.T
        return ReadoutLoss(self.curvature * (made - wanted), second, self.curvature, self.square, self.samples)


def _held_by_norms(model: nn.Module) -> dict[str, list[Tensor]]:
    """What each normalisation layer holds: scale, shift and running statistics."""
    return {
        name: [t.detach() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
        for name, module in model.named_modules()
        if isinstance(module, NORMALISATION)
    }
