"""A search over settings with Optuna: what is searched, one trial of it, and what is known in the end.

Several processes share a study: they claim trials under one lock, and what a killed one left half done is let go.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import traceback
import uuid
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from harness import files
from harness.executors import prepared
from harness.jobs import row_of
from harness.settings import Run
from harness.store import Store

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
    "shrinkage": FloatDistribution(1.0, 100.0, log=True),
}
RATES = {
    True: FloatDistribution(1e-5, 1e-2, log=True),  # steps as large as the learning rate
    False: FloatDistribution(1e-3, 1.0, log=True),  # steps as large as the gradient
}
NOT_ADAPTIVE = ("SGD", "UPGD", "legacy")
POLL = 0.5  # seconds between looks at the trials that other processes still run
FIRST_SEED = 100  # lower seeds are those that are reported


@dataclass(frozen=True)
class Search:
    """What one study is about; equal searches, of the same code, are one study.

    Attributes:
        run: benchmark, strategy and protocol; its seed is the first one, its overrides are held fixed.
        seeds: runs of a trial, with seeds from the run's up; the trial's value is their mean ACC.
        trials: of the whole study, whoever runs them.
        output: folder that all processes see: the study, its locks and results.
        dataset_root: folder with MNIST.
        code: fingerprint of the code.
        storage: URL of a database for Optuna, or None for a file in ``output``.
        layers: names, or patterns of them, of layers that get an openness of their own, instead of one for all.

    Raises:
        ValueError: at construction, for runs that don't score on validation images or use seeds that are reported.
    """

    run: Run
    seeds: int
    trials: int
    output: Path
    dataset_root: str
    code: str
    storage: str | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.run.validation:
            raise ValueError("Invalid validation value: False (allowed: True, a search never sees test images)")
        if self.run.seed < FIRST_SEED:
            raise ValueError(f"Invalid first seed: {self.run.seed} (allowed: {FIRST_SEED} or more, never reported)")
        for name in ("seeds", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"Invalid {name} value: {getattr(self, name)} (allowed: 1 or more)")
        if self.storage is None and files.fcntl is None:
            raise ValueError("Invalid storage: None (allowed: a database's URL, as this system has no file locks)")

    @property
    def name(self) -> str:
        what = json.dumps([self.run.to_json(), self.seeds, self.code, *self.layers], sort_keys=True)
        return f"{self.run.benchmark} {self.run.strategy} {hashlib.sha256(what.encode()).hexdigest()[:16]}"

    def study(self) -> optuna.Study:
        """The study, made if it isn't there."""
        return _study(self)


@functools.cache
def _study(search: Search) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = search.storage or JournalStorage(_Journal(str(search.output / "study.jsonl")))
    with files.locked(search.output / ".study.lock"):
        study = optuna.create_study(
            storage=storage, study_name=search.name, direction="maximize", pruner=Median(), load_if_exists=True
        )
        if not study.user_attrs:
            study.set_user_attr("search", {"run": search.run.to_json(), "seeds": search.seeds})
    return study


class _Journal(JournalFileBackend):
    """Optuna's journal, appended to as results are: its own lock outlives a killed process by half a minute, and a
    line that a full disk cut short would make it unreadable."""

    def append_logs(self, logs: list[dict]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        files.append_lines(Path(self._file_path), text)


class Median(BasePruner):
    """Ends a trial that is below the median of the finished ones at the same step.

    Optuna's MedianPruner compares the best value that a trial had so far. Ours fall with every task: nearly all of
    them are best after the first, before anything can be forgotten, and none would be pruned for forgetting.

    Args:
        startup_trials: finished trials before any is pruned.
        warmup_steps: steps of a trial that don't count: the first task alone says nothing about forgetting.
    """

    def __init__(self, startup_trials: int = 5, warmup_steps: int = 1):
        self.startup_trials = startup_trials
        self.warmup_steps = warmup_steps

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        step = trial.last_step
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = [t.intermediate_values[step] for t in finished if step in t.intermediate_values]
        if step is None or step < self.warmup_steps or len(values) < self.startup_trials:
            return False
        return trial.intermediate_values[step] < float(np.median(values))


def space_of(run: Run, layers: tuple[str, ...] = ()) -> dict[str, BaseDistribution]:
    """What is searched: the learning rate, and each setting of the strategy that has a range and isn't held fixed.

    Raises:
        ValueError: the strategy doesn't exist on the benchmark, or doesn't have a setting that is held fixed, or layers
            are given and it has no openness.
    """
    from harness.strategies import OPTIMIZERS, numbers_of, recipe_of  # here, as only workers need torch

    recipe = recipe_of(run)
    names = {*recipe.settings, *recipe.optimizer_settings, *numbers_of(OPTIMIZERS[recipe.optimizer])}
    if "openness" in names:
        names.add("rank")  # whose default depends on the layer, so that no recipe states it
    if recipe.optimizer_settings.get("plasticity_k") == 0:  # without its gate, which makes it what it is
        names -= {"plasticity_k", "warmup_steps"}
    space = {"lr": RATES[recipe.optimizer not in NOT_ADAPTIVE], **RANGES}
    if layers:
        if "openness" not in names:
            raise ValueError(f"Invalid layers: {', '.join(layers)} (allowed: none, as {run.strategy} has no openness)")
        of_layers = [f"openness:{layer}" for layer in layers]
        names = names - {"openness"} | set(of_layers)
        space |= dict.fromkeys(of_layers, RANGES["openness"])
    fixed = dict(run.overrides)
    return {name: values for name, values in space.items() if (name == "lr" or name in names) and name not in fixed}


# -- Trials ----------------------------------------------------------------------------------------------------------


def work(search: Search) -> dict | None:
    """Claims a trial and runs it: a worker's job.

    Returns:
        The trial's number, state and value; None if the study has all its trials.

    Raises:
        ValueError: for settings that can't be.
        OSError: the study or the results can't be written.
    """
    with prepared(search.code), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        space, study = space_of(search.run, search.layers), search.study()
        if not space:
            raise ValueError("Invalid overrides: every setting is held fixed (allowed: one or more left to search)")
        while (trial := _claim(search, study, space)) is None:
            if len(finished(study)) >= search.trials:
                return None
            time.sleep(POLL)
        try:
            state, value = TrialState.COMPLETE, _run(search, trial)
        except optuna.TrialPruned:
            state, value = TrialState.PRUNED, None
        except OSError:  # the study can't be written either: it goes as a killed trial does
            raise
        except Exception as error:
            trial.set_user_attr("error", traceback.format_exc())
            study.tell(trial, state=TrialState.FAIL)
            if isinstance(error, ValueError):
                raise
            return {"number": trial.number, "state": "FAIL", "value": None}
        study.tell(trial, value, state)
        return {"number": trial.number, "state": state.name, "value": value}


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that count: complete, pruned, or failed by an error; not those of killed processes."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [t for t in trials if t.state != TrialState.FAIL or "error" in t.user_attrs]


def _claim(search: Search, study: optuna.Study, space: dict[str, BaseDistribution]) -> optuna.Trial | None:
    """A trial of our own, if there are fewer than wanted, counting those that living processes run."""
    with files.locked(search.output / ".study.lock"):
        _let_go(search, study)
        states = Counter(t.state for t in study.get_trials(deepcopy=False))
        if len(finished(study)) + states[TrialState.RUNNING] >= search.trials:
            return None
        # Its own seed for each trial, so that no two processes, and no two starts, draw the same.
        seed = np.random.SeedSequence([search.run.seed, states.total()]).generate_state(1)
        study.sampler = TPESampler(seed=int(seed[0]), multivariate=True, constant_liar=True)
        trial = study.ask(space)
        trial.set_user_attr("worker", _worker(search.output))
        return trial


def _let_go(search: Search, study: optuna.Study) -> None:
    """Fails the trials of processes that have ended: whose lock can be had. Under the study's lock."""
    own = _worker(search.output)
    ended = [path for path in (search.output / "workers").iterdir() if path.name != own and _has_ended(path)]
    names = {None, *(path.name for path in ended)}  # None: it was killed within _claim
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("worker") in names:
            study.tell(trial.number, state=TrialState.FAIL)
    for path in ended:
        path.unlink()


def _has_ended(worker: Path) -> bool:
    with open(worker, "ab") as file:
        return files.lock(file, wait=False)


_open = []  # this process's lock, held to its end


@functools.cache
def _worker(output: Path) -> str:
    """Names this process by a file that it holds a lock on."""
    name = uuid.uuid4().hex
    (output / "workers").mkdir(parents=True, exist_ok=True)
    _open.append(open(output / "workers" / name, "ab"))
    files.lock(_open[-1])
    return name


def _run(search: Search, trial: optuna.Trial) -> float:
    """Mean ACC over the seeds; 0 if training diverged."""
    import torch

    from harness.run import execute

    overrides = tuple(sorted({**dict(search.run.overrides), **trial.params}.items()))
    accs, steps = [], 0

    def after_experience(matrix: np.ndarray) -> None:
        nonlocal steps
        seen = matrix.shape[1] if search.run.strategy == "joint" else len(matrix)
        trial.report(float(matrix[-1, :seen].mean()), steps)
        steps += 1
        if trial.should_prune():
            raise optuna.TrialPruned()

    for seed in range(search.run.seed, search.run.seed + search.seeds):
        run = replace(search.run, seed=seed, overrides=overrides)
        try:
            record = execute(run, search.dataset_root, run.key(search.code), after_experience, watch=False)
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            trial.set_user_attr("diverged", str(error))
            return 0.0
        Store(search.output / "runs").append(row_of(run, record))
        accs.append(record["acc"])
    return float(np.mean(accs))
