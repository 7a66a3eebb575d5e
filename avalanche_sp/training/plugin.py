"""SelectivePlasticityPlugin: the coincidence gate for any Avalanche strategy."""

import warnings
from collections.abc import Mapping
from typing import Literal

from avalanche.training import SCR
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates import SupervisedMetaLearningTemplate
from torch import Tensor

from avalanche_sp.gate import ChangeDetector, LayerMemory, PlasticityGate, Samples, Settings
from avalanche_sp.gate.layers import gated_layers
from avalanche_sp.gate.per_layer import PerLayer
from avalanche_sp.optim import SelectivePlasticityOptimizer
from avalanche_sp.training.consolidation import ConsolidatedEligibility
from avalanche_sp.training.replay import (
    classes_of,
    forward_of,
    is_mixture,
    labels_of,
    memories_of,
    samples_of,
    stored_rows,
    trains_apart,
)


class SelectivePlasticityPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Keeps earlier experiences in any Avalanche strategy: :class:`~avalanche_sp.gate.PlasticityGate` as a plugin.

    At the end of every experience the gate remembers the input directions that each layer used. From then on updates
    along these directions are held back. No sample is stored. :class:`~avalanche_sp.gate.PlasticityGate` has the
    equations, and lists the gated layers. The strategy's loss must be a mean over samples.

    With Avalanche's ``ReplayPlugin`` (before or after it in the list) only the stream's samples are gated, and the
    more samples are stored, the further the gate opens. Use ``JointReplayLoss(criterion)`` with it, which asks the
    plugin for the weight of the stored samples.

    A :class:`~avalanche_sp.SelectivePlasticityOptimizer` is told the surprise of each loss, and consolidates with the
    gate. Its consolidated eligibility is kept as :class:`~avalanche_sp.ConsolidationPlugin` keeps it. The model and the
    optimizer carry hooks only while the strategy trains.

    Args:
        openness: alpha > 0, in units of the mean eigenvalue (default 0.5). Larger values learn the new faster and keep
            less of the old. ``math.inf`` switches the gate off, for all layers or for one.
        pull_back: weight of the penalty, 0 or more (default 1).
        rank: eigenvectors kept a layer, 1 or more, or a share of the energy below 1 (default 48, and 257 at the
            last layer; 64 if the plugin finds the boundaries).
        consolidation_samples: samples of an experience that are run through the network, evenly spread over it, at
            most (default 2000), 1 or more. These are 500 of each class, or half of all if that is more.
        consolidate: ``"experience"`` (default): at the end of every experience. ``"surprise"``: at a change of the
            stream's loss or inputs. ``"continuous"``: every 4096 samples. The last two need no boundaries: experiences
            may be of any length, as Avalanche's online streams' are (``docs/boundaries.md``).
        detector: finds changes; an object with ``update(x)`` and ``drift_detected``, such as river's. Default: river's
            Page-Hinkley test, for ``"surprise"``.
        readout_step: whether the last layer is solved, or takes a Newton step, for old and new classes together
            (default True). False: it trains under the gate alone.
        ungated: what happens to weights that can't be gated, after the first experience: ``"freeze"`` (default) or
            ``"train"``. With stored samples they train on. A warning names them.
        settings: all other constants.
        memory_budget: upper bound on the bytes of the memory, without what follows a stream. If it is too small, the
            memory is rounded, and then fewer eigenvectors are kept. Default None: no bound.

    ``openness``, ``pull_back`` and ``rank`` take one value for all layers, or a mapping from patterns of layer names
    to values: ``docs/guide.md``.

    Raises:
        ValueError: at construction for an argument out of range; at ``train`` for a model without a layer to gate, for
            a pattern that matches none of its layers, and for a ``memory_budget`` that its memory exceeds.
        ImportError: at construction, for ``"surprise"`` without a detector if river is not installed.
        TypeError: at ``train`` for a model whose output is not one tensor, unless ``pull_back`` is 0 and
            ``readout_step`` False; and for mini-batches that are dictionaries.
        FloatingPointError: at ``train`` when the loss is not finite, before the optimizer's step, or a layer's inputs
            are not finite at a consolidation.

    Example::

        strategy = Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                         criterion=OneHotMSELoss(), train_mb_size=64, plugins=[SelectivePlasticityPlugin()])
    """

    consolidates_optimizer = True

    def __init__(
        self,
        openness: PerLayer[float] = 0.5,
        pull_back: PerLayer[float] = 1.0,
        rank: PerLayer[float] | None = None,
        consolidation_samples: int = 2000,
        consolidate: Literal["experience", "surprise", "continuous"] = "experience",
        detector: ChangeDetector | None = None,
        readout_step: bool = True,
        ungated: Literal["freeze", "train"] = "freeze",
        settings: Settings = Settings(),  # noqa: B008  # frozen
        memory_budget: int | None = None,
    ):
        super().__init__()
        self.gate = PlasticityGate(
            openness=openness,
            pull_back=pull_back,
            rank=rank,
            memory_budget=memory_budget,
            consolidation_samples=consolidation_samples,
            consolidate=consolidate,
            detector=detector,
            readout_step=readout_step,
            ungated=ungated,
            settings=settings,
            forward=forward_of,
        )
        self.gate.listening = self.gate.gating = False
        self.consolidated_at: list[int] = []
        """Training iterations after which the plugin consolidated; with "surprise" the boundaries that it found."""
        self._noted = 0  # consolidations of the gate, up to the last of these iterations
        self._eligibility = ConsolidatedEligibility()
        self._steps = 0  # of the present experience
        self._samples: Samples | None = None  # of it
        self._told_of_mixture = self._told_of_missed = False
        self._classes: set[int] | None = None  # that have come, where boundaries are not told
        self._classes_came: list[int] = []  # iterations at which new ones came, of which no boundary is known yet

    @property
    def layers(self) -> Mapping[str, LayerMemory]:
        """The memory of each layer, by name; empty until the first experience has ended."""
        return self.gate.memory.layers

    @property
    def surprise(self) -> Tensor:
        """Surprise of the last training loss: 0-dim tensor in [0, 1], 0 before any."""
        return self.gate.surprise

    @property
    def state_bytes(self) -> int:
        """Bytes of the memory."""
        return self.gate.state_bytes

    # Avalanche's callbacks, in the order of training.

    def before_training(self, strategy, **kwargs):
        if sum(isinstance(plugin, SelectivePlasticityPlugin) for plugin in strategy.plugins) > 1:
            raise ValueError("Invalid plugins: several SelectivePlasticityPlugin (allowed: one)")
        if isinstance(strategy, SCR) and self.gate.measures_loss:
            raise ValueError(
                "Invalid strategy: SCR, whose loss is of two views of each sample (allowed with pull_back=0 and "
                "readout_step=False, which need no loss)"
            )
        if not gated_layers(strategy.model):
            self.gate.attach(strategy.model, strategy.optimizer)  # raises
        if isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
            self._eligibility.note(strategy)

    def before_training_exp(self, strategy, **kwargs):
        self.gate.attach(strategy.model, strategy.optimizer)
        self._steps, self._samples = 0, None
        self._noted = self.gate.memory.consolidations  # a loaded gate has earlier ones
        if not self.gate.memory.consolidations:
            self.consolidated_at.clear()  # of another model
        if isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
            self._eligibility.restore(strategy)

    def before_training_epoch(self, strategy, **kwargs):
        if isinstance(strategy, SupervisedMetaLearningTemplate):
            return  # such a strategy tells no plugin of its steps: after_training_exp says so
        # Here, and not before_training_exp, as ReplayPlugin may come later in the list.
        begins = not strategy.clock.train_exp_epochs
        data = strategy.adapted_dataset  # Cumulative adds stored samples to it; in GDumb it is the buffer
        if begins and is_mixture(strategy) and self.gate.memory.layers:
            self.gate.forget()
            if not self._told_of_mixture:
                self._told_of_mixture = True
                warnings.warn(
                    f"selective plasticity: {type(strategy).__name__} mixes stored samples with those of the "
                    "experience. The plugin does not know which are new. It gates none of them. The memory of "
                    "earlier experiences is dropped, and the mixture is remembered.",
                    stacklevel=2,
                )
        stored = [samples_of(memory, self.gate.consolidation_samples) for memory in memories_of(strategy)]
        self.gate.begin(len(data), stored)
        if begins:
            self._samples = self._samples_of(data)
            self.gate.prepare(self._samples, strategy._criterion)

    def _samples_of(self, dataset) -> Samples:
        return samples_of(dataset, self.gate.observed(len(dataset), classes_of(dataset)))

    def before_training_iteration(self, strategy, **kwargs):
        if isinstance(strategy.mbatch, Mapping):
            raise TypeError("Invalid mini-batch: a dictionary (allowed: inputs, targets and task labels in a sequence)")

    def before_forward(self, strategy, **kwargs):
        if not self.gate.is_attached:  # after an evaluation in the midst of training, or in a resumed run
            self.gate.attach(strategy.model, strategy.optimizer)
        self.gate.replayed(stored_rows(strategy))
        self.gate.listening, self.gate.gating = True, False
        if trains_apart(strategy):

            def end(*args):  # of the stream's forward pass
                self.gate.listening = False
                handle.remove()

            handle = strategy.model.register_forward_hook(end, always_call=True)

    def after_forward(self, strategy, **kwargs):
        self.gate.listening = False
        self._steps += 1
        if self._steps == 1:
            self.gate.check_outputs(strategy.mb_output)

    def before_backward(self, strategy, **kwargs):
        self.gate.gating = True  # another plugin may have made a backward pass of its own before

    def after_backward(self, strategy, **kwargs):
        self.gate.gating = False
        if not strategy.loss.isfinite():
            clock = strategy.clock
            raise FloatingPointError(
                f"the loss is {strategy.loss.item()} at iteration {clock.train_exp_iterations} of training experience "
                f"{clock.train_exp_counter}: nothing was updated. The usual cause is too high a learning rate."
            )
        self.gate.observe(strategy.mb_x, strategy.mb_output, strategy.mb_y, strategy.loss, strategy._criterion)
        if isinstance(strategy.optimizer, SelectivePlasticityOptimizer) and self.gate.active:
            strategy.optimizer.observe_surprise(self.surprise)

    def after_update(self, strategy, **kwargs):
        if self.gate.memory.consolidations > self._noted:
            self._note_consolidation(strategy, strategy.clock.train_iterations + 1)  # Avalanche counts this one later

    def after_training_exp(self, strategy, **kwargs):
        self.gate.listening = False
        if not self._steps:
            what = f"experience {strategy.clock.train_exp_counter} was not trained in any iteration (a batch is larger "
            what += "than the experience, with drop_last?)"
            if strategy.clock.train_exp_iterations:
                what = f"{type(strategy).__name__} does not tell its plugins of its steps"
            warnings.warn(f"selective plasticity: {what}: nothing is consolidated.", stacklevel=2)
        elif self.gate.boundaries == "surprise" and not self.gate.memory.consolidations:
            least = self.gate.settings.detection_start
            if 1 < self._steps < least and strategy.clock.train_exp_counter:
                warnings.warn(
                    f"selective plasticity: {self._steps} iterations are too few to find a change in ({least} are "
                    "needed), and nothing is protected. Use consolidate='experience', or smaller batches.",
                    stacklevel=2,
                )
        elif self.gate.boundaries == "experience" and self.gate.active:
            samples = self._samples or self._samples_of(strategy.adapted_dataset)
            self._samples = None
            self.gate.consolidate(samples, strategy._criterion)
            self._note_consolidation(strategy, strategy.clock.train_iterations)
        if self.gate.boundaries != "experience" and self.gate.active:
            self._warn_of_missed(strategy)

    def after_training(self, strategy, **kwargs):
        self.gate.detach()

    def before_eval(self, strategy, **kwargs):
        self.gate.listening = False
        self.gate.detach()

    def _warn_of_missed(self, strategy) -> None:
        """Says so, once, if new classes came and nothing was consolidated since, or before."""
        came, now = labels_of(strategy.experience.dataset), strategy.clock.train_iterations
        if self._classes is not None and came - self._classes:
            self._classes_came.append(now - self._steps)
        self._classes = came | (self._classes or set())
        many = self.gate.settings.detection_start
        if not self._classes_came or now - self._classes_came[0] < many:
            return
        first, self._classes_came = self._classes_came[0], []
        if self.gate.boundaries == "continuous":
            found = self.gate.memory.consolidations > 0  # also those of a loaded gate
        else:
            found = bool(self.consolidated_at) and self.consolidated_at[-1] > first
        if found or self._told_of_missed:
            return
        self._told_of_missed = True
        how = f"every {self.gate.settings.stream_chunk} samples, and fewer have come"
        if self.gate.boundaries == "surprise":
            how = f"at changes that it finds, and found none in {now - first} iterations"
        warnings.warn(
            f"selective plasticity: new classes came at iteration {first}, and nothing that was learned before is "
            f"protected. consolidate={self.gate.boundaries!r} consolidates {how}. Where boundaries are known, "
            "consolidate='experience' is better; smaller batches give more iterations.",
            stacklevel=3,
        )

    def _note_consolidation(self, strategy, iteration: int) -> None:
        self.consolidated_at.append(iteration)
        self._noted = self.gate.memory.consolidations
        if isinstance(strategy.optimizer, SelectivePlasticityOptimizer):
            self._eligibility.consolidate(strategy)


def plugin_of(strategy) -> SelectivePlasticityPlugin | None:
    """A strategy's plugin; None without one."""
    return next((p for p in strategy.plugins if isinstance(p, SelectivePlasticityPlugin)), None)
