"""Losses for learning classes one after another, for use as a strategy's ``criterion``."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_sp.arguments import AT_LEAST_0, check_number
from avalanche_sp.replay import classes_of, memory_size, stream_rows, trust_in

__all__ = ["OneHotMSELoss", "JointReplayLoss"]


class OneHotMSELoss(nn.Module):
    """Squared error between outputs and one-hot targets: summed over the outputs, averaged over the batch.

    Softmax cross-entropy keeps pushing the outputs of absent classes down; squared error has a fixed point
    for them, zero, and stops there. That makes it the better loss where old classes are not replayed.

    Its curvature doesn't shrink as the fit improves, so steps on batches of a few samples can overshoot: where a
    stream's length leaves a remainder of a few samples, call ``strategy.train(experience, drop_last=True)``.

    Shape:
        outputs (N, C), class labels (N,) of any integer type; returns a 0-dim tensor.

    Raises:
        TypeError: when called with labels that are not integers.

    References:
        L. Hui, M. Belkin: Evaluation of neural architectures trained with square loss vs cross-entropy in
        classification tasks, ICLR 2021.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or targets.is_complex():
            raise TypeError(f"Invalid targets: {targets.dtype} (allowed: class labels, integers)")
        one_hot = F.one_hot(targets.long(), outputs.shape[-1]).to(outputs.dtype)
        return F.mse_loss(outputs, one_hot, reduction="sum") / len(outputs)


class JointReplayLoss(SupervisedPlugin):
    """Weighs replayed samples as the joint training of all experiences would.

        L = (L_stream + w L_memory) / (1 + w),   w = N_old / N_new * c / (c + s)

    N_new is the number of samples of the present experience and N_old of all earlier ones: the memory stands for
    everything it was drawn from. ``ReplayPlugin`` alone weighs each row of the batch alike. Use it as the
    strategy's ``criterion``; the strategy then calls it as a plugin too.

    Where something else stands for the old data too, a small memory should count for less: c is the number of stored
    samples for each class of each experience, and s the ``shrinkage``.

    On a stream that doesn't say where a task ends, what is old is known to a plugin that finds it out. Following it,
    N_old / N_new is the number of its consolidations, as what comes next is as long as what came before, for all we
    know; it is 1 until the first.

    Args:
        criterion: loss of (outputs, targets), averaged over the batch.
        shrinkage: stored samples a class at which the memory has half of its joint weight, 0 or more (default 0: all
            of it, as replay alone wants it). 50 beside
            :class:`~avalanche_sp.SelectivePlasticityPlugin` (``docs/experiments.md``).
        follow: a :class:`~avalanche_sp.SelectivePlasticityPlugin` with ``consolidate="surprise"`` or
            ``"continuous"``, for online streams (``docs/boundaries.md``). Default: an experience is what Avalanche
            says.

    Raises:
        ValueError: shrinkage is out of range, or the plugin to follow is told where an experience ends.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], shrinkage: float = 0.0, follow=None):
        super().__init__()
        check_number("shrinkage value", shrinkage, AT_LEAST_0)
        if follow is not None and follow.consolidate == "experience":
            raise ValueError(
                "Invalid follow: a plugin with consolidate='experience' finds no boundary (allowed: None, or one "
                "with 'surprise' or 'continuous')"
            )
        self.criterion = criterion
        self.shrinkage = shrinkage
        self.follow = follow
        self.samples_seen = 0
        self.classes_seen = 0  # each experience's count anew: its samples are others
        self._stream_rows: int | None = None  # None: all rows weigh alike (evaluation, or no memory yet)
        self._memory_weight = 0.0

    def before_training_iteration(self, strategy, **kwargs):
        memory = memory_size(strategy)
        ratio, classes = self.samples_seen / len(strategy.experience.dataset), self.classes_seen
        if self.follow is not None:
            ratio, classes = max(len(self.follow.consolidated_at), 1), max(self.follow.classes_seen, 1)
        if memory and ratio:
            self._stream_rows = stream_rows(strategy)
            self._memory_weight = ratio * trust_in(memory / classes, self.shrinkage)

    def before_update(self, strategy, **kwargs):
        self._stream_rows = None  # a look at some samples may come before the iteration ends

    def before_eval_iteration(self, strategy, **kwargs):
        self._stream_rows = None  # where an error or an interrupt left an iteration unfinished

    def after_training_exp(self, strategy, **kwargs):
        self.samples_seen += len(strategy.experience.dataset)
        self.classes_seen += classes_of(strategy.experience.dataset)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        n = self._stream_rows
        if n is None or n == len(outputs):
            return self.criterion(outputs, targets)
        stream = self.criterion(outputs[:n], targets[:n])
        memory = self.criterion(outputs[n:], targets[n:])
        return (stream + self._memory_weight * memory) / (1 + self._memory_weight)
