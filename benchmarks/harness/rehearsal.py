"""Avalanche's methods that store samples, on equal terms: as many samples, and as large a batch of them, for each."""

from __future__ import annotations

import copy

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training import Cumulative
from avalanche.training.plugins import AGEMPlugin, GDumbPlugin, GEMPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from torch import nn

from avalanche_sp import GaussianBuffer
from avalanche_sp.classic import TensorClassificationDataset, TensorSource
from avalanche_sp.replay import stream_rows
from harness.settings import Run, in_mini_batches


def memory_batch(run: Run) -> int:
    """Stored samples in a batch: as many as the stream's. Never more than there are: such a batch is never filled,
    and as runs drop incomplete batches the memory would not be seen."""
    return min(run.batch_size, run.replay_buffer)


def replay(run: Run) -> ReplayPlugin:
    """Avalanche's replay. Where an experience is one mini-batch, its memory is a random part of the whole stream: the
    default, as much of each experience, would be the first samples."""
    policy = Reservoir(run.replay_buffer) if in_mini_batches(run) else None
    return ReplayPlugin(run.replay_buffer, batch_size_mem=memory_batch(run), storage_policy=policy)


def drawn_replay(run: Run) -> ReplayPlugin:
    """Avalanche's replay of samples drawn from Gaussians, and of stored ones where the run has a buffer."""
    policy = GaussianBuffer(2000 + run.replay_buffer, stored=run.replay_buffer)
    return policy.replay_plugin(batch_size_mem=run.batch_size)


class Reservoir(ReservoirSamplingBuffer):
    """Avalanche's, which keeps its samples as views of views: one deeper with every mini-batch, and slower, as soon as
    they come from two tasks. This one copies them."""

    def update_from_dataset(self, new_data: AvalancheDataset) -> None:
        super().update_from_dataset(new_data)
        images, labels, _ = self.buffer.read_batch(list(range(len(self.buffer))))
        self.buffer = TensorClassificationDataset.from_source(TensorSource(images, labels), 0)


def averaged_gem(run: Run) -> AGEMPlugin:
    """A. Chaudhry et al.: Efficient lifelong learning with A-GEM, ICLR 2019.

    The memory is divided among the tasks that are old when the last one is learned: then all of it is in use, as in
    replay. Upstream draws from each old task alike, so a batch holds at least one sample of each.
    """
    return AGEMPlugin(_share(run), sample_size=max(memory_batch(run), run.n_tasks - 1))


def gradient_episodic_memory(run: Run, memory_strength: float) -> GEMPlugin:
    """D. Lopez-Paz, M. Ranzato: Gradient episodic memory for continual learning, NeurIPS 2017.

    Every step looks at all stored samples, so it is slow with many.
    """
    return GEMPlugin(_share(run), memory_strength)


def _share(run: Run) -> int:
    share = run.replay_buffer // max(1, run.n_tasks - 1)
    if share < 1:
        raise ValueError(
            f"Invalid replay_buffer: {run.replay_buffer} (allowed for {run.strategy}: at least a sample of each old "
            f"task, {run.n_tasks - 1})"
        )
    return share


class GDumb(GDumbPlugin):
    """A. Prabhu, P. Torr, P. Dokania: GDumb, a simple approach that questions our progress, ECCV 2020.

    At every experience a fresh network is trained on the stored samples alone, the new ones among them.

    Args:
        mem_size: samples stored.
        passes: over the stored samples, for each network.
    """

    def __init__(self, mem_size: int, passes: int):
        super().__init__(mem_size)
        if passes < 1:
            raise ValueError(f"Invalid passes value: {passes} (allowed: 1 or more)")
        self.passes = passes

    def before_training(self, strategy, **kwargs):
        strategy.train_epochs = self.passes
        strategy.train_mb_size = min(strategy.train_mb_size, self.mem_size)


class MemoryDistillation(SupervisedPlugin):
    """Holds the outputs for stored samples where the network had them when the last experience ended.

    Adds ``weight`` times their squared distance, summed over outputs and averaged over the stored samples of a batch:
    what dark experience replay (P. Buzzega et al., NeurIPS 2020) adds to replay. It goes with ``ReplayPlugin``.
    """

    def __init__(self, weight: float):
        super().__init__()
        if not 0 < weight < float("inf"):
            raise ValueError(f"Invalid weight value: {weight} (allowed: greater than 0)")
        self.weight = weight
        self.teacher: nn.Module | None = None

    def before_backward(self, strategy, **kwargs):
        stream = stream_rows(strategy)
        if self.teacher is None or stream == len(strategy.mb_x):
            return
        with torch.no_grad():
            targets = self.teacher(strategy.mb_x[stream:])
        strategy.loss += self.weight * (strategy.mb_output[stream:] - targets).square().sum(1).mean()

    def after_training_exp(self, strategy, **kwargs):
        self.teacher = copy.deepcopy(strategy.model).eval()


class ConstantGate(SupervisedPlugin):
    """Gates the stream's samples as the coincidence gate does, but by one number, whatever their input.

    Their error signal is multiplied by ``gate`` while stored samples are replayed; these pass ungated. The control of
    what a gate gains beside replay by knowing which directions are claimed.
    """

    def __init__(self, gate: float):
        super().__init__()
        if not 0 < gate <= 1:
            raise ValueError(f"Invalid gate value: {gate} (allowed: greater than 0, at most 1)")
        self.gate = gate

    def after_forward(self, strategy, **kwargs):
        stream = stream_rows(strategy)
        if stream < len(strategy.mb_x):
            factor = torch.ones(len(strategy.mb_x), 1)
            factor[:stream] = self.gate
            strategy.mb_output.register_hook(lambda error: error * factor)


def stored_bytes(method) -> int:
    """What the samples take that a plugin or strategy keeps: inputs, 8 bytes a label, and what else is stored with
    them, such as DER's outputs. A-GEM and GEM store the last task's too, which nothing uses: these don't count."""
    if isinstance(method, GEMPlugin):
        tasks = sorted(method.memory_x)[:-1]
        return sum(t.numel() * t.element_size() for m in (method.memory_x, method.memory_y) for t in map(m.get, tasks))
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
    return len(dataset) * (8 + sum(t.numel() * t.element_size() for t in (x, *more) if isinstance(t, torch.Tensor)))
