"""Artificial dendrites of the package perforatedai (PerforatedAI, Apache 2.0) in Avalanche strategies."""

import os
import pdb
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.models import DynamicModule
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_sp.arguments import check_integer, check_number
from avalanche_sp.gate import PlasticityGate
from avalanche_sp.training.plugin import SelectivePlasticityPlugin
from avalanche_sp.training.replay import SpreadBatches, forward_of

_NAME = "dendrites"  # of the package's files


class DendritesPlugin(SupervisedPlugin):
    r"""Adds perforatedai's artificial dendrites to the layers of a strategy's model while it trains.

    A linear or convolutional layer :math:`z = W x` gets copies :math:`D_j` of itself with small random weights, and
    becomes :math:`z = W x + \sum_j t_j \odot f(D_j x)`, with :math:`t_j = 0` at first, so that the network's function
    does not change. All weights train by gradient descent (perforatedai's own learning rule for dendrites
    needs a licence and is not used).

    The package keeps one global state. The plugin has a state of its own and puts it in place for the time of a call,
    so strategies in one process do not disturb each other. It calls the package from one thread at a time.

    With a :class:`~avalanche_sp.SelectivePlasticityPlugin` in the strategy a new dendrite is gated as its layer is: it
    takes over the memory of the layer's inputs. The weights t of dendrites of earlier experiences are frozen.

    Args:
        grow: ``"experience"`` (default): each experience but the first begins with a dendrite more on every layer.
            ``"plateau"``: perforatedai decides on the accuracy on held-out samples after every epoch but an
            experience's last. It restores the weights of the experience's best epoch and adds a dendrite.
        activation: f (default ``torch.tanh``). The package's own default, ``torch.sigmoid``, is 0.5 on the inputs of
            earlier experiences, so that each t moves their outputs (``docs/dendrites.md``).
        most: dendrites of a layer, at most, 1 or more (default 5).
        patience: epochs without a better accuracy after which a dendrite is added, 1 or more (default 1). For
            ``"plateau"``.
        held_out: share of each experience that is not trained, but gives the accuracy, between 0 and 1 (default 0.1).
            For ``"plateau"``.
        readout: whether the last linear layer gets dendrites also (default False: the gate solves a linear readout).
            Heads that Avalanche adapts never get any.
        folder: of the package's files and its log; it must not hold those of another run. Default: a temporary one.

    Raises:
        ImportError: at construction, if perforatedai is not installed.
        ValueError: at construction for an argument out of range; at ``train`` for a model without a layer for dendrites
            or with those of another plugin, for a folder in use, and for a gate that finds the boundaries itself.
        TypeError: at construction for an activation that is no function.
        RuntimeError: at ``train`` if the package would ask something or end the process; with its message.

    Example::

        strategy = Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=criterion,
                         train_mb_size=64, plugins=[DendritesPlugin(), SelectivePlasticityPlugin()])
    """

    def __init__(
        self,
        grow: Literal["experience", "plateau"] = "experience",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        most: int = 5,
        patience: int = 1,
        held_out: float = 0.1,
        readout: bool = False,
        folder: str | Path | None = None,
    ):
        super().__init__()
        if grow not in ("experience", "plateau"):
            raise ValueError(f"Invalid grow value: {grow!r} (allowed: 'experience', 'plateau')")
        for name, value in (("most", most), ("patience", patience)):
            check_integer(f"{name} value", value, 1)
        check_number("held_out value", held_out, (lambda v: 0 < v < 1, "between 0 and 1"))
        if not callable(activation):
            raise TypeError(f"Invalid activation: {activation!r} (allowed: a function of a tensor)")
        _package()
        self.grow, self.activation, self.most, self.patience = grow, activation, most, patience
        self.held_out, self.readout = held_out, readout
        self.folder = None if folder is None else Path(folder).absolute()
        self._config: Any = None  # the package's two globals, for this plugin's model
        self._tracker: Any = None
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._held_out: Any = None  # dataset
        self._done = False  # whether the package adds no more dendrites in this experience
        self._old: dict[str, int] = {}  # dendrites when the experience began, by layer
        self._handles: list = []

    def dendrites(self, model: nn.Module) -> dict[str, int]:
        """Number of dendrites of each layer that can have them, by the layer's name."""
        return {name: m.dendrite_modules_added for name, m in model.named_modules() if _is_perforated(m)}

    # Avalanche's callbacks, in the order of training.

    def before_training(self, strategy, **kwargs):
        allowed = "allowed with dendrites: 'experience'"
        for gate in _gates(strategy):
            if gate.boundaries != "experience":
                raise ValueError(f"Invalid consolidate value: {gate.boundaries!r} ({allowed})")
        if bool(self.dendrites(strategy.model)) != (self._tracker is not None):
            raise ValueError(
                "Invalid model: it has the dendrites of another plugin, or this plugin has those of another model "
                "(allowed: one plugin for each model)"
            )
        if self._tracker is None:
            self._perforate(strategy.model)

    def after_train_dataset_adaptation(self, strategy, **kwargs):
        if self.grow == "plateau":
            data, every = strategy.adapted_dataset, max(round(1 / self.held_out), 2)
            held_out = list(range(every - 1, len(data), every))
            if not held_out:
                raise ValueError(f"Invalid held_out value: {self.held_out} (allowed: a sample of {len(data)} at least)")
            self._held_out = data.subset(held_out)
            strategy.adapted_dataset = data.subset([i for i in range(len(data)) if i % every != every - 1])

    def before_training_exp(self, strategy, **kwargs):
        self._old = self.dendrites(strategy.model)
        self._done = False
        scores = self._tracker.member_vars  # an experience's accuracies say nothing of the next one's
        scores["current_best_validation_score"] = scores["global_best_validation_score"] = 0
        scores["epoch_last_improved"], scores["num_dendrite_tries"] = scores["num_epochs_run"], 0
        scores["current_n_set_global_best"] = True
        if self.grow == "experience" and strategy.clock.train_exp_counter and max(self._old.values()) < self.most:
            self._score(strategy, 0.0)
        self._hold_old(strategy)

    def after_training_epoch(self, strategy, **kwargs):
        if self.grow == "plateau" and not self._done and strategy.clock.train_exp_epochs + 1 < strategy.train_epochs:
            self._score(strategy, self._accuracy(strategy.model))

    def after_training_exp(self, strategy, **kwargs):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    # The package.

    def _perforate(self, model: nn.Module) -> None:
        layers = _layers_of(model, self.readout)
        if not layers:
            allowed = "an nn.Linear or nn.Conv2d below the readout"
            raise ValueError(f"Invalid model: {type(model).__name__} has no layer for dendrites (allowed: {allowed})")
        package = _package()
        self._config = config = package.globals_perforatedai.PAIConfig()
        with self._in_place() as folder:
            if (folder / _NAME).exists():
                raise ValueError(f"Invalid folder value: {str(folder)!r} (allowed: one without another run's files)")
            for name in ("configuration_confirmed", "unwrapped_modules_confirmed", "checked_skipped_modules", "silent"):
                getattr(config, f"set_{name}")(True)
            for name in ("testing_dendrite_capacity", "test_saves"):
                getattr(config, f"set_{name}")(False)
            config.set_device(next(model.parameters()).device)
            config.set_n_epochs_to_switch(self.patience)
            config.set_max_dendrites(self.most)
            config.set_pai_forward_function(self.activation)
            if self.grow == "experience":
                config.set_switch_mode(config.DOING_SWITCH_EVERY_TIME)
                config.set_retain_all_dendrites(True)
            config.set_module_names_to_perforate([])
            config.set_module_ids_to_perforate([f".{name}" for name in layers])
            package.utils_perforatedai.perforate_model(model, save_name=_NAME, making_graphs=False)
            for name in layers:
                hooks = _ForwardHooks(config)
                model.get_submodule(name).register_forward_pre_hook(hooks.before)
                model.get_submodule(name).register_forward_hook(hooks.after, always_call=True)

    def _score(self, strategy, accuracy: float) -> None:
        """Gives the package an accuracy in percent. If it changes the network, the optimizer and the gates follow."""
        model = strategy.model
        for gate in _gates(strategy):
            gate.finish_steps()
        with self._in_place():
            self._tracker.set_optimizer_instance(strategy.optimizer)
            _, changed, self._done = self._tracker.add_validation_score(accuracy, model)
            self._tracker.clear_optimizer_and_scheduler()
        if not changed:
            return
        strategy.make_optimizer(remove_params=True)
        for name, count in self.dendrites(model).items():
            for number in range(self._old[name], count):
                for gate in _gates(strategy):
                    gate.inherit(f"{name}.dendrite_module.layers.{number}", f"{name}.main_module")
        self._hold_old(strategy)

    def _hold_old(self, strategy) -> None:
        """Freezes the weights t of earlier experiences' dendrites, which share a tensor with those of new ones."""
        if any(gate.memory.layers for gate in _gates(strategy)):
            for name, count in self._old.items():
                module = strategy.model.get_submodule(name)
                if count and module.dendrite_modules_added > count:
                    hook = partial(_without_first, count)
                    self._handles.append(module.dendrites_to_top[-1].register_hook(hook))

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        device, right = next(model.parameters()).device, 0
        model.eval()
        for (x, tasks), y in SpreadBatches(self._held_out, len(self._held_out)):
            right += int((forward_of(model, (x.to(device), tasks)).argmax(1).cpu() == y).sum())
        model.train()
        return 100 * right / len(self._held_out)

    @contextmanager
    def _in_place(self) -> Iterator[Path]:
        """The package's globals are this plugin's, its files and its log in the folder, and it cannot prompt."""
        if self.folder is None and self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="avalanche_sp-")
        folder = Path(self._scratch.name) if self._scratch is not None else self.folder
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        globals_, working = _package().globals_perforatedai, os.getcwd()
        others = globals_.pc, globals_.pai_tracker
        globals_.pc, globals_.pai_tracker = self._config, self._tracker
        debugger = pdb.set_trace
        pdb.set_trace = _refuse  # type: ignore[assignment]
        os.chdir(folder)
        try:
            with open("log.txt", "a") as log, redirect_stdout(log):
                yield folder
            self._tracker = globals_.pai_tracker
        except (_Asked, SystemExit) as error:
            said = Path("log.txt").read_text().strip()[-500:]
            raise RuntimeError(f"perforatedai would ask for a debugger or end the process. It says: {said}") from error
        finally:
            os.chdir(working)
            pdb.set_trace = debugger
            globals_.pc, globals_.pai_tracker = others


def _gates(strategy) -> list[PlasticityGate]:
    return [plugin.gate for plugin in strategy.plugins if isinstance(plugin, SelectivePlasticityPlugin)]


class _ForwardHooks:
    """Puts a plugin's settings in place of the package's global ones while a layer computes its output."""

    def __init__(self, config: Any):
        self.config, self.others = config, None

    def before(self, *args: Any) -> None:
        globals_ = _package().globals_perforatedai
        self.others, globals_.pc = globals_.pc, self.config

    def after(self, *args: Any) -> None:
        _package().globals_perforatedai.pc, self.others = self.others, None


class _Asked(Exception):
    """The package has called its debugger."""


def _refuse(*args: Any) -> None:
    raise _Asked


def _package():
    try:
        with redirect_stdout(None):  # it greets
            import perforatedai
            from perforatedai import globals_perforatedai, utils_perforatedai  # noqa: F401
    except ImportError as error:
        raise ImportError("dendrites need the package perforatedai: pip install 'avalanche-sp[dendrites]'") from error
    return perforatedai


def _is_perforated(module: nn.Module) -> bool:
    return type(module).__name__ == "PAINeuronModule"


def _layers_of(model: nn.Module, readout: bool) -> list[str]:
    """Names of the layers that get dendrites."""
    adapted = {m for d in model.modules() if isinstance(d, DynamicModule) and d is not model for m in d.modules()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n}
    linear = [n for n, m in layers.items() if isinstance(m, nn.Linear)]
    last = None if readout or not linear else linear[-1]
    return [n for n, m in layers.items() if n != last and m not in adapted]


def _without_first(count: int, grad: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(grad[:count]), grad[count:]])
