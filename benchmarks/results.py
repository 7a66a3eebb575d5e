"""Trains the runs of docs/ that the stored results lack, then writes all tables and figures.

python benchmarks/results.py --studies buffers_split5 --strategies sp-replay --seeds 3 --jobs 2
"""

import argparse
import sys
from pathlib import Path

import tables
from harness.cli import add_workers, names_of, positive
from harness.settings import Run


def parser() -> argparse.ArgumentParser:
    from harness.studies import STUDIES  # here, as pandas is slow to load

    strategies = tuple(dict.fromkeys(row.strategy for study in STUDIES.values() for row in study.rows))
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = tuple(STUDIES)
    studies = names_of("study", names)
    p.add_argument("--studies", type=studies, default=list(names), metavar="A,B", help=f"allowed: {', '.join(names)}")
    p.add_argument("--strategies", type=names_of("strategy", strategies), metavar="A,B", help="train only these")
    p.add_argument("--seeds", type=positive, help="number of seeds (default: each study's own)")
    p.add_argument("--output", type=Path, default=tables.RESULTS, help="folder of the stored results")
    add_workers(p)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from harness.jobs import run_all
    from harness.store import Store
    from harness.studies import STUDIES

    failed = 0
    try:
        store = Store(args.output)
        for name in args.studies:
            study = STUDIES[name]
            runs = [Run(**settings) for settings in study.runs(args.seeds or study.seeds)]
            runs = [run for run in runs if args.strategies is None or run.strategy in args.strategies]
            print(f"{name}: {len(runs)} runs", flush=True)
            failed += run_all(runs, store, args.dataset_root, args.jobs, args.scheduler, study.keeps_curve)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished runs are kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except (OSError, ImportError) as error:  # a full disk, no such scheduler, or no Dask
        print(f"\nStopped: {error}. Finished runs are kept; the same command goes on from there.", file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} runs failed; the same command tries them again", file=sys.stderr)
    if args.output == tables.RESULTS:
        tables.main([])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
