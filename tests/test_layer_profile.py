"""What each layer contributes, and openness learned layer by layer: from short runs on real MNIST."""

import json
import sys
from math import inf

import pytest
from optuna.trial import TrialState

from avalanche_sp import SelectivePlasticityPlugin
from avalanche_sp.layers import gated_layers

from conftest import MNIST, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import hyperparameter_search  # noqa: E402

import layers  # noqa: E402
from harness import search  # noqa: E402
from harness.networks import build_network  # noqa: E402
from harness.search import Search, space_of, work  # noqa: E402
from harness.search_report import write_search  # noqa: E402
from harness.settings import Run, code_fingerprint  # noqa: E402
from harness.strategies import build_strategy  # noqa: E402

SHORT = {"benchmark": "permuted-mnist", "n_tasks": 2, "train_per_task": 200}
PROFILE = {"openness": {"1": 0.1, "3": 0.5}}


def run_of(overrides=(), strategy="sp", **kwargs):
    common = {"epochs": 1, "batch_size": 64, "replay_buffer": 0, "seed": 100, "validation": True}
    return Run(strategy=strategy, overrides=overrides, **common, **{**SHORT, **kwargs})


def gate_of(overrides):
    run = run_of(overrides)
    _, plugins = build_strategy(run, build_network(run.network), [], None)
    return plugins[0]


def test_overrides_reach_the_layers_they_name():
    gate = gate_of((("openness", inf), ("openness:3", 0.5), ("rank:1", 8.0), ("pull_back", 0.0)))
    assert gate.openness == {"3": 0.5, "*": inf}
    assert gate.rank == {"1": 8} and all(isinstance(r, int) for r in gate.rank.values())
    assert gate.pull_back == 0.0
    with pytest.raises(ValueError, match="Invalid override: strength:1"):
        gate_of((("strength:1", 1.0),))


def test_the_parts_name_every_gated_layer():
    for network, names in layers.LAYERS.items():
        assert names == tuple(gated_layers(build_network(network)))


def test_a_search_learns_openness_by_layer_and_writes_what_the_plugin_takes(tmp_path):
    fixed = (("lr", 0.1), ("pull_back", 1.0), ("rank", 16.0))
    names = ("1", "3")
    assert set(space_of(run_of(fixed), names)) == {"openness:1", "openness:3"}
    with pytest.raises(ValueError, match="Invalid layers: 1, 3 .*naive-sgd has no openness"):
        space_of(run_of(strategy="naive-sgd"), names)
    here = Search(run_of(fixed), 1, 2, tmp_path, str(MNIST), code_fingerprint(), layers=names)
    assert here.name != Search(run_of(fixed), 1, 2, tmp_path, str(MNIST), code_fingerprint()).name
    while work(here) is not None:
        pass
    paths = write_search(here, here.study())
    settings = json.loads(paths[-1].read_text())
    best = max(search.finished(here.study()), key=lambda t: t.value if t.state == TrialState.COMPLETE else -1)
    assert settings == {"openness": {n: best.params[f"openness:{n}"] for n in names}}
    assert SelectivePlasticityPlugin(**settings).openness == {**settings["openness"], "*": 0.5}
    args = hyperparameter_search.parser().parse_args(["--strategy", "sp", "--layers", "1,fc*"])
    assert args.layers == ("1", "fc*")


@pytest.fixture
def short(monkeypatch):
    parts = {"mlp": (SHORT | {"network": "256-256"}, False), "learned-split": (SHORT, True)}
    monkeypatch.setattr(layers, "PARTS", parts)
    monkeypatch.setattr(layers, "LAYERS", {"256-256": ("3",)})


def test_tables_and_figure_are_those_of_the_runs(short, tmp_path, capsys):
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE))
    words = ["--output", str(tmp_path), "--seeds", "2", "--jobs", "1"]
    assert layers.main([*words, "--rerun"]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(records) == 2 * (6 + 2)  # the default's run is both parts'
    assert all(r["curve"] == [] for r in records)
    found = layers.accuracies("mlp", PROFILE["openness"], records)
    assert list(found) == ["default", "none", "only 3", "without 3", "3 opened", "3 closed"]
    by_openness = {json.dumps(r["run"]["overrides"]): r["acc"] for r in records if r["run"]["seed"] == 1}
    assert found["without 3"][1] == by_openness['{"openness:3": Infinity}']
    assert found["default"][1] == by_openness["{}"]
    table = (tmp_path / "mlp.md").read_text()
    assert layers.shown(layers.minus(found["3 opened"], found["default"])) in table
    assert "seeds 0, 1" in table and "| `3`" in table
    assert "| 2 " in (tmp_path / "learned.md").read_text().replace("|       2 ", "| 2 ")
    assert (tmp_path / "layers.png").stat().st_size > 1000
    before = (tmp_path / "runs.jsonl").read_bytes(), table
    assert layers.main(words) == 0  # from what is stored alone
    assert before == ((tmp_path / "runs.jsonl").read_bytes(), (tmp_path / "mlp.md").read_text())


def test_only_seeds_that_all_variants_have_count(short):
    runs = layers.runs_of("learned-split", PROFILE["openness"], [0, 1])
    records = [{"run": run.to_json(), "acc": 80.0 + i} for i, run in enumerate(runs[:5])]
    assert layers.accuracies("learned-split", PROFILE["openness"], records) == {
        "default": {0: 80.0}, "alike": {0: 81.0}, "learned": {0: 82.0},
    }  # fmt: skip
    diverged = {"run": runs[5].to_json(), "error": "FloatingPointError: the loss is nan"}
    found = layers.accuracies("learned-split", PROFILE["openness"], [*records, diverged])
    assert found["learned"][1] == 10.0
    assert layers.accuracies("learned-split", PROFILE["openness"], []) == {}


def test_a_profile_that_is_none_is_refused(tmp_path, capsys):
    for text in ("{}", "nothing"):
        (tmp_path / "profile.json").write_text(text)
        with pytest.raises(SystemExit):
            layers.main(["--output", str(tmp_path)])
        assert "--profile" in capsys.readouterr().err
