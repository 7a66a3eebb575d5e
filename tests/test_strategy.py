"""SelectivePlasticity: the recommended parts, and each part replaced."""

import math

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_sp import (
    FeatureGaussians,
    GaussianBuffer,
    JointReplayLoss,
    OneHotMSELoss,
    SelectivePlasticity,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
)

from conftest import mlp, sliced, weights


@pytest.fixture(scope="module")
def short(split2):
    return sliced(split2, train=200, test=50)


def trained(cls, benchmark, model=None, **kwargs):
    model = model or mlp()
    parts = {name: make(model) if name == "optimizer" else make for name, make in kwargs.items()}
    torch.manual_seed(0)
    strategy = cls(model=model, evaluator=None, **parts)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return strategy


def recommended(model):
    return SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)


MEMORIES = {
    "none": ({}, list),
    "stored samples": ({"mem_size": 40}, lambda: [ReplayPlugin(40, batch_size_mem=40)]),
    "Gaussians": ({"plugins": [GaussianBuffer(40).replay_plugin()]}, lambda: [GaussianBuffer(40).replay_plugin()]),
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_it_is_the_documents_recommendation_bit_for_bit(memory, short):
    arguments, replay = MEMORIES[memory]
    loss = JointReplayLoss(OneHotMSELoss()) if arguments else OneHotMSELoss()
    plugins = [*replay(), SelectivePlasticityPlugin()]
    strategy = trained(SelectivePlasticity, short, **arguments)
    by_hand = trained(Naive, short, optimizer=recommended, criterion=loss, train_mb_size=64, plugins=plugins)
    assert torch.equal(weights(strategy.model), weights(by_hand.model))


def test_each_part_can_be_replaced(short):
    plugin, criterion = SelectivePlasticityPlugin(openness=math.inf), nn.CrossEntropyLoss()
    own = {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.05), "train_mb_size": 32}
    strategy = trained(SelectivePlasticity, short, plugins=[plugin], criterion=criterion, **own)
    assert [p for p in strategy.plugins if isinstance(p, SelectivePlasticityPlugin)] == [plugin]
    plain = trained(Naive, short, criterion=criterion, **own)
    assert torch.equal(weights(strategy.model), weights(plain.model))


def test_two_memories_are_refused():
    with pytest.raises(ValueError, match=r"Invalid mem_size value: 40 .allowed with a ReplayPlugin in plugins: 0"):
        SelectivePlasticity(model=mlp(), mem_size=40, plugins=[ReplayPlugin(40)])


@pytest.mark.parametrize("mem_size", [-1, 2.5, None])
def test_a_memory_of_no_size_is_refused(mem_size):
    with pytest.raises(ValueError, match=rf"Invalid mem_size value: {mem_size} \(allowed: an integer, 0 or more\)"):
        SelectivePlasticity(model=mlp(), mem_size=mem_size)


def test_gaussians_of_features_come_after_its_plugin(short):
    strategy = trained(SelectivePlasticity, short, plugins=[FeatureGaussians()])
    kinds = [type(plugin) for plugin in strategy.plugins]
    assert kinds.index(SelectivePlasticityPlugin) < kinds.index(FeatureGaussians)
