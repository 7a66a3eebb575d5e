"""PlasticityGate: the coincidence gate for any PyTorch training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from avalanche_sp.arguments import check_integer
from avalanche_sp.gate.classes import ReadoutSamples, brings_classes, class_shift, repeats_classes, told_by_classes
from avalanche_sp.gate.consolidate import check_fits, consolidate, inherited, least_bytes
from avalanche_sp.gate.detection import ChangeDetector, RunningSurprise, page_hinkley
from avalanche_sp.gate.functional import transfer
from avalanche_sp.gate.hooks import Epoch, StepHooks, parameters_of, unwrapped
from avalanche_sp.gate.layer_gate import LayerGate, StreamStatistics
from avalanche_sp.gate.layers import (
    NORMALISATION,
    GatedLayer,
    gated_layers,
    ungated_parameters,
)
from avalanche_sp.gate.memory import LayerMemory, Memory, check_budget
from avalanche_sp.gate.normalisation import batches_seen, measure_statistics
from avalanche_sp.gate.observe import (
    Criterion,
    Forward,
    Observation,
    Samples,
    check_mean,
    check_outputs,
    frozen_readout,
    observe,
    on_device,
)
from avalanche_sp.gate.penalty import Drift, Gated
from avalanche_sp.gate.per_layer import PerLayer, check_patterns, per_layer, protected_layers, value_of, values_of
from avalanche_sp.gate.precision import outside_autocast
from avalanche_sp.gate.preparation import (
    DrawnInputs,
    Preparation,
    bears_steps,
    draw_inputs,
    features_of,
    follow_drift,
    output_sensitivity,
    sharpness,
    stable_step,
)
from avalanche_sp.gate.processes import mean_over_processes
from avalanche_sp.gate.pseudo_samples import PseudoSamples, pseudo_samples
from avalanche_sp.gate.readout import ReadoutLoss, ReadoutProblem, curvature_at, old_quadratic
from avalanche_sp.gate.rows import StreamRows
from avalanche_sp.gate.settings import Settings
from avalanche_sp.gate.stream import StreamWatch
from avalanche_sp.gate.trust import StoredSamples
from avalanche_sp.gate.warn import (
    warn_of_dead,
    warn_of_frozen_readout,
    warn_of_lacking,
    warn_of_left,
    warn_of_other_samples,
    warn_of_thawed,
    warn_of_unconsolidated,
    warn_of_ungated,
    warn_of_unlearned,
    warn_of_unseen,
    warn_of_unsolved,
)


def _model_of_inputs(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


class PlasticityGate:
    r"""Keeps what a network has learned while any PyTorch loop trains it on something new.

    The gate hooks the optimizer's step: it gates the gradient before the step, and takes back the gated part of the
    updates after. The loop stays as it was. Call :meth:`consolidate` when an experience (a task, a set of new classes)
    has been learned::

        gate = PlasticityGate(model, optimizer)
        for task in tasks:
            for x, y in task:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
            gate.consolidate(task, criterion)

    **Gate.** A consolidation stores for each layer the leading eigenpairs :math:`\lambda_i, v_i` of the second moment
    :math:`E[x x^\top]` of its input vectors, over all experiences so far, and :math:`\rho`, the mean of the other
    eigenvalues. From then on the layer's gradient :math:`\delta x^\top` is

    .. math::
        \Delta W = \delta\, x_{gated}^\top, \qquad
        x_{gated} = \sum_i (1 - f_i)\, v_i v_i^\top x + (1 - f_{rest}) (I - V V^\top) x, \qquad
        f_i = \frac{L \lambda_i}{L \lambda_i + \alpha \bar\lambda}, \quad
        f_{rest} = \frac{L \rho}{L \rho + \alpha \bar\lambda}

    with L the number of input vectors that a sample gives the layer: one, or a convolution's output positions, or a
    sequence's tokens. Every step's gradient is gated along the leading vectors, and with :math:`f_{rest}` along the
    others; every few steps the share f of the updates along each vector is taken back. So momentum, adaptive step
    sizes and weight decay are gated also, with any optimizer.

    **Penalty.** Towards the weights :math:`W^*` at consolidation, with the gradient of the quadratic

    .. math::
        \tfrac{\kappa}{2} \frac{N_{old}}{N_{new}} L \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big),
        \qquad C = V \operatorname{diag}(\lambda) V^\top

    where :math:`\kappa` is the loss's measured curvature in the network's outputs. Along all other directions
    :math:`C = 0.15\, a^{1.5} \rho\, (I - V V^\top)`, with a the likeness of the stream and the memory
    (:func:`~avalanche_sp.gate.functional.likeness`), at the layers that data feed.

    **Readout.** If an experience brings new classes, the last linear layer is solved before and after it
    (:class:`avalanche_sp.gate.readout.ReadoutProblem`). Otherwise it trains under the gate, and is solved after the
    experience. A loss that is quadratic in the outputs takes one damped Newton step at a consolidation instead
    (:func:`avalanche_sp.gate.readout.newton_readout`), without new classes or if stored samples stand for most of the
    old loss.

    No sample is stored: the memory is ``rank`` vectors a layer, for its inputs and outputs, and four bits a weight. For
    each class it is also the mean of the last layer's inputs, that of the first layer's if this is linear and alone fed
    by the data, and unless the loss is quadratic eight directions of the last layer's.
    Gated are linear and bilinear layers, convolutions and transposed convolutions of one to three dimensions, recurrent
    layers and cells, attention, and embeddings (``docs/coverage.md``). A convolution's input vectors are its patches;
    the groups of a grouped one share one eigenspace. An embedding's are one-hot, so C is diagonal and exact: a row is
    held by how often it was used, and an unused one is free. All other weights learn with the first experience and are
    frozen afterwards, unless stored samples are trained on; those of recurrent layers, attention and embeddings also
    train ungated then, as the error of each of their rows is not known.

    **What hooks carry.** Gradient accumulation, ``torch.amp.GradScaler``, gradient clipping, closures, and loops of
    other libraries, as long as the optimizer is a ``torch.optim.Optimizer`` and its ``step`` is called. What they do
    not carry: the size of the coming experience and the number of stored samples (:meth:`begin`), the rows of stored
    samples (:meth:`replayed`), and the loss of a stream without told boundaries (:meth:`observe`).

    Args:
        model, optimizer: the network and its optimizer; or None for both, until :meth:`attach`.
        openness: :math:`\alpha` > 0, in units of the mean eigenvalue (default 0.5). Larger values learn the new
            faster and keep less of the old. ``math.inf`` switches the gate off: training is then bit for bit what it
            is without the gate. For a single layer it leaves the layer alone.
        pull_back: weight of the penalty, 0 or more (default 1).
        rank: eigenvectors kept a layer, 1 or more (default 48, and 257 at the last layer; 64 if the gate finds the
            boundaries). A float below 1 is the share of the energy, the second moment's trace, that the kept ones have;
            only if boundaries are told.
        memory_budget: upper bound on the bytes of the memory, ``gate.memory.state_bytes``; what follows a stream
            without told boundaries is not counted. If it is too small, the memory is rounded, then the weights at four
            bits each are not kept, and then fewer eigenvectors are
            (:meth:`~avalanche_sp.gate.memory.Memory.within`). A loaded memory is bounded from the next consolidation
            on. Default None: no bound.
        consolidation_samples: samples of an experience that are run through the network, evenly spread over it, at
            most (default 2000), 1 or more. These are 500 of each class, or half of all if that is more.
        consolidate: ``"experience"`` (default): :meth:`consolidate` is called at the end of every experience.
            ``"surprise"``: at a change of the stream's loss or inputs. ``"continuous"``: every 4096 samples. The last
            two need :meth:`observe` in every step.
        detector: finds changes; an object with ``update(x)`` and ``drift_detected``, such as river's. Default:
            river's Page-Hinkley test, for ``"surprise"``.
        readout_step: whether the readout is solved, or takes a Newton step, for old and new classes together (default
            True). False: it trains under the gate alone.
        ungated: what happens to the weights that can't be gated, after the first experience: ``"freeze"`` (default)
            or ``"train"``. With stored samples they train on. A warning names them at the first consolidation.
        settings: all other constants.
        forward: computes the outputs from model and inputs at a consolidation. Default: ``model(inputs)``.

    ``openness``, ``pull_back`` and ``rank`` take one value for all layers, or a mapping from patterns of layer names
    (:func:`fnmatch.fnmatchcase`; names as in ``model.named_modules()``) to values. A layer takes the value of the
    first pattern that matches it, and the default if none does.

    Raises:
        ValueError: an argument is out of range; the model has no layer to gate; a pattern matches none of its layers;
            the memory of the model takes more than ``memory_budget`` even with one eigenvector a layer.
        ImportError: for ``"surprise"`` without a detector if river is not installed.
        TypeError: the optimizer is no ``torch.optim.Optimizer``.

    References:
        G. Zeng et al.: Continual learning of context-dependent processing in neural networks (OWM), Nature Machine
        Intelligence 2019. G. Saha, I. Garg, K. Roy: Gradient projection memory (GPM), ICLR 2021. S. Wang et al.:
        Training networks in null space of feature covariance (Adam-NSCL), CVPR 2021. G. Saha, K. Roy: Continual
        learning with scaled gradient projection (SGP), AAAI 2023. T.-C. Kao et al.: Natural continual learning
        (NCL), NeurIPS 2021.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        openness: PerLayer[float] = 0.5,
        pull_back: PerLayer[float] = 1.0,
        rank: PerLayer[float] | None = None,
        memory_budget: int | None = None,
        consolidation_samples: int = 2000,
        consolidate: Literal["experience", "surprise", "continuous"] = "experience",
        detector: ChangeDetector | None = None,
        readout_step: bool = True,
        ungated: Literal["freeze", "train"] = "freeze",
        settings: Settings = Settings(),  # noqa: B008  # frozen
        forward: Forward = _model_of_inputs,
    ):
        check_integer("consolidation_samples value", consolidation_samples, 1)
        if memory_budget is not None:
            check_integer("memory_budget value", memory_budget, 1)
        if consolidate not in ("experience", "surprise", "continuous"):
            raise ValueError(
                f"Invalid consolidate value: {consolidate!r} (allowed: 'experience', 'surprise', 'continuous')"
            )
        if ungated not in ("freeze", "train"):
            raise ValueError(f"Invalid ungated value: {ungated!r} (allowed: 'freeze', 'train')")
        if not isinstance(readout_step, bool):
            raise ValueError(f"Invalid readout_step value: {readout_step!r} (allowed: True, False)")
        if not isinstance(settings, Settings):
            raise TypeError(f"Invalid settings: {type(settings).__name__} (allowed: avalanche_sp.gate.Settings)")
        if not callable(forward):
            raise TypeError(f"Invalid forward: {forward!r} (allowed: a function of model and inputs)")
        if isinstance(detector, type) or not (detector is None or isinstance(detector, ChangeDetector)):
            raise TypeError(f"Invalid detector: {detector!r} (allowed: an object with update and drift_detected)")
        if detector is not None and consolidate != "surprise":
            raise ValueError(f"Invalid detector: consolidate={consolidate!r} detects nothing (allowed: None)")
        self.openness = per_layer("openness", openness, 0.5)
        self.pull_back = per_layer("pull_back", pull_back, 1.0)
        self.rank = per_layer("rank", {} if rank is None else rank, None)
        if consolidate != "experience" and (shares := [r for r in values_of(self.rank) if r < 1]):
            raise ValueError(f"Invalid rank value: {shares[0]} (allowed with consolidate={consolidate!r}: an integer)")
        self.active = min(values_of(self.openness)) < float("inf")
        """False if the gate is switched off for all layers."""
        self.memory_budget = memory_budget
        self.consolidation_samples = consolidation_samples
        self.boundaries = consolidate
        self.readout_step = readout_step
        self.ungated = ungated
        self.settings = settings
        self.memory = Memory()
        """The memory of the consolidated experiences."""
        self._forward = forward
        self.measures_loss = readout_step or max(values_of(self.pull_back)) > 0
        """Whether a consolidation measures the loss."""
        self._stream: StreamWatch | None = None
        if consolidate != "experience":
            if consolidate == "surprise" and detector is None:
                detector = page_hinkley(settings)
            self._stream = StreamWatch(detector, self.rank_of, self.measures_loss, settings)
        # The weights that a stream is rewound to are copied after a take-back.
        longest = settings.look if self._stream is None else settings.stream_look
        self._drift = Drift(self.pull_back, longest, settings)
        self._running_surprise = RunningSurprise(settings.surprise_decay, settings.surprise_full)
        self._hooks = StepHooks(self._drift, self._stream, self._after_step)
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._loaded: Mapping[str, Any] | None = None  # a state that waits for a model
        # For the present experience.
        self._prepared: Preparation | None = None
        self._transfer = 0.0  # of earlier experiences to the present one; 1 if the present one continues them
        self._counts_as: int | None = None  # number of samples that it counts as, if not its own
        self._loss_before: Tensor | None = None  # on its samples
        self._read: tuple[Any, Samples] | None = None  # data of the last call of prepare, and their samples
        # For the present epoch.
        self._samples: int | None = None  # of the present experience
        self._replays: Sequence[Samples] = ()  # stored samples
        self._memory_size = 0  # and their number
        self._stored = StoredSamples(0, settings)
        self._batches_seen: dict[str, int] = {}  # by the normalisation layers before the first experience
        self._at_rest: set[nn.Parameter] = set()  # those that the user had frozen at the last consolidation
        self._criterion: Criterion | None = None  # as last observed
        if (model is None) != (optimizer is None):
            raise ValueError("Invalid model and optimizer: one of them is None (allowed: both, or none)")
        if model is not None and optimizer is not None:
            self.attach(model, optimizer)

    # -- In the order of training ----------------------------------------------------------------------------------

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts the hooks on a model and its optimizer, and takes them off those before.

        Another model than before starts with an empty memory, and a warning. (After :meth:`close` the memory stays.)

        Raises:
            TypeError, ValueError: as above.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Invalid model: {type(model).__name__} (allowed: a torch.nn.Module)")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Invalid optimizer: {type(optimizer).__name__} (allowed: a torch.optim.Optimizer)")
        optimizer = unwrapped(optimizer)
        if not gated_layers(model):
            raise ValueError(
                f"Invalid model: {type(model).__name__} has no trainable layer that can be gated, such as nn.Linear, "
                f"with a weight of its own, but {', '.join(ungated_parameters(model, ())) or 'nothing'} (allowed: at "
                "least one)"
            )
        if parameters_of(optimizer).isdisjoint(model.parameters()):
            raise ValueError("Invalid optimizer: it has no parameter of the model (allowed: the one that trains it)")
        if self._hooks.is_taken(optimizer):
            raise ValueError("Invalid optimizer: another PlasticityGate is attached to it (allowed after its close())")
        goes_on, before = model is self._model, (self._model, self._optimizer)
        replaces = self._model is not None and not goes_on and bool(self.memory.layers)
        if not goes_on and self._loaded is None:
            self._check(model, Memory() if replaces else self.memory, self._memory_size)
        if replaces:
            warnings.warn(
                "selective plasticity: the model was replaced by another one. What was remembered of the first is "
                "dropped, and nothing protects it.",
                stacklevel=2,
            )
            self._drop()
        self._model, self._optimizer = model, optimizer
        if self._loaded is not None:
            try:
                self.load_state_dict(self._loaded)
            except Exception:
                self._model, self._optimizer = before
                raise
        elif goes_on:
            self._hooks.put(model, optimizer, self._hooks.epoch)
        else:
            self._batches_seen = batches_seen(model)
            self.begin(self._samples, self._memory_size)

    @outside_autocast
    def begin(self, samples: int | None = None, stored: int | Sequence[Dataset | Samples] = 0) -> None:
        """Tells what a hook cannot know of the coming epoch. Optional; a loop without stored samples does without.

        Args:
            samples: size of the coming experience. Default: that of the experiences so far, on average.
            stored: stored samples of earlier experiences, of which each batch has some (:meth:`replayed`): datasets of
                pairs (x, y), on which the readout's step is taken also, or their number.

        Raises:
            ValueError: a value is out of range, a pattern of openness, pull_back or rank matches no layer, or
                ``memory_budget`` is too small.
        """
        replays: Sequence[Samples] = ()
        if isinstance(stored, Sequence):
            replays = [self._samples_of(data, of_experience=False) for data in stored]
            stored = sum(s.total for s in replays)
        if samples is not None:
            check_integer("samples value", samples, 1)
        if not isinstance(stored, Integral) or isinstance(stored, bool) or stored < 0:
            allowed = "allowed: an integer, 0 or more, or a list of datasets"
            raise ValueError(f"Invalid stored value: {stored!r} ({allowed})")
        model = self._attached()
        protected = self._check(model, self.memory, stored)
        self._samples, self._replays, self._memory_size = samples, replays, stored
        memory, s = self.memory, self.settings
        self._stored = StoredSamples(stored / max(memory.classes, 1), s)
        if self._stream is None:  # else an epoch may be a mini-batch, and nothing ends with it
            self.finish_steps()
        ratio = self.ratio
        prepared, gated = self._prepared, dict[str, Gated]()
        for name, layer in protected.items():
            if name in memory.layers and (layer.per_row or not stored):
                remembered, known = memory.layers[name], self._hooks.epoch.gated.get(name)
                statistics = known.statistics if known and known.memory is remembered else None
                if statistics is None:
                    statistics = StreamStatistics.empty(remembered)
                statistics.start_epoch()
                factor = self._stored.opening * (s.attention_openness if layer.projects_attention else 1.0)
                openness = math.inf if self._is_open else value_of(self.openness, name) * factor / (1 - self._transfer)
                scale, step = (prepared.scale.get(name, 1.0), prepared.step.get(name, 1.0)) if prepared else (1.0, 1.0)
                gate = LayerGate.of(remembered, openness, s.gated_vectors, scale)
                gated[name] = Gated(name, layer, remembered, gate, statistics, self._rate_of(layer), step)
        unknown = {name: layer for name, layer in protected.items() if name not in memory.layers}
        warn_of_thawed([name for name, layer in unknown.items() if layer.weight in self._at_rest])
        self._at_rest.difference_update(layer.weight for layer in unknown.values())
        freezes = memory.layers and not stored and not self._is_open
        norms = [m for m in model.modules() if freezes and isinstance(m, NORMALISATION)]
        frozen = [p for norm in norms for p in norm.parameters(recurse=False)]
        if freezes and self.ungated == "freeze":
            trained = {p for name, p in model.named_parameters() if name in self._hooks.trained}
            frozen += [p for own in self._ungated_parameters(protected).values() for p in own if p in trained]
        if prepared is not None and prepared.solved:
            frozen += protected[prepared.layer].trained_parameters
        strength = self._stored.penalty(ratio) * (1 - self._transfer)
        self._drift.begin(gated.values(), memory.curvature, ratio, strength, 1 - self._stored.trust)
        assert self._optimizer is not None
        self._hooks.put(model, self._optimizer, Epoch(protected, gated, norms, frozen, stored > 0))

    def _check(self, model: nn.Module, memory: Memory, stored: int) -> dict[str, GatedLayer]:
        """The layers whose gate is not switched off; raises ValueError if model, memory and arguments do not fit."""
        check_patterns({"openness": self.openness, "pull_back": self.pull_back, "rank": self.rank}, model)
        protected = protected_layers(model, self.openness, memory.layers)  # a frozen one may train again
        if self.memory_budget is not None and self.active:
            check_budget(self.memory_budget, least_bytes(memory, protected))
        for name, layer in protected.items():
            if name in memory.layers and (layer.per_row or not stored):
                check_fits(name, layer, memory.layers[name])
        return protected

    def _begin_again(self) -> None:
        """Begins the present epoch with the present memory."""
        self.begin(self._samples, self._replays or self._memory_size)

    @outside_autocast
    def prepare(self, data: Dataset | Iterable[tuple[Any, Tensor]] | Samples, criterion: Criterion) -> None:
        """Prepares the readout for a coming experience, before it is trained. Optional, and worth it.

        For new classes, or a new task's head, the readout is solved, and frozen until :meth:`consolidate`. So the
        layers below learn only the part of the loss that the readout cannot remove. The drift of old inputs is measured
        then, and also without a new class if the loss is not quadratic. If the experience continues all earlier ones,
        with no new class and with the class means where they were, the gate is open until :meth:`consolidate`. An
        optimizer whose steps grow with the sharpness, as SGD's do, then goes on from the readout that it trained,
        because a solved one can make the loss too sharp. Where the readout cannot be solved, as without class labels,
        the gate opens by the forward transfer of earlier experiences (:func:`~avalanche_sp.gate.functional.transfer`).
        It also is open if the readout is frozen: new classes are then learned by the layers below alone.

        Otherwise nothing is done for a quadratic loss without a new class, or if stored samples stand for most of the
        old loss. The first experience needs a loss that is not quadratic and an adaptive optimizer, such as Adam: for
        another one a solved readout can be too sharp, and there is no earlier experience to compare it with. It is left
        if the optimizer's first steps would overshoot (:func:`~avalanche_sp.gate.preparation.bears_steps`).

        Args:
            data, criterion: as for :meth:`consolidate`; data that can be read again. Their samples are held until
                :meth:`consolidate`, which takes these if it is given the same object. Of another object the samples
                must come in the same order.

        Raises:
            ValueError, TypeError, FloatingPointError: as :meth:`consolidate`.
        """
        if self.measures_loss:
            check_mean(criterion)
        if isinstance(data, Iterator):
            raise ValueError(
                f"Invalid data: a {type(data).__name__}, of which nothing would be left for training (allowed: what "
                "can be read again, such as a DataLoader or a list of batches)"
            )
        if self._read is not None and self._drift.steps:
            warn_of_unconsolidated()
        if self._prepared is not None or self._transfer or self._counts_as:
            self._forget_experience()
            self._begin_again()
        self._loss_before = self._read = None
        if not (self.active and self.readout_step) or self._stream:
            return
        model = self._attached()
        layers = protected_layers(model, self.openness)
        samples = self._samples_of(data)
        if self._samples is None:
            self._samples = samples.total
            self._begin_again()
        self._read, criterion = (data, samples), samples.of_labels(criterion)
        if not (self.memory.layers or self._is_adaptive):
            first = replace(samples, batches=islice(samples.batches, 1))
            self._observed(first, {}, criterion)  # raises if data, model and criterion do not fit
            return
        observation = self._balanced(self._observed(samples, layers, criterion))
        if observation.samples != samples.total:
            self._counts_as = observation.samples
            self._begin_again()
        self._loss_before, classified = observation.loss, observation.classified
        if self.memory.layers and observation.loss is not None and observation.zero_loss is not None:
            self._transfer = transfer(observation.loss, self.memory.loss, observation.zero_loss)
            if classified is None and (name := self._frozen_readout(samples)) is not None:
                self._transfer = 1.0
                warn_of_frozen_readout(name)
            if self._transfer:
                self._begin_again()
        continues = self._continues(classified)
        if classified is None or not self._solves(observation, continues):
            return
        if self._memory_size and classified.layer not in self.memory.layers:
            return  # batches are of several tasks: no row is gated, and nothing bounds the sharpness of a solved head
        if continues and (trained := self.memory.layers[classified.layer].trained) is not None:
            layers[classified.layer].set_weights(trained)
        merged, old = self._merged(self.memory, classified), self._pseudo_samples(classified)
        solved, readout = self._brings_classes(classified), layers[classified.layer]
        problem = self._problem(classified, old, layers, merged, criterion)
        ridge_factor = None if problem is None else problem.held_out_ridge()
        if solved:
            if problem is None or not self._solve(problem, readout, ridge_factor):
                return
            if not self.memory.layers and not self._bears_steps(samples, readout, criterion):
                readout.set_weights(problem.present)
                return
        below = {n: layers[n] for n in self._hooks.epoch.gated if n != classified.layer and n in observation.layers}
        weights = {name: layer.weights_and_bias() for name, layer in below.items()}
        sensitivity = output_sensitivity(model, observation.inputs, below, self._forward, observation.shared)
        scale, step, curvature = {}, {}, None
        if solved and self._memory_size and not self._is_adaptive:
            curvature = curvature_at(layers[classified.layer].weights_and_bias(), classified, criterion)
        for name in below:
            g, reference = self._hooks.epoch.gated[name], self.memory.layers[name].sharpness
            if reference is not None and not self._is_adaptive:
                through = partial(g.gate.through, memory=g.memory)
                sharp = sharpness(observation.layers[name], sensitivity[name], through)
                scale[name] = float(reference / sharp) if sharp > reference else 1.0
            if curvature is not None:
                sharp, weight = sharpness(observation.layers[name], sensitivity[name]), self.ratio * self.trust
                step[name] = stable_step(g.rate, curvature, weight, sharp)
        inputs, targets, vectors = classified.inputs, classified.targets, merged.vectors
        means = {name: s.mean for name, s in sensitivity.items()}
        # Of a class that has many kinds of input, drawn inputs tell too little.
        entered = self._entered(observation, layers) if solved else None
        self._prepared = Preparation(
            classified.layer,
            solved,
            inputs,
            targets,
            old,
            entered,
            vectors,
            weights,
            means,
            scale,
            step,
            ridge_factor,
        )
        self._transfer = float(continues)
        self._begin_again()

    def _frozen_readout(self, samples: Samples) -> str | None:
        with self._not_listening():
            return frozen_readout(self._attached(), samples, self._forward)

    def _bears_steps(self, samples: Samples, readout: GatedLayer, criterion: Criterion) -> bool:
        """Whether the layers below a solved readout can be trained by the optimizer (:func:`bears_steps`)."""
        model, optimizer, solved = self._attached(), self._optimizer, set(readout.parameters)
        assert optimizer is not None
        groups = [(p, float(group["lr"])) for group in optimizer.param_groups for p in group["params"]]
        rates, steps = {p: r for p, r in groups if p.requires_grad and p not in solved}, self.settings.solve_trial
        with self._not_listening():
            return not rates or bears_steps(model, samples.few(), rates, steps, criterion, self._forward)

    def check_outputs(self, outputs: Any) -> None:
        """Raises TypeError if the loss is to be measured on a network's outputs and they are not one tensor."""
        if self.active and self.measures_loss:
            check_outputs(outputs)

    def replayed(self, stored: Tensor | Sequence[bool] | None) -> None:
        """Tells which rows of the coming batch are stored samples; they pass the gate. Until the next step.

        Args:
            stored: True for each row that is a stored sample, shape (batch,); None for no row.

        Raises:
            ValueError: it is not a list of truth values, or no number of stored samples was given to :meth:`begin`.
        """
        rows = self._hooks.rows = None if stored is None else StreamRows.unlike(stored)
        if rows is not None and rows.count < rows.batch and not self._memory_size:
            raise ValueError("Invalid call: no stored sample is known (allowed after begin(stored=...))")

    @outside_autocast
    def observe(self, inputs: Any, outputs: Any, targets: Tensor, loss: Tensor, criterion: Criterion) -> None:
        """Tells the loss of the present batch, before the step: for boundaries that the gate finds, and for surprise.

        Args:
            inputs, outputs, targets: of the batch, a row a sample.
            loss: 0-dim.
            criterion: of (outputs, targets), a mean over samples.
        """
        if not self.active:
            return
        self._running_surprise.observe(mean_over_processes(loss.detach().squeeze()))
        self._criterion = criterion
        if self._stream is not None:
            stream = self._hooks.rows or StreamRows(len(targets), len(targets), slice(0, len(targets)))
            self._stream.observe(inputs, outputs, targets, loss, criterion, stream)

    @outside_autocast
    def consolidate(
        self,
        data: Dataset | Iterable[tuple[Any, Tensor]] | Samples,
        criterion: Criterion,
        *,
        stand_for: int | None = None,
    ) -> None:
        """Remembers an experience: call it when the experience has been learned.

        The first consolidation without stored samples also measures the running statistics of the normalisation layers
        that were trained, which are frozen from then on. A network that was trained before the gate came to it stays as
        it is.

        Args:
            data: the experience's samples: a dataset of pairs (x, y), or an iterable of batches (x, y).
            criterion: the loss of (outputs, targets), a mean over samples.
            stand_for: number of samples that the experience counts as, for instance if the data are a few of those
                that the network was trained on. Default: their number. For new classes alone the reference is the
                average number of samples a class in the earlier experiences. If the new classes have less than half of
                it on average, or more than twice, each counts as the reference.

        Raises:
            ValueError: there is no sample, the criterion is no mean, the gate finds the boundaries itself, or
                ``stand_for`` is no positive integer.
            TypeError: the data are no pairs of inputs and targets; the model's output is not one tensor, unless
                ``pull_back`` is 0 and ``readout_step`` False.
            FloatingPointError: an input of a layer is not finite. The memory is as it was.
        """
        if self._stream is not None:
            raise ValueError(
                f"Invalid call: with consolidate={self.boundaries!r} the gate finds the boundaries (allowed with "
                "consolidate='experience')"
            )
        if stand_for is not None:
            check_integer("stand_for value", stand_for, 1)
        if not self.active:
            return
        if self.measures_loss:
            check_mean(criterion)
        model = self._attached()
        warn_of_unseen(self._unseen())
        self._drift.take_back()
        layers = protected_layers(model, self.openness)
        samples = self._read[1] if self._read is not None and self._read[0] is data else self._samples_of(data)
        self._read, criterion = None, samples.of_labels(criterion)
        first = not self.memory.consolidations
        if (first or self._is_open) and not self._memory_size:
            self._measure_norms(samples)
        observation = self._observed(samples, layers, criterion if self.measures_loss else None)
        observation = self._balanced(observation) if stand_for is None else observation.counting_as(int(stand_for))
        before, self._loss_before = self._loss_before, None
        if not self._is_open:
            warn_of_unlearned(before, observation, self.memory, self.statistics, self.openness)
        self._remember(observation, layers, criterion, solves=not first or bool(self._hooks.trained))
        if first and self.readout_step:
            sensitivity = output_sensitivity(model, observation.inputs, layers, self._forward, observation.shared)
            known = {}
            for name, memory in self.memory.layers.items():
                known[name] = replace(memory, sharpness=sharpness(observation.layers[name], sensitivity[name]))
            self.memory = replace(self.memory, layers=known)
        self._hooks.saw_steps = False
        self.begin()

    @outside_autocast
    def finish_steps(self) -> None:
        """Takes back the gated part of the last updates. Call it before other weights are put into the model."""
        self._drift.take_back()
        self._drift.steps = 0
        self._drift.forget()

    @outside_autocast
    def inherit(self, name: str, like: str) -> None:
        """Gates a layer that was added to the model, which shares its input with another layer.

        The new layer takes over the memory of the other one's inputs, with its own present weights as the anchor. If
        the other layer has no memory, there is nothing to inherit.

        Args:
            name, like: names of the new layer and of the other one.

        Raises:
            ValueError: ``name`` is no layer that can be gated, or ``memory_budget`` is too small.
        """
        if like not in self.memory.layers:
            return
        known = gated_layers(self._attached())
        layer = known.get(name)
        if layer is None:
            raise ValueError(f"Invalid name value: {name!r} (allowed: {', '.join(known)})")
        layers = {**self.memory.layers, name: inherited(self.memory.layers[like], layer)}
        self.memory = replace(self.memory, layers=layers).within(self.memory_budget)

    def forget(self) -> None:
        """Drops the memory, between two experiences: nothing is protected, and the next experience is the first."""
        self._drop()
        if self._model is not None:
            self._begin_again()

    def _drop(self) -> None:
        """Drops the memory, and the notes of steps under it."""
        self.memory = Memory()
        self._forget_experience()
        self._drift.forget()

    def _forget_experience(self) -> None:
        """Drops what :meth:`prepare` found."""
        self._prepared, self._transfer, self._counts_as = None, 0.0, None

    def close(self) -> None:
        """Takes all hooks off the model and the optimizer. The memory stays."""
        self.finish_steps()
        self.detach()
        self._model = self._optimizer = None
        self._hooks.epoch = Epoch()

    def detach(self) -> None:
        """Takes the hooks off until :meth:`attach`, also after an error in the midst of a step."""
        self._hooks.take_off()

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on a model."""
        return self._hooks.are_on

    @property
    def device_type(self) -> str:
        """Of the model's parameters; "cpu" without a model."""
        return "cpu" if self._model is None else next(self._model.parameters()).device.type

    @property
    def listening(self) -> bool:
        """Whether forward passes are those of training; set it False around other forward passes with gradients."""
        return self._hooks.listening

    @listening.setter
    def listening(self, value: bool) -> None:
        self._hooks.listening = value

    @property
    def gating(self) -> bool:
        """Whether backward passes are those of training; set it False around other backward passes."""
        return self._hooks.gating

    @gating.setter
    def gating(self, value: bool) -> None:
        self._hooks.gating = value

    # -- What can be read ------------------------------------------------------------------------------------------

    @property
    def surprise(self) -> Tensor:
        """Surprise of the last observed loss: 0-dim tensor in [0, 1], 0 before any."""
        return self._running_surprise.last

    @property
    def trust(self) -> float:
        """The share of the old loss that the stored samples of the present epoch stand for, 0 to 1."""
        return self._stored.trust

    @property
    def ratio(self) -> float:
        """N_old / N_new, as far as it is known; for the penalty, and the weight of stored samples in the loss."""
        if self._stream is not None or self._samples is None:
            return max(self.memory.consolidations, 1)
        return self.memory.samples / (self._counts_as or self._samples)

    @property
    def statistics(self) -> dict[str, StreamStatistics]:
        """Statistics of the present epoch's inputs, by layer."""
        return {name: g.statistics for name, g in self._hooks.epoch.gated.items()}

    @property
    def claimed_rank(self) -> dict[str, int]:
        """Number of input directions along which a gate without stored samples is at least half closed, by layer."""
        return {
            name: int((memory.closed(value_of(self.openness, name))[0] >= 0.5).sum())
            for name, memory in self.memory.layers.items()
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of the memory, and of what follows a stream."""
        return self.memory.state_bytes + (self._stream.state_bytes if self._stream is not None else 0)

    def state_dict(self) -> dict:
        """The memory and the state of the present epoch, for ``torch.save``.

        ``torch.load(..., weights_only=True)`` takes it. A run that goes on from it, with the states of model and
        optimizer, goes on bit for bit. Not in it: what a gate that finds boundaries has noted since the last one; it
        watches the stream from the start again.
        """
        if self._loaded is not None:  # it waits for a model
            return dict(self._loaded)
        return {
            "memory": self.memory.state_dict(),
            "epoch": [self._samples, self._memory_size],
            "drift": self._drift.state_dict(),
            "trained": sorted(self._hooks.trained),
            "batches_seen": self._batches_seen,
            "prepared": self._prepared.state_dict() if self._prepared is not None else None,
            "transfer": self._transfer,
            "counts_as": self._counts_as,
            "loss_before": self._loss_before,
            "surprise": self._running_surprise.state_dict(),
            "statistics": {name: vars(s).copy() for name, s in self.statistics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state of :meth:`state_dict`, to the model's device; without a model, at :meth:`attach`.

        Raises:
            ValueError: it is of another model, or no such state. The gate is as it was.
        """
        if lacking := [key for key in ("memory", "epoch", "drift", "trained") if key not in state]:
            raise ValueError(f"Invalid state: no {', '.join(lacking)} (allowed: what state_dict() gave)")
        if self._model is None:
            self.memory, self._loaded = Memory.from_state_dict(state["memory"]), state
            return
        state = on_device(next(self._model.parameters()).device, state)
        memory, own = Memory.from_state_dict(state["memory"]), gated_layers(self._model)
        if memory.layers and memory.layers.keys().isdisjoint(own):
            raise ValueError(
                f"Invalid state: of the layers {', '.join(memory.layers)} (allowed: of the model's, {', '.join(own)})"
            )
        self._check(self._model, memory, state["epoch"][1])
        self.memory, self._loaded = memory, None
        self._drift.forget()
        self._hooks.trained, self._batches_seen = set(state["trained"]), state["batches_seen"]
        prepared = state["prepared"]
        self._prepared = None if prepared is None else Preparation.from_state_dict(prepared)
        self._transfer, self._loss_before, self._read = state["transfer"], state["loss_before"], None
        self._counts_as = state["counts_as"]
        self._hooks.saw_steps = state["drift"]["steps"] > 0
        self._running_surprise.load_state_dict(state["surprise"])
        self.begin(*state["epoch"])
        self._drift.load_state_dict(state["drift"])
        for name, statistics in state["statistics"].items():
            if name in self._hooks.epoch.gated:  # else the layer has left the network, and its memory stays
                self._hooks.epoch.gated[name].statistics = StreamStatistics(**statistics)

    def to(self, device: torch.device | str) -> PlasticityGate:
        """Moves the memory to a device, after the model."""
        replays = self._replays
        self.load_state_dict(on_device(torch.device(device), self.state_dict()))
        self._replays = replays
        return self

    def __getstate__(self) -> dict:
        """For pickle: hooks are put on again by :meth:`attach`."""
        return vars(self) | {"_criterion": None, "_read": None}

    def _attached(self) -> nn.Module:
        if self._model is None:
            raise ValueError("Invalid call: the gate has no model (attach(model, optimizer) gives it one)")
        return self._model

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        stream = self._stream
        if stream is not None and self.active and stream.look(self._attached(), self._hooks.epoch.protected, optimizer):
            self._consolidate_stream(stream)

    # -- Consolidation ---------------------------------------------------------------------------------------------

    def rank_of(self, name: str, inputs: int, is_last: bool) -> float:
        s, told = self.settings, self.boundaries == "experience"
        default = s.rank if told else s.stream_rank
        if is_last:
            default = max(default, min(s.readout_rank, inputs) if told else 0)
        return value_of(per_layer("rank", self.rank, default), name)

    def observed(self, total: int, classes: int) -> int:
        """Number of samples that are run through the network, of an experience of ``total`` samples, at most."""
        return min(self.consolidation_samples, max(total // 2, self.settings.observed_a_class * classes))

    def _samples_of(
        self, data: Dataset | Iterable[tuple[Any, Tensor]] | Samples, of_experience: bool = True
    ) -> Samples:
        if isinstance(data, Samples):
            return data
        return Samples.of(data, self.observed if of_experience else lambda *_: self.consolidation_samples)

    @contextmanager
    def _not_listening(self) -> Iterator[None]:
        """Within it, forward passes are not those of training."""
        listening, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = listening

    def _measure_norms(self, samples: Samples) -> None:
        """Measures the running statistics of the normalisation layers that were trained and are frozen from now on."""
        names = [name for name, seen in batches_seen(self._attached()).items() if seen != self._batches_seen.get(name)]
        if names:
            with self._not_listening():
                measure_statistics(self._attached(), samples, names, self._forward)

    def _observed(self, samples: Samples, layers: Mapping[str, GatedLayer], criterion: Criterion | None) -> Observation:
        with self._not_listening():
            return observe(self._attached(), samples, layers, criterion, self.settings, self._forward)

    def _balanced(self, observation: Observation) -> Observation:
        """The observation as that of the number of samples that it counts as.

        New classes that are much rarer or much more frequent than those before count as these, on average. By their
        numbers a joint loss would give up the rare ones.
        """
        seen = observation.classified
        known = None if seen is None else self.memory.layers.get(seen.layer)
        if seen is None or known is None or repeats_classes(known, seen):
            return observation
        usual = observation.classes * self.memory.samples / self.memory.classes
        most = self.settings.largest_imbalance
        if usual / most <= observation.samples <= usual * most:
            return observation
        return observation.counting_as(max(round(usual), 1))

    def _remember(
        self,
        observation: Observation,
        layers: Mapping[str, GatedLayer],
        criterion: Criterion | None,
        damping: float | None = None,
        solves: bool = True,
    ) -> None:
        # Without events the next samples are of the same task, which has yet to be learned, however alike they are.
        remembers = {name for name in layers if self.boundaries != "continuous" and value_of(self.pull_back, name) > 0}
        classified, losses, solved, is_open = observation.classified, None, False, self._is_open
        memory, merged = self.memory, dict[str, LayerMemory]()  # self.memory stays until all has gone well
        trained = dict[str, Tensor | None]()
        if solves and classified is not None and criterion is not None and self._solves(observation, is_open):
            name, start, prepared = classified.layer, None, self._prepared
            if prepared is not None and prepared.layer == name:
                if not torch.equal(prepared.targets, classified.targets):
                    warn_of_other_samples()
                told = prepared.entered
                now = None if told is None else self._features(observation, layers, told.rows)
                memory, old = follow_drift(memory, prepared, observation, layers, self.settings, now, is_open)
                start = prepared.vectors
            else:
                old = self._pseudo_samples(classified)
            merged = {name: self._merged(memory, classified, start)}
            if not (self._is_adaptive or self._brings_classes(classified)):
                trained[name] = layers[name].weights_and_bias() if is_open else memory.layers[name].trained
            factor = prepared.ridge_factor if prepared is not None and prepared.layer == name else None
            problem = self._problem(classified, old, layers, merged[name], criterion)
            solved = problem is not None and self._solve(problem, layers[name], factor)
        if self.readout_step and not solved:
            losses = self._stored_losses(observation, layers, criterion)
        self.memory = consolidate(
            memory,
            observation,
            layers,
            merged,
            trained,
            self.rank_of,
            remembers,
            self.settings,
            losses,
            self.trust if losses else 0.0,
            damping,
        ).within(self.memory_budget)
        self._forget_experience()
        self._drift.forget()
        parameters = dict(self._attached().named_parameters())
        self._at_rest = {p for p in parameters.values() if not p.requires_grad}
        if self.memory.consolidations == 1:
            if not self._hooks.trained:  # the network was trained before the gate came to it
                self._hooks.trained = {name for name, p in parameters.items() if p.requires_grad}
            gated = {p for name in self.memory.layers for p in layers[name].parameters}
            ungated = self._ungated_parameters(self._hooks.epoch.protected)
            warn_of_ungated(self._attached(), self._hooks.trained, gated, ungated, self.ungated)
            warn_of_dead(observation)
        knew = self.memory.consolidations == 1 or any(m.class_counts is not None for m in memory.layers.values())
        if knew and self.measures_loss and self.readout_step and not (self._stream or is_open):
            warn_of_unsolved(observation)

    def _unseen(self) -> list[str]:
        """Names of the gated layers that have changed in the present epoch, if the gate has seen no step of theirs."""
        assert self._optimizer is not None
        seen = parameters_of(self._optimizer) if self._hooks.saw_steps and self._hooks.sees_steps else set()
        gated = self._hooks.epoch.gated
        return [name for name, g in gated.items() if g.layer.weight not in seen and self._drift.has_moved(name)]

    def _rate_of(self, layer: GatedLayer) -> float:
        """The learning rate of a layer's weights if steps are proportional to the gradient, as SGD's are, else 0."""
        for group in self._optimizer.param_groups if self._optimizer is not None else ():
            if "eps" not in group and any(p is layer.weight for p in group["params"]):
                return float(group.get("lr") or 0)
        return 0.0

    @property
    def _is_adaptive(self) -> bool:
        """Whether the optimizer's steps do not grow with the sharpness of the loss."""
        assert self._optimizer is not None
        stabilisers = [group.get("eps") for group in self._optimizer.param_groups]
        return all(isinstance(eps, Real) and eps <= self.settings.adaptive_eps for eps in stabilisers)

    @property
    def _is_open(self) -> bool:
        """Whether the present experience continues all earlier ones, so that nothing of it is held back."""
        return self._transfer == 1

    def _continues(self, samples: ReadoutSamples | None) -> bool:
        """Whether an experience continues all earlier ones: no new class, and the class means where they were."""
        old = None if samples is None else self.memory.layers.get(samples.layer)
        if samples is None or old is None or old.class_counts is None:
            return False
        return class_shift(old, samples) < self.settings.same_shift

    def _solves(self, observation: Observation, continues: bool) -> bool:
        """Whether the readout is solved for an experience.

        A loss that is quadratic in the outputs takes the Newton step instead if the experience brings no new class and
        does not continue the earlier ones, or if stored samples stand for most of the old loss. In the first experience
        the readout is solved only for another loss and an adaptive optimizer.
        """
        samples = observation.classified
        if samples is None or not self.readout_step:
            return False
        old = self.memory.layers.get(samples.layer)
        if old is None:
            return bool(self.memory.layers) or (self._is_adaptive and observation.readout is None)
        if old.class_counts is None:
            return False
        return observation.readout is None or (self.trust <= 0.5 and (continues or self._brings_classes(samples)))

    def _brings_classes(self, samples: ReadoutSamples) -> bool:
        return brings_classes(self.memory.layers.get(samples.layer), samples)

    def _merged(self, memory: Memory, samples: ReadoutSamples, start: Tensor | None = None) -> LayerMemory:
        """The readout's memory with that of an experience; ``start`` are eigenvectors that it had before training."""
        inputs = samples.inputs.shape[1]
        old = memory.layers.get(samples.layer) or LayerMemory.empty(inputs, samples.inputs)
        rank = self.rank_of(samples.layer, inputs, True)
        return old.merged(samples.inputs, int(samples.weight), 1.0, rank, start=start)

    def _pseudo_samples(self, samples: ReadoutSamples) -> PseudoSamples | None:
        """Pseudo-samples of a readout's old classes; None for a new task's head."""
        old = self.memory.layers.get(samples.layer)
        return None if old is None else pseudo_samples(old, min(self.settings.solve_samples, old.samples), samples)

    def _features(self, observation: Observation, layers: Mapping[str, GatedLayer], rows: Tensor) -> Tensor | None:
        """The readout's inputs that the present network makes of input vectors of the layer that data feed."""
        entrance, classified = observation.entrance, observation.classified
        if entrance is None or classified is None:
            return None
        model, inputs = self._attached(), observation.inputs
        with self._not_listening():
            return features_of(model, inputs, rows, layers[entrance], layers[classified.layer], self._forward)

    def _entered(self, observation: Observation, layers: Mapping[str, GatedLayer]) -> DrawnInputs | None:
        """Input vectors of the layer that data feed, drawn for old and new classes; None if these are unknown."""
        entrance = observation.entrance
        if entrance is None or observation.classified is None:
            return None
        known, readout = (self.memory.layers.get(name) for name in (entrance, observation.classified.layer))
        if known is None or known.data_sums is None or readout is None:
            return None
        known = replace(known, class_sums=known.data_sums, class_counts=readout.class_counts)
        seen = replace(observation.classified, inputs=observation.layers[entrance].inputs)
        rows, old, new = draw_inputs(known, seen)
        features = self._features(observation, layers, rows)
        return None if features is None else DrawnInputs(rows, features, old, new)

    def _problem(
        self,
        samples: ReadoutSamples,
        old: PseudoSamples | None,
        layers: Mapping[str, GatedLayer],
        merged: LayerMemory,
        criterion: Criterion,
    ) -> ReadoutProblem | None:
        """The readout's problem for an experience; None if the stored samples don't all reach the same readout."""
        layer, stored, known = layers[samples.layer], [], self.memory.layers.get(samples.layer)
        for replayed in self._replays if old is not None else ():
            seen = self._observed(replayed, {samples.layer: layer}, None).classified
            if seen is None:  # several heads, for instance
                return None
            stored.append(seen)
        if self._prepared is None:
            self._warn_of_lacking(known, stored)
        trust, quadratic, told, s = self.trust if stored else 0.0, None, 1.0, self.settings
        present = layer.weights_and_bias()
        if known is not None and not brings_classes(known, samples):
            quadratic = old_quadratic(known, present, s.readout_old * self.memory.curvature)
            told = told_by_classes(known, samples)
        return ReadoutProblem(present, samples, old, merged, criterion, s, stored, trust, quadratic, told)

    def _solve(self, problem: ReadoutProblem, layer: GatedLayer, ridge_factor: float | None) -> bool:
        """Solves the readout; False if it is left. Without a factor of the ridge one is chosen."""
        weights = problem.solution(ridge_factor or problem.held_out_ridge())
        if weights is None:
            warn_of_left(problem.new.layer)
            return False
        layer.set_weights(weights)
        return True

    def _ungated_parameters(self, protected: Mapping[str, GatedLayer]) -> dict[str, list[nn.Parameter]]:
        """Parameters that the gate has no memory for, by name; without the layers that openness switches off."""
        layers = gated_layers(self._attached())
        gated = [layer for n, layer in layers.items() if n in self.memory.layers or n not in protected]
        return ungated_parameters(self._attached(), gated)

    def _warn_of_lacking(self, known: LayerMemory | None, stored: Sequence[ReadoutSamples]) -> None:
        """Says so if stored samples open the gate, and there are none of some earlier classes."""
        if known is None or known.class_counts is None or not stored or self._stored.opening < 2:
            return
        classes = known.class_counts.nonzero().flatten()
        warn_of_lacking(classes[~torch.isin(classes, torch.cat([s.targets for s in stored]))].tolist())

    def _stored_losses(self, observation, layers, criterion) -> list[ReadoutLoss] | None:
        """Losses of stored samples in the readout's weights; None if one has none."""
        readout = observation.readout
        if readout is None or readout.layer not in self.memory.layers:
            return []
        layer = {readout.layer: layers[readout.layer]}
        losses, stored = [], []
        for memory in self._replays:
            seen = self._observed(memory, layer, criterion)
            if seen.readout is None:  # several heads, for instance
                return None
            losses.append(seen.readout)
            stored += [seen.classified] if seen.classified is not None else []
        self._warn_of_lacking(self.memory.layers[readout.layer], stored)
        old, total = self.memory.layers[readout.layer].samples, sum(loss.weight for loss in losses)
        return [replace(loss, weight=self.trust * old * loss.weight / total) for loss in losses]

    @torch.no_grad()
    def _consolidate_stream(self, stream: StreamWatch) -> None:
        """Consolidates in the midst of training, and reapplies the gated part of the later updates."""
        model, layers = self._attached(), self._hooks.epoch.protected
        changes = stream.rewind(model, layers)
        observation = stream.observation(layers)
        self._remember(observation, layers, self._criterion, self.settings.readout_stream_damping)
        self._begin_again()
        for name, g in self._hooks.epoch.gated.items():
            if name in changes:
                change = changes[name]
                g.layer.set_weights(g.layer.weights_and_bias()[: len(change)] + g.gate.through(change, g.memory))
                self._drift.rebase(name)
