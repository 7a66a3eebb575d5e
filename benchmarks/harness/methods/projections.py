"""GPM and OWM: a layer's gradient is projected away from the inputs of earlier experiences.

The bias counts as the weight of one more input, which is always 1: the joint gradient [dW, db], shape (out, d + 1), is
projected from the right. The papers' networks have no biases.
"""

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_sp.gate.layers import GatedLayer, gated_layers
from avalanche_sp.gate.observe import after_each
from harness.methods import check


class GradientProjection(SupervisedPlugin):
    """Before each step, replaces the gradient of every linear layer in ``kept`` by its projection."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, Tensor] = {}  # a summary of each layer's inputs, by the layer's name

    def project(self, gradient: Tensor, kept: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def before_update(self, strategy, **kwargs):
        for name, layer in linear_layers(strategy.model).items():
            if name in self.kept:
                gradients = [p.grad.view(layer.units, -1) for p in layer.parameters]
                projected = self.project(torch.cat(gradients, dim=1), self.kept[name])
                for gradient, part in zip(gradients, projected.split([g.shape[1] for g in gradients], dim=1)):
                    gradient.copy_(part)


class GradientProjectionMemory(GradientProjection):
    """Gradient projection memory (GPM): steps orthogonal to the inputs of earlier experiences.

    After each experience, with R (d, n) a layer's inputs and M (d, r) the orthonormal basis so far, the basis gains the
    leading left singular vectors of R - M M^T R, the fewest that leave at most a share 1 - epsilon of R's energy. From
    then on the gradient G is G - G M M^T.

    G. Saha, I. Garg, K. Roy: Gradient projection memory for continual learning, ICLR 2021, equations 5, 6, 8 and 9.

    Args:
        epsilon: the share of energy to keep, between 0 and 1, the same for all experiences. (The authors also let it
            grow by .003 an experience: no better on Split MNIST, ``docs/trials/methods.csv``.)
        epsilon_hidden: the same of all layers but the first, as the authors do on Permuted MNIST. Default: ``epsilon``.
        samples: n, evenly spread over the experience; 300 as in the authors' code.
    """

    def __init__(self, epsilon: float, epsilon_hidden: float | None = None, samples: int = 300):
        super().__init__()
        self.epsilons = epsilon, epsilon if epsilon_hidden is None else epsilon_hidden
        for name, value in zip(("epsilon", "epsilon_hidden"), self.epsilons):
            check(name, value, 1, "between 0 and 1")
        self.samples = samples

    def project(self, gradient: Tensor, kept: Tensor) -> Tensor:
        return gradient - gradient @ kept @ kept.T

    def after_training_exp(self, strategy, **kwargs):
        dataset = strategy.experience.dataset
        rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), self.samples)).long()
        x = dataset.read_batch(rows.tolist())[0].to(strategy.device)
        for number, (name, inputs) in enumerate(layer_inputs(strategy.model, x).items()):
            basis = self.kept.get(name, inputs.new_zeros(inputs.shape[1], 0))
            self.kept[name] = extend_basis(basis, inputs, self.epsilons[min(number, 1)])


class OrthogonalWeightsModification(GradientProjection):
    """Orthogonal weights modification (OWM): steps scaled down along the inputs of earlier experiences.

    A layer's gradient is multiplied by P = alpha (alpha I + A A^T)^-1. The columns of A are the layer's inputs, a mean
    over each batch, with the weights at the end of the experience. The authors' code takes them in at every iteration,
    with the weights of the moment, and so already protects the present experience. On validation images it ends lower
    here (``docs/trials/methods.csv``).

    G. Zeng, Y. Chen, B. Cui, S. Yu: Continual learning of context-dependent processing in neural networks, Nature
    Machine Intelligence 2019.

    Args:
        alpha: greater than 0; smaller values close more.
    """

    def __init__(self, alpha: float):
        super().__init__()
        check("alpha", alpha)
        self.alpha = alpha

    def project(self, gradient: Tensor, kept: Tensor) -> Tensor:
        return gradient @ kept

    def after_training_exp(self, strategy, **kwargs):
        dataset, size = strategy.experience.dataset, strategy.train_mb_size
        for start in range(0, len(dataset) - size + 1, size):  # whole batches, as in training
            x = dataset.read_batch(list(range(start, start + size)))[0].to(strategy.device)
            for name, inputs in layer_inputs(strategy.model, x).items():
                if name not in self.kept:
                    self.kept[name] = torch.eye(inputs.shape[1]).to(inputs)
                take_in(self.kept[name], inputs.mean(0), self.alpha)


def linear_layers(model: nn.Module) -> dict[str, GatedLayer]:
    return {name: layer for name, layer in gated_layers(model).items() if isinstance(layer.module, nn.Linear)}


@torch.no_grad()
def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The input (n, d) of each linear layer for the samples ``x``, with a column of ones for a bias.

    Raises:
        FloatingPointError: a layer's inputs are not finite.
    """
    inputs: dict[str, Tensor] = {}

    def record(name: str, layer: GatedLayer, x: Tensor, output: Tensor) -> None:
        inputs[name] = layer.presynaptic(x)

    with after_each(linear_layers(model), record):
        model(x)
    for name, rows in inputs.items():
        if not rows.isfinite().all():
            cause = "The usual cause is too high a learning rate: try a third of it."
            raise FloatingPointError(f"the inputs of layer {name!r} are not finite after an experience. {cause}")
    return inputs


def extend_basis(basis: Tensor, inputs: Tensor, epsilon: float) -> Tensor:
    """GPM's update of a basis M (d, r) by the inputs R^T (n, d): the fewest new columns that reach ``epsilon``."""
    missed = inputs - inputs @ basis @ basis.T
    vectors, values, _ = torch.linalg.svd(missed.T, full_matrices=False)
    total = inputs.square().sum()
    energy = total - missed.square().sum() + values.square().cumsum(0) - values.square()  # before each new column
    new = int((energy < epsilon * total).sum())
    return torch.cat([basis, vectors[:, :new]], dim=1)[:, : inputs.shape[1]]


def take_in(projector: Tensor, x: Tensor, alpha: float) -> None:
    """OWM's recursive least squares, in place: the projector P (d, d) takes in one more input x (d,)."""
    px = projector @ x
    projector.addr_(px, px / (alpha + x @ px), alpha=-1)
