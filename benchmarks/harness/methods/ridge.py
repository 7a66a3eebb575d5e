"""Random features with ridge regression: a readout that one pass over a stream fits exactly, whatever its order."""

import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from harness.methods import check


def stored_bytes(width: int, inputs: int = 784, outputs: int = 10) -> int:
    """Bytes of ``width`` features in single precision: their weights, the readout's, and the two sums."""
    weights = (inputs + 1) * width + (width + 1) * outputs
    sums = (width + 1) * (width + 2) // 2 + (width + 1) * outputs  # a symmetric matrix is its upper triangle
    return 4 * (weights + sums)


def build_random_features(budget: int, inputs: int = 784, outputs: int = 10) -> nn.Module:
    """A fixed random hidden layer and a readout, which take at most ``budget`` bytes with the readout's sums."""
    width = 1
    while stored_bytes(width + 1, inputs, outputs) <= budget:
        width += 1
    hidden = nn.Linear(inputs, width).requires_grad_(False)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(width, outputs))


class StreamingRidge(SupervisedPlugin):
    """Ridge regression of one-hot targets y on the inputs h of a model's last layer, from two sums over the stream:

    G = sum h h^T and B = sum h y^T, where h has a 1 for the bias. W^T = (G + ridge I)^-1 B is the solution for all
    samples seen so far: no sample is stored and no boundary is needed. The readout is solved for in evaluation and at
    the end of an experience. All earlier layers must be fixed and the learning rate 0.

    A. Hoerl, R. Kennard: Ridge regression, Technometrics 1970. A. Rahimi, B. Recht: Random features for large-scale
    kernel machines, NeurIPS 2007.
    """

    def __init__(self, ridge: float):
        super().__init__()
        check("ridge", ridge)
        self.ridge = ridge
        self.gram = self.targets = self._inputs = None
        self._solved = True

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
        if not self._solved:
            gram = self.gram.double()
            gram.diagonal().add_(self.ridge)
            solution = torch.linalg.solve(gram, self.targets.double())
            readout.weight.copy_(solution[:-1].T)
            readout.bias.copy_(solution[-1])
            self._solved = True
