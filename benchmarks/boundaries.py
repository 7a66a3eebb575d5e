"""Boundaries that are found, not given: the plugin on streams that don't say where a task ends, beside one that does.

python benchmarks/boundaries.py --seeds 10 --output docs/results/boundaries
"""

import argparse
import sys
from collections.abc import Iterable
from statistics import median

from tabulate import tabulate

from harness.cli import add_common, names_of
from harness.files import write_whole
from harness.jobs import run_all
from harness.settings import USES_REPLAY, Run
from harness.statistics import interval

_SPLIT = {"benchmark": "split-mnist", "n_tasks": 5}
_PERMUTED = {"benchmark": "permuted-mnist", "n_tasks": 10, "train_per_task": 10000}
_REPLAY = ("sp-replay-sgd", "sp-replay-surprise", "sp-replay-continuous")
# By name: how the run is set, its strategies (the first is what the others are compared with) and buffers.
PARTS = {
    "split": (_SPLIT, ("sp", "sp-surprise", "sp-continuous"), (0,)),
    "split-replay": (_SPLIT, _REPLAY, (200, 1000)),
    "permuted": (_PERMUTED, ("sp", "sp-surprise", "sp-continuous"), (0,)),
    "permuted-replay": (_PERMUTED, _REPLAY, (200, 1000)),
    "online": (
        _SPLIT | {"stream": "online", "batch_size": 10, "overrides": (("lr", 0.02), ("openness", 0.1))},
        ("sp", "sp-surprise", "sp-continuous"),
        (0,),
    ),
    "online naive": (
        _SPLIT | {"stream": "online", "batch_size": 10, "overrides": (("lr", 0.02),)},
        ("naive-sgd",),
        (0,),
    ),
    "blurred-split": (_SPLIT | {"stream": "blurred"}, ("sp", "sp-surprise", "sp-continuous"), (0,)),
    "blurred-permuted": (_PERMUTED | {"stream": "blurred"}, ("sp", "sp-surprise", "sp-continuous"), (0,)),
    "drifting": (_PERMUTED | {"stream": "drifting"}, ("sp", "naive-sgd", "sp-surprise", "sp-continuous"), (0,)),
    "returning": (_SPLIT | {"stream": "returning"}, ("sp", "sp-surprise", "sp-continuous"), (0,)),
    "one task": (
        {"benchmark": "split-mnist", "n_tasks": 1, "epochs": 20},
        ("naive-sgd", "sp-surprise", "sp-continuous"),
        (0,),
    ),
}


def runs_of(part: str, seeds: Iterable[int], validation: bool) -> list[Run]:
    settings, strategies, buffers = PARTS[part]
    common = {"epochs": 1, "batch_size": 64, "validation": validation} | settings
    return [
        Run(strategy=strategy, replay_buffer=buffer, seed=seed, **common)
        for seed in seeds
        for strategy in strategies
        for buffer in buffers
        if (buffer > 0) == (strategy in USES_REPLAY)
    ]


def found(record: dict) -> tuple[list[int], int, int]:
    """Delays of the boundaries that were found, in iterations; how many were missed; how many alarms were false."""
    starts = record["task_ends"][:-1]
    delays, false = {}, 0
    for at in record["consolidated_at"]:
        before = [start for start in starts if start < at]
        if before and before[-1] not in delays:
            delays[before[-1]] = at - before[-1]
        else:
            false += 1
    return list(delays.values()), len(starts) - len(delays), false


def rows_of(part: str, records: list[dict]) -> list[dict]:
    """A row of the table for each strategy and buffer."""
    groups: dict[tuple, dict[int, dict]] = {}
    for r in records:
        groups.setdefault((r["run"]["strategy"], r["run"]["replay_buffer"]), {})[r["run"]["seed"]] = r
    rows = []
    for (strategy, buffer), of_seed in groups.items():
        told = groups[PARTS[part][1][0], buffer]
        pairs = [r["acc"] - told[seed]["acc"] for seed, r in of_seed.items() if seed in told]
        row = {
            "stream": part,
            "strategy": strategy,
            "buffer": buffer or "-",
            "ACC %": _shown(interval([r["acc"] for r in of_seed.values()])),
            "minus the first": _shown(interval(pairs)) if told is not of_seed and pairs else "-",
        }
        if strategy.endswith("-surprise"):
            delays, missed, false = zip(*(found(r) for r in of_seed.values()))
            every = [d for run in delays for d in run]
            row["found"] = f"{len(every)}/{len(every) + sum(missed)}"
            row["delay"] = f"{median(every):g} (max {max(every)})" if every else "-"
            row["false"] = sum(false)
        if part == "returning":
            kept = [[sum(r["accuracy_matrix"][i]) / 5 for i in (-2, -1)] for r in of_seed.values()]
            row["before, after the return"] = " ".join(f"{sum(k) / len(kept):.1f}" for k in zip(*kept))
            ranks = zip(*(r["claimed_rank"][-2:] for r in of_seed.values()))
            row["claimed rank"] = " ".join(f"{median(k):g}" for k in ranks)
        row["seconds"] = f"{median(r['seconds'] for r in of_seed.values()):.1f}"
        rows.append(row)
    return rows


def _no_curve(run: Run) -> bool:
    return False


def _shown(value: dict) -> str:
    return f"{value['mean']:.1f}" + (f" ± {value['ci95']:.1f}" if value["ci95"] is not None else "")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_common(p, seeds=3, output="boundaries")
    p.add_argument("--parts", type=names_of("part", tuple(PARTS)), default=list(PARTS), metavar="A,B")
    p.add_argument("--validation", action="store_true", help="score on held-out training images, for tuning")
    args = p.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows, failures = [], 0
    for part in args.parts:
        runs = runs_of(part, seeds, args.validation)
        results = args.output / "runs.jsonl"
        records, failed = run_all(runs, results, args.dataset_root, args.jobs, args.scheduler, _no_curve)
        rows, failures = rows + rows_of(part, records), failures + failed
    images = "held-out training images" if args.validation else "test images"
    shown = ", ".join(map(str, seeds))
    table = f"{images}, seeds {shown}; mean ± 95% interval (Student's t)\n\n{tabulate(rows, 'keys', 'pipe')}\n"
    write_whole(args.output / "table.md", table)
    print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
