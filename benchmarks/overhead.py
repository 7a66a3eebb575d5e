"""Time that the optimizer and the plugin take: ratios to torch's and Avalanche's own, in one process, one thread.

    python benchmarks/overhead.py --rounds 7

All are measured in turn, round after round, so that a machine whose speed drifts changes both sides of a ratio alike.
Reported are medians over the rounds. Writes overhead.json.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from avalanche.benchmarks import SplitMNIST
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training import Naive
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.optim import SGD, Adam

from avalanche_sp import OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, split_mnist
from harness.cli import Where, parsed
from harness.data import folder_of
from harness.memory import optimizer_bytes
from harness.networks import build_network, perceptron
from harness.run import quiet
from harness.settings import ROOT

Timers = dict[str, Callable[[], float]]  # by name: does the work once, returns seconds
BATCH, ONLINE_BATCH = 128, 10
OURS, PLUGIN = "SelectivePlasticityOptimizer", "SelectivePlasticityPlugin"
OPTIMIZERS = {
    "torch.optim.Adam": Adam,
    OURS: SelectivePlasticityOptimizer,
    "torch.optim.Adam(fused=True)": partial(Adam, fused=True),
    f"{OURS}(fused=True)": partial(SelectivePlasticityOptimizer, fused=True),
}


def seconds(work: Callable[[], object]) -> float:
    gc.collect()  # nobody pays for the garbage of the run before
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_loop(make: Callable, batches: Callable[[], Iterable]) -> float:
    torch.manual_seed(0)
    model, loss, parts = build_network(), nn.CrossEntropyLoss(), batches()
    optimizer = make(model.parameters())

    def train() -> None:
        for x, y in parts:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    return seconds(train)


class StepClock(SupervisedPlugin):
    """Seconds of all training iterations, from before the forward pass to after the optimizer's step."""

    seconds = 0.0

    def before_training_iteration(self, strategy, **kwargs):
        self.seconds -= time.perf_counter()

    def after_training_iteration(self, strategy, **kwargs):
        self.seconds += time.perf_counter()


def naive(
    before: Sequence, timed: Sequence, make: Callable, plugin=None, loss=OneHotMSELoss, batch=BATCH, steps_alone=False
) -> float:
    """Seconds that Naive takes for the experiences ``timed``, after those ``before``: all, or its iterations alone."""
    model, clock = build_network(), StepClock()
    plugins = [plugin(), clock] if plugin else [clock]
    arguments = {"criterion": loss(), "train_mb_size": batch, "plugins": plugins, "evaluator": None}
    strategy = Naive(model=model, optimizer=make(model.parameters()), **arguments)
    for experience in before:
        strategy.train(experience)
    clock.seconds = 0.0
    whole = seconds(lambda: [strategy.train(experience) for experience in timed])
    return clock.seconds if steps_alone else whole


def data_path(root: str) -> Timers:
    """An epoch of 2-task Split MNIST's first experience."""
    ours = split_mnist(2, dataset_root=root).train_stream[0]
    classic = SplitMNIST(2, fixed_class_order=range(10), dataset_root=root).train_stream[0]
    x, y, _ = ours.dataset.read_batch(list(range(len(ours.dataset))))
    sgd = partial(SGD, lr=0.05)
    return {
        "bare torch loop": lambda: torch_loop(
            sgd, lambda: ((x[rows], y[rows]) for rows in torch.randperm(len(x)).split(BATCH))
        ),
        "Naive, avalanche_sp split_mnist": partial(naive, [], [ours], sgd, loss=nn.CrossEntropyLoss),
        "Naive, Avalanche SplitMNIST": partial(naive, [], [classic], sgd, loss=nn.CrossEntropyLoss),
    }


def training_steps() -> Timers:
    """100 training steps on one batch."""
    x, y = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
    return {name: partial(torch_loop, make, lambda: [(x, y)] * 100) for name, make in OPTIMIZERS.items()}


def steps(width: int) -> tuple[Timers, dict[str, int]]:
    """100 steps of each optimizer, gradients ready; and the bytes of state that each keeps beyond Adam's."""
    timers, extra = {}, {}
    for name, make in OPTIMIZERS.items():
        for consolidated in (False, True) if name.startswith(OURS) else (False,):
            torch.manual_seed(0)
            model = perceptron(width, width)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer = make(model.parameters())
            optimizer.step()
            if consolidated:
                optimizer.consolidate()
            row = f"{name}, consolidated" if consolidated else name
            timers[row] = partial(seconds, lambda optimizer=optimizer: [optimizer.step() for _ in range(100)])
            extra[row] = optimizer_bytes(optimizer)
    return timers, extra


def gated(root: str, steps_alone: bool) -> Timers:
    """Split MNIST's second experience of two: its iterations, or all of it with consolidation."""
    first, second = split_mnist(2, dataset_root=root).train_stream
    timers: Timers = {}
    for name, make in {"SGD": partial(SGD, lr=0.1), **({"Adam": Adam} if steps_alone else {})}.items():
        timers[name] = partial(naive, [first], [second], make, steps_alone=steps_alone)
        timers[f"{name}, {PLUGIN}"] = partial(timers[name], plugin=SelectivePlasticityPlugin)
    return timers


def online(root: str) -> Timers:
    """The first 400 mini-batches of two tasks of five, each an experience: no boundary is told."""
    tasks = split_mnist(5, dataset_root=root).train_stream[:2]
    parts = [part for t in tasks for part, _ in zip(split_online_stream([t], ONLINE_BATCH, seed=0), range(400))]
    train = partial(naive, [], parts, partial(SGD, lr=0.02), batch=ONLINE_BATCH)
    timers = {"SGD": train}
    for how in ("surprise", "continuous"):
        plugin = partial(SelectivePlasticityPlugin, consolidate=how)
        timers[f'SGD, {PLUGIN}(consolidate="{how}")'] = partial(train, plugin=plugin)
    return timers


def measure(timers: Timers, rounds: int) -> list[dict]:
    """Median seconds of each, and the median of its ratio to a reference, round by round.

    The reference is torch's fused Adam for fused optimizers, Adam for Adam with the plugin, else the first.
    """
    for timer in timers.values():
        timer()  # warm-up
    times = pd.DataFrame([{name: timer() for name, timer in timers.items()} for _ in range(rounds)])
    rows = []
    for name in timers:
        other = "Adam" if name.startswith("Adam") else next(iter(timers))
        reference = "torch.optim.Adam(fused=True)" if "fused" in name else other
        ratios = times[name] / times[reference]
        rows.append({"name": name, "seconds": times[name].median(), "reference": reference, "ratio": ratios.median()})
        rows[-1] |= {"ratio_min": ratios.min(), "ratio_max": ratios.max()}
    return rows


@dataclass(frozen=True)
class Settings(Where):
    """Settings of the measurement.

    Attributes:
        rounds: number of rounds
        output: folder of overhead.json
    """

    rounds: int = 7
    output: Path = ROOT / "results" / "overhead"

    def __post_init__(self):
        super().__post_init__()
        self.finds("mnist")


def main(argv: list[str] | None = None) -> int:
    settings = parsed(Settings, argv, __doc__)
    settings.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    quiet()
    root = str(folder_of("mnist", settings.dataset_root))
    (small, small_bytes), (large, large_bytes) = steps(256), steps(1000)
    parts = {
        "data": ("an epoch of 30,596 images", data_path(root), {}),
        "step": ("100 steps, 269,322 parameters", small, small_bytes),
        "large step": ("100 steps, 1,796,010 parameters", large, large_bytes),
        "training step": ("100 training steps, 269,322 parameters", training_steps(), {}),
        "plugin step": ("the 230 training steps of an epoch", gated(root, True), {}),
        "plugin epoch": ("an epoch of 29,404 images, consolidation included", gated(root, False), {}),
        "online": ("800 mini-batches of an online stream", online(root), {}),
    }
    results: dict[str, object] = {"torch": torch.__version__}
    for part, (what, timers, extra) in parts.items():
        rows = measure(timers, settings.rounds)
        rows = [row | ({"extra_bytes": extra[row["name"]]} if extra else {}) for row in rows]
        batch = ONLINE_BATCH if part == "online" else BATCH
        results[part] = {"what": what, "batch_size": batch, "rounds": settings.rounds, "rows": rows}
        print(f"\n{what}\n{pd.DataFrame(rows).to_string(index=False, float_format='%.3f')}", flush=True)
    path = settings.output / "overhead.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
