"""Tables are queries on the store: the numbers of the documents are those of the stored runs."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import results
import tables as command
from harness import tables
from harness.networks import build_network
from harness.recipes import strategies_of
from harness.run import worst_case
from harness.settings import Run
from harness.statistics import bootstrap, holm, rank_biserial, student, wilcoxon
from harness.store import Store, key_of, version_of
from harness.studies import STUDIES, Row, Study, newest

from conftest import MNIST, ROOT


@pytest.fixture(scope="module")
def stored():
    return command.stored()


def test_statistics_by_hand():
    values = (1.0, 2.0, 4.0, 8.0, 9.0)
    low, high = bootstrap(values)
    assert 1.0 < low < np.mean(values) < high < 9.0
    interval = stats.bootstrap((values,), np.mean, n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert bootstrap((3.0,)) == (3.0, 3.0) == bootstrap((3.0, 3.0))
    assert student([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-5) and np.isnan(student([5.0]))
    assert rank_biserial([1, 2, 3]) == 1 and rank_biserial([-1, -2]) == -1 and rank_biserial([0.0, 0.0]) == 0
    assert rank_biserial([1, -2, 3]) == pytest.approx((1 + 3 - 2) / 6)
    assert wilcoxon([1, 2, 3, 4]) == 0.125 and wilcoxon([0.0, 0.0]) == 1.0


def test_holms_correction_is_that_of_the_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and len(holm([])) == 0
    ps = np.random.default_rng(0).uniform(size=12) ** 3
    for i, p in enumerate(holm(ps)):  # the largest of the products of all that are no larger
        ranks = [(len(ps) - rank) * value for rank, value in enumerate(sorted(ps)) if value <= ps[i]]
        assert p == pytest.approx(min(1, max(ranks)))


def test_the_signed_rank_test_is_scipys_with_ties_and_zeros_too():
    rng = np.random.default_rng(0)
    for n in (2, 5, 9, 20):
        for digits in (0, 1, 6):
            differences = np.round(rng.normal(0.5, 1, n), digits)
            if differences.any():
                assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences).pvalue, abs=1e-12)


def test_the_worst_case_is_the_lowest_a_task_falls_to_after_it_was_learned():
    curve = {0: ([30, 0, 0], [90, 0, 0]), 1: ([20, 50, 5], [80, 95, 5]), 2: ([70, 10, 60], [75, 88, 97])}
    points = [{"experience": e, "task_acc": accuracies} for e, found in curve.items() for accuracies in found]
    assert worst_case(points) == (20 + 10) / 2
    assert worst_case(points[:2]) is None


# -- Tables of runs that were made up ---------------------------------------------------------------------------------

STUDY = Study(
    "A study",
    {"benchmark": "permuted-mnist", "n_tasks": 2, "train_per_task": 200},
    [Row("sp-both"), Row("replay-sgd"), Row("replay-joint"), Row("der++"), Row("sp-replay"), Row("joint")],
    (50, 200),
    curves=(200,),
    seeds=2,
)
GAINS = {"sp-both": 1.0, "replay-sgd": -3.0, "replay-joint": 3.0, "der++": 9.0, "joint": 20.0}
GAINS_OF_OURS = {50: 3.0, 200: 0.0}


def made_up(path, seeds=10, study=STUDY, gain=lambda run: GAINS.get(run["strategy"], 0.0)):
    """A store of the study's runs: each row's ACC is a seed's luck, the row's gain and a little noise."""
    rng, store = np.random.default_rng(0), Store(path)
    luck = rng.normal(0, 5, seeds)
    for run in study.runs(seeds):
        own = GAINS_OF_OURS[run["replay_buffer"]] if run["strategy"] == "sp-replay" else gain(run)
        acc = float(60 + luck[run["seed"]] + own + rng.normal(0, 0.3))
        figures = {"acc": acc, "bwt": -1.0, "min_acc": acc - 10, "learning_acc": acc, "seconds": 2.0}
        figures |= {"extra_memory_bytes": 1000, "accuracy_matrix": [[acc, 0.0], [acc - 5, acc + 5]]}
        trained = {"optimizer": "SGD", "lr": 0.1, "loss": "squared error", "arguments": {"openness": 0.5}}
        store.append({"settings": run | trained, "figures": figures})
    return newest(store.frame())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return STUDY.select(made_up(tmp_path_factory.mktemp("store")))


def rows_of(text):
    """Rows of the last table in a text, by first cell; the header's names as keys."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_a_markdown_table_has_a_column_for_every_name():
    lines = tables.markdown([{"a": 1, "name": "x"}, {"b": "yy"}]).splitlines()
    assert lines == ["| a | name | b  |", "| - | ---- | -- |", "| 1 | x    |    |", "|   |      | yy |"]


def test_a_study_selects_its_own_runs_in_the_order_of_its_rows(tmp_path, runs):
    assert list(dict.fromkeys(runs["label"])) == [row.strategy for row in STUDY.rows]
    assert len(runs) == 10 * (2 + 4 * 2)
    other = dataclasses.replace(STUDY, settings={**STUDY.settings, "stream": "blurred"})
    assert len(other.select(made_up(tmp_path, seeds=2))) == 0
    store = Store(tmp_path)
    for settings in ({"overrides": {"lr": 0.3}}, {"validation": True}, {"epochs": 2}, {"n_tasks": 3}):
        store.append({"settings": STUDY.runs(1)[0] | settings, "figures": {"acc": 0.0}})
    mine = STUDY.select(newest(store.frame()))
    assert len(mine) == 2 * 10 and mine["acc"].min() > 0


def test_of_a_run_in_two_versions_the_newest_is_selected(tmp_path):
    store, run = Store(tmp_path), STUDY.runs(1)[0]
    for version, acc in ((version_of("sp-both"), 2.0), (version_of("sp-both") - 1, 1.0)):
        store.append({"settings": run, "figures": {"acc": acc}, "versions": {"algorithm": version}})
    assert len(store.frame()) == 2
    assert STUDY.select(newest(store.frame()))["acc"].tolist() == [2.0]


def test_verdicts_are_those_of_the_corrected_tests(runs):
    found = tables.against_others(runs, "sp-replay")[50]
    verdicts = {label: tables.verdict(row) for (label, _), row in found.iterrows()}
    assert verdicts == {"sp-both": "above", "replay-sgd": "above", "replay-joint": "level", "der++": "below"}
    row = found.loc[("replay-sgd", 50)]
    assert row["p"] == pytest.approx(2 / 2**10 * 4)  # all seeds gain: the smallest p of ten, of four comparisons
    assert row["mean"] == pytest.approx(6, abs=0.5) and (row["gains"] > 0).all()
    steps = tables.growth(runs, "sp-replay")
    assert [(buffer, tables.verdict(row)) for buffer, row in steps.iterrows()] == [(50, "above"), (200, "below")]


def test_the_difference_table_marks_what_is_significant(runs):
    rows = rows_of(tables.minus_others(runs, STUDY, "sp-replay"))
    names = ["gate + optimizer", "replay-sgd", "replay-joint", "der++"]
    assert list(rows) == [*names, "itself with the next smaller memory"]
    assert rows["replay-sgd"]["50"].startswith("**+6.") and rows["der++"]["50"].startswith("**-")
    assert not rows["replay-joint"]["50"].startswith("**")
    few = tables.minus_others(runs[runs["seed"] < 3], STUDY, "sp-replay")
    assert "**" not in few  # with three seeds nothing can be significant
    only = tables.minus_others(runs, STUDY, "sp-replay", "der++")
    assert list(rows_of(only)) == ["der++"]


def test_the_best_of_the_others_is_found(runs):
    row = rows_of(tables.best(runs, STUDY, "sp-replay"))["50"]
    mean = runs.loc[(runs["strategy"] == "der++") & (runs["replay_buffer"] == 50), "acc"].mean()
    assert row["best other row"] == f"der++ {mean:.1f}" and row["verdict"] == "below" and row["effect"] == "-1.00"
    assert row["p (Holm)"] == f"{2 / 2**10 * 4:.3f}"


def test_the_grid_shows_means_with_bootstrap_intervals(runs):
    text = tables.grid(runs, STUDY)
    assert text.startswith("**A study**: 1 epoch, batch 64, MLP 784-256-256-10, 10 seeds.\n")
    acc = runs.loc[(runs["strategy"] == "der++") & (runs["replay_buffer"] == 200), "acc"]
    low, high = bootstrap(tuple(acc))
    assert rows_of(text)["der++"] == {
        "strategy": "der++",
        "no buffer": "",
        "50": rows_of(text)["der++"]["50"],
        "200": f"{acc.mean():.1f} [{low:.1f}, {high:.1f}]",
    }


def test_a_listing_shows_each_tasks_accuracy_and_what_a_strategy_trains_with(runs):
    rows = rows_of(tables.listing(runs, STUDY))
    acc = runs.loc[runs["strategy"] == "joint", "acc"]
    assert rows["joint"]["ACC %"] == f"{acc.mean():.1f} ± {student(acc.tolist()):.1f}"
    assert rows["joint"]["each task %"] == f"{acc.mean() - 5:.1f} / {acc.mean() + 5:.1f}"
    assert rows["joint"]["trained with"] == "SGD 0.1, squared error; openness=0.5"
    assert list(rows)[0] == "gate + optimizer" and list(rows)[-1] == "joint"  # the bound last
    lacking = runs.assign(bwt=runs["bwt"].where(runs["seed"] > 0))
    assert {row["BWT %"] for row in rows_of(tables.listing(lacking, STUDY)).values()} == {"-"}
    worst = tables.listing(runs, STUDY, "worst")
    assert "| 50 " not in worst  # the study keeps no curve with 50


def test_accuracy_minus_that_of_a_reference_has_its_interval(runs):
    rows = rows_of(tables.minus(runs, STUDY, "sp-both"))
    joint, ours = (runs[runs["strategy"] == name].set_index("seed")["acc"] for name in ("joint", "sp-both"))
    gains = joint - ours
    assert rows["joint"]["ACC minus that of gate + optimizer"] == f"{gains.mean():+.1f} ± {student(gains.tolist()):.1f}"
    assert rows["joint"]["p (Holm)"] == f"{2 / 2**10 * 9:.3f}"
    with pytest.raises(ValueError, match="Invalid against: sp-replay .allowed: a strategy with one row"):
        tables.minus(runs, STUDY, "sp-replay")  # with 50 and 200 stored samples


def test_a_single_strategy_is_compared_with_none(runs):
    alone = runs[runs["strategy"] == "sp-both"]
    assert rows_of(tables.minus(alone, STUDY, "sp-both")) == {}
    assert tables.against_others(alone, "sp-both") == {}


def test_a_caption_counts_the_runs_of_an_older_version(runs):
    older = runs.assign(version=runs["version"].where(runs["strategy"] != "sp-both", 0))
    assert tables.caption("A study", older).endswith("10 seeds; 10 runs of an older version.\n\n")
    uneven = runs[(runs["seed"] < 3) | (runs["strategy"] != "joint")]
    assert "3 to 10 seeds" in tables.caption("A study", uneven)


def test_published_figures_are_compared_with_ours(tmp_path):
    study = STUDIES["protocol_van_de_ven_split"]
    frame = made_up(tmp_path, 3, study, lambda run: 40.0)
    text = tables.listing(study.select(frame), study, "published")
    row = rows_of(text)["joint"]
    here = float(row["here %"].split(" ")[0])
    assert row["published %"] == "97.9" and row["seeds"] == "3"
    assert float(row["difference"]) == pytest.approx(here - 97.9, abs=0.11)
    assert rows_of(text)["gate + optimizer"]["published %"] == "-" == rows_of(text)["gate + optimizer"]["difference"]
    assert "Published: G. van de Ven" in text


def test_boundaries_that_were_found_missed_and_false():
    assert tables.found_boundaries([100, 200, 300], [50, 108, 150]) == ([8], 1, 2)
    assert tables.found_boundaries([100, 200, 300], []) == ([], 2, 0)


# -- The stored results and the documents -----------------------------------------------------------------------------


def test_every_document_has_the_tables_of_the_stored_results(stored):
    for path in command.DOCUMENTS:
        text = path.read_text()
        assert text == command.updated(text, stored), f"{path}: make results"
        assert text.count("<!-- table:") == text.count("<!-- end of table -->")


def test_a_changed_result_changes_its_documents(stored):
    text = (ROOT / "README.md").read_text()
    better = stored.assign(acc=stored["acc"].where(stored["strategy"] != "sp-both", stored["acc"] + 1))
    assert text != command.updated(text, better)


# Rows that diverged.
NEVER_RUN = {"fashion-mnist_10": 1}


def test_every_study_is_shown_and_has_every_run_in_the_store(stored):
    shown = "".join(path.read_text() for path in command.DOCUMENTS)
    for name, study in STUDIES.items():
        cells = study.select(stored).groupby(["label", "strategy", "replay_buffer"]).size()
        assert len(cells) == len(study.cells()) - NEVER_RUN.get(name, 0), name
        assert name.startswith("boundaries_") or name in shown, name


def test_stored_runs_are_found_by_the_settings_of_present_ones():
    """So that ``results.py`` trains none of them again, but for those of an older version of the algorithm."""
    keys = Store(command.RESULTS).keys()
    for name in ("buffers_split2", "compare", "ablations_split5", "protocol_mammoth_split", "boundaries_returning"):
        for settings in STUDIES[name].runs(3):
            run = Run(**settings).settings()
            assert keys.intersection(key_of(run, v + 1) for v in range(version_of(run["strategy"]))), settings


def test_no_run_is_stored_twice(stored):
    assert len(list(Store(command.RESULTS).rows())) == len(stored)  # which has one of each


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_of_strategies_and_settings_that_exist(name):
    runs = [Run(**settings) for settings in STUDIES[name].runs(2)]
    assert len(set(runs)) == len(runs)
    for network in {run.network for run in runs}:
        build_network(network)
    for run in runs:
        assert run.strategy in strategies_of(run.benchmark, run.task_incremental)
        assert key_of(run.settings()) == key_of(json.loads(json.dumps(run.settings())))


@pytest.mark.slow
def test_training_then_nothing_to_train(tmp_path, monkeypatch, capsys):
    study = dataclasses.replace(STUDY, rows=[Row("naive-sgd"), Row("sp"), Row("sp-replay")], buffers=(200,))
    monkeypatch.setitem(STUDIES, "a_study", study)
    arguments = ["--studies", "a_study", "--jobs", "1", "--output", str(tmp_path), "--dataset-root", str(MNIST)]
    assert results.main([*arguments, "--strategies", "sp,sp-replay", "--seeds", "1"]) == 0
    runs = study.select(newest(Store(tmp_path).frame()))
    assert runs["label"].tolist() == ["sp", "sp-replay"] and runs["acc"].min() > 10
    assert [isinstance(curve, list) for curve in runs["curve"]] == [False, True]  # with 200 stored samples
    assert list(rows_of(tables.listing(runs, study))) == ["gate", "replay + gate + optimizer"]
    before = (tmp_path / "permuted-mnist.jsonl").read_bytes()
    assert results.main([*arguments, "--strategies", "sp,sp-replay", "--seeds", "1"]) == 0
    assert "2 of 2 runs are already in" in capsys.readouterr().out
    assert (tmp_path / "permuted-mnist.jsonl").read_bytes() == before


def test_help_writes_nothing(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [*command.DOCUMENTS, *command.RESULTS.iterdir()]}
    for script in ("tables.py", "results.py"):
        done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
