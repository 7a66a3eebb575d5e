"""Command lines: each is a settings dataclass, which tyro parses and which checks itself before anything starts."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from harness.data import DATA, PIXELS, folder_of
from harness.protocols import PROTOCOLS, overrides_of
from harness.recipes import ABOUT, NAMES, TASK_INCREMENTAL, USES_REPLAY, strategies_of, strategy_called
from harness.settings import NETWORKS, ROOT, STRATEGIES, Run

T = TypeVar("T")


def _words(text: list[str]) -> tuple[str, ...]:
    """The words between commas and blanks."""
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
    return PrimitiveConstructorSpec(
        "*", metavar, parse, lambda value: isinstance(value, kind), lambda value: [",".join(map(str, value))]
    )


Names = Annotated[tuple[str, ...], _list(tuple, "A,B", _words)]
Strategies = Annotated[tuple[str, ...], _list(tuple, "A,B", lambda text: tuple(map(strategy_called, _words(text))))]
Strategy = Annotated[
    str,
    PrimitiveConstructorSpec(
        1, "NAME", lambda text: strategy_called(text[0]), lambda value: isinstance(value, str), lambda value: [value]
    ),
]
Numbers = Annotated[tuple[int, ...], _list(tuple, "N,M", lambda text: tuple(map(int, _words(text))))]
_Assignments = Annotated[dict[str, float], _list(dict, "NAME=VALUE,...", _assignments)]


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Where:
    """Output folder, workers and data set.

    Attributes:
        output: folder of results and figures
        jobs: runs at a time, one thread each; by default the processors that the process may use
        scheduler: run on the workers of this Dask scheduler instead: docs/sweeps.md
        dataset_root: folder of the data set; None: its own in benchmarks/data
    """

    output: Path = ROOT / "results"
    jobs: int = processors()
    scheduler: str | None = None
    dataset_root: Path | None = None

    def __post_init__(self):
        self.at_least(1, "jobs")

    def finds(self, data: str) -> None:
        """The data set is where it should be."""
        folder = folder_of(data, self.dataset_root)
        if not (folder / DATA[data].file).exists():
            or_else = "" if DATA[data].shipped else ", or --download"
            raise ValueError(f"Invalid dataset_root: {folder} (allowed: a folder with {DATA[data].file}{or_else})")

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
class Training(Where):
    """How a strategy is trained.

    Attributes:
        epochs: epochs an experience
        batch_size: stream samples in a mini-batch
        network: hidden widths, or another network
        download: fetch the data set, if it is not shipped
        first_seed: the first seed
        set: settings of the strategy that replace its recipe's, such as lr=0.1
    """

    epochs: int = 1
    batch_size: int = 64
    network: Literal[tuple(NETWORKS)] = "256-256"
    download: bool = False
    first_seed: int = 0
    set: Annotated[tuple[_Assignments, ...], tyro.conf.UseAppendAction] = ()

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "epochs", "batch_size")
        self.at_least(0, "first_seed")
        if not self.download:
            self.finds(self.benchmark.partition("-")[2])

    def fetch(self) -> None:
        """Downloads the data set if that is asked for and it is not there."""
        if self.download:
            data = self.benchmark.partition("-")[2]
            folder = folder_of(data, self.dataset_root)
            folder.mkdir(parents=True, exist_ok=True)
            for train in (True, False):
                DATA[data].read(folder, train, True)

    def run(self, benchmark: str, strategy: str, protocol: str | None = None, **settings) -> Run:
        """A run with these settings. Those of ``set`` go before the protocol's."""
        own = [pair for values in self.set for pair in values.items()]
        overrides = overrides_of(benchmark, protocol, strategy, settings["replay_buffer"], own)
        shared = {"epochs": self.epochs, "batch_size": self.batch_size, "network": self.network}
        return Run(benchmark, strategy, overrides=overrides, **shared, **settings)


@dataclass(frozen=True)
class Comparison(Training):
    """A comparison of strategies on one benchmark.

    Attributes:
        data: the data set; those that are not shipped need --download once
        strategies: names as in the tables, without blanks (gate+optimizer), or as in the store (sp-both)
        tasks: experiences
        replay_buffer: numbers of stored samples of the strategies with replay
        seeds: number of seeds
        against: also report each strategy's ACC minus this one's, paired by seed
        validation: score on held-out training images, for tuning
        pixels: normalised, or as they are: between 0 and 1
        protocol: a published protocol on MNIST, whose settings are the defaults: harness/protocols.py
        output: folder of results and figures; None: one of the benchmark in results
    """

    kind: ClassVar[str]
    data: Literal[tuple(DATA)] = "mnist"
    strategies: Strategies = STRATEGIES
    tasks: int = 2
    replay_buffer: Numbers = (200,)
    seeds: int = 3
    against: Strategy | None = None
    validation: bool = False
    pixels: Literal[PIXELS] = "normalised"
    protocol: str | None = None
    output: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "tasks", "seeds")
        if min(self.replay_buffer, default=0) < 1:
            raise ValueError(f"Invalid replay_buffer: {self.replay_buffer} (allowed: numbers of 1 or more)")
        if self.against is not None and (self.against not in self.strategies or self.seeds < 2):
            allowed = f"one of {', '.join(self.strategies)}, with 2 seeds or more"
            raise ValueError(f"Invalid against: {self.against} (allowed: {allowed})")
        protocols = PROTOCOLS.get(self.benchmark, {})
        if self.protocol is not None and self.protocol not in protocols:
            allowed = ", ".join(protocols) or "none"
            raise ValueError(f"Invalid protocol: {self.protocol} (allowed on {self.benchmark}: {allowed})")
        for run in self.runs():
            run.settings()  # the strategy exists, and so do its settings

    @property
    def benchmark(self) -> str:
        return f"{self.kind}-{self.data}"

    @property
    def folder(self) -> Path:
        return self.output or ROOT / "results" / self.benchmark.replace("-", "_")

    def runs(self) -> list[Run]:
        """Seeds outermost, so that a comparison cut short is a whole one with fewer seeds."""
        names = {"train_per_task", "task_incremental"}.intersection(vars(self))  # of one kind of benchmark alone
        names |= {"validation", "pixels"}
        shared = {"n_tasks": self.tasks} | {name: getattr(self, name) for name in names}
        return [
            self.run(self.benchmark, strategy, self.protocol, replay_buffer=buffer, seed=seed, **shared)
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for strategy in self.strategies
            for buffer in (self.replay_buffer if strategy in USES_REPLAY else (0,))
        ]


@dataclass(frozen=True)
class ClassIncremental(Comparison):
    """Groups of classes, one after another.

    Attributes:
        tasks: experiences: a divisor of the number of classes
        task_incremental: a head for each task, chosen by task labels; the defaults are then 5 tasks, 2 epochs
    """

    kind: ClassVar[str] = "split"
    task_incremental: bool = False


@dataclass(frozen=True)
class DomainIncremental(Comparison):
    """Permutations of the pixels, one after another.

    Attributes:
        train_per_task: training images a task; None: all
    """

    kind: ClassVar[str] = "permuted"
    tasks: int = 10
    train_per_task: int | None = None

    def __post_init__(self):
        self.at_least(1, "train_per_task")
        super().__post_init__()


@dataclass(frozen=True)
class _Presets:
    data: str = "mnist"
    protocol: str | None = None
    task_incremental: bool = False


def parsed(kind: type[T], argv: list[str] | None, description: str, default: T | None = None) -> T:
    """The command line's settings. An error is explained on stderr and ends the process with status 2."""
    return tyro.cli(kind, args=argv, description=description, default=default)


def comparison(kind: type[Comparison], argv: list[str] | None, description: str, **defaults) -> Comparison:
    """The settings of a comparison. A protocol's are the defaults."""
    presets, _ = tyro.cli(_Presets, args=argv, return_unknown_args=True, add_help=False)
    if presets.task_incremental:  # PackNet needs a second epoch
        defaults |= {"tasks": 5, "epochs": 2, "strategies": TASK_INCREMENTAL, "task_incremental": True}
    if protocol := PROTOCOLS.get(f"{kind.kind}-{presets.data}", {}).get(presets.protocol):
        defaults |= protocol.arguments
    return parsed(kind, argv, f"{description}\n\n{about(kind.kind)}", kind(**defaults))


def about(*kinds: str) -> str:
    """A line on each strategy that the kinds of benchmarks have."""
    names = {name for kind in kinds for name in strategies_of(kind)}
    names.update(TASK_INCREMENTAL if "split" in kinds else ())
    lines = {name: f"{NAMES[name]}: {line}" if name in NAMES else line for name, line in ABOUT.items()}
    return "strategies:\n" + "\n".join(f"  {name:<21} {line}" for name, line in lines.items() if name in names)


def status(work: Callable[[], int], go_on: str) -> int:
    """The exit status of ``work``: its own, 130 after Ctrl-C, 1 after an error. ``go_on``: a message."""
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {go_on}", file=sys.stderr)
        return 130
    except Exception as error:  # a full disk, no such scheduler, no Dask, or a search's run
        print(f"\nStopped: {error}. {go_on}", file=sys.stderr)
        return 1


def compare(kind: type[Comparison], description: str, argv: list[str] | None = None, **defaults) -> int:
    """A script: trains the missing runs, then writes and prints the report; its exit status."""
    settings = comparison(kind, argv, description, **defaults)
    from harness.jobs import run_all  # here, as pandas is slow to load
    from harness.store import Store, key_of

    def work() -> int:
        store, runs = Store(settings.folder), settings.runs()
        where = f"on {settings.scheduler}" if settings.scheduler else f"{settings.jobs} at a time"
        print(f"{len(runs)} runs, {where}; results go to {settings.folder}", flush=True)
        settings.fetch()
        failed = run_all(runs, store, settings.dataset_root, settings.jobs, settings.scheduler)
        if failed:
            print(f"{failed} of {len(runs)} runs failed: their errors are in {settings.folder}", file=sys.stderr)
        frame = store.frame()
        if keys := [key for key in (key_of(run.settings()) for run in runs) if key in frame.index]:
            from harness.report import report

            print(*report(frame.loc[keys], settings.folder, settings.against), sep="\n")
        return 1 if failed else 0

    return status(work, f"Finished runs are in {settings.folder}; the same command goes on from there.")
