"""Losses for learning classes one after another, for use as a strategy's ``criterion``."""

from collections.abc import Callable

import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_sp.arguments import check_number
from avalanche_sp.gate.observe import check_mean
from avalanche_sp.training.plugin import plugin_of
from avalanche_sp.training.replay import memory_size, stream_rows


class OneHotMSELoss(nn.Module):
    """Squared error between outputs and one-hot targets: summed over the outputs, averaged over the batch.

    Softmax cross-entropy keeps pushing the outputs of absent classes down; squared error has a fixed point
    for them, zero, and stops there. Which of the two is better depends on the number of classes and on the length of
    the tasks (``docs/guide.md``).

    Its curvature doesn't shrink as the fit improves, so steps on batches of a few samples can overshoot: where a
    stream's length leaves a remainder of a few samples, call ``strategy.train(experience, drop_last=True)``.

    Shape:
        outputs (N, C), class labels (N,) of any integer type; returns a 0-dim tensor.

    Attributes:
        reduction: ``"mean"`` (default), or ``"none"`` for a value a sample (N,), which Avalanche's MIR sets.

    Raises:
        TypeError: when called with labels that are not integers.
        ValueError: when called with labels that are not 0 to C - 1.

    References:
        L. Hui, M. Belkin: Evaluation of neural architectures trained with square loss vs cross-entropy in
        classification tasks, ICLR 2021.
    """

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() or targets.is_complex():
            raise TypeError(f"Invalid targets: {targets.dtype} (allowed: class labels, integers)")
        try:
            one_hot = F.one_hot(targets.long(), outputs.shape[-1]).to(outputs.dtype)
        except RuntimeError:
            labels, allowed = f"{int(targets.min())} to {int(targets.max())}", f"0 to {outputs.shape[-1] - 1}"
            raise ValueError(f"Invalid targets: class labels {labels} (allowed: {allowed})") from None
        if self.reduction == "none":
            return (outputs - one_hot).square().flatten(1).sum(1)
        return F.mse_loss(outputs, one_hot, reduction="sum") / len(outputs)


class JointReplayLoss(SupervisedPlugin):
    """Weighs replayed samples as the joint training of all experiences would.

        L = (L_stream + w L_memory) / (1 + w),   w = N_old / N_new * t

    N_new is the number of samples of the present experience and N_old of all earlier ones: the stored samples stand for
    all earlier ones. ``ReplayPlugin`` alone weighs each row of the batch alike. Use it as the strategy's ``criterion``;
    the strategy then calls it as a plugin too.

    t is 1 for replay alone. A :class:`~avalanche_sp.SelectivePlasticityPlugin` in the strategy stands for a part of the
    old loss, so it is asked for the share t of the stored samples; and, if it finds the boundaries, for N_old / N_new.

    Args:
        criterion: loss of (outputs, targets), averaged over the batch.
        trust: t, 0 to 1. Default: as above.

    Raises:
        TypeError, ValueError: criterion is no function, or says that it is no mean; trust is out of range.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor], trust: float | None = None):
        super().__init__()
        if trust is not None:
            check_number("trust value", trust, (lambda v: 0 <= v <= 1, "0 to 1, or None"))
        check_mean(criterion)
        self.criterion = criterion
        self.trust = trust
        self.samples_seen = 0
        self._stream_rows: int | None = None  # None: all rows weigh alike (evaluation, or no memory yet)
        self._memory_weight = 0.0

    @property
    def reduction(self) -> str:
        """That of ``criterion``, which Avalanche's MIR sets."""
        return self.criterion.reduction  # type: ignore[attr-defined]

    @reduction.setter
    def reduction(self, value: str) -> None:
        self.criterion.reduction = value  # type: ignore[attr-defined]

    def before_training_exp(self, strategy, **kwargs):
        if not strategy.clock.train_exp_counter:  # another strategy may have had it before
            self.samples_seen = 0

    def before_training_iteration(self, strategy, **kwargs):
        plugin = plugin_of(strategy)
        ratio = self.samples_seen / len(strategy.experience.dataset)
        trust = self.trust
        if plugin is not None and plugin.gate.active:
            ratio, trust = plugin.gate.ratio, plugin.gate.trust if trust is None else trust
        if ratio and memory_size(strategy):
            self._stream_rows = stream_rows(strategy)
            self._memory_weight = ratio * (1.0 if trust is None else trust)

    def before_update(self, strategy, **kwargs):
        self._stream_rows = None  # a look at some samples may come before the iteration ends

    def before_eval_iteration(self, strategy, **kwargs):
        self._stream_rows = None  # where an error or an interrupt left an iteration unfinished

    def after_training_exp(self, strategy, **kwargs):
        self.samples_seen += len(strategy.experience.dataset)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        n = self._stream_rows
        if n is None or n == len(outputs):
            return self.criterion(outputs, targets)
        stream = self.criterion(outputs[:n], targets[:n])
        memory = self.criterion(outputs[n:], targets[n:])
        return (stream + self._memory_weight * memory) / (1 + self._memory_weight)
