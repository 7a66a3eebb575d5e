"""Command lines: what they accept, and that an error is said before anything starts."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

import compare
import hyperparameter_search
import permuted_mnist
import results
import split_mnist
from harness import cli, jobs
from harness.recipes import ABOUT, NAMES, strategy_called
from harness.store import Store

from conftest import ROOT

TINY = ["--tasks", "2", "--train-per-task", "200", "--batch-size", "32", "--jobs", "1", "--replay-buffer", "50"]


def runs_of(kind, *arguments):
    return cli.comparison(kind, list(map(str, arguments)), "").runs()


def shown(text):
    """Without the frame and the line breaks."""
    return " ".join(re.sub("[─│╭╮╰╯]", " ", text).split())


@pytest.mark.parametrize("words", [["naive-sgd,sp"], ["naive-sgd,", "sp"], ["naive-sgd", "sp"], ["naive-sgd, sp"]])
def test_lists_may_be_parted_by_commas_and_blanks(words):
    runs = runs_of(cli.ClassIncremental, "--strategies", *words, "--seeds", 1)
    assert [run.strategy for run in runs] == ["naive-sgd", "sp"]


def test_strategies_are_called_by_the_names_of_the_tables_or_by_their_keys():
    for words in ("gate,gate+optimizer,Gaussians,replay+gate+optimizer", "sp,sp-both,gaussian-replay,sp-replay"):
        runs = runs_of(cli.ClassIncremental, "--strategies", words, "--seeds", 2, "--against", "gate+optimizer")
        assert [run.strategy for run in runs][:4] == ["sp", "sp-both", "gaussian-replay", "sp-replay"]
    assert len({*NAMES.values(), *ABOUT} - set(NAMES)) == len(ABOUT)  # no name is that of two strategies
    assert all(strategy_called(name) == key == strategy_called(key) for key, name in NAMES.items())


def test_each_benchmark_has_a_folder_of_its_own():
    defaults = compare.main.keywords
    kind, names = cli.ClassIncremental, ("mnist", "fashion-mnist")
    folders = [cli.comparison(kind, ["--data", data], "", **defaults).folder.name for data in names]
    assert folders == ["split_mnist", "split_fashion_mnist"]


@pytest.mark.parametrize("words", [["lr=0.1,openness=2"], ["lr=0.1,", "openness=2"], ["lr=0.1", "--set", "openness=2"]])
def test_settings_may_be_overridden_together_or_one_by_one(words):
    (run,) = runs_of(cli.ClassIncremental, "--strategies", "sp", "--seeds", 1, "--set", *words)
    assert dict(run.overrides) == {"lr": 0.1, "openness": 2.0}


def test_seeds_are_outermost_and_buffers_are_for_those_that_store():
    arguments = ["--strategies", "sp,sp-replay", "--replay-buffer", "50, 200", "--seeds", 2, "--first-seed", 7]
    runs = runs_of(cli.DomainIncremental, *arguments)
    one = [("sp", 0), ("sp-replay", 50), ("sp-replay", 200)]
    assert [(r.seed, r.strategy, r.replay_buffer) for r in runs] == [(s, *row) for s in (7, 8) for row in one]


def test_jobs_are_the_processors_that_the_process_may_use():
    assert cli.Where().jobs == len(os.sched_getaffinity(0)) == cli.processors()


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        (split_mnist, ["--set", "opennes=0.1", "--strategies", "sp"], "Invalid setting: opennes (allowed for this"),
        (split_mnist, ["--set", "opennes=0.1", "--strategies", "sp"], "lr, openness, pull_back, rank, readout_step"),
        (split_mnist, ["--strategies", "sp,spp"], "Invalid strategy: spp (allowed: naive-sgd, "),
        (split_mnist, ["--strategies", "packnet"], "Invalid strategy: packnet (allowed: naive-sgd, "),
        (split_mnist, ["--task-incremental", "--strategies", "gdumb"], "Invalid strategy: gdumb (allowed: naive-sgd"),
        (split_mnist, ["--task-incremental", "--tasks", "10"], "Invalid tasks: 10 (allowed on split-mnist with task"),
        (split_mnist, ["--tasks", "3"], "Invalid tasks: 3 (allowed on split-mnist: 1, 2, 5, 10)"),
        (split_mnist, ["--data", "glyphs", "--tasks", "5"], "Invalid tasks: 5 (allowed on split-glyphs: 1, 2, 4, 19"),
        (split_mnist, ["--data", "cifar10"], "(allowed: a folder with cifar-10-batches-py/batches.meta, or --down"),
        (permuted_mnist, ["--data=glyphs", "--protocol", "gpm"], "Invalid protocol: gpm (allowed on permuted-glyphs"),
        (split_mnist, ["--epochs", "0"], "Invalid epochs: 0 (allowed: 1 or more)"),
        (split_mnist, ["--epoch", "1"], "Perhaps you meant: --epochs"),
        (permuted_mnist, ["--train-per-task", "-1"], "Invalid train_per_task: -1 (allowed: 1 or more)"),
        (permuted_mnist, ["--replay-buffer", "200,0"], "Invalid replay_buffer: (200, 0) (allowed: numbers of 1 or"),
        (permuted_mnist, ["--protocol", "original"], "Invalid protocol: original (allowed on permuted-mnist: mammoth"),
        (permuted_mnist, ["--set", "lr"], "lr (allowed: NAME=NUMBER)"),
        (permuted_mnist, ["--strategies", "sp", "--against", "ewc"], "Invalid against: ewc (allowed: one of"),
        (compare, ["--dataset-root", "/nowhere"], "Invalid dataset_root: /nowhere (allowed: a folder with MNIST/raw/"),
        (compare, ["--jobs", "0"], "Invalid jobs: 0 (allowed: 1 or more)"),
        (results, ["--studies", "split5,split6"], "Invalid studies: split6 (allowed: buffers_split2, "),
        (hyperparameter_search, ["--strategy", "upgd"], "Invalid strategy: upgd (allowed: naive-sgd, "),
        (hyperparameter_search, ["--tasks", "3"], "Invalid tasks: 3 (allowed on split-mnist: 1, 2, 5, 10)"),
        (hyperparameter_search, ["--trials", "0"], "Invalid trials: 0 (allowed: 1 or more)"),
        (hyperparameter_search, ["--first-seed", "5"], "Invalid first_seed: 5 (allowed: 100 or more)"),
        (hyperparameter_search, ["--train-per-task", "9"], "Invalid train_per_task: 9 (allowed with permutations"),
        (hyperparameter_search, ["--set", "lr=1", "--strategy", "naive-sgd"], "Invalid set: every setting is held"),
    ],
)
def test_an_error_is_said_before_anything_starts(script, arguments, words, tmp_path, monkeypatch, capsys):
    def started(*args, **kwargs):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(jobs, "in_parallel", started)
    with pytest.raises(SystemExit) as end:
        script.main([*arguments, "--output", str(tmp_path / "new")])
    assert end.value.code == 2 and words in shown(capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", [permuted_mnist, hyperparameter_search])
def test_an_output_that_cannot_be_written_ends_it_at_once(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "in_parallel", None)
    (tmp_path / "file").touch()
    assert script.main(["--output", str(tmp_path / "file" / "folder")]) == 1
    assert f"the results cannot be written: Not a directory: '{tmp_path / 'file'}" in capsys.readouterr().err


HELP = """
import sys, split_mnist
try:
    split_mnist.main(["--help"])
except SystemExit as end:
    assert end.code == 0 and "torch" not in sys.modules
"""


def test_help_has_a_line_on_each_strategy_and_writes_nothing(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    done = subprocess.run([sys.executable, "-c", HELP], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"^  ([\w+-]+) +(\S.*)$", done.stdout.partition("strategies:")[2], re.MULTILINE))
    names = {run.strategy for run in runs_of(cli.ClassIncremental, "--task-incremental")}
    names |= {"sp-replay-surprise", "gdumb"}
    assert all(listed[name].endswith(ABOUT[name]) and listed[name].startswith(NAMES.get(name, "")) for name in names)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_comparison_ends_with_a_table_and_figures(tmp_path, capsys):
    arguments = [*TINY, "--strategies", "naive-sgd,sp-replay", "--seeds", "2", "--first-seed", "3"]
    arguments += ["--output", str(tmp_path), "--against", "naive-sgd"]
    assert permuted_mnist.main(arguments) == 0
    out = capsys.readouterr().out
    for name in ("table.md", "acc.png", "training.png"):
        assert str(tmp_path / name) in out and (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "table.md").read_text() in out and "ACC minus that of naive-sgd" in out
    frame = Store(tmp_path).frame()
    assert sorted(frame.seed) == [3, 3, 4, 4] and set(frame.torch) == {importlib.metadata.version("torch")}
    assert permuted_mnist.main(arguments) == 0
    assert "4 of 4 runs are already in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_run_ends_it_with_status_1(tmp_path, capsys):
    arguments = [*TINY, "--strategies", "sp", "--seeds", "1", "--set", "lr=1e30", "--output", str(tmp_path)]
    assert permuted_mnist.main(arguments) == 1
    assert "1 of 1 runs failed" in capsys.readouterr().err
