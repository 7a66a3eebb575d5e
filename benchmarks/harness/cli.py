"""Command lines: a settings dataclass each, which tyro parses and which checks itself before anything starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from harness.protocols import PROTOCOLS, overrides_of
from harness.recipes import ABOUT, TASK_INCREMENTAL, USES_REPLAY, strategies_of
from harness.settings import MNIST, NETWORKS, ROOT, STRATEGIES, Run

T = TypeVar("T")


def _words(text: list[str]) -> tuple[str, ...]:
    """What commas and blanks part."""
    return tuple(" ".join(text).replace(",", " ").split())


def _assignments(text: list[str]) -> dict[str, float]:
    values = {}
    for word in _words(text):
        name, _, number = word.partition("=")
        try:
            values[name] = float(number)
        except ValueError:
            raise ValueError(f"{word} (allowed: NAME=NUMBER)") from None
    return values


def _list(kind: type, metavar: str, parse: Callable[[list[str]], object]) -> PrimitiveConstructorSpec:
    def shown(value) -> list[str]:
        return [",".join(map(str, value))]

    return PrimitiveConstructorSpec("*", metavar, parse, lambda value: isinstance(value, kind), shown)


Names = Annotated[tuple[str, ...], _list(tuple, "A,B", _words)]
Numbers = Annotated[tuple[int, ...], _list(tuple, "N,M", lambda text: tuple(map(int, _words(text))))]
_Assignments = Annotated[dict[str, float], _list(dict, "NAME=VALUE,...", _assignments)]
Overrides = Annotated[tuple[_Assignments, ...], tyro.conf.arg(name="set"), tyro.conf.UseAppendAction]
Network = Literal[tuple(NETWORKS)]


def merged(overrides: tuple[dict[str, float], ...]) -> dict[str, float]:
    """What every ``--set`` says together."""
    return {name: value for values in overrides for name, value in values.items()}


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Where:
    """Where runs are trained, and where their results go.

    Attributes:
        output: folder for results and figures
        jobs: runs at a time, one thread each; by default the processors that the process may use
        scheduler: run on the workers of this Dask scheduler instead: docs/sweeps.md
        dataset_root: folder with MNIST/raw/*-ubyte
    """

    output: Path = ROOT / "results"
    jobs: int = processors()
    scheduler: str | None = None
    dataset_root: Path = MNIST

    def __post_init__(self):
        self.at_least(1, "jobs")
        if not (self.dataset_root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
            expected = "a folder with MNIST/raw/train-images-idx3-ubyte"
            raise ValueError(f"Invalid dataset_root: {self.dataset_root} (allowed: {expected})")

    def at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Invalid {name}: {value} (allowed: {least} or more)")

    def one_of(self, name: str, allowed: Iterable[str]) -> None:
        for value in getattr(self, name):
            if value not in allowed:
                raise ValueError(f"Invalid {name}: {value} (allowed: {', '.join(allowed)})")


@dataclass(frozen=True)
class Comparison(Where):
    """A comparison of strategies on one benchmark.

    Attributes:
        protocol: a published protocol, whose settings are the defaults: harness/protocols.py
        strategies: names, in any order
        tasks: experiences
        epochs: epochs an experience
        batch_size: stream samples in a mini-batch
        network: hidden widths, or a small CNN
        replay_buffer: numbers of stored samples of the strategies with replay
        seeds: number of seeds
        first_seed: the first of them
        against: also report each strategy's ACC minus this one's, paired by seed
        validation: score on held-out training images, for tuning
        set: settings of the strategies that replace their recipes', such as lr=0.1
    """

    benchmark: ClassVar[str]
    protocol: str | None = None
    strategies: Names = STRATEGIES
    tasks: int = 2
    epochs: int = 1
    batch_size: int = 64
    network: Network = "256-256"
    replay_buffer: Numbers = (200,)
    seeds: int = 3
    first_seed: int = 0
    against: str | None = None
    validation: bool = False
    set: Overrides = ()

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "tasks", "epochs", "batch_size", "seeds")
        self.at_least(0, "first_seed")
        if min(self.replay_buffer, default=0) < 1:
            raise ValueError(f"Invalid replay_buffer: {self.replay_buffer} (allowed: numbers of 1 or more)")
        if self.against is not None and (self.against not in self.strategies or self.seeds < 2):
            allowed = f"one of the strategies, {', '.join(self.strategies)}, with 2 seeds or more"
            raise ValueError(f"Invalid against: {self.against} (allowed: {allowed})")
        for run in self.runs():
            run.settings()  # the strategy and its settings are there

    def runs(self) -> list[Run]:
        """Seeds outermost, so that a comparison cut short is a whole one with fewer seeds."""
        own = merged(self.set)
        return [
            Run(
                benchmark=self.benchmark,
                strategy=strategy,
                n_tasks=self.tasks,
                epochs=self.epochs,
                batch_size=self.batch_size,
                replay_buffer=buffer,
                seed=seed,
                train_per_task=getattr(self, "train_per_task", None),
                validation=self.validation,
                network=self.network,
                overrides=overrides_of(self.benchmark, self.protocol, strategy, buffer, own.items()),
                task_incremental=getattr(self, "task_incremental", False),
            )
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for strategy in self.strategies
            for buffer in (self.replay_buffer if strategy in USES_REPLAY else (0,))
        ]


@dataclass(frozen=True)
class SplitMNIST(Comparison):
    __doc__ = f"""{Comparison.__doc__}
        task_incremental: a head for each task, chosen by task labels; the defaults are then 5 tasks, 2 epochs
    """

    benchmark: ClassVar[str] = "split-mnist"
    output: Path = ROOT / "results" / "split_mnist"
    protocol: Literal[tuple(PROTOCOLS["split-mnist"])] | None = None
    tasks: Literal[2, 5, 10] = 2
    task_incremental: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.task_incremental and self.tasks == 10:
            raise ValueError("Invalid tasks: 10 (allowed with task_incremental: 2, 5, as one class is no task)")


@dataclass(frozen=True)
class PermutedMNIST(Comparison):
    __doc__ = f"""{Comparison.__doc__}
        train_per_task: training images a task; None: all 60000
    """

    benchmark: ClassVar[str] = "permuted-mnist"
    output: Path = ROOT / "results" / "permuted_mnist"
    protocol: Literal[tuple(PROTOCOLS["permuted-mnist"])] | None = None
    tasks: int = 10
    train_per_task: int | None = None

    def __post_init__(self):
        self.at_least(1, "train_per_task")
        super().__post_init__()


@dataclass(frozen=True)
class _Presets:
    protocol: str | None = None
    task_incremental: bool = False


def parsed(kind: type[T], argv: list[str] | None, description: str, default: T | None = None) -> T:
    """The command line's settings. What is wrong with them is said on stderr, with status 2."""
    return tyro.cli(kind, args=argv, description=description, default=default)


def comparison(kind: type[Comparison], argv: list[str] | None, description: str) -> Comparison:
    """The settings of a comparison. A protocol's are the defaults."""
    presets, _ = tyro.cli(_Presets, args=argv, return_unknown_args=True, add_help=False)
    defaults: Mapping = {}
    if presets.task_incremental:  # PackNet needs a second epoch
        defaults = {"tasks": 5, "epochs": 2, "strategies": TASK_INCREMENTAL, "task_incremental": True}
    if presets.protocol in PROTOCOLS[kind.benchmark]:
        defaults = {**defaults, **PROTOCOLS[kind.benchmark][presets.protocol].arguments}
    return parsed(kind, argv, f"{description}\n\n{about(kind.benchmark)}", kind(**defaults))


def about(*benchmarks: str) -> str:
    """A line on each strategy that the benchmarks have."""
    names = {name for benchmark in benchmarks for name in strategies_of(benchmark)}
    names.update(TASK_INCREMENTAL if "split-mnist" in benchmarks else ())
    return "strategies:\n" + "\n".join(f"  {name:<21} {line}" for name, line in ABOUT.items() if name in names)


def status(work: Callable[[], int], go_on: str) -> int:
    """The exit status of ``work``: its own, 130 after Ctrl-C, 1 after an error.

    Args:
        go_on: where the results so far are.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {go_on}", file=sys.stderr)
        return 130
    except Exception as error:  # a full disk, no such scheduler, no Dask, or a search's run
        print(f"\nStopped: {error}. {go_on}", file=sys.stderr)
        return 1


def compare(settings: Comparison) -> int:
    """Trains what is missing, then writes and prints the report; the script's exit status."""
    from harness.jobs import run_all  # here, as pandas is slow to load
    from harness.store import Store, key_of

    def work() -> int:
        store, runs = Store(settings.output), settings.runs()
        where = f"on {settings.scheduler}" if settings.scheduler else f"{settings.jobs} at a time"
        print(f"{len(runs)} runs, {where}; results go to {settings.output}", flush=True)
        failed = run_all(runs, store, settings.dataset_root, settings.jobs, settings.scheduler)
        if failed:
            print(f"{failed} of {len(runs)} runs failed: their errors are in {settings.output}", file=sys.stderr)
        frame = store.frame()
        if keys := [key for key in map(key_of, (run.settings() for run in runs)) if key in frame.index]:
            from harness.report import report

            print(*report(frame.loc[keys], settings.output, settings.against), sep="\n")
        return 1 if failed else 0

    return status(work, f"Finished runs are in {settings.output}; the same command goes on from there.")
