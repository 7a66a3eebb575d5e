"""Trains and measures one run: from its settings to a record of results. Runs in a worker process."""

from __future__ import annotations

import importlib.metadata
import platform
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.models import avalanche_forward
from avalanche.training.plugins import AGEMPlugin, EvaluationPlugin, GEMPlugin, SupervisedPlugin
from avalanche.training.regularization import RegularizationMethod
from torch import nn

from avalanche_sp import (
    AccuracyMatrix,
    ConsolidationPlugin,
    SelectivePlasticityPlugin,
    average_forgetting,
    backward_transfer,
    learning_accuracy,
    permuted_mnist,
    split_mnist,
)
from avalanche_sp.classic import benchmark_of
from harness.networks import build_network, network_bytes
from harness.rehearsal import stored_bytes
from harness.settings import Run
from harness.strategies import build_model, build_strategy, recipe_of
from harness.streams import class_order, drifting, parts, rearranged

CURVE_POINTS = 10  # measurements of the accuracy curve in an experience
FIRST_STEPS = (1, 2, 5, 10, 20)  # and at these iterations of every later one, where old tasks fall deepest
CURVE_IMAGES = 1000  # test images a task behind each


class AccuracyCurve(SupervisedPlugin):
    """Accuracy on every task, in percent, during an experience; ``seconds`` is what measuring took."""

    def __init__(self, test_sets: list[list[torch.Tensor]]):
        super().__init__()
        self.test_sets = test_sets
        self.points: list[dict] = []
        self.seconds = 0.0

    def before_training_exp(self, strategy, **kwargs):
        iterations = len(strategy.dataloader) * strategy.train_epochs
        self._at = {max(1, round(iterations * (i + 1) / CURVE_POINTS)) for i in range(CURVE_POINTS)}
        self._experience = strategy.clock.train_exp_counter
        if self._experience:
            self._at |= set(FIRST_STEPS)

    @torch.no_grad()
    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations + 1 not in self._at:
            return
        start = time.perf_counter()
        strategy.model.eval()
        accuracies = [
            100 * (avalanche_forward(strategy.model, x, t).argmax(1) == y).float().mean().item()
            for x, y, t in self.test_sets
        ]
        strategy.model.train()
        iteration = strategy.clock.train_iterations + 1
        self.points.append({"experience": self._experience, "iteration": iteration, "task_acc": accuracies})
        self.seconds += time.perf_counter() - start


def execute(
    run: Run,
    dataset_root: str,
    key: str,
    after_experience: Callable[[np.ndarray], None] | None = None,
    watch: bool = True,
) -> dict:
    """Trains the run and returns its record, of which ``jobs.row_of`` makes a row of the store.

    Args:
        after_experience: called after each experience with the accuracy matrix so far; what it raises ends the run.
        watch: whether to measure accuracies during an experience, too, which takes longer than to train it.
    """
    torch.set_num_threads(1)
    benchmark = build_benchmark(run, dataset_root)
    smallest = min(len(e.dataset) for e in benchmark.train_stream)
    if run.batch_size > smallest:  # no whole batch: nothing would be trained
        raise ValueError(f"Invalid batch_size: {run.batch_size} (allowed: at most {smallest}, the smallest experience)")
    test_sets = [_first_images(e.dataset, CURVE_IMAGES) for e in benchmark.test_stream]
    torch.manual_seed(run.seed)
    random.seed(run.seed)  # which Avalanche's A-GEM draws its memory with
    recipe = recipe_of(run)
    model = build_model(run)
    matrix, curve = AccuracyMatrix(), AccuracyCurve(test_sets)
    # An online stream's curve would have a point for every batch; and amid pruning PackNet has no old task's network.
    watch = watch and run.stream == "tasks" and recipe.model != "packnet"
    strategy, plugins = build_strategy(run, model, [curve] if watch else [], EvaluationPlugin(matrix))

    seconds, ends, ranks = 0.0, [], []
    gate = next((p for p in plugins if isinstance(p, SelectivePlasticityPlugin)), None)
    train_stream = benchmark.train_stream
    for experiences in [train_stream] if run.strategy == "joint" else train_stream:
        start = time.perf_counter()
        # A last batch of a few images makes a step of a few images' noise: it can undo a class (docs/experiments.md).
        for part in [experiences] if run.strategy == "joint" else parts(run, experiences):
            strategy.train(part, drop_last=True, shuffle=run.stream != "drifting")
        seconds += time.perf_counter() - start
        _check_finite(strategy)
        ends.append(strategy.clock.train_iterations)
        ranks.append(sum(a.claimed_rank for a in gate.layers.values()) if gate is not None else 0)
        strategy.eval(benchmark.test_stream)
        if after_experience is not None:
            after_experience(matrix.result())

    accuracy = matrix.result()
    accuracy = accuracy[~np.isnan(accuracy).all(axis=1)]  # an online stream is evaluated when a task ends
    incremental = accuracy.shape[0] == accuracy.shape[1]
    return {
        "key": key,
        "run": run.to_json(),
        "recipe": {**asdict(recipe), "plugins": list(recipe.plugins)},  # as it is read back from JSON
        "acc": float(accuracy[-1].mean()),
        "bwt": backward_transfer(accuracy) if incremental else None,
        "forgetting": average_forgetting(accuracy) if incremental else None,
        "learning_acc": learning_accuracy(accuracy) if incremental else None,
        "min_acc": worst_case(curve.points) if incremental and curve.points else None,
        "accuracy_matrix": accuracy.round(4).tolist(),
        "curve": curve.points,
        "task_ends": ends,
        "consolidated_at": gate.consolidated_at if gate is not None else [],
        "claimed_rank": ranks,
        "seconds": seconds - curve.seconds,
        "extra_memory_bytes": sum(memory_bytes(p) for p in plugins)
        + stored_bytes(strategy)
        + optimizer_bytes(strategy.optimizer)
        + network_bytes(model)
        - network_bytes(build_network(run.network, run.heads)),  # a network of another size counts by what it is larger
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def worst_case(points: list[dict]) -> float | None:
    """Mean over the old tasks of the lowest accuracy that each had after it was learned (M. De Lange et al., Continual
    evaluation for lifelong learning, ICLR 2023, min-ACC), on the curve's images; None if no task is old."""
    last = points[-1]["experience"]
    lowest = [min(p["task_acc"][task] for p in points if p["experience"] > task) for task in range(last)]
    return float(np.mean(lowest)) if lowest else None


def _check_finite(strategy) -> None:
    """Few methods look at their loss: one that diverged would be reported as one that guesses."""
    if not all(p.isfinite().all() for p in strategy.model.parameters()):
        number = strategy.clock.train_exp_counter - 1
        raise FloatingPointError(
            f"the weights are not finite after training experience {number}. The usual cause is too high a "
            "learning rate."
        )


def build_benchmark(run: Run, dataset_root: str) -> CLScenario:
    """The run's streams; with ``validation`` the test stream is 1/6 of the training images, taken out of them."""
    if run.stream == "drifting":
        return benchmark_of(*drifting(run, dataset_root))
    if run.benchmark == "split-mnist":
        benchmark = split_mnist(
            run.n_tasks,
            class_order=class_order(run),
            seed=run.seed,
            return_task_id=run.task_incremental,
            class_ids_from_zero_in_each_exp=run.task_incremental,
            dataset_root=dataset_root,
        )
    else:
        size = run.train_per_task
        if run.validation and size is not None:
            size = min(60000, round(size * 6 / 5))  # what is held out comes on top
        benchmark = permuted_mnist(run.n_tasks, train_size=size, seed=run.seed, dataset_root=dataset_root)
    if not run.validation and run.stream in ("tasks", "random classes"):
        return benchmark
    train, test = ([e.dataset for e in stream] for stream in (benchmark.train_stream, benchmark.test_stream))
    if run.validation:
        held_out = [len(d) // 6 for d in train]
        train, test = [d[n:] for d, n in zip(train, held_out)], [d[:n] for d, n in zip(train, held_out)]
    return benchmark_of(*rearranged(run, train, test))


def memory_bytes(plugin: SupervisedPlugin) -> int:
    """What a method keeps from one experience to the next, beyond the network and its optimizer's state."""
    if hasattr(plugin, "state_bytes"):
        return plugin.state_bytes
    if isinstance(plugin, ConsolidationPlugin):
        return 0  # it holds the optimizer's own tensors
    kept = vars(plugin)
    if isinstance(plugin, (AGEMPlugin, GEMPlugin)):  # their gradients are made anew for each step
        kept = {}
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(kept)}
    return sum(tensors.values()) + stored_bytes(plugin)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What a method adds to SGD's or Adam's own state."""
    own = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
    return sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and name not in own
    )


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, RegularizationMethod):
        return _tensors(vars(value))
    data = getattr(value, "data", None)  # Avalanche's ParamData
    return [data] if isinstance(data, torch.Tensor) else []


def _first_images(dataset, n: int) -> list[torch.Tensor]:
    """Images, their labels and task labels."""
    return dataset.read_batch(list(range(min(n, len(dataset)))))


def versions() -> dict[str, str]:
    packages = ("avalanche-sp", "avalanche-lib", "torch", "numpy")
    return {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()}


def quiet() -> None:
    """Drops what Avalanche says to itself: that it has no loggers, and what it will deprecate.

    Its decorator resets the warning filters at every call, so the filter is where warnings are shown.
    """
    show = warnings.showwarning

    def show_others(message, category, filename, *args, **kwargs):
        if "avalanche" not in Path(filename).parts:
            show(message, category, filename, *args, **kwargs)

    warnings.showwarning = show_others
