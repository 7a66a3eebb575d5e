"""Command line of the benchmark scripts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from harness.protocols import PROTOCOLS, overrides_of
from harness.settings import MNIST, NETWORKS, ROOT, STRATEGIES, TASK_INCREMENTAL, USES_REPLAY, Run, strategies_of


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} (allowed: an integer, 1 or more)")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} (allowed: an integer, 0 or more)")
    return value


def buffers(text: str) -> list[int]:
    return [positive(number) for number in text.split(",")]


def names_of(kind: str, allowed: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r} (allowed: {', '.join(allowed)})")
        return names

    return parse


def dataset_root(text: str) -> str:
    if not (Path(text) / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        raise argparse.ArgumentTypeError(f"no MNIST in {text} (expected {text}/MNIST/raw/train-images-idx3-ubyte)")
    return text


def override(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} (allowed: name=number)") from None


def parser(description: str, *, benchmark: str, output: str, tasks: tuple[int, ...] | None) -> argparse.ArgumentParser:
    """Arguments that every script takes; ``tasks`` lists the numbers of tasks allowed (None: any)."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--protocol", choices=PROTOCOLS[benchmark], help="what else isn't said is as there: harness/protocols.py"
    )
    p.add_argument("--tasks", type=positive, choices=tasks, default=tasks[0] if tasks else 10, help="experiences")
    add_training(p)
    p.add_argument(
        "--replay-buffer", type=buffers, default=[200], metavar="N,M", help="stored samples of the replay strategies"
    )
    names = strategies_of(benchmark)
    if benchmark == "split-mnist":
        names = tuple(dict.fromkeys((*names, *TASK_INCREMENTAL)))
    p.add_argument(
        "--strategies", type=names_of("strategy", names), default=list(STRATEGIES), metavar="A,B", help=", ".join(names)
    )
    add_common(p, seeds=3, output=output)
    p.add_argument("--against", metavar="A", help="also report each strategy's ACC minus this one's, paired by seed")
    p.add_argument("--validation", action="store_true", help="score on held-out training images, for tuning")
    p.add_argument("--set", type=override, action="append", default=[], metavar="NAME=VALUE", help="override a setting")
    return p


def parsed(p: argparse.ArgumentParser, benchmark: str, argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a protocol's stand where the command line doesn't say otherwise."""
    known = p.parse_known_args(argv)[0]
    if getattr(known, "task_incremental", False):
        p.set_defaults(tasks=5, epochs=2, strategies=list(TASK_INCREMENTAL))  # PackNet needs a second epoch
    if known.protocol is not None:
        p.set_defaults(**PROTOCOLS[benchmark][known.protocol].arguments)
    return p.parse_args(argv)


def add_training(p: argparse.ArgumentParser) -> None:
    p.add_argument("--epochs", type=positive, default=1, help="epochs an experience")
    p.add_argument("--batch-size", type=positive, default=64, help="stream samples in a mini-batch")
    p.add_argument("--network", choices=NETWORKS, default="256-256", help="hidden widths, or a small CNN")


def add_common(p: argparse.ArgumentParser, *, seeds: int, output: str) -> None:
    p.add_argument("--seeds", type=positive, default=seeds, help="number of seeds")
    p.add_argument("--first-seed", type=natural, default=0, help="the first of them")
    p.add_argument("--output", type=Path, default=ROOT / "results" / output, help="folder for results and figures")
    add_workers(p)


def add_workers(p: argparse.ArgumentParser) -> None:
    p.add_argument("--jobs", type=positive, default=os.cpu_count(), help="runs at a time, one thread each")
    p.add_argument("--scheduler", metavar="ADDRESS", help="run on the workers of this Dask scheduler: docs/sweeps.md")
    p.add_argument("--dataset-root", type=dataset_root, default=str(MNIST), help="folder with MNIST/raw/*-ubyte")


def runs_of(args: argparse.Namespace, benchmark: str) -> list[Run]:
    """Seeds outermost, so that a comparison cut short is a whole one with fewer seeds."""
    return [
        Run(
            benchmark=benchmark,
            strategy=strategy,
            n_tasks=args.tasks,
            epochs=args.epochs,
            batch_size=args.batch_size,
            replay_buffer=buffer,
            seed=seed,
            train_per_task=getattr(args, "train_per_task", None),
            validation=args.validation,
            network=args.network,
            overrides=overrides_of(benchmark, args.protocol, strategy, buffer, args.set),
            task_incremental=getattr(args, "task_incremental", False),
        )
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for strategy in args.strategies
        for buffer in (args.replay_buffer if strategy in USES_REPLAY else (0,))
    ]


def check_task_incremental(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    allowed = strategies_of("split-mnist", args.task_incremental)
    for name in args.strategies:
        if name not in allowed:
            which = "with" if args.task_incremental else "without"
            p.error(f"--strategies {name}: not {which} --task-incremental (allowed: {', '.join(allowed)})")
    if args.task_incremental and args.tasks == 10:
        p.error("--tasks 10: not with --task-incremental, where a task of one class is no task (allowed: 2, 5)")


def check_against(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.against is not None and (args.against not in args.strategies or args.seeds < 2):
        p.error(f"--against {args.against}: needs 2 seeds or more, and one of --strategies {','.join(args.strategies)}")


def compare(runs: list[Run], args: argparse.Namespace) -> int:
    """Runs what is missing, writes and prints the report; the script's exit status."""
    from harness.jobs import run_all  # here, as torch and pandas are slow to load
    from harness.report import report
    from harness.store import Store, key_of

    where = f"on {args.scheduler}" if args.scheduler else f"{args.jobs} at a time"
    print(f"{len(runs)} runs, {where}; results go to {args.output}", flush=True)
    try:
        store = Store(args.output)
        failed = run_all(runs, store, args.dataset_root, args.jobs, args.scheduler)
        frame = store.frame()
        if keys := [key for key in map(key_of, (run.settings() for run in runs)) if key in frame.index]:
            print(*report(frame.loc[keys], args.output, args.against), sep="\n")
    except KeyboardInterrupt:
        print(f"\nInterrupted. {_go_on(args.output)}", file=sys.stderr)
        return 130
    except (OSError, ImportError) as error:  # a full disk, no such scheduler, or no Dask
        print(f"\nStopped: {error}. {_go_on(args.output)}", file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} of {len(runs)} runs failed: their errors are in {args.output}", file=sys.stderr)
    return 1 if failed else 0


def _go_on(results: Path) -> str:
    return f"Finished runs are in {results}; the same command goes on from there."
