"""The gate for Lightning's Trainer."""

from typing import Any

import lightning
import torch

from avalanche_sp.gate import PlasticityGate, Samples
from avalanche_sp.gate.hooks import unwrapped
from avalanche_sp.gate.observe import Criterion
from avalanche_sp.optim import SelectivePlasticityOptimizer


class SelectivePlasticityCallback(lightning.Callback):
    """:class:`~avalanche_sp.gate.PlasticityGate` for ``lightning.Trainer``: one call of ``fit`` is an experience.

    Give the same callback to the Trainer of each experience. It prepares the gate for samples of the training data
    loader, batches of pairs (x, y), and consolidates them, and a
    :class:`~avalanche_sp.SelectivePlasticityOptimizer`, at the end of ``fit``. Lightning's checkpoints hold the gate's
    state. The module must have one optimizer.

    Args:
        criterion: loss of (outputs, targets), a mean over samples, that the module trains with.
        **gate: arguments of :class:`~avalanche_sp.gate.PlasticityGate`.

    Raises:
        ValueError: the module has several optimizers; and as the gate does.

    Example::

        callback = SelectivePlasticityCallback(torch.nn.functional.cross_entropy)
        for loader in loaders:
            lightning.Trainer(max_epochs=1, callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, criterion: Criterion, **gate: Any):
        self.criterion = criterion
        self.gate = PlasticityGate(**{"forward": self._outputs, **gate})
        self._precision: Any = None  # the trainer's plugin
        self._samples: Samples | None = None  # of the present training

    def on_train_start(self, trainer, pl_module):
        if len(trainer.optimizers) != 1:
            raise ValueError(f"Invalid module: it has {len(trainer.optimizers)} optimizers (allowed: 1)")
        if not hasattr(trainer.train_dataloader, "dataset"):
            what = type(trainer.train_dataloader).__name__
            raise ValueError(f"Invalid train_dataloaders: a {what} (allowed: one DataLoader of pairs (x, y))")
        self._precision = trainer.precision_plugin
        self.gate.attach(pl_module, trainer.optimizers[0])

    def on_train_epoch_start(self, trainer, pl_module):
        dataset = trainer.train_dataloader.dataset
        self.gate.begin(len(dataset) if hasattr(dataset, "__len__") else None)
        if self._samples is None or not trainer.current_epoch:  # a resumed run has none
            with torch.random.fork_rng([]):  # the loader's order stays what it is without the callback
                self._samples = Samples.of(trainer.train_dataloader, self.gate.observed)
        if not trainer.current_epoch:
            self.gate.prepare(self._samples, self.criterion)

    def on_train_end(self, trainer, pl_module):
        assert self._samples is not None
        self.gate.consolidate(self._samples, self.criterion)
        if isinstance(optimizer := unwrapped(trainer.optimizers[0]), SelectivePlasticityOptimizer):
            optimizer.consolidate()
        self._samples = None
        self.gate.detach()

    def _outputs(self, model: torch.nn.Module, inputs: Any) -> Any:
        with self._precision.forward_context():
            return model(self._precision.convert_input(inputs))

    def state_dict(self) -> dict[str, Any]:
        return self.gate.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gate.load_state_dict(state_dict)
