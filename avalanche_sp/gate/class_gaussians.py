"""Gaussians of classes at a readout's inputs: they follow the drift of the network, and give a linear discriminant."""

import torch
from torch import Tensor

from avalanche_sp.arguments import check_integer
from avalanche_sp.gate.functional import leading_eigenpairs, remainder
from avalanche_sp.gate.pseudo_samples import agreement, drift_map
from avalanche_sp.gate.settings import Settings

_DIRECTIONS = 512  # of a covariance or of a drift's map, at most


class ClassGaussians:
    r"""Gaussians of classes with one covariance, of the features that a readout has as its inputs.

    While the layers below train, all features move. The Gaussians of earlier classes are moved by the linear map that
    the drift of the new samples' features teaches, where two halves of the new classes agree on it
    (``Settings.drift_agreement``). Otherwise they stay, as a gate holds old features still that such a map would move.
    In an experience of a single class nothing shows it: they stay.

    The readout is that of linear discriminant analysis:

    .. math::
        w_c = (\Sigma + \epsilon \bar\sigma^2 I)^{-1} (\mu_c - \mu), \qquad
        b_c = \log p_c - \tfrac12 w_c^\top (\mu_c + \mu)

    No sample is stored.

    Args:
        max_bytes: upper bound on the memory (default: at most 512 directions of the covariance are kept, in single
            precision). Along all other directions the covariance has its mean variance.
        settings: of the gate; ``gaussian_ridge``, ``drift_ridge`` and ``drift_agreement`` count here.

    Attributes:
        means: of each class (d,), by label.
        counts: number of samples of each class, by label.
        components: the covariance's principal directions, as long as the standard deviation along each (k, d).
        variance: of the covariance, summed over all directions, 0-dim.

    Raises:
        ValueError: ``max_bytes`` is no integer of 1 or more; at :meth:`remember`, if it is too small.
        TypeError: ``settings`` are none of the gate's.

    References:
        A. Gomez-Villa et al.: Exemplar-free continual representation learning via learnable drift compensation (LDC),
        ECCV 2024. T. Hayes, C. Kanan: Lifelong machine learning with deep streaming linear discriminant analysis, CVPR
        Workshops 2020.

    Example::

        before = features(x)
        ...  # train on (x, y)
        gaussians.remember(features(x), y, before)
        weights = gaussians.readout(10)
    """

    def __init__(self, max_bytes: int | None = None, settings: Settings = Settings()):  # noqa: B008  # frozen
        if max_bytes is not None:
            check_integer("max_bytes value", max_bytes, 1)
        if not isinstance(settings, Settings):
            raise TypeError(f"Invalid settings: {type(settings).__name__} (allowed: avalanche_sp.gate.Settings)")
        self.max_bytes = max_bytes
        self.settings = settings
        self.means: dict[int, Tensor] = {}
        self.counts: dict[int, float] = {}
        self.components = torch.zeros(0, 0)
        self.variance = torch.zeros(())

    @property
    def state_bytes(self) -> int:
        """Bytes of the memory."""
        return sum(mean.nbytes + 4 for mean in self.means.values()) + self.components.nbytes + self.variance.nbytes

    @torch.no_grad()
    def remember(self, features: Tensor, targets: Tensor, before: Tensor | None = None, weight: float = 1.0) -> None:
        """Adds samples, as the network makes them now.

        Args:
            features: of the samples, shape (n, d).
            targets: their classes, shape (n,), integers of 0 or more.
            before: features of the same samples before the network was trained on them. Default: the network has not
                changed.
            weight: number of samples that each of them stands for.

        Raises:
            ValueError: shapes that do not fit, or targets that are not classes.
            FloatingPointError: a feature is not finite. Nothing was changed.
        """
        rank = self.check(features, targets, before)
        x, d = features.float(), features.shape[1]
        labels, which = targets.unique(return_inverse=True)
        if before is not None and self.means:
            self._follow(before.float(), x, targets)
        counts = which.bincount()
        means = x.new_zeros(len(labels), d).index_add_(0, which, x) / counts.unsqueeze(1)
        old, total = sum(self.counts.values()), sum(self.counts.values()) + weight * len(x)
        new = [(x - means[which]) * (weight / total) ** 0.5]
        for label, count, mean in zip(labels.tolist(), (weight * counts).tolist(), means):
            if n := self.counts.get(label, 0):  # a class that comes again
                apart = mean - self.means[label]
                new.append((apart * (n * count / (n + count) / total) ** 0.5).unsqueeze(0))
                mean = self.means[label] + apart * count / (n + count)
            self.means[label], self.counts[label] = mean, n + count
        rows = torch.cat([self.components.to(x).view(-1, d) * (old / total) ** 0.5, *new])
        self.variance = self.variance.to(x) * old / total + sum(part.square().sum() for part in new)
        values, vectors = leading_eigenpairs(rows, rank)
        self.components = (vectors * values.sqrt()).T.contiguous()

    def check(self, features: Tensor, targets: Tensor, before: Tensor | None = None) -> int:
        """Raises what :meth:`remember` would raise for these arguments; changes nothing.

        Returns:
            The number of the covariance's directions that are kept at most.
        """
        _check(features, targets, before)
        d = features.shape[1]
        if self.means and (known := self.components.shape[1]) != d:
            raise ValueError(f"Invalid features: {d} for each sample (allowed: {known}, as those before)")
        return self._rank(len(self.means.keys() | set(targets.tolist())), d)

    @torch.no_grad()
    def readout(self, outputs: int) -> Tensor:
        """Weights and biases (outputs, d + 1) of a readout, whose row c is of class c.

        They are centred over the known classes. So the output of the largest known class is above 0, and outputs
        without a class have the weights 0 and the bias -1.

        Raises:
            ValueError: no class is remembered, or one of them has no output.
        """
        labels = list(self.means)
        if not labels:
            raise ValueError("Invalid call: no class is remembered (allowed after remember)")
        check_integer("outputs value", outputs, max(labels) + 1)
        means, counts = torch.stack(list(self.means.values())), torch.tensor(list(self.counts.values()))
        share = (counts / counts.sum()).to(means)
        values = self.components.square().sum(1)
        d, tiny = means.shape[1], torch.finfo(means.dtype).tiny
        vectors = self.components / values.clamp_min(tiny).sqrt().unsqueeze(1)
        least = torch.finfo(means.dtype).eps * means.square().mean() + tiny  # a class of one sample has no variance
        ridge = torch.maximum(self.settings.gaussian_ridge * self.variance / d, least)
        rest = remainder(values, self.variance / d, d)
        center = share @ means
        apart = means - center
        along = apart @ vectors.T
        weights = (along / (values + ridge)) @ vectors + (apart - along @ vectors) / (rest + ridge)
        bias = share.log() - (weights * (means + center)).sum(1) / 2
        rows = torch.cat([weights, bias.unsqueeze(1)], 1)
        made = rows.new_zeros(outputs, d + 1)
        made[:, -1] = -1
        made[labels] = rows - rows.mean(0)
        return made

    def _follow(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Moves the Gaussians as the features of the same samples (n, d) have moved, if the classes agree."""
        here, there = before.mean(0), after.mean(0)
        rows = torch.cat([torch.stack(list(self.means.values())), self.components + here])

        def changes(part: Tensor) -> Tensor:
            return self._moved(rows, before[part], after[part]) - rows

        if agreement(targets, changes) < self.settings.drift_agreement:
            return
        moved = self._moved(rows, before, after)
        self.means = dict(zip(self.means, moved))
        components = moved[len(self.means) :] - there
        self.variance *= components.square().sum() / self.components.square().sum().clamp_min(1e-30)
        self.components = components

    def _moved(self, rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Features (m, d) after the drift that other samples' features teach; a shift of all is not held back."""
        here, there = before.mean(0), after.mean(0)
        before, after = before - here, after - there
        basis = leading_eigenpairs(before, _DIRECTIONS)[1]
        rows = rows - here
        return rows + drift_map(before, after, basis, self.settings)(rows) + there

    def _rank(self, classes: int, d: int) -> int:
        if self.max_bytes is None:
            return _DIRECTIONS
        means = 4 * (classes * (d + 1) + 1)
        rank = (self.max_bytes - means) // (4 * d)
        if rank < 1:
            raise ValueError(
                f"Invalid max_bytes value: {self.max_bytes} (allowed for {classes} classes of {d} features: "
                f"{means + 4 * d} or more)"
            )
        return rank


def _check(features: Tensor, targets: Tensor, before: Tensor | None) -> None:
    if features.dim() != 2 or len(features) != len(targets) or not len(features):
        raise ValueError(f"Invalid features: shape {tuple(features.shape)} (allowed: a row for each of the targets)")
    if before is not None and before.shape != features.shape:
        raise ValueError(f"Invalid before: shape {tuple(before.shape)} (allowed: {tuple(features.shape)})")
    if targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool or int(targets.min()) < 0:
        raise ValueError(f"Invalid targets: {targets.dtype} (allowed: class labels, integers of 0 or more)")
    if not (features.isfinite().all() and (before is None or before.isfinite().all())):
        raise FloatingPointError("a feature is not finite: nothing was remembered")
