"""What our parts cost in time: ratios against torch's and Avalanche's own, paired in one process, one thread.

    python benchmarks/overhead.py --rounds 7

Measured in turn, round after round, so that a machine whose speed drifts changes both sides of a ratio alike; the
median over rounds is reported. Writes overhead.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from avalanche.benchmarks import SplitMNIST
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training import Naive
from avalanche.training.plugins import SupervisedPlugin
from tabulate import tabulate
from torch import nn
from torch.optim import Optimizer

from avalanche_sp import OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, split_mnist
from harness.cli import dataset_root, positive
from harness.networks import build_network, perceptron
from harness.run import optimizer_bytes, quiet
from harness.settings import MNIST, ROOT

BATCH = 128
ONLINE_BATCH = 10
Timer = Callable[[], float]  # does the work once, returns seconds


def naive(model: nn.Module, plugins=(), criterion=None, optimizer=None, batch=BATCH) -> Naive:
    return Naive(
        model=model,
        optimizer=(optimizer or functools.partial(torch.optim.SGD, lr=0.05))(model.parameters()),
        criterion=criterion or nn.CrossEntropyLoss(),
        train_mb_size=batch,
        plugins=list(plugins),
        evaluator=None,
    )


def seconds(work: Callable[[], object]) -> float:
    gc.collect()  # nobody pays for the garbage of the run before
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def data_path(root: str) -> dict[str, Timer]:
    """An epoch of 2-task Split MNIST's first experience (30,596 images), three ways."""
    ours = split_mnist(2, dataset_root=root).train_stream[0]
    classic = SplitMNIST(2, fixed_class_order=range(10), dataset_root=root).train_stream[0]
    x, y, _ = ours.dataset.read_batch(list(range(len(ours.dataset))))

    def bare() -> float:
        model, loss = build_network(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def epoch():
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                optimizer.step()

        return seconds(epoch)

    def avalanche(experience) -> Timer:
        def epoch() -> float:
            strategy = naive(build_network())
            return seconds(lambda: strategy.train(experience))

        return epoch

    return {
        "bare torch loop": bare,
        "Naive, avalanche_sp split_mnist": avalanche(ours),
        "Naive, Avalanche SplitMNIST": avalanche(classic),
    }


def steps_alone(width: int) -> tuple[dict[str, Timer], dict[str, int]]:
    """100 steps of each optimizer, gradients ready; and the bytes of state that each keeps beyond Adam's."""

    def steps(make, consolidated: bool = False) -> tuple[Timer, Optimizer]:
        torch.manual_seed(0)
        model = perceptron(width, width)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer = make(model.parameters())
        optimizer.step()
        if consolidated:
            optimizer.consolidate()
        return lambda: seconds(lambda: [optimizer.step() for _ in range(100)]), optimizer

    optimizers = {
        "torch.optim.Adam": steps(torch.optim.Adam),
        "SelectivePlasticityOptimizer": steps(SelectivePlasticityOptimizer),
        "SelectivePlasticityOptimizer, consolidated": steps(SelectivePlasticityOptimizer, True),
        "torch.optim.Adam(fused=True)": steps(lambda p: torch.optim.Adam(p, fused=True)),
        "SelectivePlasticityOptimizer(fused=True)": steps(lambda p: SelectivePlasticityOptimizer(p, fused=True)),
        "SelectivePlasticityOptimizer(fused=True), consolidated": steps(
            lambda p: SelectivePlasticityOptimizer(p, fused=True), True
        ),
    }
    timers = {name: timer for name, (timer, _) in optimizers.items()}
    return timers, {name: optimizer_bytes(optimizer) for name, (_, optimizer) in optimizers.items()}


def training_steps() -> dict[str, Timer]:
    """100 whole training steps on a batch: forward, backward and the optimizer's."""

    def steps(make) -> Timer:
        torch.manual_seed(0)
        model, loss = build_network(), nn.CrossEntropyLoss()
        x, y = torch.randn(BATCH, 784), torch.randint(10, (BATCH,))
        optimizer = make(model.parameters())

        def train():
            for _ in range(100):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()

        return lambda: seconds(train)

    return {
        "torch.optim.Adam": steps(torch.optim.Adam),
        "SelectivePlasticityOptimizer": steps(SelectivePlasticityOptimizer),
        "torch.optim.Adam(fused=True)": steps(lambda p: torch.optim.Adam(p, fused=True)),
        "SelectivePlasticityOptimizer(fused=True)": steps(lambda p: SelectivePlasticityOptimizer(p, fused=True)),
    }


class StepClock(SupervisedPlugin):
    """Seconds of all training iterations, from before the forward pass to after the optimizer's step."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def before_training_iteration(self, strategy, **kwargs):
        self._start = time.perf_counter()

    def after_training_iteration(self, strategy, **kwargs):
        self.seconds += time.perf_counter() - self._start


def gated_training(root: str) -> tuple[dict[str, Timer], dict[str, Timer]]:
    """The second experience (29,404 images), Naive and squared error: its steps, and all of it with consolidation."""
    first, second = split_mnist(2, dataset_root=root).train_stream

    def trained(plugins, optimizer, steps_alone: bool) -> Timer:
        def run() -> float:
            clock = StepClock()
            strategy = naive(build_network(), [*plugins(), clock], OneHotMSELoss(), optimizer)
            strategy.train(first)
            clock.seconds = 0.0
            epoch = seconds(lambda: strategy.train(second))
            return clock.seconds if steps_alone else epoch

        return run

    def gate():
        return [SelectivePlasticityPlugin()]

    sgd, adam = (lambda p: torch.optim.SGD(p, lr=0.1)), torch.optim.Adam
    steps = {
        "SGD": trained(list, sgd, True),
        "SGD, SelectivePlasticityPlugin": trained(gate, sgd, True),
        "Adam": trained(list, adam, True),
        "Adam, SelectivePlasticityPlugin": trained(gate, adam, True),
    }
    epochs = {"SGD": trained(list, sgd, False), "SGD, SelectivePlasticityPlugin": trained(gate, sgd, False)}
    return steps, epochs


def online_training(root: str) -> dict[str, Timer]:
    """The first 400 mini-batches of two tasks of five, each an experience: no boundary is told."""
    tasks = [
        [part for part, _ in zip(split_online_stream([task], ONLINE_BATCH, seed=0), range(400))]
        for task in split_mnist(5, dataset_root=root).train_stream[:2]
    ]

    def trained(*plugins) -> Timer:
        def run() -> float:
            sgd = functools.partial(torch.optim.SGD, lr=0.02)
            strategy = naive(build_network(), [plugin() for plugin in plugins], OneHotMSELoss(), sgd, ONLINE_BATCH)
            return seconds(lambda: [strategy.train(part) for task in tasks for part in task])

        return run

    timers = {"SGD": trained()}
    for how in ("surprise", "continuous"):
        plugin = functools.partial(SelectivePlasticityPlugin, consolidate=how)
        timers[f'SGD, SelectivePlasticityPlugin(consolidate="{how}")'] = trained(plugin)
    return timers


def measure(timers: dict[str, Timer], rounds: int) -> list[dict]:
    """Median seconds of each, and the median of its ratio to the first, round by round.

    Optimizers called fused are set against torch's fused one, and Adam with the plugin against Adam.
    """
    for timer in timers.values():
        timer()  # warm-up
    times = [{name: timer() for name, timer in timers.items()} for _ in range(rounds)]
    first = next(iter(timers))
    rows = []
    for name in timers:
        reference = "torch.optim.Adam(fused=True)" if "fused" in name else "Adam" if name.startswith("Adam") else first
        ratios = [t[name] / t[reference] for t in times]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(t[name] for t in times),
                "reference": reference,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=positive, default=7, help="rounds (default: 7)")
    p.add_argument("--output", type=Path, default=ROOT / "results" / "overhead", help="folder for overhead.json")
    p.add_argument("--dataset-root", type=dataset_root, default=str(MNIST), help="folder with MNIST/raw/*-ubyte")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    small, small_bytes = steps_alone(256)
    large, large_bytes = steps_alone(1000)
    gated_steps, gated_epochs = gated_training(args.dataset_root)
    parts = {
        "data": ("an epoch of 30,596 images", data_path(args.dataset_root), {}),
        "step": ("100 steps, 269,322 parameters", small, small_bytes),
        "large step": ("100 steps, 1,796,010 parameters", large, large_bytes),
        "training step": ("100 training steps, 269,322 parameters", training_steps(), {}),
        "plugin step": ("the 230 training steps of an epoch", gated_steps, {}),
        "plugin epoch": ("an epoch of 29,404 images, consolidation included", gated_epochs, {}),
        "online": ("800 mini-batches of an online stream", online_training(args.dataset_root), {}),
    }
    results = {}
    for part, (what, timers, extra_bytes) in parts.items():
        rows = measure(timers, args.rounds)
        for row in rows:
            if row["name"] in extra_bytes:
                row["extra_bytes"] = extra_bytes[row["name"]]
        batch = ONLINE_BATCH if part == "online" else BATCH
        results[part] = {"what": what, "batch_size": batch, "rounds": args.rounds, "rows": rows}
        table = [
            {
                what: r["name"],
                "seconds": f"{r['seconds']:.3f}",
                "ratio": f"{r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})",
                "to": r["reference"],
                **({"extra bytes": r["extra_bytes"]} if extra_bytes else {}),
            }
            for r in rows
        ]
        print(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True) + "\n", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "overhead.json"
    path.write_text(json.dumps({"torch": torch.__version__, **results}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
