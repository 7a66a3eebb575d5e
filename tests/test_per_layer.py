"""Settings by layer: on real MNIST, with a real Avalanche strategy."""

import json
import math

import numpy as np
import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer, SelectivePlasticityPlugin, Settings
from avalanche_sp.gate.layers import gated_layers
from avalanche_sp.gate.per_layer import value_of

from conftest import mlp, strategy_of, weights

DEFAULTS = {"openness": 0.5, "pull_back": 1.0}


class At:
    """Finds a change after 30 iterations."""

    def __init__(self):
        self.seen, self.drift_detected = 0, False

    def update(self, x):
        self.seen += 1
        self.drift_detected = self.seen == 10  # it is not asked about the first 20


def found(consolidate):
    """Arguments for boundaries that are found soon."""
    detector = At() if consolidate == "surprise" else None
    return {"consolidate": consolidate, "detector": detector, "settings": Settings(stream_chunk=512)}


def trained(benchmark, plugin, optimizer=None, replay=(), model=None):
    model = model or mlp()
    strategy = strategy_of(model, [*replay, plugin], optimizer=optimizer and optimizer(model.parameters()))
    torch.manual_seed(0)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return strategy


@pytest.mark.parametrize(
    "consolidate, replay", [("experience", False), ("experience", True), ("surprise", True), ("continuous", False)]
)
def test_a_mapping_to_equal_values_is_the_value_bit_for_bit(split2, consolidate, replay):
    results = []
    for settings in (
        {"openness": 0.1, "pull_back": 0.5, "rank": 10},
        {
            "openness": {"1": 0.1, "3": 0.1, "*": 0.1},
            "pull_back": {"[135]": 0.5},
            "rank": {"5": 10, "*": 10},
        },
    ):
        plugin = SelectivePlasticityPlugin(**settings, **found(consolidate))
        memory = [ReplayPlugin(40)] if replay else []
        results.append(weights(trained(split2, plugin, replay=memory).model))
        assert plugin.consolidated_at
    assert torch.equal(*results)


def test_the_first_pattern_that_matches_counts_and_others_take_the_default():
    plugin = SelectivePlasticityPlugin(
        openness={"features.0": 0.5, "features.*": 0.1},
        pull_back={"*": 0.0, "head": 2.0},
        rank={"[fg]eatures*": 8},
    )
    gate = plugin.gate
    assert [value_of(gate.openness, n) for n in ("features.0", "features.01", "features.a.b", "head")] == [
        0.5, 0.1, 0.1, 0.5,
    ]  # fmt: skip
    assert [value_of(gate.pull_back, n) for n in ("features.0", "head")] == [0.0, 0.0]
    assert value_of(gate.rank, "features.0") == 8
    empty = SelectivePlasticityPlugin(openness={}, pull_back={}, rank={})
    assert {name: value_of(getattr(empty.gate, name), "any") for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    "consolidate, default, rank, kept",
    [
        ("experience", 48, None, {}),
        ("surprise", 64, {"1": 8}, {"1": 8}),
        ("continuous", 64, None, {}),
        ("experience", 48, {"1": 8}, {"1": 8}),
        ("experience", 48, 5, {"1": 5, "3": 5, "5": 5}),
    ],
    ids=str,
)
def test_the_default_rank_depends_on_how_often_something_is_merged(split2, consolidate, default, rank, kept):
    """A readout keeps 257 directions if boundaries are told; all others keep the default."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 80), nn.ReLU(), nn.Linear(80, 700), nn.ReLU(), nn.Linear(700, 10)
    )
    plugin = SelectivePlasticityPlugin(rank=rank, **found(consolidate))
    trained(split2, plugin, model=model)
    ranks = {name: memory.vectors.shape[1] for name, memory in plugin.layers.items()}
    assert ranks == {"1": default, "3": default, "5": 257 if consolidate == "experience" else 64, **kept}


def test_each_layer_is_gated_as_it_is_told(split2):
    plugin = SelectivePlasticityPlugin(openness={"1": 0.05, "3": 5.0}, rank={"3": 7, "5": 12})
    trained(split2, plugin)
    alike = SelectivePlasticityPlugin(openness=0.05)
    trained(split2, alike)
    assert {n: a.vectors.shape[1] for n, a in plugin.layers.items()} == {"1": 48, "3": 7, "5": 12}
    for name, openness in {"1": 0.05, "3": 5.0, "5": 0.5}.items():
        a = plugin.layers[name]
        expected = a.eigenvalues / (a.eigenvalues + openness * a.mean_eigenvalue)
        assert plugin.gate.claimed_rank[name] == int((expected >= 0.5).sum())
    assert plugin.state_bytes < alike.state_bytes


def test_without_a_pull_back_a_layers_drift_is_left_alone(split2):
    """The other layers' pulls don't come to it: with all pulls off it would move the same, if the others did."""
    plugin = SelectivePlasticityPlugin(pull_back={"1": 0.0, "3": 0.0, "5": 0.0})
    off = SelectivePlasticityPlugin(pull_back=0)
    assert torch.equal(weights(trained(split2, plugin).model), weights(trained(split2, off).model))


def test_the_penalty_acts_on_the_layers_that_have_one(split2):
    """On weights that were moved from where they were consolidated, with a loss that has no gradient."""
    plugin = SelectivePlasticityPlugin(openness=20, pull_back={"3": 0.0}, readout_step=False)
    strategy = strategy_of(mlp(), [plugin])
    strategy.train(split2.train_stream[0])
    layers = gated_layers(strategy.model)
    vectors = {name: memory.vectors for name, memory in plugin.layers.items()}
    anchors = {name: layer.weights_and_bias() for name, layer in layers.items()}
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    moved = {name: layer.weights_and_bias() for name, layer in layers.items()}
    strategy._criterion = lambda outputs, targets: outputs.sum() * 0
    strategy.train(split2.train_stream[1])
    for name, layer in layers.items():
        before, now = ((w - anchors[name]) @ vectors[name] for w in (moved[name], layer.weights_and_bias()))
        assert torch.equal(layer.weights_and_bias(), moved[name]) if name == "3" else now.norm() < 0.98 * before.norm()


@pytest.mark.parametrize("consolidate", ["experience", "continuous"])
@pytest.mark.parametrize("optimizer", [None, SelectivePlasticityOptimizer])
def test_a_layer_that_is_switched_off_keeps_nothing(split2, consolidate, optimizer):
    plugin = SelectivePlasticityPlugin(openness={"3": math.inf}, **found(consolidate))
    strategy = trained(split2, plugin, optimizer)
    assert plugin.gate.active and "3" not in plugin.layers
    off = SelectivePlasticityPlugin(openness={"*": math.inf}, **found(consolidate))
    without = trained(split2, SelectivePlasticityPlugin(openness=math.inf), optimizer)
    assert torch.equal(weights(trained(split2, off, optimizer).model), weights(without.model))
    assert not off.gate.active
    assert not torch.equal(weights(strategy.model), weights(without.model))


def test_a_pattern_that_is_no_layers_is_named_before_anything_is_trained(split2):
    model = mlp()
    before = weights(model).clone()
    for name in DEFAULTS:
        strategy = strategy_of(model, [SelectivePlasticityPlugin(**{name: {"1": 1, "conv*": 2}})])
        with pytest.raises(ValueError) as error:
            strategy.train(split2.train_stream[0])
        assert f"Invalid {name} pattern: 'conv*' is no layer's (allowed: 1, 3, 5)" in str(error.value)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"openness": {"1": 0}}, "Invalid openness value for the layers '1': 0 (allowed: greater than 0"),
        ({"openness": {"1": float("nan")}}, "Invalid openness value for the layers '1': nan"),
        ({"openness": {"1": "0.2"}}, "Invalid openness value for the layers '1': '0.2'"),
        ({"pull_back": {"*": -1}}, "Invalid pull_back value for the layers '*': -1 (allowed: 0 or more)"),
        ({"rank": {"1": 8, "3": 2.5}}, "Invalid rank value for the layers '3': 2.5 (allowed: an integer, 1 or more;"),
        ({"openness": "0.5"}, "Invalid openness value: '0.5' (allowed: greater than 0; math.inf is off)"),
        ({"openness": None}, "Invalid openness value: None"),
        ({"openness": [0.5]}, "Invalid openness value: [0.5]"),
        ({"pull_back": "1"}, "Invalid pull_back value: '1' (allowed: 0 or more)"),
        ({"pull_back": {"1": None}}, "Invalid pull_back value for the layers '1': None"),
        ({"rank": "48"}, "Invalid rank value: '48'"),
        ({"rank": np.float32(2.5)}, "2.5"),
        ({"rank": {1: 8}}, "Invalid rank pattern: 1 (allowed: a string, such as '1')"),
    ],
)
def test_bad_values_are_named_at_construction(kwargs, words):
    with pytest.raises(ValueError) as error:
        SelectivePlasticityPlugin(**kwargs)
    assert words in str(error.value)


def test_numpys_numbers_are_numbers():
    plugin = SelectivePlasticityPlugin(
        openness=np.float32(0.25), pull_back={"1": np.int64(2)}, rank={"1": np.int64(32), "*": np.float64(0.5)}
    )
    settings = (plugin.gate.openness, plugin.gate.pull_back, plugin.gate.rank)
    assert settings == (0.25, {"1": 2, "*": 1.0}, {"1": 32, "*": 0.5})
    json.dumps(settings)  # they are Python's own then


def test_settings_go_through_a_file(split2, tmp_path):
    file = tmp_path / "profile.json"
    settings = {"openness": {"1": 0.1, "3": math.inf}, "rank": {"1": 16, "*": 8}}
    file.write_text(json.dumps(settings))
    read = SelectivePlasticityPlugin(**json.loads(file.read_text()))
    given = SelectivePlasticityPlugin(**settings)
    assert torch.equal(weights(trained(split2, read).model), weights(trained(split2, given).model))
    file.write_text(json.dumps({"openness": given.gate.openness, "rank": given.gate.rank}))
    again = SelectivePlasticityPlugin(**json.loads(file.read_text()))
    assert (again.gate.openness, again.gate.rank) == (given.gate.openness, given.gate.rank)


def test_convolutions_take_settings_by_name(split2):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    plugin = SelectivePlasticityPlugin(rank={"0": 5, "2": 9}, openness={"0": 0.05})
    trained(split2, plugin, model=model)
    assert {n: a.vectors.shape[1] for n, a in plugin.layers.items()} == {"0": 5, "2": 9, "5": 129}
