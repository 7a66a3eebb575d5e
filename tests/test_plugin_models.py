"""The plugin on all kinds of models, in all kinds of streams, and saved."""

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import SelectivePlasticityOptimizer, SelectivePlasticityPlugin
from avalanche_sp.data import benchmark_of
from avalanche_sp.gate.layers import GatedLayer, gated_layers

from conftest import accuracy, mlp, strategy_of, weights


def moved_along(benchmark, model, plugin, criterion=None):
    """By layer, how far the second experience moves the weights along the remembered directions."""
    strategy = strategy_of(model, [plugin], criterion=criterion)
    torch.manual_seed(0)
    strategy.train(benchmark.train_stream[0])
    layers, vectors = gated_layers(model), {name: memory.vectors for name, memory in plugin.layers.items()}
    before = {name: layers[name].along(v) for name, v in vectors.items()}
    strategy.train(benchmark.train_stream[1])
    return {name: (layers[name].along(v) - before[name]).norm() for name, v in vectors.items()}


def test_layers_without_bias_shared_frozen_unused_and_with_sequences(split2):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(28, 16, bias=False)  # sees 28 rows an image
            self.shared = nn.Linear(16, 16)
            self.frozen = nn.Linear(16, 16).requires_grad_(False)
            self.unused = nn.Linear(3, 3)
            self.last = nn.Linear(16 * 28, 10)

        def forward(self, x):
            x = self.first(x.squeeze(1)).relu()
            x = self.shared(self.shared(x).relu()).relu()
            return self.last(self.frozen(x).flatten(1))

    moved = []
    for openness in (1e-6, 1e6):
        torch.manual_seed(0)
        plugin = SelectivePlasticityPlugin(openness=openness, rank=5, pull_back=0, readout_step=False)
        moved.append(moved_along(split2, Net(), plugin))
        assert set(plugin.layers) == {"first", "shared", "last"}
        assert plugin.layers["first"].vectors.shape == (28, 5)
        assert plugin.layers["shared"].vectors.shape == (17, 5)
    assert all(moved[0][name] < 0.01 * moved[1][name] for name in ("first", "shared", "last"))


@pytest.mark.parametrize("dtype, replay", [(torch.float64, False), (torch.bfloat16, True)])
def test_models_of_other_precision_remember(split2, dtype, replay):
    class Cast(nn.Module):
        def forward(self, x):
            return x.to(dtype)

    kept = []
    for plugins in ([], [SelectivePlasticityPlugin(rank=30), *[ReplayPlugin(2)] * replay]):
        model = nn.Sequential(Cast(), *mlp().to(dtype))
        strategy = strategy_of(model, plugins, epochs=3)
        torch.manual_seed(0)
        for experience in split2.train_stream:
            strategy.train(experience)
        assert weights(model).dtype == dtype
        kept.append(accuracy(model, split2, 0))
    assert kept[0] < 0.4 < 0.6 < kept[1]


@pytest.mark.slow
def test_many_small_experiences_stay_stable(split2):
    """Each is a hundredth of what came before: the pull-back must not outrun the step size."""
    strategy = strategy_of(mlp(), [SelectivePlasticityPlugin(rank=10)], batch=5)
    strategy.train(split2.train_stream[0])
    strategy.train_epochs = 20
    strategy.optimizer.param_groups[0]["lr"] = 0.1
    for i in range(0, 100, 5):
        small = benchmark_of([split2.train_stream[1].dataset[i : i + 5]], [])
        strategy.train(small.train_stream[0])
    assert weights(strategy.model).abs().max() < 10


def test_a_model_with_several_outputs_is_named_unless_nothing_pulls(split2):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x), x

    def criterion(outputs, targets):
        return nn.functional.cross_entropy(outputs[0], targets)

    with pytest.raises(TypeError, match="Invalid model: its output is a tuple"):
        strategy_of(Two(), [SelectivePlasticityPlugin()], criterion=criterion).train(split2.train_stream[0])
    closed, opened = (
        moved_along(split2, Two(), SelectivePlasticityPlugin(openness, 0, rank=5, readout_step=False), criterion)
        for openness in (1e-6, 1e6)
    )
    assert all(closed[name] < 0.01 * opened[name] for name in ("net.1", "net.3", "net.5"))


def test_a_strategy_saved_between_experiences_resumes_bit_for_bit(split2, tmp_path):
    def fresh():
        model = mlp()
        return strategy_of(
            model,
            [ReplayPlugin(30), SelectivePlasticityPlugin(rank=10)],
            optimizer=SelectivePlasticityOptimizer(model.parameters()),
        )

    strategy = fresh()
    torch.manual_seed(0)
    strategy.train(split2.train_stream[0])
    save_checkpoint(strategy, tmp_path / "strategy.pkl")
    strategy.train(split2.train_stream[1])
    resumed, experience = maybe_load_checkpoint(fresh(), tmp_path / "strategy.pkl")
    assert experience == 1
    resumed.train(split2.train_stream[1])
    assert torch.equal(weights(strategy.model), weights(resumed.model))


def test_a_growing_head_is_followed(split5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), IncrementalClassifier(16, 1))
    plugin = SelectivePlasticityPlugin()
    strategy = strategy_of(model, [plugin], criterion=nn.CrossEntropyLoss())
    for experience in split5.train_stream:
        strategy.train(experience)
        strategy.eval(split5.test_stream[: experience.current_experience + 1])
        head, memory = model[3].classifier, plugin.layers["3.classifier"]
        assert head.out_features == len(memory.anchor) == 2 * (experience.current_experience + 1)
        assert torch.equal(memory.anchor, GatedLayer(head).along(memory.vectors))


def test_consolidation_restores_modes_and_ignores_dropout(split2):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.9), nn.ReLU(), nn.Linear(16, 10))
    seen = []
    model[4].register_forward_pre_hook(lambda m, inputs: seen.append(model.training))
    strategy = strategy_of(model, [SelectivePlasticityPlugin()])
    strategy.train(split2.train_stream[0])
    assert model.training
    # A first batch before training, and two samples that show which layers are fed by data. At the consolidation 600
    # samples in batches of 256, these two again, and some for the outputs' sensitivity.
    assert seen.count(False) == 2 + 3 + 1 + 1


def test_a_model_without_a_layer_to_gate_is_refused(split2):
    with pytest.raises(ValueError, match=r"Invalid model: Sequential has no trainable layer that can be gated"):
        strategy_of(mlp().requires_grad_(False), [SelectivePlasticityPlugin()]).train(split2.train_stream[0])


def test_activity_that_is_not_finite_is_named_before_it_is_consolidated(split2):
    model = mlp()
    plugin = SelectivePlasticityPlugin()
    strategy = strategy_of(
        model,
        [plugin],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=lambda outputs, y: outputs.mean() * 0 + 1,
    )
    with torch.no_grad():
        model[1].weight.normal_(std=1e25)
    with pytest.raises(FloatingPointError, match="input of layer 3 is not finite, or its square is not"):
        strategy.train(split2.train_stream[0])
    assert not plugin.layers
