"""A network before an experience: how sharp a solved readout makes the loss below, and how far old inputs move."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_sp.gate.classes import ReadoutSamples, class_means
from avalanche_sp.gate.functional import leading_eigenvalue
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory, Memory
from avalanche_sp.gate.observe import (
    BATCH,
    Criterion,
    Forward,
    LayerObservation,
    Observation,
    after_each,
    each_tensor,
    evaluation_mode,
    has_rows,
    on_device,
    some_rows,
)
from avalanche_sp.gate.pseudo_samples import PseudoSamples, agreement, drift_map, pseudo_samples
from avalanche_sp.gate.settings import Settings


@dataclass(frozen=True)
class DrawnInputs:
    """Inputs on which a network has run: drawn for old classes, and after these for the experience's (`draw_inputs`).

    Attributes:
        rows: input vectors of the layer that data feed (n, d').
        features: the readout's inputs that the network made of them (n, d).
        old, new: the classes of the first rows, and of the last.
    """

    rows: Tensor
    features: Tensor
    old: Tensor
    new: Tensor


def draw_inputs(memory: LayerMemory, seen: ReadoutSamples) -> tuple[Tensor, Tensor, Tensor]:
    """Draws input vectors for old classes, and for those of an experience with the same covariance.

    Args:
        memory: of a layer that data feed, with class sums.
        seen: the experience's samples of its inputs. At least their number is drawn for the old classes, and at most
            256 for the experience's.

    Returns:
        Rows (n, d), the old classes of the first rows, and the classes of the others.
    """
    drawn = pseudo_samples(memory, len(seen.targets), seen)
    rows, (means, counts) = drawn.inputs, class_means(seen)
    deviations = some_rows(rows - _by_class(rows, drawn.targets, len(seen.masked))[0][drawn.targets])
    new = counts.nonzero().flatten()
    new = new[torch.arange(len(deviations), device=new.device) % len(new)]
    return torch.cat([rows, deviations + means[new]]), drawn.targets, new


@dataclass(frozen=True)
class Preparation:
    """A network before it trains on an experience after which its readout is solved.

    Attributes:
        layer: the readout's name.
        solved: whether the readout has been solved for the experience, and is frozen until its end.
        inputs, targets: the readout's inputs (n, d) and their classes (n,).
        old: pseudo-samples of the old classes; None for a new task's head.
        entered: drawn inputs, on which the network has run; None if they are not known.
        vectors: leading eigenvectors of old and new inputs (d, k).
        weights: of the layers below, by name: (out, d).
        sensitivity: of the network's outputs to their outputs, the mean (:class:`Sensitivity`).
        scale: factors of what their gates let through, 0 to 1, so that the loss is no sharper than in the first
            experience, which was trained without a gate.
        step: factors of their gradients, 0 to 1, with stored samples, which pass the gate (:func:`stable_step`).
        ridge_factor: of the readout's solution, chosen on samples that the network has not been trained on; None if it
            cannot be solved.
    """

    layer: str
    solved: bool
    inputs: Tensor
    targets: Tensor
    old: PseudoSamples | None
    entered: DrawnInputs | None
    vectors: Tensor
    weights: dict[str, Tensor]
    sensitivity: dict[str, Tensor]
    scale: dict[str, float]
    step: dict[str, float] = field(default_factory=dict)
    ridge_factor: float | None = None

    def state_dict(self) -> dict:
        """Tensors and numbers by field."""
        nested = {name: getattr(self, name) for name in ("old", "entered")}
        return vars(self) | {name: None if value is None else vars(value) for name, value in nested.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping) -> Preparation:
        old, entered = state["old"], state["entered"]
        old = None if old is None else PseudoSamples(**old)
        return cls(**{**state, "old": old, "entered": None if entered is None else DrawnInputs(**entered)})


@dataclass(frozen=True)
class Sensitivity:
    """Of the network's outputs to a layer's: the second moment of J^T v over samples, the Gauss-Newton matrix's factor.

    J is the Jacobian of the network's outputs in the layer's, and v are random signs (J. Martens, R. Grosse: Optimizing
    neural networks with Kronecker-factored approximate curvature, ICML 2015).

    Attributes:
        mean: its mean eigenvalue, 0-dim; 0 if the layer is not called.
        leading: its leading eigenvalue, 0-dim; its trace, if the gradient in the layer's own output is not known.
    """

    mean: Tensor
    leading: Tensor


@contextmanager
def _gradients_in_evaluation(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode with gradients. Recurrent layers run without cuDNN, whose layers have no backward pass in it."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with torch.enable_grad(), evaluation_mode(model) as device, without_cudnn:
        yield device


def output_sensitivity(
    model: nn.Module, inputs: Any, layers: Mapping[str, GatedLayer], forward: Forward, shared: Collection[str] = ()
) -> dict[str, Sensitivity]:
    """Sensitivities of a network's outputs, by layer.

    If the gradient in the layer's own output is not known, the weight's gradient and the energy of its input stand for
    it.

    Args:
        inputs: the network's, of some samples, on its device.
        shared: names of the layers of which all samples share one input.
    """
    made: dict[str, Tensor] = {}
    energy: dict[str, Tensor] = {}

    def note(name, layer, x, output):
        if layer.per_row and isinstance(output, Tensor):
            made[name] = output
        else:
            squares_of_x = layer.energy(x) if layer.of_rows else x.detach().float().square().sum()
            energy[name] = energy.get(name, 0) + squares_of_x

    with _gradients_in_evaluation(model) as device:
        with after_each(layers, note):
            outputs = forward(model, inputs)
        signs = torch.randint(0, 2, outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs) * 2 - 1
        varied = {name: output for name, output in made.items() if output.requires_grad}
        varied |= {name: layers[name].weight for name in energy}
        scalar = (outputs * signs).sum()
        found = torch.autograd.grad(scalar, list(varied.values()), allow_unused=True) if varied else ()
    zero = torch.zeros((), device=device)
    sensitivity = dict.fromkeys(layers, Sensitivity(zero, zero))
    for name, gradient in zip(varied, found):
        layer = layers[name]
        if gradient is None:
            continue
        each = len(outputs) if name in shared else 1  # the gradient is a sum over samples
        if name in energy:  # (sum of delta x^T)^2 is about the sum of delta^2 x^2
            trace = gradient.square().sum() / (energy[name] * each)
            sensitivity[name] = Sensitivity(trace / layer.units, trace)
        else:
            rows = layer.postsynaptic(gradient).flatten(0, -2)
            leading = leading_eigenvalue(some_rows(rows))
            sensitivity[name] = Sensitivity(gradient.square().mean() / each, leading / each)
    return sensitivity


def sharpness(
    seen: LayerObservation, sensitivity: Sensitivity, through: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Leading eigenvalue of the Gauss-Newton matrix in a layer's weights, with Kronecker factors, 0-dim.

    Args:
        seen: the layer's inputs.
        sensitivity: of the network's outputs to the layer's.
        through: applies the layer's gate to rows; None without a gate.
    """
    return sensitivity.leading * seen.rows * seen.leading_eigenvalue(through)


def stable_step(rate: float, curvature: Tensor, weight: float, sharp: Tensor) -> float:
    r"""The factor of a gradient with which a step on stored samples is stable: at most 1.

    .. math:: \frac{2}{\eta\, \kappa\, \frac{w}{1 + w}\, \sigma}

    It is the limit of gradient descent on a quadratic of leading eigenvalue :math:`\kappa \sigma w / (1 + w)`.

    Args:
        rate: :math:`\eta` of an optimizer whose steps are proportional to the gradient.
        curvature: :math:`\kappa`, of the loss in the network's outputs, 0-dim.
        weight: w, of the stored samples in the loss, for 1 of the stream's.
        sharp: :math:`\sigma`, of a layer (:func:`sharpness`), 0-dim.
    """
    steepest = float(rate * curvature * weight / (1 + weight) * sharp)
    return min(1.0, 2 / steepest) if steepest > 0 else 1.0


def bears_steps(
    model: nn.Module,
    samples: Sequence[tuple[Any, Tensor]],
    rates: Mapping[nn.Parameter, float],
    steps: int,
    criterion: Criterion,
    forward: Forward,
) -> bool:
    """Whether a network is still better than outputs of zero after a few steps of Adam on some samples.

    With a sharp loss the first step overshoots, as it is as long as the rate says (D. P. Kingma, J. Ba: Adam, ICLR
    2015). The next ones may make up for it. Weights and gradients are left as they are.

    Args:
        samples: batches of inputs and targets.
        rates: learning rates of the weights that are trained.
        steps: number of steps.
        criterion: of (outputs, targets).
        forward: computes the outputs from model and inputs.
    """
    before = {p: (p.detach().clone(), p.grad) for p in rates}
    adam = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates.items()])
    with _gradients_in_evaluation(model) as device:
        batches = [(on_device(device, x), y.to(device)) for x, y in samples]
        total = sum(len(y) for _, y in batches)

        def loss(scale: float) -> Tensor:  # of the outputs, scaled
            of_each = [len(y) / total * criterion(scale * forward(model, x), y) for x, y in batches]
            return torch.stack(of_each).sum()

        try:
            for _ in range(steps):
                for p, gradient in zip(rates, torch.autograd.grad(loss(1.0), list(rates), allow_unused=True)):
                    p.grad = gradient
                adam.step()
            with torch.no_grad():
                return bool(loss(1.0) < loss(0.0))
        finally:
            for p, (weights, own) in before.items():
                p.data.copy_(weights)
                p.grad = own


@torch.no_grad()
def features_of(
    model: nn.Module, inputs: Any, rows: Tensor, entrance: GatedLayer, readout: GatedLayer, forward: Forward
) -> Tensor | None:
    """The readout's inputs (n, d) that a network makes of input vectors (n, d') of the one layer that data feed.

    Args:
        inputs: the network's, of some samples, on its device. The rows replace the input of ``entrance``.
        rows: input vectors of ``entrance``.

    Returns:
        None if ``entrance`` is no ``nn.Linear``, if the readout's inputs depend on the network's in another way, and if
        one is not finite.
    """
    if type(entrance.module) is not nn.Linear or not has_rows(inputs):
        return None
    seen: list[Tensor] = []

    def run(part: Tensor, inputs: Any) -> None:
        def enter(module: nn.Module, args: tuple) -> tuple:
            return (part[:, : args[0].shape[-1]].to(args[0]).view_as(args[0]), *args[1:])

        handle = entrance.module.register_forward_pre_hook(enter)
        try:
            forward(model, each_tensor(inputs, lambda t: t[torch.arange(len(part), device=t.device) % len(t)]))
        finally:
            handle.remove()

    first, *others = rows.split(BATCH)
    with evaluation_mode(model), after_each({"": readout}, lambda *called: seen.append(called[2])):
        try:
            run(first, inputs)
        except (RuntimeError, IndexError):  # the network runs on no other choice of rows, as on those of a graph
            return None
        run(first, each_tensor(inputs, lambda tensor: tensor.flip(0)))
        if seen[0].dim() != 2 or not torch.allclose(seen[0], seen.pop(), rtol=1e-3, atol=1e-4):
            return None
        for part in others:
            run(part, inputs)
    features = torch.cat([readout.presynaptic(x.float()) for x in seen])
    return features if features.isfinite().all() else None


def follow_drift(
    memory: Memory,
    prepared: Preparation,
    observation: Observation,
    layers: Mapping[str, GatedLayer],
    settings: Settings,
    entered: Tensor | None = None,
    continues: bool = False,
) -> tuple[Memory, PseudoSamples | None]:
    """Moves the memory of the readout's old inputs as far as the layers below have moved them.

    A linear map is learned on new inputs (:func:`~avalanche_sp.gate.pseudo_samples.drift_map`). If the network can be
    run on inputs that are drawn for the old classes, the map is learned on new and drawn inputs. The residuals of the
    drawn inputs are then added to the pseudo-samples of their classes (:func:`_unexplained`). Without drawn inputs the
    map's share is the root of the change of the outputs by the updates on old inputs over that on new ones, to first
    order, with each layer's sensitivity. The first order tells little of a deep network, whose layers move each other's
    inputs. Let a be how far the new classes agree on the map (:func:`~avalanche_sp.gate.pseudo_samples.agreement`). A
    drift that they share is that of old classes also, so a share s becomes :math:`s + a^2 (1 - s)`. For a squared
    error, and without a new class, s stays, unless the first order explains less than 1/500 of the change of the new
    outputs (``drift_first_order``) and the classes agree (``drift_agreement``). It is then 1. It is also 1 if the
    experience continues the earlier ones.

    Args:
        memory: before the experience.
        prepared: the network before the experience.
        observation: of the same samples after it. If they are others, or the readout is new, nothing moves.
        layers: the network's gated layers by name.
        entered: the readout's inputs that the network now makes of ``prepared.entered``.
        continues: whether the experience continues the earlier ones, so that old inputs move as its own do.

    Returns:
        The memory, and the pseudo-samples of the old classes.
    """
    now, drawn, told = observation.classified, prepared.old, prepared.entered
    if now is None or drawn is None or not torch.equal(prepared.targets, now.targets):
        return memory, drawn
    known, before, after = memory.layers[now.layer], prepared.inputs, now.inputs
    if told is None or entered is None:
        share = 1.0 if continues else _share_of_old(memory, prepared, observation, layers, settings)
        of_new = drift_map(before, after, prepared.vectors, settings)

        def move(rows: Tensor) -> Tensor:
            return rows + share * of_new(rows)

        known, old = known.moved(move), drawn.moved(move)
    else:
        n = len(told.old)
        first, then = told.features[:n], entered[:n]
        of_all = drift_map(torch.cat([before, first]), torch.cat([after, then]), prepared.vectors, settings)
        known, old = known.moved(lambda rows: rows + of_all(rows)), drawn.moved(lambda rows: rows + of_all(rows))
        error = _error_of_drawn(entered[n:] - told.features[n:], told.new, after - before, now.targets)
        residuals, inputs = then - first - of_all(first), old.inputs
        changed = inputs + _unexplained(residuals, told.old, error, old.targets)
        known = known.resampled(inputs, changed, old.targets)
        old = PseudoSamples(changed, torch.eye(changed.shape[1]).to(changed), old.targets)
    return replace(memory, layers={**memory.layers, now.layer: known}), old


def _by_class(rows: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of rows (n, d) by class (classes, d), zero without rows, their numbers (classes,), and the scatter.

    The scatter is the mean squared distance of a row from its class's mean, 0-dim.
    """
    counts = torch.bincount(targets, minlength=classes)
    sums = rows.new_zeros(classes, rows.shape[1]).index_add_(0, targets, rows)
    means = sums / counts.clamp_min(1).unsqueeze(1)
    return means, counts, (rows - means[targets]).square().sum() / (len(rows) - (counts > 0).sum()).clamp_min(1)


def _error_of_drawn(changes: Tensor, classes: Tensor, real: Tensor, targets: Tensor) -> Tensor:
    """Mean squared distance between the class means of drawn and of real inputs' changes, without noise, 0-dim.

    Args:
        changes, classes: of drawn inputs, shapes (m, d) and (m,).
        real, targets: of real ones of the same classes, shapes (n, d) and (n,).
    """
    number = int(targets.max()) + 1
    told, known = _by_class(changes, classes, number), _by_class(real, targets, number)
    both = told[1] > 0
    noise = sum(scatter * (1 / counts[both]).mean() for _, counts, scatter in (told, known))
    return ((told[0] - known[0])[both].square().sum(1).mean() - noise).clamp_min(0)


def _unexplained(residuals: Tensor, sources: Tensor, error: Tensor, targets: Tensor) -> Tensor:
    r"""The part of samples' changes that the drift's map does not explain, from residuals of drawn inputs.

    A residual is a drawn input's change without the map's part. Each sample gets a residual of its class; a class's
    residuals are given in turn (bootstrap of residuals, B. Efron 1979). So samples scatter as drawn inputs do. The
    class means :math:`r_c` of the residuals are multiplied by

    .. math:: \max(0, 1 - (e^2 + s_r^2) / \overline{\lVert r_c \rVert^2})

    with :math:`s_r` the standard error of such a mean and :math:`e^2` the squared error with which drawn inputs tell
    the change of a class (W. James, C. Stein: Estimation with quadratic loss, 1961).

    Args:
        residuals: rows (m, d), of drawn inputs.
        sources: their classes (m,), in rising order.
        error: e^2, 0-dim.
        targets: classes of the samples (n,), in rising order.
    """
    means, counts, scatter = _by_class(residuals, sources, int(sources.max()) + 1)
    known = counts > 0
    noise = error + scatter * (1 / counts[known]).mean()
    kept = (1 - noise / means[known].square().sum(1).mean().clamp_min(torch.finfo(residuals.dtype).tiny)).clamp(0, 1)
    residuals = residuals - (1 - kept) * means[sources]
    numbers = torch.bincount(targets)
    turn = torch.arange(len(targets), device=targets.device) - (numbers.cumsum(0) - numbers)[targets]
    return residuals[(counts.cumsum(0) - counts)[targets] + turn % counts[targets]]


def _share_of_old(
    memory: Memory,
    prepared: Preparation,
    observation: Observation,
    layers: Mapping[str, GatedLayer],
    settings: Settings,
) -> float:
    """How far old inputs of the readout have moved, as a share of the map of new ones (:func:`follow_drift`)."""
    now = observation.classified
    assert now is not None
    old = new = now.inputs.new_zeros(())
    for name, weights in prepared.weights.items():
        known, seen = memory.layers[name], observation.layers[name]
        change = layers[name].weights_and_bias()[: len(weights)] - weights
        scale = prepared.sensitivity[name] * seen.rows
        old = old + scale * known.mean_square(change)
        new = new + scale * seen.mean_square(change)
    before, after, basis = prepared.inputs, now.inputs, prepared.vectors
    readout, weights = memory.layers[now.layer], layers[now.layer].weights_and_bias()
    changed = ((after - before) @ weights.T).square().sum() / len(after)
    share = float((old / new.clamp_min(torch.finfo(new.dtype).tiny)).sqrt().clamp(0, 1))
    says_little = bool(new < settings.drift_first_order * changed)
    shares_drift = prepared.solved and observation.readout is None
    if not (says_little or shares_drift):
        return share

    def changes(part: Tensor) -> Tensor:
        return drift_map(before[part], after[part], basis, settings)(readout.roots)

    agree = max(agreement(now.targets, changes), 0.0)
    if says_little and agree >= settings.drift_agreement:
        return 1.0
    return share + agree**2 * (1 - share) if shares_drift else share
