"""A search over a strategy's settings with Optuna: the space, a worker's trials, and the report."""

import itertools
import json
import shlex
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from harness.cli import Strategy, Training
from harness.jobs import in_parallel, worker
from harness.recipes import USES_REPLAY, recipe_of
from harness.settings import BENCHMARKS, ROOT, Run
from harness.store import Store, key_of

# The ranges of trace_decay, plasticity_k and warmup_steps are the original method's.
RANGES: dict[str, BaseDistribution] = {
    "strength": FloatDistribution(1.0, 1e5, log=True),
    "openness": FloatDistribution(0.02, 2.0, log=True),
    "pull_back": FloatDistribution(0.1, 10.0, log=True),
    "rank": IntDistribution(25, 400, log=True),
    "trace_decay": FloatDistribution(0.95, 0.999),
    "plasticity_k": FloatDistribution(1.0, 10.0),
    "warmup_steps": IntDistribution(500, 2000),
    "sigma": FloatDistribution(1e-4, 1e-1, log=True),
    "alpha": FloatDistribution(0.01, 10.0, log=True),
    "beta": FloatDistribution(0.1, 2.0, log=True),
    "memory_strength": FloatDistribution(0.0, 1.0),
    "passes": IntDistribution(5, 300, log=True),
    "weight": FloatDistribution(0.03, 10.0, log=True),
    "gate": FloatDistribution(0.01, 1.0, log=True),
}
_AS_LARGE_AS_THE_GRADIENT = ("SGD", "UPGD", "legacy")  # steps; the other optimizers' are as large as the learning rate
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Search(Training):
    """A search. Equal ones, of the same version of the algorithm, are one study.

    Attributes:
        strategy: its name
        benchmark: its name
        tasks: experiences; by default 2 groups of classes or 10 permutations
        train_per_task: training images a task of permutations; None: all
        replay_buffer: stored samples, of a strategy with replay
        trials: of the whole study, with those that are already finished
        seeds: runs of a trial, whose value is their mean ACC on validation images
        first_seed: the first of their seeds, 100 or more: lower ones are reported
        set: settings that are held fixed, such as lr=0.1
        storage: URL of a database for Optuna; None: a file in the output folder
    """

    strategy: Strategy = "sp"
    benchmark: Literal[BENCHMARKS] = "split-mnist"
    tasks: int | None = None
    train_per_task: int | None = None
    replay_buffer: int = 200
    trials: int = 50
    seeds: int = 2
    first_seed: int = 100
    storage: str | None = None
    output: Path = ROOT / "results" / "search"

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "trials", "tasks", "train_per_task", "replay_buffer", "seeds")
        self.at_least(100, "first_seed")
        if self.benchmark.startswith("split") and self.train_per_task is not None:
            raise ValueError(f"Invalid train_per_task: {self.train_per_task} (allowed with permutations alone)")
        self.first_run.settings()
        if not self.space():
            raise ValueError("Invalid set: every setting is held fixed (allowed: one or more left to search)")

    @property
    def first_run(self) -> Run:
        """A trial's first run, without the settings that are searched."""
        tasks = self.tasks or (2 if self.benchmark.startswith("split") else 10)
        buffer = self.replay_buffer if self.strategy in USES_REPLAY else 0
        shared = {"train_per_task": self.train_per_task, "seed": self.first_seed, "validation": True}
        return self.run(self.benchmark, self.strategy, n_tasks=tasks, replay_buffer=buffer, **shared)

    def space(self) -> dict[str, BaseDistribution]:
        """Ranges of the learning rate and of the strategy's settings that have one and are not held fixed."""
        recipe = recipe_of(self.first_run)
        names = {name for names in recipe.settable for name in names}
        if recipe.optimizer_arguments.get("plasticity_k") == 0:  # without its gate, or it would be another strategy
            names -= {"plasticity_k", "warmup_steps"}
        large = recipe.optimizer in _AS_LARGE_AS_THE_GRADIENT
        rate = FloatDistribution(1e-3, 1.0, log=True) if large else FloatDistribution(1e-5, 1e-2, log=True)
        fixed = dict(self.first_run.overrides)
        ranges = {"lr": rate} | {name: values for name, values in RANGES.items() if name in names}
        return {name: values for name, values in ranges.items() if name not in fixed}

    def study(self, seed: int | None = None, *, new: bool = False) -> optuna.Study:
        """The study, made if it does not exist. With ``new`` it must not exist yet.

        Args:
            seed: of the sampler; None: a fresh one.

        Raises:
            DuplicatedStudyError: with ``new``, if it exists.
        """
        key = key_of({**self.first_run.settings(), "seeds": self.seeds})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.create_study(
                storage=self.storage or JournalStorage(JournalFileBackend(str(self.output / "study.log"))),
                study_name=f"{self.benchmark} {self.strategy} {key}",
                direction="maximize",
                sampler=TPESampler(seed=seed, multivariate=True, constant_liar=True),
                pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=1),  # the first task alone forgets nothing
                load_if_exists=not new,
            )


def search(settings: Search) -> list[Path]:
    """Runs the trials that the study lacks, and writes the report; returns its paths.

    Raises:
        OSError: the study or the results can't be written, or the scheduler can't be reached.
        Exception: from a run, or from the database's driver.
    """
    Store(settings.output)  # it can be written
    settings.fetch()
    print(f"{settings.trials} trials of {settings.seeds} runs; results go to {settings.output}", flush=True)
    seed = settings.first_seed if settings.jobs == 1 else None
    try:
        settings.study(new=True)
    except optuna.exceptions.DuplicatedStudyError:
        seed = None  # another command on the study must not draw the same, nor must several workers
    tasks = [(settings, seed)] * settings.jobs
    with closing(in_parallel(work, tasks, settings.jobs, settings.scheduler)) as workers:
        for _, error in workers:
            if error is not None:
                raise error
    return write_report(settings, settings.study())


def work(task: tuple[Search, int | None]) -> None:
    """Runs trials until the study has all of its; a worker's job, of a search and the sampler's seed.

    Raises:
        OSError: the study or the results can't be written.
        Exception: from a run. Its trial has failed.
    """
    search, seed = task
    with worker():
        study = search.study(seed)
        if study.trials:  # after a worker that died, for example
            study.sampler.reseed_rng()
        if len(finished(study)) < search.trials:
            study.optimize(_objective(search), callbacks=[MaxTrialsCallback(search.trials, COUNTED)])


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that count: complete or pruned. Failed ones don't, nor those of killed processes."""
    return study.get_trials(deepcopy=False, states=COUNTED)


def _objective(search: Search) -> Callable[[optuna.Trial], float]:
    """Mean ACC over the seeds; 0 if training diverged."""
    from torch.linalg import LinAlgError  # here, as only workers need torch

    from harness.run import execute

    store, first = Store(search.output), search.first_run

    def value_of(trial: optuna.Trial) -> float:
        found, accs, steps = {}, [], itertools.count()
        for name, values in search.space().items():
            suggest = trial.suggest_int if isinstance(values, IntDistribution) else trial.suggest_float
            found[name] = suggest(name, values.low, values.high, log=values.log)

        def after_experience(matrix: np.ndarray) -> None:
            # The trial's value if nothing more were learned. It grows with the tasks: Optuna's pruner compares the best
            # of a trial's values so far, so it would never prune if they fell.
            seen = matrix.shape[1] if search.strategy == "joint" else len(matrix)
            trial.report(float(sum(accs) + matrix[-1, :seen].sum() / matrix.shape[1]) / search.seeds, next(steps))
            if trial.should_prune():
                raise optuna.TrialPruned

        for seed in range(search.first_seed, search.first_seed + search.seeds):
            run = replace(first, seed=seed, overrides={**dict(first.overrides), **found})
            try:
                row = execute(run, search.dataset_root, after_experience, curve=False)
            except (FloatingPointError, LinAlgError) as error:
                trial.set_user_attr("diverged", str(error))
                return 0.0
            store.append(row)
            accs.append(row["figures"]["acc"])
        return float(np.mean(accs))

    return value_of


def write_report(search: Search, study: optuna.Study) -> list[Path]:
    """Writes best.json, trials.csv and, if trials differ, importances.png; prints the best settings.

    Raises:
        ValueError: no trial was completed.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    count = len(finished(study))
    if not complete:
        raise ValueError(f"none of {count} trials was completed")
    paths = [search.output / name for name in ("trials.csv", "best.json")]
    trials = study.trials_dataframe(("number", "state", "value", "duration", "params", "user_attrs"))
    trials.to_csv(paths[0], index=False)
    importances = {}
    if len({trial.value for trial in complete}) > 1:
        paths.append(search.output / "importances.png")
        importances = _importances(study, paths[-1])
    settings = {**dict(search.first_run.overrides), **study.best_params}
    best = {
        "run": search.first_run.settings(),
        "seeds": search.seeds,
        "value": study.best_value,
        "settings": settings,
        "trials": {"complete": len(complete), "pruned": count - len(complete)},
        "importances": importances,
        "command": command_of(search, settings),
    }
    paths[1].write_text(json.dumps(best, indent=1) + "\n")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in settings.items())
    found = f"best of {count} trials: {study.best_value:.2f} on validation images, with {shown}"
    print(f"\n{found}\n\n{best['command']}\n")
    return paths


def _importances(study: optuna.Study, figure: Path) -> dict[str, float]:
    """PED-ANOVA (S. Watanabe et al., IJCAI 2023), also drawn."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axes = optuna.visualization.matplotlib.plot_param_importances(study, evaluator=evaluator)
    axes.figure.savefig(figure, dpi=150, bbox_inches="tight")
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def command_of(search: Search, settings: dict[str, float]) -> str:
    """The command that runs the settings on test images, with seeds that the search has not seen."""
    run = search.first_run
    script = "class_incremental" if run.kind == "split" else "domain_incremental"
    words = ["python", f"benchmarks/{script}.py", "--data", run.data, "--strategies", run.strategy]
    words += ["--tasks", run.n_tasks, "--epochs", run.epochs, "--batch-size", run.batch_size, "--network", run.network]
    if run.strategy in USES_REPLAY:
        words += ["--replay-buffer", run.replay_buffer]
    if run.train_per_task is not None:
        words += ["--train-per-task", run.train_per_task]
    if search.dataset_root is not None:
        words += ["--dataset-root", search.dataset_root]
    words += ["--set", *(f"{name}={value!r}" for name, value in settings.items())]
    return shlex.join(map(str, [*words, "--output", search.output / "best"]))
