"""SelectivePlasticityPlugin: the coincidence gate for any Avalanche strategy."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_sp import boundaries
from avalanche_sp.activity import LayerActivity
from avalanche_sp.detection import ChangeDetector, RunningSurprise, page_hinkley
from avalanche_sp.drift import LOOK, DriftWatch
from avalanche_sp.gates import held_back
from avalanche_sp.layers import (
    NORMALISATION,
    GatedLayer,
    energy,
    gate_gradient,
    gated_layers,
    gradient_along,
    postsynaptic,
    project,
    set_weights,
    weights_and_bias,
)
from avalanche_sp.optimizer import SelectivePlasticityOptimizer
from avalanche_sp.per_layer import PerLayer, check_patterns, per_layer, protected_layers, value_of, values_of
from avalanche_sp.readout import ReadoutLoss, settle
from avalanche_sp.recording import record_activity
from avalanche_sp.replay import (
    classes_of,
    memories_of,
    memory_size,
    stream_part,
    stream_rows,
    times_as_closed,
    times_as_open,
    trust_in,
)

__all__ = ["SelectivePlasticityPlugin"]

# Eigenvectors kept a layer. Each merge cuts to as many again, so more merges, of sketches, take more.
_RANK = {"experience": 48, "surprise": 64, "continuous": 64}
# At the readout at least so many of its inputs.
_READOUT_SHARE = 0.1


class SelectivePlasticityPlugin(SupervisedPlugin):
    r"""Coincidence gate: a synapse changes only where its input is not claimed by what was learned before.

    At the end of every experience the plugin consolidates each layer's presynaptic activity: the leading eigenpairs
    :math:`\lambda_i, v_i` of :math:`E[x x^\top]` over all experiences so far, and :math:`\rho`, the mean of the other
    eigenvalues. From then on, in the backward pass, the presynaptic factor of the stream's samples is gated:

    .. math::
        \Delta W = \delta\, x_{gated}^\top, \qquad
        x_{gated} = \sum_i (1 - f_i)\, v_i v_i^\top x + (1 - f_{rest}) (I - V V^\top) x, \qquad
        f_i = \frac{L \lambda_i}{L \lambda_i + \alpha \bar\lambda}, \quad
        f_{rest} = \frac{L \rho}{L \rho + \alpha \bar\lambda}

    where L is the number of input vectors that a sample gives the layer: one, or a convolution's output positions, or
    a sequence's tokens. A change to the weights acts on each. New input is learned where it differs from the old;
    along the old directions, which carry the old answers, the layer holds still. What leaks all the same is pulled
    back, towards the weights :math:`W^*` at consolidation, by the gradient of the quadratic that stands for the old
    loss,

    .. math::
        \tfrac{\kappa}{2} \frac{N_{old}}{N_{new}} L \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big),
        \qquad C = V \operatorname{diag}(\lambda) V^\top

    where :math:`\kappa` is the loss's measured curvature in its outputs and the ratio is at most 20. So more steps
    don't add up to more leakage. It pulls every few iterations, 8 at most, as many times as hard. Along all other
    directions it pulls, too, towards :math:`W^*` to four bits, with :math:`C = 0.15\, a^{1.5} \rho\, (I - V V^\top)`, a
    being how alike the stream is to what was consolidated, beyond chance (:func:`~avalanche_sp.gates.likeness`), at the
    layers that are fed by data, not by something that learns. And each further epoch over an experience, which brings
    little that is new, opens the gate less: its e-th with :math:`\alpha / e^5`.

    When a later experience ends, the readout, the last linear layer, is settled: it takes one damped Newton step on the
    experience's loss, if that is quadratic in the outputs as squared error is, and the old ones' quadratic, as far as
    the new loss gains by it (:func:`avalanche_sp.readout.settle`). So a task of few or small steps is read out, too.

    No sample is stored: the memory is ``rank`` vectors a layer, for its inputs and outputs, and four bits a weight.

    It works with any optimizer. Every step's gradient is gated along the 32 strongest directions, and with
    :math:`f_{rest}` along the others; every 1 to 8 iterations the share f of what the steps did along any is taken
    back. So momentum, adaptive step sizes and weight decay are gated, too.

    Gated are all trainable ``nn.Linear`` and ``nn.Conv2d`` layers (a convolution's input vectors are its patches; the
    groups of a grouped one share one eigenspace). Normalisation layers learn with the first experience and then
    hold still, scale, shift and running statistics, as each moves the outputs for all old inputs at once. Other layers'
    weights (embeddings, recurrent layers, what ``nn.MultiheadAttention`` uses without calling a layer) train
    ungated.

    Beside Avalanche's ``ReplayPlugin`` (before or after it in the list) only the stream's samples are gated along the
    :math:`v_i`, where else it is the whole gradient; the factor :math:`1 - f_{rest}` is for the memory's, too. Stored
    samples show what would be forgotten, so the more there are the more they replace. With c of them for each class
    of each experience they stand for :math:`t = c / (c + 50)` of the old loss, as they do in
    ``JointReplayLoss(criterion, shrinkage=50)``, the loss to use with it. With :math:`o = 1 + (c / 12)^2` the openness
    is multiplied by o, the pull-back divided by :math:`o^2 (1 + t N_{old} / N_{new})`, and of what the steps do along
    the claimed directions :math:`1 - t` is taken back. Further epochs close by :math:`e^{5 / (1 + (c/800)^2)}`. The
    readout is settled on the stored samples, too. All found on Split MNIST (``docs/experiments.md``). Normalisation
    layers go on learning.

    The model is touched only while the strategy trains: hooks from a forward pass to the end of its backward pass.
    Gradients accumulated over several are gated each by itself. A
    :class:`~avalanche_sp.SelectivePlasticityOptimizer` is told the surprise of each loss.

    ``openness``, ``pull_back`` and ``rank`` take one value for all layers, or a mapping from patterns of layer names
    (:func:`fnmatch.fnmatchcase`; names as in ``model.named_modules()``) to values. A layer takes the value of the
    first pattern that matches it, and the default if none does: ``docs/layers.md``.

    Args:
        openness: :math:`\alpha` > 0, in units of the mean eigenvalue (default 0.5). Larger values learn the new
            faster and keep less of the old. ``math.inf`` switches the gate off: training is then bit for bit what it
            is without the plugin. So a single layer is left alone, too, and nothing is kept for it.
        pull_back: weight of the pull-back, 0 or more (default 1); 0 leaves the gate alone.
        rank: eigenvectors kept a layer, 1 or more (default 48, or 64 where the plugin finds out when to consolidate;
            at the last layer a tenth of its inputs, if that is more). A float below 1 keeps as many as have that share
            of the energy, the second moment's trace; only where an experience's end is told.
        consolidation_samples: samples of an experience, evenly spread over it, that are run through the network
            at its end, 1 or more (default 5000).
        consolidate: when to. ``"experience"`` (default): at the end of every experience. ``"surprise"``: when the
            stream's loss or inputs show a change, what was learned before. ``"continuous"``: every 4096 samples. The
            last two need no boundaries: experiences may be of any length, as Avalanche's online streams' are
            (``docs/boundaries.md``).
        detector: what finds a change, an object with ``update(x)`` and ``drift_detected``, such as river's; copies
            of it are told of loss and inputs. Default: river's Page-Hinkley test, for ``"surprise"``.
        readout_step: whether the readout is settled at a consolidation (default True).

    Raises:
        ValueError: at construction for an argument out of range; at ``train`` for a model without a layer to gate, and
            for a pattern that matches none of its layers.
        ImportError: at construction, for ``"surprise"`` without a detector where river is not installed.
        TypeError: at ``train`` for a model whose output is not one tensor, unless ``pull_back`` is 0 and
            ``readout_step`` False.
        FloatingPointError: at ``train`` when the loss is not finite, before the optimizer's step, or what is to be
            consolidated is not.

    References:
        G. Zeng et al.: Continual learning of context-dependent processing in neural networks (OWM), Nature Machine
        Intelligence 2019. G. Saha, I. Garg, K. Roy: Gradient projection memory (GPM), ICLR 2021. S. Wang et al.:
        Training networks in null space of feature covariance (Adam-NSCL), CVPR 2021. G. Saha, K. Roy: Continual
        learning with scaled gradient projection (SGP), AAAI 2023. T.-C. Kao et al.: Natural continual learning
        (NCL), NeurIPS 2021.

    Example::

        strategy = Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                         criterion=OneHotMSELoss(), train_mb_size=64, plugins=[SelectivePlasticityPlugin()])
    """

    def __init__(
        self,
        openness: PerLayer[float] = 0.5,
        pull_back: PerLayer[float] = 1.0,
        rank: PerLayer[float] | None = None,
        consolidation_samples: int = 5000,
        consolidate: Literal["experience", "surprise", "continuous"] = "experience",
        detector: ChangeDetector | None = None,
        readout_step: bool = True,
    ):
        super().__init__()
        if not isinstance(consolidation_samples, int) or consolidation_samples < 1:
            allowed = "allowed: an integer, 1 or more"
            raise ValueError(f"Invalid consolidation_samples value: {consolidation_samples} ({allowed})")
        if consolidate not in ("experience", "surprise", "continuous"):
            raise ValueError(
                f"Invalid consolidate value: {consolidate!r} (allowed: 'experience', 'surprise', 'continuous')"
            )
        if detector is not None and consolidate != "surprise":
            raise ValueError(f"Invalid detector: consolidate={consolidate!r} detects nothing (allowed: None)")
        self.openness = per_layer("openness", openness, 0.5)
        self.pull_back = per_layer("pull_back", pull_back, 1.0)
        self.rank = per_layer("rank", {} if rank is None else rank, None)
        if consolidate != "experience" and (shares := [r for r in values_of(self.rank) if r < 1]):
            raise ValueError(f"Invalid rank value: {shares[0]} (allowed with consolidate={consolidate!r}: an integer)")
        self.active = min(values_of(self.openness)) < float("inf")  # False where the gate is switched off
        self.consolidation_samples = consolidation_samples
        self.consolidate = consolidate
        self.readout_step = readout_step
        self.layers: dict[str, LayerActivity] = {}
        """Consolidated activity by layer name; empty until the first experience has ended."""
        self.consolidated_at: list[int] = []
        """Training iterations after which something was consolidated; with "surprise" those that found a change."""
        self.classes_seen = 0
        """Classes of all that was consolidated, each experience's counted anew: its samples are others."""
        self._stream: boundaries.StreamWatch | None = None
        if consolidate != "experience":
            if consolidate == "surprise" and detector is None:
                detector = page_hinkley()
            self._stream = boundaries.StreamWatch(detector, self.rank_of, measure_loss=self._pulls_back or readout_step)
        self._running_surprise = RunningSurprise()
        # Weights that a stream may go back to are to be copied when what is claimed has just been taken back.
        self._drift = DriftWatch(self.pull_back, LOOK if self._stream is None else boundaries.LOOK)
        # For the present epoch.
        self._trust = 0.0  # how much of the old loss the memory stands for
        self._memory = False  # whether stored samples are trained on, too
        self._protected: dict[str, GatedLayer] = {}  # the layers whose gate isn't switched off
        self._gated: list[tuple[str, GatedLayer, LayerActivity]] = []  # and those that something is consolidated for
        self._norms: list[nn.Module] = []  # the normalisation layers that hold still
        # For the present iteration.
        self._handles: list = []
        self._held_back: dict[str, Tensor] = {}
        self._batch = (0, 0)  # rows in the batch, rows of the stream; none outside the strategy's backward pass
        self._accumulated: dict[nn.Parameter, Tensor] = {}  # gradients of earlier backward passes, gated already
        self._resting: list[nn.Module] = []  # normalisation layers switched to evaluation for a forward pass

    @property
    def surprise(self) -> Tensor:
        """Surprise of the last training loss: 0-dim tensor in [0, 1], 0 before any."""
        return self._running_surprise.last

    @property
    def _pulls_back(self) -> bool:
        return max(values_of(self.pull_back)) > 0

    def rank_of(self, name: str, inputs: int, is_last: bool) -> float:
        """Eigenvectors kept for a layer, by name, number of inputs and whether it is called last; or their share."""
        default = max(_RANK[self.consolidate], int(_READOUT_SHARE * inputs) if is_last else 0)
        return value_of(per_layer("rank", self.rank, default), name)

    def _pulls_beyond(self, name: str) -> bool:
        """Whether a layer is to be pulled along all directions."""
        # Without events what comes next is the same task again, which has yet to be learned, however alike it looks.
        return self.consolidate != "continuous" and value_of(self.pull_back, name) > 0

    @property
    def state_bytes(self) -> int:
        """Bytes that consolidated activity takes."""
        watched = self._stream.state_bytes if self._stream is not None else 0
        return watched + sum(activity.state_bytes for activity in self.layers.values())

    @property
    def _samples_seen(self) -> int:
        """Samples of all experiences consolidated so far."""
        return max((a.samples for a in self.layers.values()), default=0)

    # -- Avalanche's callbacks, in the order of the training loop --------------------------------------------------

    def before_training(self, strategy, **kwargs):
        if not gated_layers(strategy.model):
            raise ValueError(
                f"Invalid model: {type(strategy.model).__name__} has no trainable nn.Linear or nn.Conv2d layer "
                "(SelectivePlasticityPlugin gates these; at least one is needed)"
            )

    def before_training_exp(self, strategy, **kwargs):
        settings = {"openness": self.openness, "pull_back": self.pull_back, "rank": self.rank}
        check_patterns(settings, strategy.model)  # which Avalanche has adapted by now

    def before_training_epoch(self, strategy, **kwargs):
        # Here, and not before_training_exp, as ReplayPlugin may come later in the list.
        memory = memory_size(strategy)
        stored = memory / max(self.classes_seen, 1)
        opening = times_as_open(stored)
        self._trust = trust_in(stored)
        if self._stream is None:
            ratio = self._samples_seen / len(strategy.experience.dataset)
            self._drift.iteration = 0
            self._drift.forget()
        else:  # an experience may be a mini-batch, and nothing ends with it
            ratio = len(self.consolidated_at)  # what comes next is as long as what came before, for all we know
        self._protected = protected_layers(strategy.model, self.openness)
        self._gated = [(n, m, self.layers[n]) for n, m in self._protected.items() if n in self.layers]
        holds_norms = self.layers and not memory
        self._norms = [m for m in strategy.model.modules() if isinstance(m, NORMALISATION)] if holds_norms else []
        self._memory = memory > 0
        times = opening / times_as_closed(strategy.clock.train_exp_epochs, stored)
        for name, _, activity in self._gated:
            activity.close(value_of(self.openness, name) * times)
        self._drift.begin(self._gated, ratio, 1 / (opening**2 * (1 + ratio * self._trust)), 1 - self._trust)

    def before_forward(self, strategy, **kwargs):
        self._release()
        if self._memory or self._drift.iteration % LOOK == 0:
            for name, layer, _ in self._gated:
                self._handles.append(layer.register_forward_hook(partial(self._watch, name)))
        if self._stream is not None and self.active:
            self._handles += self._stream.listen(strategy, self._protected)
        for module in self._norms:
            if module.training:
                self._resting.append(module.eval())

    def after_forward(self, strategy, **kwargs):
        self._end_forward()

    def before_backward(self, strategy, **kwargs):
        # Only the strategy's own backward pass is gated, not one that another plugin makes.
        self._batch = len(strategy.mb_x), stream_rows(strategy)
        for _, layer, _ in self._gated:
            for parameter in layer.parameters(recurse=False):
                if parameter.grad is not None:
                    self._accumulated[parameter] = parameter.grad
                    parameter.grad = None

    def after_backward(self, strategy, **kwargs):
        if not strategy.loss.isfinite():
            clock = strategy.clock
            raise FloatingPointError(
                f"the loss is {strategy.loss.item()} at iteration {clock.train_exp_iterations} of training experience "
                f"{clock.train_exp_counter}: nothing was updated. The usual cause is too high a learning rate."
            )
        for name, layer, activity in self._gated:
            if layer.weight.grad is not None:
                self._gate(name, layer, activity)
        self._release()
        for module in self._norms:
            for parameter in module.parameters(recurse=False):
                parameter.grad = None  # not zero: a step on zeros still follows momentum and decays weights
        if self.active:
            self._running_surprise.observe(strategy.loss.detach().squeeze())
            if isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
                strategy.optimizer.observe_surprise(self.surprise)
            if self._stream is not None:
                self._stream.observe(strategy)

    def after_update(self, strategy, **kwargs):
        self._drift.end_step()
        if self._stream is not None and self.active and self._stream.look(strategy, self._protected):
            self._consolidate_amid(strategy, self._stream)

    def after_training_epoch(self, strategy, **kwargs):
        if self._stream is None:
            self._drift.end_epoch()

    def after_training_exp(self, strategy, **kwargs):
        self._release()
        if self._stream is None and self.active:
            self._consolidate(strategy)

    # -- Gating ----------------------------------------------------------------------------------------------------

    def _watch(self, name: str, layer: GatedLayer, inputs: tuple, output: Tensor) -> None:
        """Forward hook: notes the layer's input, and waits for the error that comes back to its output."""
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda delta: self._hold_back(name, layer, x, delta))

    def _hold_back(self, name: str, layer: GatedLayer, x: Tensor, delta: Tensor) -> None:
        """Tensor hook on a layer's output: what its gradient must lose. Adds up where a layer is used twice."""
        if self._batch == (0, 0):
            return
        activity = self.layers[name]
        x, delta = (stream_part(t, *self._batch).to(activity.vectors.dtype) for t in (x, delta))
        if self._drift.iteration % LOOK == 0:
            activity.watch(energy(layer, x), project(layer, x, activity.vectors))
        if self._memory:
            projection = project(layer, x, activity.strongest)
            held = held_back(postsynaptic(layer, delta), projection, activity.closed_strongest).flatten(0, -2)
            self._held_back[name] = self._held_back[name].add_(held) if name in self._held_back else held

    def _gate(self, name: str, layer: GatedLayer, activity: LayerActivity) -> None:
        """Gates a layer's gradient, and adds the pull-back that is due."""
        vectors, pull = activity.strongest, self._drift.pull_due(name)
        if not self._memory:
            held = gradient_along(layer, vectors).mul_(activity.closed_strongest)
        elif name in self._held_back:
            held = self._held_back[name]
        else:  # it was not called
            return
        if pull is not None:
            vectors = activity.vectors
            held = F.pad(held, (vectors.shape[1] - held.shape[1], 0))
            held[: len(pull)] -= pull  # fewer rows than the layer's where a head has grown
        gate_gradient(layer, held, vectors, 1 - activity.closed_rest)
        self._drift.pull_beyond(name, layer)

    def _end_forward(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._resting:
            module.train()
        self._resting.clear()

    def _release(self) -> None:
        """Ends an iteration, also one that an error or an interrupt left unfinished."""
        self._end_forward()
        for parameter, grad in self._accumulated.items():
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._accumulated.clear()
        self._held_back.clear()
        self._batch = (0, 0)

    @torch.no_grad()
    def _consolidate(self, strategy) -> None:
        """Merges the experience's presynaptic activity into the layers' eigenspaces."""
        criterion = strategy._criterion if self._pulls_back or self.readout_step else None
        layers = protected_layers(strategy.model, self.openness)
        experience = strategy.experience.dataset
        recorded = record_activity(strategy, experience, layers, self.consolidation_samples, criterion)
        seen, new = self._samples_seen, len(experience)
        loss = recorded.readout_loss(new) if self.readout_step else None
        self.classes_seen += classes_of(experience)
        last = next(reversed(recorded.inputs), None)
        for name, x in recorded.inputs.items():
            old, layer, residual = self.layers.get(name), layers[name], None
            if name == recorded.readout and loss is not None:
                residual = self._settle(strategy, name, layer, loss)
            self.layers[name] = (old or LayerActivity.empty(x.shape[1], x)).merged(
                layer,
                x,
                recorded.rows[name],
                new,
                self.rank_of(name, x.shape[1], name == last),
                remembers_all=self._pulls_beyond(name),
                fed_by_data=name in recorded.fed_by_data,
                residual=residual,
            )
            self.layers[name].close(value_of(self.openness, name))
        self._drift.curvature = (seen * self._drift.curvature + new * recorded.curvature) / (seen + new)
        self.consolidated_at.append(strategy.clock.train_iterations)
        self._drift.forget()
        self._protected, self._gated, self._norms = {}, [], []

    def _settle(self, strategy, name: str, layer: GatedLayer, loss: ReadoutLoss, damping=0.05) -> Tensor | None:
        """Settles the readout on a new loss and the old one, of which stored samples stand for their part."""
        old, losses = self.layers.get(name), [loss]
        seen = old.samples if old is not None else 0
        for memory in memories_of(strategy) if seen else ():
            stored = record_activity(
                strategy, memory, {name: layer}, self.consolidation_samples, strategy._criterion
            ).readout_loss(self._trust * seen * len(memory) / memory_size(strategy))
            if stored is None:  # several heads, for instance
                return None
            losses.append(stored)
        return settle(layer, losses, old, self._drift.curvature, self._trust, damping)

    @torch.no_grad()
    def _consolidate_amid(self, strategy, stream: boundaries.StreamWatch) -> None:
        """Consolidates in the midst of training, and goes on with the gate closed for what was consolidated."""
        seen, new, curvature = self._samples_seen, stream.samples, stream.curvature
        self.classes_seen += len(stream.classes)
        pulled = {name for name in self._protected if self._pulls_beyond(name)}
        settles = partial(self._settle, strategy) if self.readout_step else None
        changes = stream.consolidate(strategy.model, self._protected, self.layers, pulled, settles)
        self._drift.curvature = (seen * self._drift.curvature + new * curvature) / (seen + new)
        self.consolidated_at.append(strategy.clock.train_iterations + 1)  # Avalanche counts this one later
        self._drift.forget()
        self.before_training_epoch(strategy)
        for name, layer, activity in self._gated:
            if name in changes:
                change = changes[name]
                set_weights(layer, weights_and_bias(layer)[: len(change)] + activity.through(change))
                self._drift.rebase(name, layer, activity)
