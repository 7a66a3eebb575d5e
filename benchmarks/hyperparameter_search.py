"""Searches a strategy's settings on validation images, with Optuna; several processes may share one search.

python benchmarks/hyperparameter_search.py --benchmark split-mnist --tasks 5 --strategy sp --trials 60
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.cli import Network, Overrides, Where, about, merged, parsed
from harness.recipes import USES_REPLAY
from harness.settings import ROOT, Run

TASKS = {"split-mnist": (2, 5, 10), "permuted-mnist": None}


@dataclass(frozen=True)
class Settings(Where):
    """A search.

    Attributes:
        strategy: name of the strategy
        benchmark: what is learned
        trials: of the whole search, with those already finished
        tasks: experiences; by default 2 of split-mnist, 10 of permuted-mnist
        train_per_task: training images a task of permuted-mnist; None: all 50000
        epochs: epochs an experience
        batch_size: stream samples in a mini-batch
        network: hidden widths, or a small CNN
        replay_buffer: stored samples, of a strategy with replay
        seeds: runs of a trial
        first_seed: the first of their seeds
        set: settings that are held fixed, such as lr=0.1
        storage: URL of a database for Optuna; None: a file in the output folder
    """

    strategy: str = "sp"
    benchmark: Literal["split-mnist", "permuted-mnist"] = "split-mnist"
    trials: int = 50
    tasks: int | None = None
    train_per_task: int | None = None
    epochs: int = 1
    batch_size: int = 64
    network: Network = "256-256"
    replay_buffer: int = 200
    seeds: int = 2
    first_seed: int = 100
    set: Overrides = ()
    storage: str | None = None
    output: Path = ROOT / "results" / "search"

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "trials", "tasks", "train_per_task", "epochs", "batch_size", "replay_buffer", "seeds")
        allowed = TASKS[self.benchmark]
        if allowed and self.tasks not in (None, *allowed):
            raise ValueError(f"Invalid tasks: {self.tasks} (allowed on {self.benchmark}: 2, 5, 10)")
        if self.train_per_task is not None and self.benchmark == "split-mnist":
            raise ValueError(f"Invalid train_per_task: {self.train_per_task} (allowed on permuted-mnist alone)")
        self.search()

    def search(self):
        from harness.search import Search  # here, as it imports Optuna

        run = Run(
            benchmark=self.benchmark,
            strategy=self.strategy,
            n_tasks=self.tasks or {"split-mnist": 2, "permuted-mnist": 10}[self.benchmark],
            epochs=self.epochs,
            batch_size=self.batch_size,
            replay_buffer=self.replay_buffer if self.strategy in USES_REPLAY else 0,
            seed=self.first_seed,
            train_per_task=self.train_per_task,
            network=self.network,
            validation=True,
            overrides=merged(self.set),
        )
        return Search(run, self.seeds, self.trials, self.output.resolve(), str(self.dataset_root), self.storage)


def main(argv: list[str] | None = None) -> int:
    settings = parsed(Settings, argv, f"{__doc__}\n{about(*TASKS)}")
    from harness.jobs import in_parallel
    from harness.search import work, write_report
    from harness.store import Store

    search = settings.search()
    go_on = f"Finished trials are in {search.storage or search.output}; the same command goes on from there."
    try:
        Store(search.output)
        study = search.study()
        print(f"{search.trials} trials of {search.seeds} runs; results go to {search.output}", flush=True)
        # One worker draws what its seed decides; several, and the second command of a study, must not draw the same.
        alone = settings.jobs == 1 and not study.trials
        tasks = [(search, settings.first_seed if alone else None)] * settings.jobs
        with closing(in_parallel(work, tasks, settings.jobs, settings.scheduler)) as workers:
            for _, error in workers:
                if error is not None:
                    raise error
        for path in write_report(search, search.study()):
            print(path)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {go_on}", file=sys.stderr)
        return 130
    except Exception as error:  # from a run, from the database's driver, from the scheduler, or a full disk
        print(f"\nStopped: {error}. {go_on}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
