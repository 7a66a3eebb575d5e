"""Methods that store samples, with equal numbers of stored samples and equal batches of them."""

import copy

import torch
from avalanche.training.plugins import AGEMPlugin, GDumbPlugin, GEMPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import GaussianBuffer
from avalanche_sp.training.replay import stream_rows
from harness.methods import check
from harness.settings import Run


def memory_of(run: Run) -> dict[str, int]:
    """Avalanche's arguments of a memory. A batch has the same number of stored samples and of stream samples.

    It has at most the whole memory: Avalanche never fills a larger batch, and runs drop incomplete ones.
    """
    return {"mem_size": run.replay_buffer, "batch_size_mem": min(run.batch_size, run.replay_buffer)}


def gaussian_replay(run: Run) -> ReplayPlugin:
    """Avalanche's replay of samples drawn from Gaussians, and of stored ones if the run has a buffer."""
    policy = GaussianBuffer(2000 + run.replay_buffer, stored=run.replay_buffer)
    return policy.replay_plugin(batch_size_mem=run.batch_size)


def averaged_gem(run: Run) -> AGEMPlugin:
    """A. Chaudhry et al.: Efficient lifelong learning with A-GEM, ICLR 2019.

    Upstream draws from each old task alike, so a batch holds at least one sample of each.
    """
    return AGEMPlugin(_share(run), sample_size=max(memory_of(run)["batch_size_mem"], run.n_tasks - 1))


def gradient_episodic_memory(run: Run, memory_strength: float) -> GEMPlugin:
    """D. Lopez-Paz, M. Ranzato: Gradient episodic memory, NeurIPS 2017. It is slow if many samples are stored."""
    return GEMPlugin(_share(run), memory_strength)


def _share(run: Run) -> int:
    """Stored samples of each task that is old when the last one is learned: then all of the memory is in use."""
    old = max(1, run.n_tasks - 1)
    if run.replay_buffer < old:
        allowed = f"allowed for {run.strategy}: at least a sample of each old task, {old}"
        raise ValueError(f"Invalid replay_buffer: {run.replay_buffer} ({allowed})")
    return run.replay_buffer // old


class GDumb(GDumbPlugin):
    """A fresh network at every experience, trained with ``passes`` over the stored samples, the new ones among them.

    A. Prabhu, P. Torr, P. Dokania: GDumb, a simple approach that questions our progress, ECCV 2020.
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
    """Keeps the outputs for stored samples near those of the network at the end of the last experience.

    Adds ``weight`` times their squared distance, summed over outputs and averaged over the stored samples of a batch:
    the addition of dark experience replay (P. Buzzega et al., NeurIPS 2020) to replay. It needs ``ReplayPlugin``.
    """

    def __init__(self, weight: float):
        super().__init__()
        check("weight", weight)
        self.weight = weight
        self.teacher: nn.Module | None = None

    def before_backward(self, strategy, **kwargs):
        stream = stream_rows(strategy)
        if self.teacher is not None and stream < len(strategy.mb_x):
            with torch.no_grad():
                targets = self.teacher(strategy.mb_x[stream:])
            strategy.loss += self.weight * (strategy.mb_output[stream:] - targets).square().sum(1).mean()

    def after_training_exp(self, strategy, **kwargs):
        self.teacher = copy.deepcopy(strategy.model).eval()


class ConstantGate(SupervisedPlugin):
    """The control of the plugin with replay: its gate, but one number for every input."""

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
