"""Trains the runs of docs/ that the stored results lack, then writes all tables and figures.

python benchmarks/results.py --studies buffers_split5 --strategies sp-replay --seeds 3 --jobs 2
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tables
from harness.cli import Names, Strategies, Where, parsed, status
from harness.settings import Run
from harness.studies import STUDIES


@dataclass(frozen=True)
class Settings(Where):
    """Settings of the training.

    Attributes:
        studies: names of harness/studies.py
        strategies: train only these; all by default
        seeds: number of seeds; None: each study's own
        output: folder of the stored results
    """

    studies: Names = tuple(STUDIES)
    strategies: Strategies = ()
    seeds: int | None = None
    output: Path = tables.RESULTS

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "seeds")
        self.one_of("studies", tuple(STUDIES))
        for data in {study.settings["benchmark"].partition("-")[2] for study in map(STUDIES.get, self.studies)}:
            self.finds(data)
        self.one_of("strategies", {row.strategy for study in STUDIES.values() for row in study.rows})

    def runs(self, study: str) -> list[Run]:
        runs = [Run(**settings) for settings in STUDIES[study].runs(self.seeds or STUDIES[study].seeds)]
        return [run for run in runs if not self.strategies or run.strategy in self.strategies]


def train(settings: Settings) -> int:
    from harness.jobs import run_all
    from harness.store import Store

    store, failed = Store(settings.output), 0
    for name in settings.studies:
        runs, curves = settings.runs(name), STUDIES[name].keeps_curve
        print(f"{name}: {len(runs)} runs", flush=True)
        failed += run_all(runs, store, settings.dataset_root, settings.jobs, settings.scheduler, curves)
    if failed:
        print(f"{failed} runs failed; the same command tries them again", file=sys.stderr)
    if settings.output == tables.RESULTS:
        tables.main([])
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    settings = parsed(Settings, argv, __doc__)
    return status(lambda: train(settings), "Finished runs are kept; the same command goes on from there.")


if __name__ == "__main__":
    sys.exit(main())
