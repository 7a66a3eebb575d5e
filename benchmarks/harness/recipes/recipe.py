"""A recipe: optimizer, loss, plugins and settings of a strategy, by the number of tasks and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

CE, SE = "cross-entropy", "squared error"

PER_LAYER = ("openness", "pull_back", "rank")  # arguments of the plugin that a layer may have for itself
# Numeric arguments of an optimizer, without its learning rate.
OPTIMIZER_NUMBERS = {
    "SGD": ("momentum", "dampening", "weight_decay"),
    "Adam": ("eps", "weight_decay"),
    "UPGD": ("beta_utility", "sigma"),
    "legacy": ("trace_decay", "plasticity_k", "warmup_steps"),
}
for _name in ("SelectivePlasticity", "constant gate", "random gate"):
    OPTIMIZER_NUMBERS[_name] = ("trace_decay", "plasticity_k", "warmup_steps", "surprise_weight", "alignment_threshold")
    OPTIMIZER_NUMBERS[_name] += ("beta1", "eps", "weight_decay")


class Tasks(dict):
    """A setting by the number of tasks that it was tuned for."""


class Size(dict):
    """A setting by the number of stored samples that it was tuned for; without any, by the training images a task."""


def tuned(value, n_tasks: int, size: int):
    """The value that was tuned for the nearest numbers, in ratio."""
    while isinstance(value, (Tasks, Size)):
        number = n_tasks if isinstance(value, Tasks) else size
        value = value[min(value, key=lambda n: abs(math.log(number / n)))]
    return value


@dataclass(frozen=True)
class Recipe:
    """Optimizer, loss, plugins and settings of a strategy. A value may depend on the number of tasks or samples.

    Attributes:
        optimizer, loss, plugins, template: names of ``build``'s OPTIMIZERS, LOSSES, PLUGINS and TEMPLATES.
        arguments: those of the plugins and of the template.
        joint_weight: the loss weighs replayed samples as joint training would, but for a "shrinkage" in ``arguments``.
        model: "network", "packnet" (the network with masks) or "random features" (instead of the network).
        stores: whether it keeps ``replay_buffer`` samples.
    """

    optimizer: str
    lr: float | dict
    loss: str | dict = CE
    plugins: tuple[str, ...] = ()
    arguments: Mapping[str, float | dict] = field(default_factory=dict)
    optimizer_arguments: Mapping[str, float] = field(default_factory=dict)
    joint_weight: bool = False
    template: str = "naive"
    model: str = "network"
    stores: bool = False

    def at(self, n_tasks: int, size: int) -> Recipe:
        """The recipe with the values that were tuned for the nearest number of tasks and size."""
        lr, loss = (tuned(value, n_tasks, size) for value in (self.lr, self.loss))
        arguments = {name: tuned(value, n_tasks, size) for name, value in self.arguments.items()}
        return replace(self, lr=lr, loss=loss, arguments=arguments)

    @property
    def settable(self) -> tuple[list[str], list[str]]:
        """Names of the arguments, and of the optimizer's, that may be overridden."""
        names = [*self.arguments]
        names += ["rank", "readout_step"] if "openness" in names else []
        names += ["epsilon_hidden"] if "epsilon" in names else []
        return names, list(dict.fromkeys([*self.optimizer_arguments, *OPTIMIZER_NUMBERS[self.optimizer]]))

    def override(self, overrides: Mapping[str, float | str]) -> Recipe:
        """The recipe with other values. "openness:1" is the openness of layer "1".

        Raises:
            ValueError: the strategy does not have the setting, or there is no such loss.
        """
        loss = overrides.get("loss", self.loss)
        if loss not in (CE, SE):
            raise ValueError(f"Invalid loss: {loss} (allowed: {CE}, {SE})")
        arguments, of_optimizer = self.settable
        by_layer = [name for name in PER_LAYER if name in arguments]
        own = {name for name in overrides if name in arguments or name.partition(":")[0] in by_layer}
        for name in overrides:
            if name not in ("lr", "loss") and name not in own and name not in of_optimizer:
                forms = ["lr", *arguments, *of_optimizer, *(f"{name}:LAYER" for name in by_layer)]
                raise ValueError(f"Invalid setting: {name} (allowed for this strategy: {', '.join(forms)})")
        in_arguments = {**self.arguments, **{k: v for k, v in overrides.items() if k in own}}
        in_optimizer = {**self.optimizer_arguments, **{k: v for k, v in overrides.items() if k in of_optimizer}}
        lr = overrides.get("lr", self.lr)
        return replace(self, lr=lr, loss=loss, arguments=in_arguments, optimizer_arguments=in_optimizer)

    def to_json(self) -> dict:
        """The settings of a run that the recipe decides."""
        values = {**asdict(self), "plugins": list(self.plugins)}
        values["arguments"] |= values.pop("optimizer_arguments")
        del values["stores"]
        return values
