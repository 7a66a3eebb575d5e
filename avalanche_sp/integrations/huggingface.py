"""The gate for Hugging Face's Trainer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from avalanche_sp.gate import PlasticityGate, Samples
from avalanche_sp.gate.hooks import unwrapped
from avalanche_sp.optim import SelectivePlasticityOptimizer


class SelectivePlasticityCallback(TrainerCallback):
    """:class:`~avalanche_sp.gate.PlasticityGate` for ``transformers.Trainer``: one call of ``train`` is an experience.

    Give the same callback to the Trainer of each experience. It prepares the gate for samples of the Trainer's data
    loader, and consolidates them, and a :class:`~avalanche_sp.SelectivePlasticityOptimizer`, at the end of ``train``. A
    batch is a mapping with ``labels``; the network's output has ``logits``. The Trainer's checkpoints do not hold the
    gate's state: save ``callback.gate.state_dict()`` with them.

    Args:
        criterion: loss of (logits, labels), a mean over samples. Default: cross-entropy, labels of -100 left out.
        **gate: arguments of :class:`~avalanche_sp.gate.PlasticityGate`.

    Raises:
        ValueError, TypeError, FloatingPointError: as the gate does.

    Example::

        callback = SelectivePlasticityCallback()
        for task in tasks:
            Trainer(model, args, train_dataset=task, callbacks=[callback]).train()
    """

    def __init__(self, criterion=None, **gate: Any):
        self.criterion = criterion or _cross_entropy
        self.gate = PlasticityGate(**{"forward": _logits, **gate})
        self._samples: Samples | None = None  # of the present training

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gate.attach(model, optimizer)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        self.gate.begin(len(dataset) if hasattr(dataset, "__len__") else None)
        if self._samples is None or not state.epoch:  # a resumed run has none
            with torch.random.fork_rng([]):  # the loader's order stays what it is without the callback
                self._samples = Samples.of(_pairs(train_dataloader), self.gate.observed)
        if not state.epoch:
            self.gate.prepare(self._samples, self.criterion)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        assert self._samples is not None
        self.gate.consolidate(self._samples, self.criterion)
        if isinstance(optimizer := unwrapped(optimizer), SelectivePlasticityOptimizer):
            optimizer.consolidate()
        self._samples = None
        self.gate.detach()


def _pairs(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(f"Invalid batch: it has {', '.join(batch)} (allowed: labels, and the network's inputs)")
        yield {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        raise TypeError(f"Invalid labels: {labels.dtype} (allowed without a criterion of your own: class labels)")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
