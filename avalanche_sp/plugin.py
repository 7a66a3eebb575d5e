"""SelectivePlasticityPlugin: the coincidence gate for any Avalanche strategy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from avalanche.models import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avalanche_sp.gates import claim, held_back, loss_curvature, loss_surprise, merge_eigenspace, pull_back
from avalanche_sp.optimizer import SelectivePlasticityOptimizer
from avalanche_sp.replay import memory_size, stream_rows

__all__ = ["SelectivePlasticityPlugin", "LayerActivity"]

# Stored samples with which the gate opens to twice its openness: see SelectivePlasticityPlugin.
_MEMORY_SCALE = 20
# At most so many old samples for each new one pull: many small experiences would outrun the optimizer's step size.
_MAX_PULL = 20
# Decay of the running mean and variance of the loss, against which surprise is measured.
_LOSS_DECAY = 0.99


@dataclass
class LayerActivity:
    """Consolidated presynaptic activity of one layer, and what the gate did there in the present epoch.

    Attributes:
        eigenvalues: (r,), rising; of the mean second moment of the layer's input (a bias counts as an input of 1).
        vectors: (d, r), the eigenvectors.
        mean_eigenvalue: 0-dim, over all d directions.
        samples: how many samples stand behind them.
        anchor: (out, r), the weights along the vectors when they were consolidated.
        closed: (r,), how far the gate is closed along each vector, in [0, 1].
        energy, passed, novel: 0-dim sums over the epoch of the stream's squared input, of the part that the gate
            let through, and of the part outside the stored eigenspace.
    """

    eigenvalues: Tensor
    vectors: Tensor
    mean_eigenvalue: Tensor
    samples: int
    anchor: Tensor
    closed: Tensor
    energy: Tensor
    passed: Tensor
    novel: Tensor

    @classmethod
    def empty(cls, inputs: int, like: Tensor) -> LayerActivity:
        zero, nothing = like.new_zeros(()), like.new_zeros(0)
        return cls(nothing, like.new_zeros(inputs, 0), zero, 0, like.new_zeros(0, 0), nothing, zero, zero, zero)

    @property
    def openness(self) -> float:
        """Share of the stream's presynaptic energy that the gate let through in the epoch; 1 before any."""
        return float(self.passed / self.energy) if self.energy > 0 else 1.0

    @property
    def surprise(self) -> float:
        """Share of the stream's presynaptic energy unlike anything consolidated in the epoch; 1 before any."""
        return float(self.novel / self.energy) if self.energy > 0 else 1.0

    @property
    def claimed_rank(self) -> int:
        """Number of input directions along which the gate is at least half closed."""
        return int((self.closed >= 0.5).sum())


class SelectivePlasticityPlugin(SupervisedPlugin):
    r"""Coincidence gate: a synapse changes only where its input is not claimed by what was learned before.

    At the end of every experience the plugin consolidates each linear layer's presynaptic activity: the leading
    eigenpairs :math:`\lambda_i, v_i` of :math:`E[x x^\top]` over all experiences so far. From then on, in the
    backward pass, the presynaptic factor of the stream's samples is gated:

    .. math::
        \Delta W = \delta\, x_{gated}^\top, \qquad
        x_{gated} = x - V \operatorname{diag}(f) V^\top x, \qquad
        f_i = \frac{\lambda_i}{\lambda_i + \alpha \bar\lambda}

    New input is learned where it differs from the old; along the old directions, which carry the old answers, the
    layer holds still. What leaks all the same is pulled back, towards the weights :math:`W^*` at consolidation, by the
    gradient of the quadratic that stands for the old loss,

    .. math::
        \tfrac{\kappa}{2} \frac{N_{old}}{N_{new}} \operatorname{tr}\big((W - W^*) C (W - W^*)^\top\big),
        \qquad C = V \operatorname{diag}(\lambda) V^\top

    where :math:`\kappa` is the loss's measured curvature in its outputs and the ratio is at most 20. So more steps
    don't add up to more leakage. No sample is stored: the memory is ``rank`` vectors a layer, for its inputs and for
    its outputs.

    Beside Avalanche's ``ReplayPlugin`` (before or after it in the list) only the stream's samples are gated, and
    stored samples, which show what would be forgotten, open the gate and replace the pull-back: with M of them
    the openness is multiplied by :math:`o = 1 + (M/20)^2` and the pull-back divided by :math:`o^2`, found on Split
    MNIST (``docs/experiments.md``).

    It gates every trainable ``nn.Linear``, whatever the optimizer. The gate acts on gradients: with plain SGD the
    weights move in the open directions alone; momentum carried over from before a consolidation, adaptive step
    sizes and weight decay each let some change through along the closed ones. Other layers train ungated.

    The model is touched only while the strategy computes a training forward pass (hooks on its linear layers). A
    :class:`~avalanche_sp.SelectivePlasticityOptimizer` is told the surprise of the loss at every iteration.

    Args:
        openness: :math:`\alpha` > 0, in units of the mean eigenvalue (default 0.2). Larger values learn the new
            faster and keep less of the old. ``math.inf`` switches the gate off: training is then bit for bit what
            it is without the plugin.
        pull_back: weight of the pull-back, 0 or more (default 1); 0 leaves the gate alone.
        rank: eigenvectors kept a layer, 1 or more (default 100).
        consolidation_samples: samples of an experience, evenly spread over it, that are run through the network
            at its end, 1 or more (default 5000).

    Raises:
        ValueError: at construction for an argument out of range; at ``train`` for a model without ``nn.Linear``.
        TypeError: at ``train`` for a model whose output is not one tensor, unless ``pull_back`` is 0.
        FloatingPointError: at ``train`` when the loss is not finite, before the optimizer's step.

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
        self, openness: float = 0.2, pull_back: float = 1.0, rank: int = 100, consolidation_samples: int = 5000
    ):
        super().__init__()
        if not openness > 0:
            raise ValueError(f"Invalid openness value: {openness} (allowed: greater than 0; math.inf is off)")
        if not 0 <= pull_back < float("inf"):
            raise ValueError(f"Invalid pull_back value: {pull_back} (allowed: 0 or more)")
        for name, value in (("rank", rank), ("consolidation_samples", consolidation_samples)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid {name} value: {value} (allowed: an integer, 1 or more)")
        self.openness = openness
        self.pull_back = pull_back
        self.rank = rank
        self.consolidation_samples = consolidation_samples
        self.layers: dict[str, LayerActivity] = {}
        """Consolidated activity by layer name; empty until the first experience has ended."""
        self.surprise: Tensor | None = None
        """Surprise of the last training loss: 0-dim tensor in [0, 1]."""
        self._loss_moments: tuple[Tensor, Tensor] | None = None
        self._curvature = torch.zeros(())  # of the loss in its outputs, over all consolidated samples
        self._pull_weight = 0.0  # for the present epoch: N_old / N_new, and what a memory leaves of it
        self._handles: list = []
        self._held_back: dict[nn.Linear, tuple[LayerActivity, Tensor]] = {}
        self._batch: tuple[int, int] | None = None  # rows in the batch, rows of the stream; None outside backward

    @property
    def active(self) -> bool:
        """False where the gate is switched off."""
        return self.openness != float("inf")

    @property
    def _samples_seen(self) -> int:
        """Samples of all experiences consolidated so far."""
        return max((a.samples for a in self.layers.values()), default=0)

    @property
    def state_bytes(self) -> int:
        """Bytes that consolidated activity takes."""
        return sum(
            t.numel() * t.element_size()
            for a in self.layers.values()
            for t in (a.eigenvalues, a.vectors, a.mean_eigenvalue, a.anchor, a.closed)
        )

    # -- Avalanche's callbacks, in the order of the training loop --------------------------------------------------

    def before_training(self, strategy, **kwargs):
        if not any(isinstance(m, nn.Linear) for m in strategy.model.modules()):
            raise ValueError(
                f"Invalid model: {type(strategy.model).__name__} has no nn.Linear layer "
                "(SelectivePlasticityPlugin gates nn.Linear layers; at least one is needed)"
            )

    def before_training_epoch(self, strategy, **kwargs):
        # Here, and not before_training_exp, as ReplayPlugin may come later in the list.
        opening = 1 + (memory_size(strategy) / _MEMORY_SCALE) ** 2
        openness = self.openness * opening
        new = len(strategy.experience.dataset)
        old = min(self._samples_seen, _MAX_PULL * new)
        self._pull_weight = self.pull_back * old / new / opening**2
        for activity in self.layers.values():
            activity.closed = claim(activity.eigenvalues, activity.mean_eigenvalue, openness)
            activity.energy = activity.passed = activity.novel = torch.zeros_like(activity.mean_eigenvalue)

    def before_forward(self, strategy, **kwargs):
        self._release()
        if not self.layers:
            return
        for name, layer in strategy.model.named_modules():
            if name in self.layers and layer.weight.requires_grad:
                activity = self.layers[name]
                self._handles.append(
                    layer.register_forward_hook(
                        lambda layer, inputs, output, activity=activity: self._watch(layer, inputs, output, activity)
                    )
                )

    def after_forward(self, strategy, **kwargs):
        self._remove_hooks()

    def before_backward(self, strategy, **kwargs):
        # Only the strategy's own backward pass is gated, not one that another plugin makes for its purposes.
        self._batch = len(strategy.mb_x), stream_rows(strategy)

    def after_backward(self, strategy, **kwargs):
        if not strategy.loss.isfinite().all():
            clock = strategy.clock
            raise FloatingPointError(
                f"the loss is {strategy.loss.item()} at iteration {clock.train_exp_iterations} of training experience "
                f"{clock.train_exp_counter}: nothing was updated. The usual cause is too high a learning rate."
            )
        for layer, (activity, held) in self._held_back.items():
            self._correct(layer, activity, held)
        self._release()
        if self.active:
            self._observe(strategy.loss.detach().squeeze(), strategy.optimizer)

    def after_training_exp(self, strategy, **kwargs):
        self._release()
        if self.active:
            self._consolidate(strategy)

    # -- Gating ----------------------------------------------------------------------------------------------------

    def _watch(self, layer: nn.Linear, inputs: tuple, output: Tensor, activity: LayerActivity) -> None:
        """Forward hook: notes the layer's input, and waits for the error that comes back to its output."""
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda delta: self._hold_back(layer, x, delta, activity))

    def _hold_back(self, layer: nn.Linear, x: Tensor, delta: Tensor, activity: LayerActivity) -> None:
        """Tensor hook on a layer's output: what its gradient must lose. Adds up where a layer is used twice."""
        if self._batch is None:
            return
        x, delta = (self._stream_part(t).to(activity.vectors.dtype) for t in (x, delta))
        projection = x @ activity.vectors[: layer.in_features]
        energy = x.square().sum()
        if layer.bias is not None:
            projection += activity.vectors[-1]
            energy += len(x)
        f = activity.closed
        power = projection.square().sum(0)
        activity.energy = activity.energy + energy
        activity.passed = activity.passed + energy - (power * (2 * f - f.square())).sum()
        activity.novel = activity.novel + energy - power.sum()
        held = held_back(delta, projection, f)
        _, before = self._held_back.get(layer, (activity, None))
        self._held_back[layer] = activity, held if before is None else before.add_(held)

    def _correct(self, layer: nn.Linear, activity: LayerActivity, held: Tensor) -> None:
        """Takes from a layer's gradient what the gate held back, and adds the pull-back."""
        if self._pull_weight:
            rows = len(activity.anchor)  # fewer than the layer's where a head has grown
            drift = _along(layer, activity.vectors)[:rows] - activity.anchor
            weight = self._pull_weight * self._curvature
            held[:rows] -= pull_back(drift, activity.eigenvalues, activity.closed, weight)
        correction = held @ activity.vectors.T
        layer.weight.grad.sub_(correction[:, : layer.in_features])
        if layer.bias is not None and layer.bias.grad is not None:
            layer.bias.grad.sub_(correction[:, -1])

    def _stream_part(self, x: Tensor) -> Tensor:
        """Rows of ``x`` that belong to the stream: (..., d) to (rows, d). A sample may have several, in sequence."""
        batch, stream = self._batch
        return x.reshape(batch, -1, x.shape[-1])[:stream].reshape(-1, x.shape[-1])

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _release(self) -> None:
        """Ends an iteration, also one that an error or an interrupt left unfinished."""
        self._remove_hooks()
        self._held_back.clear()
        self._batch = None

    def _observe(self, loss: Tensor, optimizer) -> None:
        if self._loss_moments is None:
            self._loss_moments = loss.clone(), torch.zeros_like(loss)
        mean, variance = self._loss_moments
        self.surprise = loss_surprise(loss, mean, variance)
        difference = loss - mean
        self._loss_moments = (
            mean + (1 - _LOSS_DECAY) * difference,
            _LOSS_DECAY * (variance + (1 - _LOSS_DECAY) * difference.square()),
        )
        if isinstance(optimizer, SelectivePlasticityOptimizer):
            optimizer.observe_surprise(self.surprise)

    # -- Consolidation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _consolidate(self, strategy) -> None:
        """Merges the experience's presynaptic activity into the layers' eigenspaces."""
        model, dataset = strategy.model, strategy.experience.dataset
        activity, curvature = self._record_activity(strategy, model, dataset)
        seen = self._samples_seen
        self._curvature = (seen * self._curvature + len(dataset) * curvature) / (seen + len(dataset))
        for name, layer in model.named_modules():
            if name not in activity:
                continue
            x = torch.cat(activity[name])
            if layer.bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            old = self.layers.get(name) or LayerActivity.empty(x.shape[1], x)
            samples = old.samples + len(dataset)
            share = old.samples / samples
            values, vectors = merge_eigenspace(old.eigenvalues, old.vectors, share, x, self.rank)
            mean = share * old.mean_eigenvalue + (1 - share) * x.square().mean(0).mean()
            zero = torch.zeros_like(mean)
            anchor = _along(layer, vectors)
            closed = claim(values, mean, self.openness)
            self.layers[name] = LayerActivity(values, vectors, mean, samples, anchor, closed, zero, zero, zero)

    def _record_activity(self, strategy, model: nn.Module, dataset) -> tuple[dict[str, list[Tensor]], Tensor]:
        """Inputs of each trainable linear layer, and the loss's curvature, over evenly spread samples.

        Leaves the modules' modes and the global random state alone.
        """
        activity: dict[str, list[Tensor]] = {}
        curvatures: list[Tensor] = []

        def recorder(name):
            def hook(layer, inputs):
                activity.setdefault(name, []).append(inputs[0].reshape(-1, layer.in_features).float())

            return hook

        rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), self.consolidation_samples)).long()
        loader = DataLoader(
            dataset.subset(rows.tolist()),
            batch_size=512,
            collate_fn=getattr(dataset, "collate_fn", None),
            generator=torch.Generator(),  # its own: a loader draws from the global one even without shuffling
        )
        modes = {module: module.training for module in model.modules()}
        handles = [
            layer.register_forward_pre_hook(recorder(name))
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad
        ]
        devices = [strategy.device] if strategy.device.type == "cuda" else []
        try:
            model.eval()
            with torch.random.fork_rng(devices):
                for batch in loader:
                    x, y, task_labels = (batch[i].to(strategy.device) for i in (0, 1, -1))
                    outputs = avalanche_forward(model, x, task_labels)
                    if not self.pull_back:
                        continue
                    if not isinstance(outputs, Tensor):
                        raise TypeError(
                            f"Invalid model: its output is a {type(outputs).__name__} (the pull-back measures the "
                            "loss on one output tensor; pull_back=0 leaves the gate alone)"
                        )
                    with torch.enable_grad():
                        outputs = outputs.detach().requires_grad_()
                        curvatures.append(loss_curvature(outputs, strategy._criterion(outputs, y)))
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
        return activity, torch.stack(curvatures).mean() if curvatures else torch.zeros(())


def _along(layer: nn.Linear, vectors: Tensor) -> Tensor:
    """A layer's weights, its bias as one more column, along each vector: shape (out, r)."""
    along = layer.weight.detach().to(vectors.dtype) @ vectors[: layer.in_features]
    return along if layer.bias is None else along + torch.outer(layer.bias.detach().to(vectors.dtype), vectors[-1])
