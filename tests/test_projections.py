"""The comparison's other methods without replay compute what their papers say: GPM, OWM, LwF, and a ridge readout."""


import pytest
import torch
import torch.nn.functional as F
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_sp import OneHotMSELoss
from harness.build import build_model, learning_without_forgetting
from harness.memory import plugin_bytes
from harness.methods.projections import (
    GradientProjectionMemory,
    OrthogonalWeightsModification,
    extend_basis,
    layer_inputs,
    linear_layers,
)
from harness.methods.ridge import StreamingRidge, build_random_features, stored_bytes
from harness.networks import build_network, gate_bytes, network_bytes
from harness.run import execute
from harness.settings import Run

from conftest import MNIST, mlp, strategy_of

pytestmark = pytest.mark.slow


def images(experience, n=None):
    x, y, _ = experience.dataset.read_batch(list(range(n or len(experience.dataset))))
    return x, y


def joint_gradient(layer):
    if layer.bias is None:
        return layer.weight.grad
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)


class Gradients(SupervisedPlugin):
    """What each step was made of: pairs of a layer's name and its joint gradient."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_update(self, strategy, **kwargs):
        self.seen += [(name, joint_gradient(layer).clone()) for name, layer in linear_layers(strategy.model).items()]


# -- Gradient projection memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_gpm_steps_are_orthogonal_to_its_basis(split2, bias):
    gpm, gradients = GradientProjectionMemory(0.9), Gradients()
    strategy = strategy_of(mlp(bias=bias), [gpm, gradients])
    strategy.train(split2.train_stream[0])
    assert set(gpm.kept) == {"1", "3", "5"} and gpm.kept["1"].shape[0] == 784 + bias
    bases, gradients.seen = dict(gpm.kept), []
    strategy.train(split2.train_stream[1])
    assert any(g.norm() > 1e-3 for _, g in gradients.seen)
    for name, gradient in gradients.seen:
        assert (gradient @ bases[name]).norm() <= 1e-5 * (1 + gradient.norm())


def test_gpm_keeps_more_of_the_layers_after_the_first_where_it_is_told_to(split2):
    def kept(*epsilons):
        gpm = GradientProjectionMemory(*epsilons)
        strategy_of(mlp(), [gpm]).train(split2.train_stream[0])
        return {name: basis.shape[1] for name, basis in gpm.kept.items()}

    same, apart = kept(0.9), kept(0.9, 0.99)
    assert apart["1"] == same["1"] and apart["3"] > same["3"] and apart["5"] > same["5"]


def test_gpm_holds_a_layers_answers_to_old_inputs(split2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    gpm = GradientProjectionMemory(0.99, samples=600)
    strategy = strategy_of(model, [gpm], optimizer=torch.optim.SGD(model.parameters(), lr=5e-4))
    strategy.train(split2.train_stream[0])
    (old, _), (new, _), basis = images(split2.train_stream[0]), images(split2.train_stream[1]), gpm.kept["1"]
    inputs = layer_inputs(model, old)["1"]
    joint = torch.cat([model[1].weight, model[1].bias[:, None]], dim=1).detach()
    within = inputs @ basis @ basis.T
    answers, old_outputs, new_outputs = within @ joint.T, model(old).detach(), model(new).detach()
    strategy.train(split2.train_stream[1])
    joint = torch.cat([model[1].weight, model[1].bias[:, None]], dim=1).detach()
    torch.testing.assert_close(within @ joint.T, answers, rtol=1e-4, atol=1e-4)
    assert (model(old) - old_outputs).norm() < 0.3 * (model(new) - new_outputs).norm()


def test_gpm_adds_the_fewest_vectors_that_reach_the_threshold(split2):
    basis = torch.zeros(784, 0)
    for experience in split2.train_stream:
        inputs, before = images(experience)[0].flatten(1), basis.shape[1]
        basis = extend_basis(basis, inputs, 0.9)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
        shares = [(inputs @ basis[:, :r]).square().sum() / inputs.square().sum() for r in (-1, basis.shape[1])]
        assert basis.shape[1] > before and shares[0] < 0.9 <= shares[1]
    assert extend_basis(basis, inputs, 0.9).shape == basis.shape  # nothing new: nothing added


@pytest.mark.parametrize("plugin", [GradientProjectionMemory(0.9), OrthogonalWeightsModification(1.0)])
def test_training_that_diverged_is_told_with_the_layer_and_what_to_do(split2, plugin):
    model = mlp()
    strategy = strategy_of(model, [plugin], optimizer=torch.optim.SGD(model.parameters(), lr=1e6))
    with pytest.raises(FloatingPointError, match="inputs of layer '3' are not finite.*too high a learning rate"):
        strategy.train(split2.train_stream[0])


# -- Orthogonal weights modification ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.03, 1.0])
def test_owms_projector_is_the_inverse_it_stands_for(split2, alpha):
    owm = OrthogonalWeightsModification(alpha)
    strategy = strategy_of(mlp(), [owm], batch=20)
    for experience in split2.train_stream:
        strategy.train(experience)
    means = torch.cat([images(e)[0].flatten(1).unflatten(0, (-1, 20)).mean(1) for e in split2.train_stream]).double()
    means = torch.cat([means, means.new_ones(len(means), 1)], dim=1)
    direct = alpha * torch.linalg.inv(alpha * torch.eye(785) + means.T @ means)
    torch.testing.assert_close(owm.kept["1"].double(), direct, rtol=0, atol=1e-4)


def test_owm_multiplies_a_layers_joint_gradient_by_its_projector(split2):
    owm = OrthogonalWeightsModification(0.1)
    strategy = strategy_of(mlp(), [owm])
    strategy.train(split2.train_stream[0])
    x, y = images(split2.train_stream[1], 50)
    F.cross_entropy(strategy.model(x), y).backward()
    layers = linear_layers(strategy.model)
    gradients = {name: joint_gradient(layer).clone() for name, layer in layers.items()}
    owm.before_update(strategy)
    for name, layer in layers.items():
        torch.testing.assert_close(joint_gradient(layer), gradients[name] @ owm.kept[name])


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0, float("nan")])
def test_gpm_names_a_bad_epsilon(value):
    with pytest.raises(ValueError, match=r"Invalid epsilon_hidden value: .* \(allowed: between 0 and 1\)"):
        GradientProjectionMemory(0.9, value)
    with pytest.raises(ValueError, match=r"Invalid epsilon value: .* \(allowed: between 0 and 1\)"):
        GradientProjectionMemory(value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_setting_out_of_range_is_named(value):
    for name, build in (
        ("alpha", OrthogonalWeightsModification),
        ("alpha", lambda v: learning_without_forgetting(v, 2.0)),
        ("temperature", lambda v: learning_without_forgetting(1.0, v)),
        ("ridge", StreamingRidge),
    ):
        with pytest.raises(ValueError, match=rf"Invalid {name} value: .* \(allowed: greater than 0\)"):
            build(value)


# -- Learning without forgetting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, OneHotMSELoss])
def test_lwf_keeps_the_old_networks_answers(split2, criterion):
    old, drift = images(split2.train_stream[0])[0], []
    for alpha in (1e-6, 10.0):
        lwf = learning_without_forgetting(alpha, 0.5)
        strategy = strategy_of(mlp(), [lwf], criterion=criterion())
        torch.manual_seed(0)
        strategy.train(split2.train_stream[0])
        before = strategy.model(old)[:, :5].detach()
        strategy.train(split2.train_stream[1])
        after = strategy.model(old)[:, :5].detach()
        drift.append((after.softmax(1) - before.softmax(1)).abs().mean().item())
    assert drift[1] < drift[0]
    assert plugin_bytes(lwf) == network_bytes(strategy.model)  # one copy of the network


# -- Random features and ridge regression ----------------------------------------------------------------------------


def ridge_readout(stream, ridge, batch):
    """The readout after training on ``stream``, and the features' random weights that it belongs to."""
    torch.manual_seed(0)
    model = build_random_features(1_800_000)
    plugin = StreamingRidge(ridge)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    strategy = strategy_of(model, [plugin], optimizer=optimizer, batch=batch)
    for experience in stream:
        strategy.train(experience)
    return model, torch.cat([model[-1].weight, model[-1].bias[:, None]], dim=1).detach()


@pytest.mark.parametrize("ridge", [1.0, 100.0])
def test_ridge_over_a_stream_is_the_batch_solution_in_any_order(split2, ridge):
    model, readout = ridge_readout(split2.train_stream, ridge, batch=32)
    x, y = (torch.cat(parts) for parts in zip(*(images(e) for e in split2.train_stream), strict=True))
    h = torch.cat([model[:-1](x), torch.ones(len(x), 1)], dim=1).double()
    direct = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.shape[1]), h.T @ F.one_hot(y, 10).double())
    torch.testing.assert_close(readout.double(), direct.T, rtol=0, atol=2e-4)
    _, other = ridge_readout(split2.train_stream[::-1], ridge, batch=100)
    torch.testing.assert_close(readout, other, rtol=0, atol=2e-4)


def test_ridge_readout_is_up_to_date_in_evaluation(split2):
    torch.manual_seed(0)
    model, plugin = build_random_features(1_800_000), StreamingRidge(1.0)
    strategy = strategy_of(model, [plugin], optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    strategy.train(split2.train_stream[0])
    x, y = images(split2.train_stream[1])
    plugin.observe(model[:-1](x), y)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("network", ["256-256", "1000", "cnn"])
def test_random_features_take_no_more_memory_than_the_plugin_and_its_network(network, tiny):
    extra = {}
    for strategy, overrides in (("sp", {"lr": 0.01}), ("rf-ridge", {})):  # the wide one diverges at 0.1
        run = Run("permuted-mnist", strategy, 2, train_per_task=900, network=network, overrides=overrides)
        extra[strategy] = execute(run, str(MNIST), curve=False)["figures"]["extra_memory_bytes"]
    size = network_bytes(build_network(network))
    budget = size + gate_bytes(build_network(network))
    assert budget == size + extra["sp"]
    width = build_model(run)[1].out_features
    assert stored_bytes(width) <= budget < stored_bytes(width + 1)
    assert extra["rf-ridge"] == stored_bytes(width) - size <= extra["sp"]


def test_a_network_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"Invalid network: 12 \(allowed: 256-256, .*, vit\)"):
        build_network("12")
