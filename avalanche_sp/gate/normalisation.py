"""The running statistics of normalisation layers, measured before they are frozen."""

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from avalanche_sp.gate.observe import BATCH, Forward, Samples, each_tensor, evaluation_mode, on_device
from avalanche_sp.gate.processes import mean_over_processes

_STATISTICS = ("running_mean", "running_var")


def batches_seen(model: nn.Module) -> dict[str, int]:
    """Number of batches that the running statistics of each normalisation layer have followed, by name."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NormBase)}
    return {
        name: int(norm.num_batches_tracked)
        for name, norm in norms.items()
        if norm.num_batches_tracked is not None and norm.momentum != 0
    }


@torch.no_grad()
def measure_statistics(model: nn.Module, samples: Samples, names: Collection[str], forward: Forward) -> None:
    """Sets normalisation layers' running statistics to those of samples, with the weights as they are now.

    The running statistics lag behind the weights: with a momentum of 0.1 after 10 batches a third of them is as
    initialised. Each layer normalises by its batch, as in training, and its statistics are the mean over batches, as in
    ``torch.optim.swa_utils.update_bn``. Batches mix samples from all over the experience. All other modules are in
    evaluation mode. After an error, or if a statistic is not finite, all stay as they were.

    Args:
        samples: of an experience.
        names: of the layers.
        forward: computes the outputs from model and inputs.
    """
    norms = [module for name, module in model.named_modules() if name in names and isinstance(module, _NormBase)]
    before = [(norm.momentum, deepcopy(norm.state_dict())) for norm in norms]
    batches = list(samples.batches)
    with evaluation_mode(model) as device:
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            for inputs in _mixed([x for x, _ in batches], sum(len(y) for _, y in batches)):
                forward(model, on_device(device, inputs))
            measured = [deepcopy(norm.state_dict()) for norm in norms]
        finally:
            for norm, (momentum, state) in zip(norms, before):
                norm.momentum = momentum
                norm.load_state_dict(state)
    means = [{name: mean_over_processes(state[name]) for name in _STATISTICS} for state in measured]
    if all(mean.isfinite().all() for known in means for mean in known.values()):
        for norm, (_, state), known in zip(norms, before, means):
            norm.load_state_dict({**state, **known})


def _mixed(batches: list[Any], total: int) -> Iterable[Any]:
    """The same samples in batches of about 256, each with samples of all batches, if the inputs are tensors."""
    try:
        rows = _joined(batches)
    except (TypeError, RuntimeError):  # of other kinds, or of several shapes
        return batches
    number = -(-total // BATCH)
    return [each_tensor(rows, itemgetter(slice(first, None, number))) for first in range(number)]


def _joined(batches: list[Any]) -> Any:
    if isinstance(batches[0], Mapping):
        return {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    if isinstance(batches[0], (tuple, list)):
        return tuple(_joined(list(column)) for column in zip(*batches))
    return torch.cat(batches)
