"""What each layer's protection contributes, and openness learned layer by layer: docs/layers.md's tables and figure.

python benchmarks/layers.py --rerun --parts mlp --seeds 10 && python benchmarks/tables.py

From the runs stored in the output folder; --rerun trains what they lack.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from math import inf
from pathlib import Path

from tabulate import tabulate

from harness.cli import add_common, names_of
from harness.files import write_whole
from harness.jobs import read_results, run_all
from harness.settings import NETWORKS, ROOT, Run, settings_of
from harness.statistics import bootstrap, wilcoxon

OPENNESS = 0.5  # the plugin's default
FACTOR = 4
_SPLIT = {"benchmark": "split-mnist", "n_tasks": 5}
_PERMUTED = {"benchmark": "permuted-mnist", "n_tasks": 5, "train_per_task": 5000}
# By network, its gated layers by name, first to last.
LAYERS = {"256-256": ("1", "3", "5"), "cnn": ("0", "2", "5")}
# What is compared, by name: a run's settings, and whether the learned openness is compared with the default or each
# layer's protection is taken apart.
PARTS = {
    "mlp": (_SPLIT | {"network": "256-256"}, False),
    "cnn": (_SPLIT | {"network": "cnn"}, False),
    "learned-split": (_SPLIT, True),
    "learned-permuted": (_PERMUTED, True),
}
TITLES = {
    "learned-split": "Split MNIST, 5 tasks (learned on its validation images)",
    "learned-permuted": "Permuted MNIST, 5 tasks of 5,000 images (not seen in learning)",
}


def variants(part: str, profile: dict[str, float]) -> dict[str, tuple]:
    """The part's settings of the openness, as overrides, by name; the first is the default.

    The control of a learned one is as open on average, in all layers alike.
    """
    settings, learned = PARTS[part]
    if learned:
        layers = LAYERS["256-256"]
        mean = sum(profile.get(layer, OPENNESS) for layer in layers) / len(layers)
        each = tuple((f"openness:{layer}", v) for layer, v in sorted(profile.items()))
        return {"default": (), "alike": (("openness", round(mean, 3)),), "learned": each}
    rows: dict[str, tuple] = {"default": (), "none": (("openness", inf),)}
    for layer in LAYERS[settings["network"]]:
        rows[f"only {layer}"] = ("openness", inf), (f"openness:{layer}", OPENNESS)
        rows[f"without {layer}"] = ((f"openness:{layer}", inf),)
        rows[f"{layer} opened"] = ((f"openness:{layer}", OPENNESS * FACTOR),)
        rows[f"{layer} closed"] = ((f"openness:{layer}", OPENNESS / FACTOR),)
    return rows


def runs_of(part: str, profile: dict[str, float], seeds: Iterable[int], validation: bool = False) -> list[Run]:
    """Seeds outermost, so that a part cut short is a whole one with fewer seeds."""
    common = {"strategy": "sp", "epochs": 1, "batch_size": 64, "replay_buffer": 0, "validation": validation}
    return [
        Run(seed=seed, overrides=overrides, **common, **PARTS[part][0])
        for seed in seeds
        for overrides in variants(part, profile).values()
    ]


def accuracies(part: str, profile: dict[str, float], records: list[dict]) -> dict[str, dict[int, float]]:
    """ACC by variant and seed, of the seeds that all variants have; a run that diverged guesses."""
    runs = runs_of(part, profile, [0])
    names = {settings_of(run.to_json()): name for run, name in zip(runs, variants(part, profile))}
    found: dict[str, dict[int, float]] = {name: {} for name in variants(part, profile)}
    for record in records:
        name, seed = names.get(settings_of(record["run"])), record["run"]["seed"]
        if name is not None and ("acc" in record or "FloatingPointError" in record["error"]):
            found[name][seed] = record.get("acc", 10.0)
    whole = set.intersection(*(set(of_seed) for of_seed in found.values()))
    return {name: {seed: of_seed[seed] for seed in sorted(whole)} for name, of_seed in found.items()} if whole else {}


def minus(one: dict[int, float], other: dict[int, float]) -> list[float]:
    return [one[seed] - other[seed] for seed in one]


def shown(differences: list[float]) -> str:
    low, high = bootstrap(differences)
    mean = sum(differences) / len(differences)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def contributions(part: str, found: dict[str, dict[int, float]]) -> str:
    """The table of one network: a row a layer."""
    network = PARTS[part][0]["network"]
    rows = [
        {
            "layer": f"`{layer}`",
            "alone protected": _mean(found[f"only {layer}"]),
            "minus none": shown(minus(found[f"only {layer}"], found["none"])),
            "all but it": _mean(found[f"without {layer}"]),
            "minus all": shown(minus(found[f"without {layer}"], found["default"])),
            f"openness x {FACTOR}": shown(minus(found[f"{layer} opened"], found["default"])),
            f"openness / {FACTOR}": shown(minus(found[f"{layer} closed"], found["default"])),
        }
        for layer in LAYERS[network]
    ]
    seeds = ", ".join(map(str, found["default"]))
    title = f"{NETWORKS[network]}: no layer protected {_mean(found['none'])}, all {_mean(found['default'])}"
    return f"{title}. ACC in %, test images, seeds {seeds}\n\n{_table(rows)}"


def comparison(found: dict[str, dict[str, dict[int, float]]]) -> str:
    """The table of what was learned: a row a benchmark."""
    rows = []
    for part, of_part in found.items():
        row = {"benchmark": TITLES[part], "seeds": len(of_part["learned"])}
        row |= {name: _mean(of_seed) for name, of_seed in of_part.items()}
        for other in ("default", "alike"):
            gains = minus(of_part["learned"], of_part[other])
            row[f"learned minus {other}"] = f"{shown(gains)}, p = {wilcoxon(gains):.3f}"
        rows.append(row)
    return _table(rows)


def _mean(of_seed: dict[int, float]) -> str:
    return f"{sum(of_seed.values()) / len(of_seed):.1f}"


def _table(rows: list[dict]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) + "\n"


def write(output: Path, profile: dict[str, float]) -> list[Path]:
    """Writes the tables and the figure of what is stored; returns their paths."""
    records = read_results(output / "runs.jsonl")
    found = {part: accuracies(part, profile, records) for part in PARTS}
    found = {part: of_part for part, of_part in found.items() if of_part}
    apart = {part: of_part for part, of_part in found.items() if not PARTS[part][1]}
    learned = {part: of_part for part, of_part in found.items() if PARTS[part][1]}
    tables = {f"{part}.md": contributions(part, of_part) for part, of_part in apart.items()}
    if learned:
        tables["learned.md"] = comparison(learned)
    for name, text in tables.items():
        write_whole(output / name, text)
        print(text)
    paths = [output / name for name in tables]
    if apart:
        from harness.layer_figure import draw  # here, as matplotlib is slow to load

        paths.append(draw({PARTS[part][0]["network"]: of_part for part, of_part in apart.items()}, output))
    return paths


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_common(p, seeds=10, output="layers")
    p.set_defaults(output=ROOT / "docs" / "results" / "layers")
    p.add_argument("--rerun", action="store_true", help="train what is missing: after a change of the code, every run")
    p.add_argument("--parts", type=names_of("part", tuple(PARTS)), default=list(PARTS), metavar="A,B")
    p.add_argument("--profile", type=Path, help="the learned openness (default: profile.json in the output folder)")
    args = p.parse_args(argv)
    try:
        profile = json.loads((args.profile or args.output / "profile.json").read_text())["openness"]
    except (OSError, ValueError, KeyError) as error:
        p.error(f"--profile: {error!r} (expected what hyperparameter_search.py --layers writes)")
    args.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for part in args.parts if args.rerun else []:
        runs = runs_of(part, profile, range(args.first_seed, args.first_seed + args.seeds))
        file = args.output / "runs.jsonl"
        failed += run_all(runs, file, args.dataset_root, args.jobs, args.scheduler, keeps_curve=lambda run: False)[1]
    for path in write(args.output, profile):
        print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
