"""FeatureGaussians: Gaussians of classes at the readout's inputs, for any Avalanche strategy."""

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from torch import Tensor, nn

from avalanche_sp.arguments import check_integer
from avalanche_sp.gate import ClassGaussians, Settings
from avalanche_sp.gate.classes import ReadoutSamples
from avalanche_sp.gate.layers import GatedLayer, gated_layers
from avalanche_sp.gate.observe import evaluation_mode, observe
from avalanche_sp.training.plugin import SelectivePlasticityPlugin
from avalanche_sp.training.replay import forward_of, is_mixture, memories_of, samples_of


class FeatureGaussians(SupervisedPlugin):
    """A readout of Gaussians in feature space: class means and one covariance, moved as training moves the features.

    When an experience ends, the Gaussians of earlier classes follow the drift of the new samples' features, and those
    of the new classes join them (:class:`~avalanche_sp.gate.ClassGaussians`). When training ends, and for an evaluation
    between the end of an experience and the next one, the last linear layer is set to their linear discriminant
    analysis. Other plugins find the trained weights at the end of an experience, and before the next one the layer gets
    them back. So all else trains as without this plugin, with any loss; only the evaluated readout is another one. Its
    outputs are log-probabilities but for a constant, whatever the loss.

    For class-incremental streams without replay. Classes that look different in each experience, as with permuted
    inputs, are no Gaussians, and with replay a network with BatchNorm moves its features as no linear map says. No
    sample is stored.

    Args:
        max_bytes: upper bound on the memory. Default None: at most 512 directions of the covariance.
        samples: number of an experience's samples that are run through the network before and after it, evenly spread
            over it, 2 or more (default 2000).
        settings: of the gate, as for :class:`~avalanche_sp.gate.ClassGaussians`.

    Raises:
        ValueError: at construction for an argument out of range; at ``train`` if a
            :class:`~avalanche_sp.SelectivePlasticityPlugin` comes later in the list, for two plugins of this kind in a
            strategy, and for a head for each task; before an experience is trained, for a last layer that is not
            linear, trained and with a bias, and for a ``max_bytes`` that the class means exceed.
        TypeError: before an experience is trained, for targets that are not class labels, and if the last layer does
            not make the network's outputs.
        FloatingPointError: before an experience is trained, or at its end, for features that are not finite.

    Example::

        plugins=[SelectivePlasticityPlugin(), FeatureGaussians()]
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        samples: int = 2000,
        settings: Settings = Settings(),  # noqa: B008  # frozen
    ):
        super().__init__()
        check_integer("samples value", samples, 2)
        self.samples = samples
        self.gaussians = ClassGaussians(max_bytes, settings)
        """The Gaussians of all classes so far."""
        self._seen: Any = None  # samples of the present experience
        self._before: Tensor | None = None  # their features before it
        self._other: tuple[str, Tensor] | None = None  # the readout's name, the weights and bias that it has not now
        self._discriminates = False  # whether the readout is the Gaussians', and the trained one the other
        self._evaluating = False  # whether it is that for one evaluation only
        self._told_of_replay = False

    @property
    def state_bytes(self) -> int:
        """Bytes of the Gaussians."""
        return self.gaussians.state_bytes

    # Avalanche's callbacks, in the order of training.

    def before_training(self, strategy, **kwargs):
        plugins = list(strategy.plugins)
        if sum(isinstance(plugin, FeatureGaussians) for plugin in plugins) > 1:
            raise ValueError("Invalid plugins: two FeatureGaussians in a strategy (allowed: one)")
        if any(isinstance(plugin, SelectivePlasticityPlugin) for plugin in plugins[plugins.index(self) :]):
            raise ValueError("Invalid plugins: FeatureGaussians first (allowed: after SelectivePlasticityPlugin)")
        if isinstance(strategy.model, MultiTaskModule):
            raise ValueError("Invalid model: a head for each task (allowed with FeatureGaussians: one readout)")

    def before_train_dataset_adaptation(self, strategy, **kwargs):  # a head may grow after it
        if self._discriminates:
            self._exchange(strategy)
        self._other, self._evaluating = None, False

    def before_training_exp(self, strategy, **kwargs):
        self._seen = samples_of(strategy.adapted_dataset, self.samples)
        now = self._observed(strategy)  # of the first experience also: it raises for what cannot be remembered
        self.gaussians.check(now.inputs[:, :-1], now.targets)
        self._before = now.inputs[:, :-1] if self.gaussians.means else None

    def before_training_epoch(self, strategy, **kwargs):  # only then does the strategy have its data loader
        by_plugin = any(isinstance(plugin, ReplayPlugin) for plugin in strategy.plugins)
        if not self._told_of_replay and (by_plugin or is_mixture(strategy) or memories_of(strategy)):
            self._told_of_replay = True
            warnings.warn(
                f"feature Gaussians: {'ReplayPlugin' if by_plugin else type(strategy).__name__} trains on earlier "
                "samples, so the features move as no linear map says. The Gaussians can end far below replay alone: "
                "use one of the two.",
                stacklevel=2,
            )

    def after_training_exp(self, strategy, **kwargs):
        now, known = self._observed(strategy), self.gaussians.means.keys()
        if known and not set(now.targets.tolist()) - known:
            warnings.warn(
                f"feature Gaussians: experience {strategy.clock.train_exp_counter} brings no new class. Its samples "
                "join the Gaussians of the old ones, which do not describe several kinds of input.",
                stacklevel=2,
            )
        self.gaussians.remember(now.inputs[:, :-1], now.targets, self._before, now.weight / len(now.targets))
        layer = gated_layers(strategy.model)[now.layer]
        # Not yet into the model: plugins that come later, such as the one that LwF adds, keep the trained readout.
        self._other = now.layer, self.gaussians.readout(layer.units)
        self._seen = self._before = None

    def after_training(self, strategy, **kwargs):
        if self._other is not None and not self._discriminates:
            self._exchange(strategy)

    def before_eval(self, strategy, **kwargs):
        if self._other is not None and not self._discriminates:
            self._exchange(strategy)
            self._evaluating = True

    def after_eval(self, strategy, **kwargs):
        if self._evaluating:
            self._exchange(strategy)
            self._evaluating = False

    def _exchange(self, strategy) -> None:
        """Puts the other readout into the model, and keeps the present one."""
        assert self._other is not None
        name, weights = self._other
        layer = gated_layers(strategy.model)[name]
        self._other = name, layer.weights_and_bias()
        layer.set_weights(weights)
        self._discriminates = not self._discriminates

    def _observed(self, strategy) -> ReadoutSamples:
        """The readout's inputs (n, d + 1), the last of them the bias's, on the experience's samples."""
        model, name = strategy.model, self._last_layer(strategy.model)
        layer = gated_layers(model)[name]
        seen = observe(model, self._seen, {name: layer}, None, self.gaussians.settings, forward_of).classified
        if seen is not None:
            return seen
        for _, y in self._seen.batches:
            is_label = y.dim() == 1 and not y.is_floating_point() and y.dtype != torch.bool
            if not (is_label and 0 <= y.min() <= y.max() < layer.units):
                raise TypeError(
                    f"Invalid targets: shape {tuple(y.shape)}, {y.dtype}, from {y.min()} to {y.max()} (allowed with "
                    f"FeatureGaussians: class labels, integers from 0 to {layer.units - 1})"
                )
        raise TypeError(
            f"Invalid model: its last layer, {name!r}, does not make the outputs (allowed with FeatureGaussians: its "
            "outputs (n, classes), a multiple of them, or their softmax, log-softmax or sigmoid)"
        )

    def _last_layer(self, model: nn.Module) -> str:
        """The name of the module with parameters that a forward pass ends with."""
        called: list[str] = []
        own = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
        with torch.no_grad(), evaluation_mode(model) as device, ExitStack() as hooks:
            for name, module in own.items():
                hooks.callback(module.register_forward_hook(lambda *_, name=name: called.append(name)).remove)
            (x, tasks), _ = next(iter(self._seen.batches))
            forward_of(model, (x.to(device), tasks.to(device)))
        name = called[-1] if called else ""
        module, layer = own.get(name), gated_layers(model).get(name)
        if module is not None and not all(p.requires_grad for p in module.parameters(recurse=False)):
            what = "is frozen"
        elif type(layer) is not GatedLayer:
            what = f"is of type {type(module).__name__}"
        elif layer.bias is None:
            what = "has no bias"
        else:
            return name
        raise ValueError(
            f"Invalid model: its last layer, {name!r}, {what} (allowed with FeatureGaussians: a trained nn.Linear with "
            "bias)"
        )
