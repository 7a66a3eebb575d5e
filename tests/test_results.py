"""The page of results says what the tests of significance support, and comes from the stored runs alone."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from scipy import stats

from conftest import MNIST, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import results  # noqa: E402
from harness import page as pages  # noqa: E402
from harness.comparison import against_others, cells_of, steps  # noqa: E402
from harness.report import summarize  # noqa: E402
from harness.run import worst_case  # noqa: E402
from harness.settings import code_fingerprint, settings_of, strategies_of  # noqa: E402
from harness.statistics import bootstrap, holm, rank_biserial, wilcoxon  # noqa: E402
from harness.strategies import recipe_of  # noqa: E402
from harness.studies import BY_BUFFER, EVERY, ROBUSTNESS, Row, Study  # noqa: E402


def test_statistics_by_hand():
    values = [1.0, 2.0, 4.0, 8.0, 9.0]
    low, high = bootstrap(values)
    assert 1.0 < low < np.mean(values) < high < 9.0
    assert bootstrap(values) == (low, high)  # always the same
    assert bootstrap([3.0]) == (3.0, 3.0) == bootstrap([3.0, 3.0])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert rank_biserial([1, 2, 3]) == 1 and rank_biserial([-1, -2]) == -1 and rank_biserial([0.0, 0.0]) == 0
    assert rank_biserial([1, -2, 3]) == pytest.approx((1 + 3 - 2) / 6)
    assert wilcoxon([1, 2, 3, 4]) == pytest.approx(stats.wilcoxon([1, 2, 3, 4]).pvalue)
    assert wilcoxon([0.0, 0.0]) == 1.0


def test_the_worst_case_is_the_lowest_a_task_falls_to_after_it_was_learned():
    curve = {0: ([30, 0, 0], [90, 0, 0]), 1: ([20, 50, 5], [80, 95, 5]), 2: ([70, 10, 60], [75, 88, 97])}
    points = [{"experience": e, "task_acc": accuracies} for e, found in curve.items() for accuracies in found]
    assert worst_case(points) == (20 + 10) / 2
    assert worst_case(points[:2]) is None


def test_a_measure_that_not_all_seeds_have_is_left_out_of_the_summary():
    """Stored runs may be of before a measure was there, or of an online stream, which has none."""
    made = records({}, seeds=3)
    for record in made:
        record["recipe"] = {"loss": "squared error", "optimizer": "SGD", "lr": 0.1, "settings": {}}
    made[0]["min_acc"] = None
    del made[1]["min_acc"]
    first, second, third = summarize(made)[:3]
    assert [s["strategy"] for s in (first, second, third)] == ["sp-both", "replay-sgd", "replay-joint"]
    assert first["min_acc"] is None and "min_acc" not in second
    assert third["min_acc"]["mean"] == pytest.approx(third["acc"]["mean"] - 10)


# -- What the page says ----------------------------------------------------------------------------------------------

STUDY = Study(
    "A study",
    "permuted-mnist",
    2,
    (Row("sp-both"), Row("replay-sgd"), Row("replay-joint"), Row("der++"), Row("sp-replay"), Row("joint")),
    (50, 200),
    train_per_task=200,
    curves=(200,),
    seeds=2,
)


def records(gains, seeds=10, study=STUDY):
    """Records of the study; each row's ACC is a seed's luck, the row's gain and a little noise."""
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 5, seeds)
    made = []
    for run in study.runs(seeds):
        gain = gains.get(run.strategy, 0.0)
        gain = gain[run.replay_buffer] if isinstance(gain, dict) else gain
        acc = float(60 + luck[run.seed] + gain + rng.normal(0, 0.3))
        made.append(
            {"key": run.key(code_fingerprint()), "run": run.to_json(), "acc": acc, "min_acc": acc - 10, "seconds": 1.0}
            | {"extra_memory_bytes": 1000, "accuracy_matrix": [[acc, acc]], "bwt": -1.0, "learning_acc": acc}
        )
    return made


GAINS = {"replay-sgd": -3.0, "replay-joint": 3.0, "der++": 9.0, "sp-replay": {50: 3.0, 200: 0.0}}
GAINS |= {"sp-both": 1.0, "joint": 20.0}


def test_verdicts_are_those_of_the_corrected_tests():
    cells = cells_of(STUDY, records(GAINS))
    found = against_others(cells)[50]
    verdicts = {row.other.label: row.verdict for row in found}
    assert verdicts == {"sp-both": "above", "replay-sgd": "above", "replay-joint": "level", "der++": "below"}
    (row,) = [row for row in found if row.other.label == "replay-sgd"]
    assert row.p == pytest.approx(2 / 2**10 * 4)  # all seeds gain: the smallest p of ten, of four comparisons
    assert row.mean == pytest.approx(6, abs=0.5) and row.low < row.mean < row.high and row.effect == 1
    assert [(row.other.buffer, row.verdict) for row in steps(cells)] == [(0, "above"), (50, "below")]


def test_sentences_say_no_more_than_the_tests(monkeypatch):
    monkeypatch.setattr(pages, "BY_BUFFER", {"a_study": STUDY})
    text = pages.page({"a_study": records(GAINS)})
    assert "`sp-replay` is above every other row at none of them, and below at least one with 50 and 200." in text
    assert "With 50 stored samples `sp-replay` is above sp-both (+" in text and ") and replay-sgd (+" in text
    assert "; level with replay-joint (" in text and "; below der++ (-" in text
    assert "it falls significantly from 50 on (-" in text
    few = pages.page({"a_study": records(GAINS, seeds=3)})  # with which nothing can be significant
    assert "above sp-both" not in few and "below der" not in few and "never falls significantly" in few
    assert "With 3 seeds no difference can be significant." in few
    assert "## Published figures" not in text  # there are none


def test_ours_with_gaussians_has_sentences_of_its_own(monkeypatch):
    names = ("sp-both", "sp-gaussian", "sp-replay", "replay-gaussian", "sp-replay-gaussian")
    study = dataclasses.replace(STUDY, rows=tuple(map(Row, names)))
    gains = {"sp-gaussian": 2.0, "sp-replay": 1.0, "replay-gaussian": 3.0, "sp-replay-gaussian": {50: 5.0, 200: 4.0}}
    made = records(gains, study=study)
    monkeypatch.setattr(pages, "BY_BUFFER", {"a_study": study})
    text = pages.page({"a_study": made})
    assert "`sp-replay` is above every other row at none of them, and below at least one with 50 and 200." in text
    assert "`sp-replay-gaussian` is above every other row with 50 and 200 stored samples, and below none" in text
    assert "`sp-replay-gaussian` (`sp-gaussian` where there is none) changes by -" in text
    found = steps(cells_of(study, made), "sp-replay-gaussian")
    assert [(row.other.label, row.other.buffer, row.verdict) for row in found] == [
        ("sp-gaussian", 0, "above"),
        ("sp-replay-gaussian", 50, "below"),
    ]


def test_a_head_for_each_task_has_a_section_of_its_own():
    study = EVERY["task_incremental_split5"]
    assert all(run.task_incremental for run in study.runs(1))
    made = records({"packnet": 4.0, "sp-both": 9.0, "joint": 20.0}, study=study)
    text = pages.page({"task_incremental_split5": made})
    (heading,) = [line for line in text.splitlines() if line.startswith("## ")]
    assert heading == "## A head for each task" and "no figure here is comparable with any above" in text
    above, below = re.search(r"- `sp-both` is above (.*); below (.*)\.\n", text).groups()
    assert "packnet (+" in above and "joint (-" in below


def test_the_published_gate_stands_beside_its_control():
    legacy = EVERY["original"]
    text = pages.page({"original": records({"legacy-sp-replay": 5.0}, study=legacy)})
    assert re.search(
        r"The published gate changes ACC by \+[45]\.\d \[\+[45]\.\d, \+[45]\.\d\] points .*; p = 0\.002\)", text
    )
    assert "Avalanche's replay, tuned rates" not in text  # these are another study's
    kept = EVERY["original_working_buffer"]
    assert {run.overrides for run in kept.runs(1)} == {(("fifo", 0.0),)}


def test_figures_beside_published_ones_are_near_or_farther_off():
    study = EVERY["protocol_van_de_ven_split"]
    made = records({}, seeds=3, study=study)
    for record in made:
        record["acc"] = 30.0 if record["run"]["strategy"] == "naive-adam" else 97.0
    text = pages.page({"protocol_van_de_ven_split": made})
    assert "papers differ by on equal methods: joint (-0.9); farther off: naive-adam (+10.1)." in text
    assert re.search(r"\| sp-both +\| - +\| - +\| 97.0", text)


def test_of_each_run_the_present_codes_record_is_taken_else_the_last():
    run, other = STUDY.runs(1)[:2]
    code = code_fingerprint()

    def record(run, code, acc):
        return {"key": run.key(code), "run": run.to_json(), "acc": acc}

    found = results.latest(
        STUDY,
        [
            record(run, "old", 1),
            record(run, code, 2),
            record(run, "older", 3),
            record(other, "old", 4),
            record(other, "older", 5),
            {**record(other, code, 6), "error": "it failed"},
            record(dataclasses.replace(run, epochs=7), code, 8),
        ],
    )
    assert [r["acc"] for r in found] == [2, 5]


def test_training_then_writing_and_writing_again_without_training(tmp_path, monkeypatch, capsys):
    study = dataclasses.replace(STUDY, rows=(Row("sp"), Row("replay-joint"), Row("sp-replay")), buffers=(200,))
    for module in (results, pages):
        monkeypatch.setattr(module, "BY_BUFFER", {"a_study": study})
    monkeypatch.setattr(results, "EVERY", {"a_study": study})
    arguments = ["--jobs", "1", "--output", str(tmp_path), "--dataset-root", str(MNIST)]
    assert results.main(["--rerun", "--strategies", "sp", *arguments]) == 0
    assert not (tmp_path / "results" / "buffers.png").exists()  # nothing with a buffer yet
    assert results.main(["--rerun", "--strategies", "sp-replay", *arguments]) == 0
    assert results.main(["--rerun", *arguments]) == 0
    assert "4 of 6 runs are already in" in capsys.readouterr().out
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {"results.jsonl", "summary.json", "table.md", "training.png", "buffers.png", "results.md"}
    assert {path.name for path in written} == names
    assert results.main(arguments) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written
    text = (tmp_path / "results.md").read_text()
    assert "**A study**: 1 epoch, batch 64, MLP 784-256-256-10, 2 seeds." in text
    assert "| sp-replay    |" in text and "worst case %" in text


def test_what_a_change_of_the_settings_costs_stands_beside_joint_training():
    name, study = next(iter(ROBUSTNESS.items()))
    made = records({"sp": 30.0, "sp-both": 31.0, "sp-gaussian": 33.0, "joint": 36.0}, seeds=3, study=study)
    for record in made:
        if record["run"]["batch_size"] == 10:
            record["acc"] -= 7.0
    text = pages.page({name: made})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["", "sp", "sp-both", "sp-gaussian", "joint"]
    changes = {row[0]: [float(re.search(r"\(([+-].*)\)", cell)[1]) for cell in row[1:]] for row in rows[2:]}
    rates = ["learning rate x 3", "learning rate / 3"]
    assert list(changes) == [*rates, "batch 10", "batch 256", "10 epochs", "random classes"]
    assert changes.pop("batch 10") == pytest.approx([-7.0] * 4, abs=1)
    assert all(change == pytest.approx([0.0] * 4, abs=1) for change in changes.values())
    assert not re.search(r"\([+-]", " ".join(rows[1]))


# -- The studies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_study_is_of_strategies_and_settings_that_exist(name):
    study = EVERY[name]
    runs = study.runs(2)
    assert len(set(runs)) == len(runs)
    labels = study.labels()
    for run in runs:
        assert run.strategy in strategies_of(run.benchmark, run.task_incremental)
        recipe_of(run)
        assert labels[settings_of(json.loads(json.dumps(run.to_json())))]
    only = study.runs(2, ["sp-replay"])
    assert {run.strategy for run in only} <= {"sp-replay"} and set(only) <= set(runs)


def test_the_committed_page_is_that_of_the_committed_results():
    file = ROOT / "docs" / "results.md"
    if not file.exists():
        pytest.skip("no results are committed yet")
    stored = {
        name: results.latest(study, results.read_results(ROOT / "docs" / "results" / name / "results.jsonl"))
        for name, study in EVERY.items()
    }
    assert file.read_text() == pages.page(stored)
    assert any(stored[name] for name in BY_BUFFER)


def test_a_study_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        results.main(["--studies", "everything"])
    assert "unknown study 'everything' (allowed: buffers_split2, " in capsys.readouterr().err
