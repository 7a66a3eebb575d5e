"""Settings by layer: on real MNIST, with a real Avalanche strategy."""

import json
import math

import numpy as np
import pytest
import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer, SelectivePlasticityPlugin, boundaries
from avalanche_sp.per_layer import value_of

from conftest import mlp, strategy_of, weights


@pytest.fixture(autouse=True)
def continuous_is_every_512_samples(monkeypatch):
    monkeypatch.setattr(boundaries, "_CHUNK", 512)


DEFAULTS = {"openness": 0.5, "pull_back": 1.0}


def trained(benchmark, plugin, optimizer=None, replay=(), model=None):
    model = model or mlp()
    strategy = strategy_of(model, [*replay, plugin], optimizer=optimizer and optimizer(model.parameters()))
    torch.manual_seed(0)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return strategy


@pytest.mark.parametrize("consolidate", ["experience", "surprise", "continuous"])
@pytest.mark.parametrize("replay", [False, True])
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
        plugin = SelectivePlasticityPlugin(**settings, consolidate=consolidate)
        memory = [ReplayPlugin(40)] if replay else []
        results.append(weights(trained(split2, plugin, replay=memory).model))
    assert torch.equal(*results)


def test_the_first_pattern_that_matches_counts_and_others_take_the_default():
    plugin = SelectivePlasticityPlugin(
        openness={"features.0": 0.5, "features.*": 0.1},
        pull_back={"*": 0.0, "head": 2.0},
        rank={"[fg]eatures*": 8},
    )
    assert [value_of(plugin.openness, n) for n in ("features.0", "features.01", "features.a.b", "head")] == [
        0.5, 0.1, 0.1, 0.5,
    ]  # fmt: skip
    assert [value_of(plugin.pull_back, n) for n in ("features.0", "head")] == [0.0, 0.0]
    assert [plugin.rank_of(n, 100, False) for n in ("features.0", "Features.0", "head")] == [8, 48, 48]
    empty = SelectivePlasticityPlugin(openness={}, pull_back={}, rank={})
    assert {name: value_of(getattr(empty, name), "any") for name in DEFAULTS} == DEFAULTS
    assert empty.rank_of("any", 100, False) == 48


@pytest.mark.parametrize("consolidate, rank", [("experience", 48), ("surprise", 64), ("continuous", 64)])
def test_the_default_rank_depends_on_how_often_something_is_merged(consolidate, rank):
    plugin = SelectivePlasticityPlugin(consolidate=consolidate)
    assert plugin.rank_of("head", 1000, False) == plugin.rank_of("head", 300, True) == rank
    some = SelectivePlasticityPlugin(consolidate=consolidate, rank={"features.*": 8})
    assert [some.rank_of(n, 1000, False) for n in ("features.0", "head")] == [8, rank]
    assert SelectivePlasticityPlugin(consolidate=consolidate, rank=5).rank_of("head", 1000, True) == 5


@pytest.mark.parametrize("consolidate", ["experience", "continuous"])
def test_a_wide_readout_keeps_a_tenth_of_its_directions(split2, consolidate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 900), nn.ReLU(), nn.Linear(900, 10))
    plugin = SelectivePlasticityPlugin(consolidate=consolidate)
    trained(split2, plugin, model=model)
    low = {"experience": 48, "continuous": 64}[consolidate]
    assert {n: a.vectors.shape[1] for n, a in plugin.layers.items()} == {"1": low, "3": 90}


def test_each_layer_is_gated_as_it_is_told(split2):
    plugin = SelectivePlasticityPlugin(openness={"1": 0.05, "3": 5.0}, rank={"3": 7, "5": 12})
    trained(split2, plugin)
    alike = SelectivePlasticityPlugin(openness=0.05)
    trained(split2, alike)
    assert {n: a.vectors.shape[1] for n, a in plugin.layers.items()} == {"1": 48, "3": 7, "5": 12}
    for name, openness in {"1": 0.05, "3": 5.0, "5": 0.5}.items():
        a = plugin.layers[name]
        expected = a.eigenvalues / (a.eigenvalues + openness * a.mean_eigenvalue)
        torch.testing.assert_close(a.closed, expected)
    assert plugin.state_bytes < alike.state_bytes


def test_without_a_pull_back_a_layers_drift_is_left_alone(split2):
    """The other layers' pulls don't come to it: with all pulls off it would move the same, if the others did."""
    plugin = SelectivePlasticityPlugin(pull_back={"1": 0.0, "3": 0.0, "5": 0.0})
    off = SelectivePlasticityPlugin(pull_back=0)
    assert torch.equal(weights(trained(split2, plugin).model), weights(trained(split2, off).model))
    pulled = []

    class Look(SelectivePlasticityPlugin):
        def after_update(self, strategy, **kwargs):
            super().after_update(strategy, **kwargs)
            pulled.append(set(self._drift._pulls))

    trained(split2, Look(pull_back={"3": 0.0}))
    assert set().union(*pulled) == {"1", "5"}


@pytest.mark.parametrize("consolidate", ["experience", "continuous"])
@pytest.mark.parametrize("optimizer", [None, SelectivePlasticityOptimizer])
def test_a_layer_that_is_switched_off_keeps_nothing(split2, consolidate, optimizer):
    plugin = SelectivePlasticityPlugin(openness={"3": math.inf}, consolidate=consolidate)
    strategy = trained(split2, plugin, optimizer)
    assert plugin.active and "3" not in plugin.layers
    off = SelectivePlasticityPlugin(openness={"*": math.inf}, consolidate=consolidate)
    without = trained(split2, SelectivePlasticityPlugin(openness=math.inf), optimizer)
    assert torch.equal(weights(trained(split2, off, optimizer).model), weights(without.model))
    assert not off.active
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
    settings = (plugin.openness, plugin.pull_back, plugin.rank)
    assert settings == (0.25, {"1": 2, "*": 1.0}, {"1": 32, "*": 0.5})
    json.dumps(settings)  # they are Python's own then


def test_settings_go_through_a_file(split2, tmp_path):
    file = tmp_path / "profile.json"
    settings = {"openness": {"1": 0.1, "3": math.inf}, "rank": {"1": 16, "*": 8}}
    file.write_text(json.dumps(settings))
    read = SelectivePlasticityPlugin(**json.loads(file.read_text()))
    given = SelectivePlasticityPlugin(**settings)
    assert torch.equal(weights(trained(split2, read).model), weights(trained(split2, given).model))
    file.write_text(json.dumps({"openness": given.openness, "rank": given.rank}))  # as the plugin holds it
    again = SelectivePlasticityPlugin(**json.loads(file.read_text()))
    assert (again.openness, again.rank) == (given.openness, given.rank)


def test_convolutions_take_settings_by_name(split2):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    plugin = SelectivePlasticityPlugin(rank={"0": 5, "2": 9}, openness={"0": 0.05})
    trained(split2, plugin, model=model)
    assert {n: a.vectors.shape[1] for n, a in plugin.layers.items()} == {"0": 5, "2": 9, "5": 48}
