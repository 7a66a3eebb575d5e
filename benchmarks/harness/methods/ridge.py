"""Random features with ridge regression: a readout that one pass over a stream fits exactly, whatever its order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

INPUTS, OUTPUTS = 784, 10


def stored_bytes(width: int) -> int:
    """What ``width`` features take, in single precision: their weights, the readout's, and the two sums."""
    weights = (INPUTS + 1) * width + (width + 1) * OUTPUTS
    sums = (width + 1) * (width + 2) // 2 + (width + 1) * OUTPUTS  # a symmetric matrix is its upper triangle
    return 4 * (weights + sums)


def width_within(budget: int) -> int:
    """The largest number of features that takes no more than ``budget`` bytes."""
    width = 1
    while stored_bytes(width + 1) <= budget:
        width += 1
    return width


def build_random_features(budget: int) -> nn.Module:
    """A network with a fixed random hidden layer, which takes ``budget`` bytes with all that its readout keeps."""
    width = width_within(budget)
    hidden = nn.Linear(INPUTS, width).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(width, OUTPUTS))


class StreamingRidge(SupervisedPlugin):
    r"""Ridge regression of one-hot targets on the inputs of a model's last layer, from two sums over the stream.

    With h the inputs, an input of 1 for the bias among them, and y the one-hot target,

    .. math::
        G = \sum h h^\top, \qquad B = \sum h y^\top, \qquad W^\top = (G + \rho I)^{-1} B

    which is the solution for all samples seen so far at once. No sample is stored and no task boundary is needed: the
    readout is solved for where it is asked (in evaluation, and when an experience ends). All earlier layers must be
    fixed, and the optimizer's learning rate 0.

    Memory: the random features count as stored weights, although a seed could draw them again; without them the same
    budget of the 784-256-256-10 network would hold 886 features instead of 407.

    Args:
        ridge: :math:`\rho`, greater than 0.

    References:
        A. Hoerl, R. Kennard: Ridge regression, Technometrics 1970. A. Rahimi, B. Recht: Random features for
        large-scale kernel machines, NeurIPS 2007.
    """

    def __init__(self, ridge: float):
        super().__init__()
        if not 0 < ridge < float("inf"):
            raise ValueError(f"Invalid ridge value: {ridge} (allowed: greater than 0)")
        self.ridge = ridge
        self.gram: Tensor | None = None
        self.targets: Tensor | None = None
        self._solved = True
        self._inputs: Tensor | None = None

    @property
    def state_bytes(self) -> int:
        size = len(self.gram)
        return (size * (size + 1) // 2 + self.targets.numel()) * self.gram.element_size()

    def before_training(self, strategy, **kwargs):
        readout = strategy.model[-1]
        if self.gram is None:
            size = readout.in_features + 1
            self.gram = readout.weight.new_zeros(size, size)
            self.targets = readout.weight.new_zeros(size, readout.out_features)
            readout.register_forward_pre_hook(self._before_readout)

    def after_forward(self, strategy, **kwargs):
        self.observe(self._inputs, strategy.mb_y)

    def after_training_exp(self, strategy, **kwargs):
        self.solve(strategy.model[-1])

    def _before_readout(self, readout: nn.Linear, inputs: tuple) -> None:
        if readout.training:
            self._inputs = inputs[0].detach()
        else:
            self.solve(readout)

    def observe(self, inputs: Tensor, labels: Tensor) -> None:
        h = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        self.gram.addmm_(h.T, h)
        self.targets.addmm_(h.T, F.one_hot(labels, self.targets.shape[1]).to(h.dtype))
        self._solved, self._inputs = False, None

    @torch.no_grad()
    def solve(self, readout: nn.Linear) -> None:
        """Sets the readout to the solution for all samples so far."""
        if self._solved:
            return
        gram = self.gram.double()
        gram.diagonal().add_(self.ridge)
        solution = torch.linalg.solve(gram, self.targets.double())
        readout.weight.copy_(solution[:-1].T)
        readout.bias.copy_(solution[-1])
        self._solved = True
