"""From records to a summary, a table and figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tabulate import tabulate

from harness.settings import NETWORKS, position, settings_of
from harness.statistics import holm, interval, wilcoxon

MEASURES = ("acc", "bwt", "forgetting", "learning_acc", "min_acc")


def summarize(records: list[dict]) -> list[dict]:
    """One object for every combination of benchmark, strategy and settings, over its seeds."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(settings_of(record["run"]), []).append(record)
    summary = []
    for group in groups.values():
        run, recipe = group[0]["run"], group[0]["recipe"]
        summary.append(
            {
                **{k: run[k] for k in ("benchmark", "strategy", "n_tasks", "epochs", "batch_size", "replay_buffer")},
                "train_per_task": run["train_per_task"],
                **{k: run[k] for k in ("task_incremental",) if k in run},
                "loss": recipe["loss"],
                "optimizer": recipe["optimizer"],
                "lr": recipe["lr"],
                "settings": recipe["settings"] | recipe.get("optimizer_settings", {}),
                "seeds": sorted(r["run"]["seed"] for r in group),
                **{
                    m: interval(values) if None not in values else None
                    for m, values in ((m, [r.get(m) for r in group]) for m in MEASURES if m in group[0])
                },
                "task_acc": np.mean([r["accuracy_matrix"][-1] for r in group], axis=0).round(4).tolist(),
                "seconds_per_run": float(np.mean([r["seconds"] for r in group])),
                "extra_memory_bytes": max(r["extra_memory_bytes"] for r in group),
            }
        )
    return sorted(summary, key=lambda s: position(s["strategy"], s["replay_buffer"]))


def differences(records: list[dict], against: str) -> list[dict]:
    """ACC of each strategy minus that of ``against``, paired by seed.

    With Student's 95% interval and the p of Wilcoxon's signed-rank test, Holm-corrected over the rows (S. Holm, 1979).
    """
    by_strategy: dict[tuple, dict[int, float]] = {}
    for r in records:
        by_strategy.setdefault((r["run"]["strategy"], r["run"]["replay_buffer"]), {})[r["run"]["seed"]] = r["acc"]
    references = [accs for (strategy, _), accs in by_strategy.items() if strategy == against]
    if len(references) != 1:
        raise ValueError(f"Invalid against: {against} (allowed: a strategy with one row in this comparison)")
    rows = []
    for (strategy, buffer), accs in sorted(by_strategy.items(), key=lambda item: position(*item[0])):
        seeds = sorted(accs.keys() & references[0].keys())
        if strategy != against and len(seeds) > 1:
            values = [accs[s] - references[0][s] for s in seeds]
            rows.append(
                {"strategy": strategy, "replay_buffer": buffer, "seeds": len(seeds), **interval(values)}
                | {"p": wilcoxon(values)}
            )
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        row["p"] = p
    return rows


def difference_table(rows: list[dict], against: str) -> str:
    shown = [
        {
            "strategy": r["strategy"],
            "buffer": r["replay_buffer"] or "-",
            f"ACC minus that of {against}": f"{r['mean']:+.1f} ± {r['ci95']:.1f}",
            "p": f"{r['p']:.3f}",
        }
        for r in rows
    ]
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)


def table(summary: list[dict]) -> str:
    """The summary as a Markdown table."""
    rows = []
    varied = [name for name in ("epochs", "batch_size") if len({s[name] for s in summary}) > 1]
    for s in summary:
        settings = ", ".join(f"{k} {v:g}" for k, v in s["settings"].items())
        rows.append(
            {
                "strategy": s["strategy"],
                "buffer": s["replay_buffer"] or "-",
                **{name: s[name] for name in varied},
                "ACC %": mean_and_interval(s["acc"]),
                "BWT %": mean_and_interval(s["bwt"]),
                "each task %": _tasks(s["task_acc"]),
                "seconds": f"{s['seconds_per_run']:.1f}",
                "extra kB": f"{s['extra_memory_bytes'] / 1000:.0f}",
                "trained with": f"{s['optimizer']} {s['lr']:g}, {s['loss']}" + (f"; {settings}" if settings else ""),
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def mean_and_interval(value: dict | None) -> str:
    """What ``statistics.interval`` gives, as tables show it; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value['mean']:.1f}" + (f" ± {value['ci95']:.1f}" if value["ci95"] is not None else "")


def _tasks(accuracies: list[float]) -> str:
    if len(accuracies) <= 5:
        return " / ".join(f"{a:.1f}" for a in accuracies)
    return f"{min(accuracies):.1f} to {max(accuracies):.1f}"


def title(records: list[dict]) -> str:
    """What was measured, in a line."""
    run = records[0]["run"]
    name = {"split-mnist": "Split MNIST", "permuted-mnist": "Permuted MNIST"}[run["benchmark"]]
    images = f", {run['train_per_task']} images a task" if run["train_per_task"] else ""
    seeds = ", ".join(map(str, sorted({r["run"]["seed"] for r in records})))
    score = "validation images" if run["validation"] else "test images"
    epochs, batch = (_values(records, name) for name in ("epochs", "batch_size"))
    heads = "a head for each task" if run.get("task_incremental") else "one head"
    return (
        f"{name}, {run['n_tasks']} tasks{images}, {heads}, {epochs} epoch{'s' * (epochs != '1')}, "
        f"batch {batch}, {NETWORKS[run.get('network', '256-256')]}, {score}, seeds {seeds}"
    )


def _values(records: list[dict], setting: str) -> str:
    return ", ".join(map(str, sorted({r["run"][setting] for r in records})))


def write_tables(records: list[dict], summary: list[dict], output: Path, against: str | None = None) -> str:
    """Writes summary.json and table.md; returns the tables."""
    text = f"{title(records)}; mean ± 95% interval (Student's t)\n\n{table(summary)}\n"
    if against is not None:
        rows = differences(records, against)
        text += "\nPaired by seed; ± 95% interval, p of Wilcoxon's signed-rank test with Holm's correction\n\n"
        text += difference_table(rows, against) + "\n"
        (output / "differences.json").write_text(json.dumps({"against": against, "rows": rows}, indent=1) + "\n")
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (output / "table.md").write_text(text)
    return text


def write_report(records: list[dict], output: Path, against: str | None = None) -> list[Path]:
    """Writes tables and figures, prints the tables; returns the paths of what it wrote."""
    summary, heading = summarize(records), title(records)
    print("\n" + write_tables(records, summary, output, against))
    from harness import figures  # here, as matplotlib is slow to load

    paths = [output / "summary.json", output / "table.md"]
    paths.append(figures.acc_by_strategy(summary, heading, output / "acc.png"))
    if watched := [record for record in records if record["curve"]]:
        paths.append(figures.accuracy_over_training(watched, heading, output / "training.png"))
    return paths
