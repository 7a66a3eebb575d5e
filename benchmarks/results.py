"""Writes docs/results.md, with tables and figures, from the results in docs/results; --rerun trains what they lack.

python benchmarks/results.py --rerun --studies buffers_split5 --strategies sp-replay --seeds 3 --jobs 2
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from harness.cli import add_workers, names_of, positive
from harness.files import write_whole
from harness.jobs import read_results, run_all
from harness.settings import ROOT, code_fingerprint, settings_of
from harness.studies import BY_BUFFER, EVERY, Study


def parser() -> argparse.ArgumentParser:
    strategies = tuple(dict.fromkeys(row.strategy for study in EVERY.values() for row in study.rows))
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--rerun", action="store_true", help="train what is missing: after a change of the code, every run")
    p.add_argument("--studies", type=names_of("study", tuple(EVERY)), default=list(EVERY), metavar="A,B")
    p.add_argument("--strategies", type=names_of("strategy", strategies), metavar="A,B", help="train only these")
    p.add_argument("--seeds", type=positive, help="number of seeds (default: each study's own)")
    p.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of results.md and results/")
    add_workers(p)
    return p


def latest(study: Study, records: list[dict]) -> list[dict]:
    """One record for each run of the study: of the present code, if there is one, else the last."""
    code, kept = code_fingerprint(), {}
    wanted = {settings_of(run.to_json()): run for run in study.runs(1)}
    for record in records:
        name = settings_of(record["run"])
        if "error" in record or name not in wanted:
            continue
        place = (record["run"]["seed"], list(wanted).index(name))
        if place not in kept or not _is_of(code, wanted[name], kept[place]):
            kept[place] = record
    return [kept[place] for place in sorted(kept)]


def _is_of(code: str, run, record: dict) -> bool:
    return record["key"] == dataclasses.replace(run, seed=record["run"]["seed"]).key(code)


def train(study: Study, results: Path, args: argparse.Namespace) -> int:
    """Trains what the study's results lack; the number of runs that failed."""
    results.parent.mkdir(parents=True, exist_ok=True)
    runs = study.runs(args.seeds or study.seeds, args.strategies)
    print(f"{results.parent.name}: {len(runs)} runs", flush=True)
    _, failed = run_all(runs, results, args.dataset_root, args.jobs, args.scheduler, study.keeps_curve)
    return failed


def write(output: Path) -> list[Path]:
    """Writes the page and all that it shows, and the README's first table; returns the paths of what is to be seen."""
    from harness.comparison import cells_of  # here, as scipy and matplotlib are slow to load
    from harness.figures import acc_by_buffer, accuracy_over_training
    from harness.overview import overview
    from harness.page import page
    from harness.report import summarize, title, write_tables

    results = {}
    for name, study in EVERY.items():
        file = output / "results" / name / "results.jsonl"
        if records := latest(study, read_results(file)):
            lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
            write_whole(file, lines)  # without what failed, and what later code has done again
            write_tables(records, summarize(records), file.parent)
            results[name] = records
    paths = []
    panels = [(study.title, cells_of(study, results[name])) for name, study in BY_BUFFER.items() if name in results]
    panels = [(title, cells) for title, cells in panels if any(cell.buffer for cell in cells)]
    if panels:
        paths.append(acc_by_buffer(panels, output / "results" / "buffers.png"))
    for name, records in results.items():
        if watched := [record for record in records if record.get("curve")]:
            path = output / "results" / name / "training.png"
            paths.append(accuracy_over_training(watched, title(watched), path))
    if table := overview(output / "results"):
        paths.append(output / "results" / "overview.md")
        write_whole(paths[-1], table)
    write_whole(output / "results.md", page(results))
    return [*paths, output / "results.md"]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    failed = 0
    try:
        for name in args.studies if args.rerun else []:
            failed += train(EVERY[name], args.output / "results" / name / "results.jsonl", args)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished runs are kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except (OSError, ImportError) as error:  # a full disk, no such scheduler, or no Dask
        print(f"\nStopped: {error}. Finished runs are kept; the same command goes on from there.", file=sys.stderr)
        return 1
    for path in write(args.output):
        print(path)
    if failed:
        print(f"{failed} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
