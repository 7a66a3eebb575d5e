"""Trains and measures one run: from its settings to the row of the store."""

import functools
import importlib.metadata
import platform
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.models import avalanche_forward
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from avalanche_sp import (
    AccuracyMatrix,
    SelectivePlasticityPlugin,
    average_forgetting,
    backward_transfer,
    learning_accuracy,
)
from avalanche_sp.data import benchmark_of, permute_pixels
from harness.build import build_model, build_strategy
from harness.data import parts_of
from harness.memory import extra_memory_bytes
from harness.networks import build_network
from harness.settings import Run
from harness.store import version_of
from harness.streams import blurred, drifting, groups_of_classes, parts

CURVE_POINTS = 10  # measurements of the accuracy curve in an experience
FIRST_STEPS = (1, 2, 5, 10, 20)  # measured iterations of every later experience: old tasks fall deepest then
CURVE_IMAGES = 1000  # test images a task behind each
LONG = 20  # tasks; a longer stream is scored on these test images, and its row has means in place of the matrix
LAST = 10  # the last tasks of a long stream


class AccuracyCurve(SupervisedPlugin):
    """Accuracy on every task, in percent, during an experience; ``seconds`` is the time of the measurements."""

    def __init__(self, test_sets: list[list[torch.Tensor]]):
        super().__init__()
        self.test_sets = test_sets
        self.points: list[dict] = []
        self.seconds = 0.0

    def before_training_exp(self, strategy, **kwargs):
        iterations = len(strategy.dataloader) * strategy.train_epochs
        self._experience = strategy.clock.train_exp_counter
        self._at = {max(1, round(iterations * (i + 1) / CURVE_POINTS)) for i in range(CURVE_POINTS)}
        self._at.update(FIRST_STEPS if self._experience else ())

    @torch.no_grad()
    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations + 1 not in self._at:
            return
        start = time.perf_counter()
        accuracies = accuracies_on(self.test_sets, strategy.model)
        iteration = strategy.clock.train_iterations + 1
        self.points.append({"experience": self._experience, "iteration": iteration, "task_acc": accuracies})
        self.seconds += time.perf_counter() - start


@torch.no_grad()
def accuracies_on(test_sets: list[list[torch.Tensor]], model: torch.nn.Module) -> list[float]:
    """Accuracy on each test set (images, labels, task labels), in percent."""
    model.eval()
    correct = [avalanche_forward(model, x, t).argmax(1) == y for x, y, t in test_sets]
    model.train()
    return [100 * c.float().mean().item() for c in correct]


def over_time(accuracy: np.ndarray) -> dict[str, list[float]]:
    """Accuracy after each task of a long stream: on the present task, on the last ten, and on all so far.

    Args:
        accuracy: matrix (tasks, tasks), a row an experience.
    """
    seen = [row[: task + 1] for task, row in enumerate(accuracy)]
    means = {"present": [row[-1] for row in seen], "last": [row[-LAST:].mean() for row in seen]}
    means["all"] = [row.mean() for row in seen]
    return {name: [round(float(value), 2) for value in values] for name, values in means.items()}


def worst_case(points: list[dict]) -> float | None:
    """Mean over the old tasks of their lowest accuracy after their own experience; None if no task is old.

    min-ACC of M. De Lange et al.: Continual evaluation for lifelong learning, ICLR 2023.
    """
    old = range(points[-1]["experience"])
    lowest = [min(p["task_acc"][task] for p in points if p["experience"] > task) for task in old]
    return float(np.mean(lowest)) if lowest else None


def execute(
    run: Run,
    dataset_root: Path | None = None,
    after_experience: Callable[[np.ndarray], None] | None = None,
    *,
    curve: bool = True,
) -> dict:
    """Trains the run and returns its row: "settings", "figures" and "versions".

    Args:
        dataset_root: folder of the data set; None: its own.
        after_experience: called after each experience with the accuracy matrix so far. Its exceptions end the run.
        curve: whether to measure accuracies during an experience, which takes longer than to train it.

    Raises:
        ValueError: for settings that the strategy or the data rule out.
        FloatingPointError: training diverged.
    """
    torch.set_num_threads(1)
    settings, benchmark = run.settings(), build_benchmark(run, dataset_root)
    smallest = min(len(e.dataset) for e in benchmark.train_stream)
    if run.batch_size > smallest:  # no whole batch: nothing would be trained
        raise ValueError(f"Invalid batch_size: {run.batch_size} (allowed: at most {smallest}, the smallest experience)")
    test_sets = [e.dataset[:CURVE_IMAGES] for e in benchmark.test_stream]
    test_sets = [dataset.read_batch(list(range(len(dataset)))) for dataset in test_sets]
    torch.manual_seed(run.seed)
    random.seed(run.seed)  # Avalanche's A-GEM draws its memory with it
    model = build_model(run)
    matrix, watch = AccuracyMatrix(), AccuracyCurve(test_sets)
    is_long, rows = run.n_tasks > LONG, []
    # An online stream's curve would have a point for every batch. Amid pruning PackNet has no old task's network.
    curve = curve and run.stream == "tasks" and run.strategy != "packnet" and not is_long
    strategy, plugins = build_strategy(run, model, [watch] if curve else [], EvaluationPlugin(matrix))

    seconds, ends, ranks = 0.0, [], []
    gate = next((p for p in plugins if isinstance(p, SelectivePlasticityPlugin)), None)
    whole = run.strategy == "joint"
    for experiences in [benchmark.train_stream] if whole else benchmark.train_stream:
        start = time.perf_counter()
        # A last batch of a few images would be a noisy step that can undo a class (docs/trials/methods.csv).
        for part in [experiences] if whole else parts(run, experiences):
            strategy.train(part, drop_last=True, shuffle=run.stream != "drifting")
        seconds += time.perf_counter() - start
        # Few methods check their loss: one that diverged would be reported as one that guesses.
        if not all(p.isfinite().all() for p in strategy.model.parameters()):
            number = strategy.clock.train_exp_counter - 1
            cause = "The usual cause is too high a learning rate."
            raise FloatingPointError(f"the weights are not finite after training experience {number}. {cause}")
        ends.append(strategy.clock.train_iterations)
        ranks.append(sum(gate.gate.claimed_rank.values()) if gate is not None else 0)
        if is_long:
            trained = test_sets if whole else test_sets[: len(rows) + 1]
            later = [0.0] * (len(test_sets) - len(trained))
            rows.append(accuracies_on(trained, strategy.model) + later)
        else:
            strategy.eval(benchmark.test_stream)
        if after_experience is not None:
            after_experience(np.array(rows) if is_long else matrix.result())

    accuracy = np.array(rows) if is_long else matrix.result()
    accuracy = accuracy[~np.isnan(accuracy).all(axis=1)]  # an online stream is evaluated when a task ends
    network = build_network(run.network, run.heads, run.data)
    figures = {"acc": float(accuracy[-1].mean()), "task_ends": ends}
    if is_long and not whole:
        figures["over_time"] = over_time(accuracy)
    else:
        figures["accuracy_matrix"] = accuracy.round(4).tolist()
    figures["seconds"] = seconds - watch.seconds
    figures["extra_memory_bytes"] = extra_memory_bytes(strategy, plugins, network)
    if watch.points:
        figures["curve"] = watch.points
    if accuracy.shape[0] == accuracy.shape[1]:
        figures |= {"bwt": backward_transfer(accuracy), "forgetting": average_forgetting(accuracy)}
        figures["learning_acc"] = learning_accuracy(accuracy)
        figures |= {"min_acc": worst_case(watch.points)} if watch.points and len(accuracy) > 1 else {}
    if gate is not None:
        figures |= {"consolidated_at": gate.consolidated_at, "claimed_rank": ranks}
    return {"settings": settings, "figures": figures, "versions": {"algorithm": version_of(run.strategy), **versions()}}


def build_benchmark(run: Run, dataset_root: Path | None = None) -> CLScenario:
    """The run's streams; with ``validation`` the test stream is 1/6 of the training images, taken out of them."""
    if run.stream == "drifting":
        return benchmark_of(*drifting(run, dataset_root))
    if run.kind == "split":
        benchmark = groups_of_classes(run, run.n_tasks, dataset_root)
    else:
        train, test = parts_of(run.data, dataset_root, run.pixels)
        size, images = run.train_per_task, len(train.read()[1])
        if size is not None and size > images:
            raise ValueError(f"Invalid train_per_task: {size} (allowed: 1 to {images})")
        if run.validation and size is not None:
            size = min(images, round(size * 6 / 5))  # the held-out images come on top
        benchmark = permute_pixels(train, test, run.n_tasks, train_size=size, seed=run.seed, task_labels=False)
    if not run.validation and run.stream == "tasks":
        return benchmark
    train, test = ([e.dataset for e in stream] for stream in (benchmark.train_stream, benchmark.test_stream))
    if run.validation:
        held_out = [len(d) // 6 for d in train]
        train, test = [d[n:] for d, n in zip(train, held_out)], [d[:n] for d, n in zip(train, held_out)]
    train = blurred(train) if run.stream == "blurred" else train
    return benchmark_of([*train, train[0]] if run.stream == "returning" else train, test)


def versions() -> dict[str, str]:
    packages = ("avalanche-sp", "avalanche-lib", "torch", "numpy")
    return {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()}


@functools.cache
def quiet() -> None:
    """Drops Avalanche's own warnings: that it has no loggers, and deprecations.

    Its decorator resets the warning filters at every call, so the filter is in the function that shows warnings.
    """
    show = warnings.showwarning

    def show_others(message, category, filename, *args, **kwargs):
        if "avalanche" not in Path(filename).parts:
            show(message, category, filename, *args, **kwargs)

    warnings.showwarning = show_others
