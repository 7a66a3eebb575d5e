"""Settings of the plugin by layer, in runs and in searches."""

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

from harness import search  # noqa: E402
from harness.networks import build_network  # noqa: E402
from harness.search import Search, space_of, work  # noqa: E402
from harness.search_report import write_search  # noqa: E402
from harness.settings import Run, code_fingerprint  # noqa: E402
from harness.strategies import build_strategy  # noqa: E402
from harness.studies import LAYERS  # noqa: E402

SHORT = {"benchmark": "permuted-mnist", "n_tasks": 2, "train_per_task": 200}


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


def test_the_studies_of_layers_name_every_gated_layer():
    for network, names in LAYERS.items():
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
