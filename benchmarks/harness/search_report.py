"""What a search found: best.json, trials.csv, a figure of what mattered, and the command that runs the best; of a
search layer by layer also profile.json, the plugin's settings."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections import Counter
from pathlib import Path

import optuna
from optuna.trial import TrialState

from harness.files import write_whole
from harness.search import Search, finished
from harness.settings import MNIST, USES_REPLAY

SCRIPTS = {"split-mnist": "split_mnist.py", "permuted-mnist": "permuted_mnist.py"}


def write_search(search: Search, study: optuna.Study) -> list[Path]:
    """Writes the report and prints the best; returns the paths of what it wrote.

    Raises:
        ValueError: no trial was completed.
    """
    trials = finished(study)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if not complete:
        raise ValueError(f"none of {len(trials)} trials was completed")
    best = max(complete, key=lambda t: t.value)
    importances = _importances(study, complete)
    settings = {**dict(search.run.overrides), **best.params}
    command = command_of(search, settings)
    report = {
        "run": search.run.to_json(),
        "seeds": list(range(search.run.seed, search.run.seed + search.seeds)),
        "value": best.value,
        "settings": settings,
        "trial": best.number,
        "trials": {state.lower(): n for state, n in sorted(Counter(t.state.name for t in trials).items())},
        "importances": importances,
        "command": command,
    }
    paths = [search.output / name for name in ("best.json", "trials.csv", "importances.png")]
    write_whole(paths[0], json.dumps(report, indent=1) + "\n")
    write_whole(paths[1], _table(trials))
    _figure(importances, search, len(complete), paths[2])
    if search.layers:
        openness = {layer: settings[f"openness:{layer}"] for layer in search.layers}
        paths.append(search.output / "profile.json")
        write_whole(paths[-1], json.dumps({"openness": openness}, indent=1) + "\n")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in settings.items())
    print(f"\nbest of {len(trials)} trials: {best.value:.2f} on validation images, with {shown}\n\n{command}\n")
    return paths


def command_of(search: Search, settings: dict[str, float]) -> str:
    """The command that runs the settings on test images, with seeds that the search has not seen."""
    run = search.run
    words = ["python", f"benchmarks/{SCRIPTS[run.benchmark]}", "--strategies", run.strategy, "--tasks", run.n_tasks]
    words += ["--epochs", run.epochs, "--batch-size", run.batch_size]
    if run.strategy in USES_REPLAY:
        words += ["--replay-buffer", run.replay_buffer]
    if run.train_per_task is not None:
        words += ["--train-per-task", run.train_per_task]
    if search.dataset_root != str(MNIST):
        words += ["--dataset-root", search.dataset_root]
    for name, value in settings.items():
        words += ["--set", f"{name}={value!r}"]
    return shlex.join(map(str, [*words, "--output", search.output / "best"]))


def _importances(study: optuna.Study, complete: list[optuna.trial.FrozenTrial]) -> dict[str, float]:
    """PED-ANOVA (S. Watanabe et al., IJCAI 2023); nothing where trials don't differ."""
    if len({t.value for t in complete}) < 2:
        return {}
    return optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())


def _table(trials: list[optuna.trial.FrozenTrial]) -> str:
    names = list(dict.fromkeys(name for t in trials for name in t.params))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", "value", "seconds", *names, "accuracy on the tasks seen, step by step", "error"])
    for t in trials:
        seconds = round(t.duration.total_seconds(), 1) if t.duration else None
        steps = " ".join(f"{v:.2f}" for _, v in sorted(t.intermediate_values.items()))
        error = t.user_attrs.get("error", t.user_attrs.get("diverged", "")).strip().split("\n")[-1]
        params = [t.params.get(name) for name in names]
        rows.writerow([t.number, t.state.name.lower(), t.value, seconds, *params, steps, error])
    return text.getvalue()


def _figure(importances: dict[str, float], search: Search, complete: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt

    names = list(importances)[::-1]
    fig, ax = plt.subplots(figsize=(6, 1.2 + 0.35 * len(names)), layout="constrained")
    ax.barh(names, [importances[name] for name in names], color="#cc3311", height=0.7)
    ax.set(xlim=(0, 1), xlabel="importance (PED-ANOVA, shares of 1)")
    ax.set_title(f"{search.run.strategy}, {search.run.benchmark}, {complete} complete trials", fontsize=8, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)
