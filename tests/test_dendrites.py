"""Artificial dendrites in a strategy: with the gate, between experiences, in a checkpoint, after other runs."""

import copy
import sys

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_sp import SelectivePlasticityPlugin
from avalanche_sp.dendrites import DendritesPlugin
from harness.networks import build_network
from harness.run import execute
from harness.settings import Run

from conftest import MNIST, accuracy, mlp, strategy_of, weights


@pytest.fixture
def package():
    return pytest.importorskip("perforatedai.globals_perforatedai")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "perforatedai", None)
    with pytest.raises(ImportError, match=r"pip install 'avalanche-sp\[dendrites\]'"):
        DendritesPlugin()


@pytest.mark.parametrize(
    "argument",
    [
        {"grow": "always"},
        {"most": 0},
        {"most": True},
        {"patience": 1.5},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"held_out": "a"},
    ],
)
def test_an_argument_out_of_range_is_refused(argument):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(argument))} value"):
        DendritesPlugin(**argument)


def trained(split, plugins, experiences=2, **settings):
    strategy = strategy_of(mlp(), plugins, **settings)
    for experience in split.train_stream[:experiences]:
        strategy.train(experience)
    return strategy


def test_a_network_without_a_dendrite_has_twice_the_parameters(package, split2):
    """The published number of parameters (docs/dendrites.md)."""
    model, counts = build_network("256-256"), []
    counts.append(len(weights(model)))
    strategy = strategy_of(model, [plugin := DendritesPlugin(readout=True)])
    strategy.train(split2.train_stream[0])
    counts.append(len(weights(model)))
    assert plugin.dendrites(model) == {"1": 0, "3": 0, "5": 0}
    strategy.train(split2.train_stream[1])
    tops = 256 + 256 + 10
    assert counts == [269322, 538644] and len(weights(model)) == 3 * 269322 + tops


def test_dendrites_between_two_experiences_are_gated_and_keep_the_first(package, split2):
    gate = SelectivePlasticityPlugin()
    alone = trained(split2, [SelectivePlasticityPlugin()]).model
    strategy = trained(split2, [dendrites := DendritesPlugin(), gate])
    assert dendrites.dendrites(strategy.model) == {"1": 1, "3": 1}
    assert set(gate.layers) == {"1.main_module", "3.main_module", "5"} | {
        f"{name}.dendrite_module.layers.0" for name in "13"
    }
    tops = [strategy.model.get_submodule(name).dendrites_to_top[-1] for name in "13"]
    assert all(top.abs().sum() > 0 for top in tops)  # they were trained
    assert accuracy(strategy.model, split2, 0) > accuracy(alone, split2, 0) - 0.02
    assert accuracy(strategy.model, split2, 1) > accuracy(alone, split2, 1) - 0.02


def test_a_new_dendrite_takes_over_the_memory_of_its_layer_and_changes_no_output(package, split2):
    gate = SelectivePlasticityPlugin()
    strategy = trained(split2, [DendritesPlugin(), gate], 1)
    before, remembered = strategy.model(split2.train_stream[0].dataset[0][0][None]), gate.layers["1.main_module"]
    seen = {}

    class Watch(SupervisedPlugin):
        def before_training_epoch(self, strategy, **kwargs):
            seen["layers"] = dict(gate.layers)
            seen["output"] = strategy.model(split2.train_stream[0].dataset[0][0][None])
            seen["optimized"] = {p for group in strategy.optimizer.param_groups for p in group["params"]}

    strategy.plugins.insert(1, Watch())
    strategy.train(split2.train_stream[1])
    new = seen["layers"]["1.dendrite_module.layers.0"]
    assert torch.equal(new.vectors, remembered.vectors) and torch.equal(new.eigenvalues, remembered.eigenvalues)
    assert new.anchor.shape == remembered.anchor.shape and new.anchor.abs().max() < 1  # its own small weights
    assert torch.equal(seen["output"], before)
    assert seen["optimized"] == set(strategy.model.parameters())
    # The memory holds old inputs: updates along their directions are held back in the dendrite, too.
    layer = strategy.model.get_submodule("1.dendrite_module.layers.0")
    change = (torch.cat([layer.weight, layer.bias[:, None]], 1).detach() @ new.vectors - new.anchor).square().mean(0)
    ungated = trained(split2, [DendritesPlugin()]).model.get_submodule("1.dendrite_module.layers.0")
    free = (torch.cat([ungated.weight, ungated.bias[:, None]], 1).detach() @ new.vectors - new.anchor).square().mean(0)
    assert change[-5:].mean() < 0.2 * free[-5:].mean()


def test_the_weights_of_old_dendrites_are_frozen(package, split5):
    strategy = strategy_of(mlp(), [DendritesPlugin(most=2), SelectivePlasticityPlugin()])
    tops = []
    for experience in split5.train_stream[:4]:
        strategy.train(experience)
        layers = [strategy.model.get_submodule(name) for name in "13"]
        tops.append([m.dendrites_to_top[-1].detach().clone() if tops else torch.empty(0, 32) for m in layers])
    assert [len(t[0]) for t in tops] == [0, 1, 2, 2]  # two at most
    assert all(torch.equal(new[:1], old) for new, old in zip(tops[2], tops[1]))
    assert all(torch.equal(new, old) for new, old in zip(tops[3], tops[2]))


@pytest.mark.slow
def test_the_package_decides_on_held_out_samples(package, split2, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "files"
    plugin = DendritesPlugin("plateau", held_out=0.25, activation=torch.sigmoid, folder=folder)
    trains = []

    class Count(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            trains.append(len(strategy.adapted_dataset))

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    strategy = strategy_of(model, [Count(), plugin, SelectivePlasticityPlugin()], optimizer=optimizer, epochs=12)
    strategy.train(split2.train_stream[0])
    assert trains == [450]
    assert sum(plugin.dendrites(model).values()) > 0
    assert strategy.optimizer is optimizer and optimizer.param_groups[0]["momentum"] == 0.5
    strategy.train(split2.train_stream[1])
    assert accuracy(model, split2, 0) > 0.6
    assert [p.name for p in tmp_path.iterdir()] == ["files"] and (folder / "log.txt").read_text()
    assert capfd.readouterr().out.count("perforat") == 0
    with pytest.raises(ValueError, match="Invalid folder value"):
        trained(split2, [DendritesPlugin(folder=folder)])


def test_runs_in_one_process_do_not_disturb_each_other(package, split2):
    alone = trained(split2, [DendritesPlugin()]).model
    settings = package.pc
    mixed = [strategy_of(mlp(), [DendritesPlugin(activation=f)]) for f in (torch.tanh, torch.sigmoid)]
    torch.manual_seed(0)
    for experience in split2.train_stream:
        for strategy in mixed:
            torch.manual_seed(int(experience.current_experience))
            strategy.train(experience)
    torch.manual_seed(0)
    one = strategy_of(mlp(), [DendritesPlugin()])
    for experience in split2.train_stream:
        torch.manual_seed(int(experience.current_experience))
        one.train(experience)
    assert torch.equal(weights(one.model), weights(mixed[0].model))
    assert not torch.equal(weights(one.model), weights(mixed[1].model))
    assert package.pc is settings and len(weights(alone)) == len(weights(one.model))


@pytest.mark.slow
def test_a_checkpoint_resumes(package, split5, tmp_path):
    def fresh():
        return strategy_of(mlp(), [DendritesPlugin(), SelectivePlasticityPlugin()])

    def train(strategy, experiences):
        for experience in experiences:
            torch.manual_seed(int(experience.current_experience))
            strategy.train(experience)

    train(whole := fresh(), split5.train_stream[:4])
    train(cut := fresh(), split5.train_stream[:2])
    save_checkpoint(cut, tmp_path / "checkpoint")
    resumed, counter = maybe_load_checkpoint(fresh(), tmp_path / "checkpoint")
    assert counter == 2
    train(resumed, split5.train_stream[2:4])
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_the_package_cannot_prompt(package, split2, monkeypatch):
    plugin = DendritesPlugin()
    strategy = trained(split2, [plugin], 1)
    strategy.model.module = nn.Identity()  # the package takes it for DataParallel, and opens its debugger
    with pytest.raises(RuntimeError, match="Need to call .module"):
        strategy.train(split2.train_stream[1])


def test_a_model_without_a_layer_for_dendrites_is_refused(package, split2):
    with pytest.raises(ValueError, match="Linear has no layer for dendrites"):
        strategy_of(nn.Linear(784, 10), [DendritesPlugin()]).train(split2.train_stream[0])


def test_a_plugin_has_one_model_and_a_gate_that_is_told_the_boundaries(package, split2):
    strategy = trained(split2, [plugin := DendritesPlugin()], 1)
    for model, plugins in ((mlp(), [plugin]), (strategy.model, [DendritesPlugin()])):
        with pytest.raises(ValueError, match="Invalid model"):
            strategy_of(model, plugins).train(split2.train_stream[0])
    with pytest.raises(ValueError, match="Invalid consolidate value: 'continuous'"):
        trained(split2, [DendritesPlugin(), SelectivePlasticityPlugin(consolidate="continuous")])


def test_convolutions_get_dendrites_and_growing_heads_do_not(package, split2):
    torch.manual_seed(0)
    head = IncrementalClassifier(8 * 49, 2)
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Flatten(), head)
    gate = SelectivePlasticityPlugin()
    strategy = strategy_of(model, [DendritesPlugin(), gate])
    for experience in split2.train_stream:
        strategy.train(experience)
    assert "0.dendrite_module.layers.0" in gate.layers and model[3] is head
    assert min(accuracy(copy.deepcopy(model), split2, task) for task in (0, 1)) > 0.6


@pytest.mark.parametrize("strategy, buffer", [("sp-dendrites-replay", 50), ("legacy-dendrites", 0)])
def test_the_comparisons_strategies(package, tiny, strategy, buffer):
    figures = execute(Run("split-mnist", strategy, 2, 1, 32, buffer), str(MNIST))["figures"]
    assert figures["learning_acc"] > 60
    if buffer:
        assert figures["accuracy_matrix"][-1][0] > 50
