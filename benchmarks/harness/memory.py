"""Bytes that a method keeps from one experience to the next, beyond the network and SGD's or Adam's own state."""

from collections.abc import Iterable, Iterator

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training import Cumulative
from avalanche.training.plugins import AGEMPlugin, GEMPlugin, SupervisedPlugin
from avalanche.training.regularization import RegularizationMethod
from torch import Tensor, nn

from avalanche_sp import ConsolidationPlugin, GaussianBuffer
from harness.networks import network_bytes


def extra_memory_bytes(strategy, plugins: Iterable[SupervisedPlugin], network: nn.Module) -> int:
    """All of it; a model of another size than ``network`` counts by the difference."""
    of_plugins = sum(plugin_bytes(p) for p in plugins) + stored_bytes(strategy)
    return of_plugins + optimizer_bytes(strategy.optimizer) + network_bytes(strategy.model) - network_bytes(network)


def plugin_bytes(plugin: SupervisedPlugin) -> int:
    if hasattr(plugin, "state_bytes"):
        return plugin.state_bytes
    # These hold the optimizer's own tensors, or gradients, which are new at each step.
    others = isinstance(plugin, (ConsolidationPlugin, AGEMPlugin, GEMPlugin))
    tensors = {t.data_ptr(): t.nbytes for t in ([] if others else _tensors(vars(plugin)))}
    return sum(tensors.values()) + stored_bytes(plugin)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    own = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
    states = optimizer.state.values()
    return sum(t.nbytes for s in states for name, t in s.items() if isinstance(t, Tensor) and name not in own)


def stored_bytes(method) -> int:
    """The samples of a plugin or strategy: inputs, 8 bytes a label, and data stored with them (DER's outputs).

    A-GEM and GEM store the last task's samples as well, which nothing uses. They don't count.
    """
    if isinstance(method, GEMPlugin):
        tasks = sorted(method.memory_x)[:-1]
        return sum(memory[task].nbytes for memory in (method.memory_x, method.memory_y) for task in tasks)
    if isinstance(method, AGEMPlugin):
        return sum(map(_dataset_bytes, method.buffers[:-1]))
    if isinstance(method, Cumulative):
        return _dataset_bytes(method.dataset)
    policy = getattr(method, "storage_policy", None)
    if isinstance(policy, GaussianBuffer):
        return policy.state_bytes + (_dataset_bytes(policy.stored.buffer) if policy.stored is not None else 0)
    return 0 if policy is None else _dataset_bytes(policy.buffer)


def _dataset_bytes(dataset: AvalancheDataset) -> int:
    if not len(dataset):
        return 0
    x, _, _, *more = dataset[0]
    return len(dataset) * (8 + sum(t.nbytes for t in (x, *more) if isinstance(t, Tensor)))


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, (dict, list, tuple, RegularizationMethod)):
        value = vars(value) if isinstance(value, RegularizationMethod) else value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
    elif isinstance(getattr(value, "data", None), Tensor):  # Avalanche's ParamData
        yield value.data
