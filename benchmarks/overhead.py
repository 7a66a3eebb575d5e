"""What our parts cost in time: ratios against torch's and Avalanche's own, paired in one process, one thread.

    python benchmarks/overhead.py --rounds 7

Measured in turn, round after round, so that a machine whose speed drifts changes both sides of a ratio alike; the
median over rounds is reported. Writes overhead.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from avalanche.benchmarks import SplitMNIST
from avalanche.training import Naive
from tabulate import tabulate
from torch import nn

from avalanche_sp import OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, split_mnist
from harness.cli import dataset_root, positive
from harness.run import quiet
from harness.settings import MNIST, ROOT
from harness.strategies import build_model

BATCH = 128
Timer = Callable[[], float]  # does the work once, returns seconds


def naive(model: nn.Module, plugins=(), criterion=None) -> Naive:
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=criterion or nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
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
        model, loss = build_model(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def epoch():
            for rows in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                optimizer.step()

        return seconds(epoch)

    def avalanche(experience) -> Timer:
        def epoch() -> float:
            strategy = naive(build_model())
            return seconds(lambda: strategy.train(experience))

        return epoch

    return {
        "bare torch loop": bare,
        "Naive, avalanche_sp split_mnist": avalanche(ours),
        "Naive, Avalanche SplitMNIST": avalanche(classic),
    }


def optimizer_step() -> dict[str, Timer]:
    """200 steps on the comparison's network (269,322 parameters), gradients ready."""

    def steps(make) -> Timer:
        model = build_model()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer = make(model.parameters())
        return lambda: seconds(lambda: [optimizer.step() for _ in range(200)])

    return {
        "torch.optim.Adam": steps(torch.optim.Adam),
        "SelectivePlasticityOptimizer": steps(SelectivePlasticityOptimizer),
    }


def gated_training(root: str) -> dict[str, Timer]:
    """An epoch of the second experience (29,404 images), Naive and squared error, consolidation included."""
    first, second = split_mnist(2, dataset_root=root).train_stream

    def epoch(plugins) -> Timer:
        def run() -> float:
            strategy = naive(build_model(), plugins(), OneHotMSELoss())
            strategy.train(first)
            return seconds(lambda: strategy.train(second))

        return run

    return {"without plugin": epoch(list), "SelectivePlasticityPlugin": epoch(lambda: [SelectivePlasticityPlugin()])}


def measure(timers: dict[str, Timer], rounds: int) -> list[dict]:
    """Median seconds of each, and the median of its ratio to the first, round by round."""
    for timer in timers.values():
        timer()  # warm-up
    times = [{name: timer() for name, timer in timers.items()} for _ in range(rounds)]
    reference = next(iter(timers))
    return [
        {
            "name": name,
            "seconds": statistics.median(t[name] for t in times),
            "ratio": statistics.median(t[name] / t[reference] for t in times),
            "ratio_min": min(t[name] / t[reference] for t in times),
            "ratio_max": max(t[name] / t[reference] for t in times),
        }
        for name in timers
    ]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=positive, default=7, help="rounds (default: 7)")
    p.add_argument("--output", type=Path, default=ROOT / "results" / "overhead", help="folder for overhead.json")
    p.add_argument("--dataset-root", type=dataset_root, default=str(MNIST), help="folder with MNIST/raw/*-ubyte")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    parts = {
        "data": ("an epoch of 30,596 images", data_path(args.dataset_root)),
        "optimizer": ("200 steps, 269,322 parameters", optimizer_step()),
        "plugin": ("an epoch of 29,404 images, consolidation included", gated_training(args.dataset_root)),
    }
    results = {}
    for part, (what, timers) in parts.items():
        results[part] = {"what": what, "batch_size": BATCH, "rounds": args.rounds, "rows": measure(timers, args.rounds)}
        rows = [
            {
                what: r["name"],
                "seconds": f"{r['seconds']:.3f}",
                "times the first": f"{r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})",
            }
            for r in results[part]["rows"]
        ]
        print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) + "\n", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "overhead.json"
    path.write_text(json.dumps({"torch": torch.__version__, **results}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
