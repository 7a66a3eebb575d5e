"""Metrics: what the gate does, and GEM's measures of continual learning, for Avalanche's EvaluationPlugin."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name, stream_type
from avalanche.evaluation.metrics import Accuracy
from numpy.typing import ArrayLike
from torch import Tensor

from avalanche_sp.gate import PlasticityGate
from avalanche_sp.optim import SelectivePlasticityOptimizer
from avalanche_sp.training.plugin import plugin_of


def average_accuracy(matrix: ArrayLike) -> float:
    """ACC, mean accuracy over all T tasks after the last: (1/T) sum_j R[T, j].

    ``matrix`` is R of shape (T, T): R[i, j] is the accuracy on task j after training on task i. All measures
    here are in R's own unit. Source: D. Lopez-Paz, M. Ranzato: Gradient episodic memory, NeurIPS 2017.
    """
    return float(_square(matrix)[-1].mean())


def backward_transfer(matrix: ArrayLike) -> float:
    """BWT, change on the earlier tasks since each was learned: 1/(T-1) sum_{j<T} R[T, j] - R[j, j].

    0 for a single task. Source: Lopez-Paz and Ranzato 2017.
    """
    r = _square(matrix)
    return float((r[-1] - r.diagonal())[:-1].mean()) if len(r) > 1 else 0.0


def average_forgetting(matrix: ArrayLike) -> float:
    """Loss on the earlier tasks since each was at its best: 1/(T-1) sum_{j<T} max_{j<=i<T} R[i, j] - R[T, j].

    0 for a single task. Source: A. Chaudhry et al.: Riemannian walk for incremental learning, ECCV 2018.
    """
    r = _square(matrix)
    if len(r) < 2:
        return 0.0
    return float(np.mean([r[j:-1, j].max() - r[-1, j] for j in range(len(r) - 1)]))


def learning_accuracy(matrix: ArrayLike) -> float:
    """Mean accuracy on each task right after it was learned: (1/T) sum_j R[j, j].

    Source: M. Riemer et al.: Learning to learn without forgetting, ICLR 2019.
    """
    return float(_square(matrix).diagonal().mean())


def _square(matrix: ArrayLike) -> np.ndarray:
    r = np.asarray(matrix, dtype=float)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not len(r):
        raise ValueError(f"Invalid matrix shape: {r.shape} (allowed: (T, T), accuracy on task j after task i)")
    return r


class _Metric(PluginMetric):
    """A metric that is shown by its class's name."""

    def __str__(self) -> str:
        return type(self).__name__


class AccuracyMatrix(_Metric):
    """Accuracy matrix R of one stream in percent, and ACC, BWT, forgetting and learning accuracy.

    Each training on an experience adds a row. The row is evaluated after it and before any later training. An
    evaluation before any training is left out. An experience of an online stream counts as the one that it was split
    from.

    The measures take the experiences in the order of their trainings. If an experience was trained several times, its
    last training counts. A measure is reported after an evaluation if the trained experiences are those that were
    evaluated, and if R has all the entries that the measure is made of: one evaluation of all experiences at the end of
    training is enough for ACC. ACC is also reported if more experiences were trained than the stream has, and the last
    evaluation is of the whole stream. A measure that an earlier evaluation had, and that a later one lacks, is reported
    as NaN.

    Warnings tell, once each, why only ACC is reported, and that evaluations followed a training but none of the stream.

    Args:
        stream: name of the stream (default "test"). Evaluations of other streams are left out.
    """

    def __init__(self, stream: str = "test"):
        super().__init__()
        self.stream = stream
        self._accuracy = Accuracy()
        self._evaluated = False  # the present evaluation has added to R
        self._reported: set[str] = set()
        self._warned = False  # of measures that are left out
        self._others: set[str] | None = set()  # streams evaluated since training; None once it needs no warning
        self.reset()

    def result(self) -> np.ndarray:
        """R, shape (trainings, experiences evaluated on), NaN where not evaluated."""
        columns = 1 + max((j for row in self._rows for j in row), default=-1)
        matrix = np.full((len(self._rows), columns), np.nan)
        for i, row in enumerate(self._rows):
            for j, value in row.items():
                matrix[i, j] = value
        return matrix

    def to_csv(self, path: str | Path) -> None:
        """Writes R to a CSV file: a line for each training, a column for each experience evaluated on.

        A line begins with the experience trained on. Experiences count from 0, as Avalanche's do. Entries that were
        not evaluated are empty.

        Args:
            path: the file. It is overwritten; its folder must be there.

        Raises:
            OSError: it cannot be written.
        """
        matrix = self.result()
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["trained_on", *range(matrix.shape[1])])
            for trained, row in zip(self._trained, matrix):
                writer.writerow([trained, *("" if np.isnan(value) else float(value) for value in row)])

    def reset(self) -> None:
        self._rows: list[dict[int, float]] = []
        self._trained: list[int | None] = []  # the experience of each row; None if an online stream does not tell it

    def before_training(self, strategy) -> None:
        if self._rows and self._others:
            warnings.warn(
                f"AccuracyMatrix({self.stream!r}) has no entry. After training these streams were evaluated: "
                f"{', '.join(sorted(self._others))}.",
                stacklevel=2,
            )
            self._others = None

    def before_training_exp(self, strategy) -> None:
        experience = strategy.experience
        if isinstance(experience, OnlineCLExperience):
            experience = experience.origin_experience
        self._trained.append(getattr(experience, "current_experience", None))
        self._rows.append({})

    def after_training_iteration(self, strategy) -> None:
        self._rows[-1].clear()  # it was another network's

    def after_training(self, strategy) -> None:
        if self._others is not None:
            self._others.clear()  # an evaluation within training may be of the training stream alone

    def before_eval_exp(self, strategy) -> None:
        self._accuracy.reset()

    def after_eval_iteration(self, strategy) -> None:
        self._accuracy.update(strategy.mb_output, strategy.mb_y)

    def after_eval_exp(self, strategy) -> None:
        if (stream := stream_type(strategy.experience)) != self.stream:
            if self._others is not None:
                self._others.add(stream)
            return
        self._others = None
        if self._rows:
            self._rows[-1][strategy.experience.current_experience] = 100 * self._accuracy.result()
            self._evaluated = True
            self._is_whole = len(self._rows[-1]) == len(strategy.experience.origin_stream)

    def after_eval(self, strategy) -> list[MetricValue]:
        if not self._evaluated:
            return []
        self._evaluated = False
        values, why = self._measures()
        found = {name for name, value in values.items() if not np.isnan(value)}
        if "ACC" in found and len(found) < len(values) and not self._warned:
            self._warned = True
            left = ", ".join(name for name in values if name not in found)
            warnings.warn(f"AccuracyMatrix({self.stream!r}) does not report {left}: {why}.", stacklevel=2)
        self._reported |= found
        return [
            MetricValue(self, f"{name}_Percent/eval_phase/{self.stream}_stream", value, strategy.clock.train_iterations)
            for name, value in values.items()
            if name in self._reported
        ]

    def _measures(self) -> tuple[dict[str, float], str]:
        """The measures, NaN if R lacks an entry that they are made of, and why those but ACC can be NaN."""
        measures = {
            "ACC": average_accuracy,
            "BWT": backward_transfer,
            "Forgetting": average_forgetting,
            "LearningAccuracy": learning_accuracy,
        }
        last = {experience: i for i, experience in enumerate(self._trained)}
        evaluated = set().union(*self._rows)
        if evaluated != set(last):
            values = dict.fromkeys(measures, np.nan)
            if self._is_whole and (evaluated < set(last) or None in last):
                values["ACC"] = float(np.mean(list(self._rows[-1].values())))
            return values, "the experiences that were trained are not those that were evaluated"
        order = sorted(evaluated, key=last.__getitem__)
        matrix = self.result()[[last[j] for j in order]][:, order]
        why = ""
        for i, j in np.argwhere(np.isnan(np.tril(matrix)))[:1]:
            why = f"experience {order[j]} was not evaluated after training on experience {order[i]}"
        return {name: f(matrix) for name, f in measures.items()}, why


class _LayerMetric(_Metric):
    """A value for every layer, read at one moment."""

    def __init__(self):
        super().__init__()
        self._values: dict[str, float] = {}

    def result(self) -> dict[str, float]:
        """The last values by layer name."""
        return dict(self._values)

    def reset(self) -> None:
        self._values.clear()

    def _read(self, strategy) -> dict[str, float]:
        raise NotImplementedError

    def _emit(self, strategy) -> list[MetricValue]:
        values = self._read(strategy)
        if not values:
            return []
        self._values = values
        named = {f"{self}/{layer}": value for layer, value in self._values.items()}
        named[f"{self}/mean"] = sum(self._values.values()) / len(self._values)
        return [
            MetricValue(self, get_metric_name(name, strategy), value, strategy.clock.train_iterations)
            for name, value in named.items()
        ]


class _GateMetric(_LayerMetric):
    """A value of each gated layer, read from the strategy's SelectivePlasticityPlugin."""

    _of: Callable[[PlasticityGate], Mapping[str, float]]

    def _read(self, strategy) -> dict[str, float]:
        plugin = plugin_of(strategy)
        return {} if plugin is None else dict(self._of(plugin.gate))


class GateOpenness(_GateMetric):
    """Share of the stream's presynaptic energy that the gate let through, per layer, epoch by epoch.

    ``sum |x_gated|^2 / sum |x|^2``
    """

    _of = staticmethod(lambda gate: {name: s.openness for name, s in gate.statistics.items()})
    after_training_epoch = _LayerMetric._emit


class PresynapticSurprise(_GateMetric):
    """Share of the stream's presynaptic energy outside all that was consolidated, per layer, epoch by epoch.

    ``1 - sum |V^T x|^2 / sum |x|^2``
    """

    _of = staticmethod(lambda gate: {name: s.surprise for name, s in gate.statistics.items()})
    after_training_epoch = _LayerMetric._emit


class ClaimedRank(_GateMetric):
    """Number of input directions that consolidation has at least half closed, per layer, after each experience."""

    _of = staticmethod(lambda gate: gate.claimed_rank)
    after_training_exp = _LayerMetric._emit


class Eligibility(_LayerMetric):
    """Mean eligibility of a layer's synapses as the optimizer's gate reads it, after each experience.

    For a :class:`~avalanche_sp.SelectivePlasticityOptimizer`; with another optimizer it is silent. Eligibility is in
    units of its mean over a tensor, so it is 1 after one experience. Consolidated it is the largest of all
    experiences', synapse by synapse: the more each needs synapses of its own, the further it rises.
    """

    def _read(self, strategy) -> dict[str, float]:
        optimizer = strategy.optimizer
        if not isinstance(optimizer, SelectivePlasticityOptimizer):
            return {}
        layers: dict[str, list[Tensor]] = {}
        for name, p in strategy.model.named_parameters():
            if "step" in optimizer.state.get(p, {}):
                layers.setdefault(name.rpartition(".")[0] or name, []).append(optimizer.get_param_eligibility(p))
        return {name: float(torch.cat([e.flatten() for e in all_]).mean()) for name, all_ in layers.items()}

    after_training_exp = _LayerMetric._emit


class LossSurprise(_Metric):
    """Mean over an epoch of the surprise of the training loss, in [0, 1], which the plugin tells the optimizer."""

    def __init__(self):
        super().__init__()
        self.reset()

    def result(self) -> float | None:
        """The mean over the present epoch so far, or the last one; None before any."""
        return float(self._sum) / self._iterations if self._iterations else None

    def reset(self) -> None:
        self._sum: float | Tensor = 0.0  # becomes a tensor: no device sync until it is read
        self._iterations = 0

    def before_training_epoch(self, strategy) -> None:
        self.reset()

    def after_training_iteration(self, strategy) -> None:
        plugin = plugin_of(strategy)
        if plugin is not None and plugin.gate.active:
            self._sum, self._iterations = self._sum + plugin.surprise, self._iterations + 1

    def after_training_epoch(self, strategy) -> list[MetricValue]:
        if not self._iterations:
            return []
        name = get_metric_name(str(self), strategy)
        return [MetricValue(self, name, self.result(), strategy.clock.train_iterations)]


class FoundBoundaries(_Metric):
    """How many boundaries the plugin has found in the stream, at each one found (``consolidate="surprise"``)."""

    def __init__(self):
        super().__init__()
        self.reset()

    def result(self) -> int:
        """Their number so far."""
        return self._found

    def reset(self) -> None:
        self._found = 0

    def before_training_exp(self, strategy) -> None:
        plugin = plugin_of(strategy)  # may come from another run, or have started again for another model
        if plugin is not None and plugin.gate.boundaries == "surprise":
            self._found = len(plugin.consolidated_at)

    def after_training_iteration(self, strategy) -> list[MetricValue]:
        plugin = plugin_of(strategy)
        if plugin is None or plugin.gate.boundaries != "surprise" or len(plugin.consolidated_at) == self._found:
            return []
        self._found = len(plugin.consolidated_at)
        name = get_metric_name(str(self), strategy)
        return [MetricValue(self, name, self._found, plugin.consolidated_at[-1])]


def selective_plasticity_metrics(stream: str = "test") -> list[PluginMetric]:
    """All metrics of this module, ready for ``EvaluationPlugin(*selective_plasticity_metrics(), loggers=...)``.

    Args:
        stream: name of the stream of the :class:`AccuracyMatrix` (default "test").
    """
    return [
        GateOpenness(),
        PresynapticSurprise(),
        ClaimedRank(),
        AccuracyMatrix(stream),
        FoundBoundaries(),
        Eligibility(),
        LossSurprise(),
    ]
