"""Boundaries that are found, not given: the plugin on streams that don't say where a task ends, beside one that does.

python benchmarks/boundaries.py --seeds 10 --output docs/results/boundaries
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from tabulate import tabulate

from harness.cli import add_common, names_of
from harness.files import write_whole
from harness.jobs import read_results, run_all
from harness.report import mean_and_interval
from harness.settings import Run
from harness.statistics import interval

_SPLIT = {"benchmark": "split-mnist", "n_tasks": 5}
_PERMUTED = {"benchmark": "permuted-mnist", "n_tasks": 10, "train_per_task": 10000}
_ONLINE = _SPLIT | {"stream": "online", "batch_size": 10}


def _all(*names: str) -> tuple[str, ...]:
    """Each strategy as it is told the boundaries, and as it isn't."""
    return tuple(f"{name}{how}" for name in names for how in ("", "-surprise", "-continuous"))


# By name: how the run is set, its strategies and buffers.
PARTS = {
    "split": (_SPLIT, _all("sp", "sp-both"), (0,)),
    "split-replay": (_SPLIT, _all("sp-replay"), (200, 1000)),
    "online": (_ONLINE | {"overrides": (("lr", 0.02), ("openness", 0.1))}, _all("sp"), (0,)),
    "online naive": (_ONLINE | {"overrides": (("lr", 0.02),)}, ("naive-sgd",), (0,)),
    "online-replay": (_ONLINE | {"overrides": (("lr", 3e-4),)}, (*_all("sp-replay"), "replay-adaptive"), (500,)),
    "permuted": (_PERMUTED, _all("sp", "sp-both"), (0,)),
    "permuted-replay": (_PERMUTED, _all("sp-replay"), (200, 1000)),
    "one task": (_SPLIT | {"n_tasks": 1, "epochs": 20}, ("naive-sgd", "sp-surprise", "sp-continuous"), (0,)),
    "blurred-split": (_SPLIT | {"stream": "blurred"}, _all("sp"), (0,)),
    "blurred-permuted": (_PERMUTED | {"stream": "blurred"}, _all("sp"), (0,)),
    "drifting": (_PERMUTED | {"stream": "drifting"}, (*_all("sp"), "naive-sgd"), (0,)),
    "returning": (_SPLIT | {"stream": "returning"}, _all("sp"), (0,)),
}


def told(strategy: str, part: str) -> str:
    """What a strategy is compared with: itself, told the boundaries; ungated training where there are none."""
    base = strategy.removesuffix("-surprise").removesuffix("-continuous")
    return base if base in PARTS[part][1] else "naive-sgd"


def runs_of(part: str, seeds: Iterable[int], validation: bool) -> list[Run]:
    settings, strategies, buffers = PARTS[part]
    common = {"epochs": 1, "batch_size": 64, "validation": validation} | settings
    return [
        Run(strategy=strategy, replay_buffer=buffer, seed=seed, **common)
        for seed in seeds
        for strategy in strategies
        for buffer in buffers
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
        base = groups.get((told(strategy, part), buffer), {})
        pairs = [r["acc"] - base[seed]["acc"] for seed, r in of_seed.items() if seed in base]
        row = {
            "stream": part,
            "strategy": strategy,
            "buffer": buffer or "-",
            "runs": len(of_seed),
            "ACC %": mean_and_interval(interval([r["acc"] for r in of_seed.values()])),
            "minus told": mean_and_interval(interval(pairs)) if base is not of_seed and pairs else "-",
        }
        if part == "drifting":  # it has no boundary to be found
            row["consolidated"] = f"{median(len(r['consolidated_at']) for r in of_seed.values()):g}"
        elif strategy.endswith("-surprise"):
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


def stored(runs: list[Run], results: Path) -> list[dict]:
    """The records that are there, of whatever code; a run's last one."""
    records = {json.dumps(r["run"], sort_keys=True): r for r in read_results(results) if "error" not in r}
    keys = [json.dumps(run.to_json(), sort_keys=True) for run in runs]
    return [records[key] for key in keys if key in records]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_common(p, seeds=3, output="boundaries")
    p.add_argument("--parts", type=names_of("part", tuple(PARTS)), default=list(PARTS), metavar="A,B")
    p.add_argument("--validation", action="store_true", help="score on held-out training images, for tuning")
    p.add_argument("--stored", action="store_true", help="train nothing: the table of what is in the output already")
    args = p.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows, failures = [], 0
    for part in args.parts:
        runs = runs_of(part, seeds, args.validation)
        results = args.output / "runs.jsonl"
        if args.stored:
            records, failed = stored(runs, results), 0
        else:
            records, failed = run_all(runs, results, args.dataset_root, args.jobs, args.scheduler, lambda run: False)
        rows, failures = rows + rows_of(part, records), failures + failed
    images = "held-out training images" if args.validation else "test images"
    shown = ", ".join(map(str, seeds))
    table = f"{images}, seeds {shown}; mean ± 95% interval (Student's t)\n\n{tabulate(rows, 'keys', 'pipe')}\n"
    write_whole(args.output / "table.md", table)
    print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
