"""Every strategy of Avalanche that works at all works on our benchmarks, alone and beside the plugin."""

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.models import MTSimpleMLP
from avalanche.models.packnet import packnet_simple_mlp
from avalanche.training import (
    AGEM,
    DER,
    ER_ACE,
    EWC,
    GEM,
    MAS,
    MIR,
    Cumulative,
    GDumb,
    GSS_greedy,
    JointTraining,
    LwF,
    Naive,
    PackNet,
    Replay,
    SynapticIntelligence,
)
from avalanche.training.plugins import RWalkPlugin
from torch import nn

from avalanche_sp import SelectivePlasticityPlugin, split_mnist

from conftest import MNIST, mlp, sliced, weights

STRATEGIES = {
    "Naive": (Naive, {}),
    "Replay": (Replay, {"mem_size": 40}),
    "EWC": (EWC, {"ewc_lambda": 1.0}),
    "SI": (SynapticIntelligence, {"si_lambda": 1.0}),
    "MAS": (MAS, {"lambda_reg": 0.01, "alpha": 0.5}),
    "LwF": (LwF, {"alpha": 1.0, "temperature": 2.0}),
    "AGEM": (AGEM, {"patterns_per_exp": 20, "sample_size": 20}),
    "GEM": (GEM, {"patterns_per_exp": 20, "memory_strength": 0.5}),
    "DER": (DER, {"mem_size": 40, "batch_size_mem": 20}),
    "ER_ACE": (ER_ACE, {"mem_size": 40, "batch_size_mem": 20}),
    "MIR": (MIR, {"mem_size": 40, "subsample": 30, "batch_size_mem": 13}),
    "GDumb": (GDumb, {"mem_size": 40}),
    "RWalk": (Naive, {"plugins": [RWalkPlugin(ewc_lambda=0.1, ewc_alpha=0.9, delta_t=2)]}),
    "GSS": (GSS_greedy, {"mem_size": 60, "mem_strength": 3, "input_size": [1, 28, 28]}),
    "Cumulative": (Cumulative, {}),
    "Joint": (JointTraining, {}),
}


def build(cls, kwargs, model, plugins):
    return cls(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        eval_mb_size=100,
        evaluator=None,
        **{**kwargs, "plugins": kwargs.get("plugins", []) + plugins},
    )


@pytest.mark.parametrize("gated", [False, True], ids=["alone", "with plugin"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_trains_and_evaluates(split5, name, gated):
    cls, kwargs = STRATEGIES[name]
    small = sliced(split5, train=100, test=50)
    plugin = SelectivePlasticityPlugin(rank=10)
    model = mlp()
    strategy = build(cls, kwargs, model, [plugin] if gated else [])
    torch.manual_seed(0)
    for experiences in [small.train_stream] if cls is JointTraining else small.train_stream:
        strategy.train(experiences)
    strategy.eval(small.test_stream)
    assert weights(strategy.model).isfinite().all()
    assert not gated or set(plugin.layers) == {"1", "3", "5"}


@pytest.mark.parametrize("gated", [False, True], ids=["alone", "with plugin"])
@pytest.mark.parametrize("name", ["MultiHead", "PackNet"])
def test_task_incremental(name, gated):
    benchmark = sliced(split_mnist(5, return_task_id=True, dataset_root=MNIST), train=100, test=50)
    plugins = [SelectivePlasticityPlugin(rank=10)] if gated else []
    torch.manual_seed(0)
    if name == "MultiHead":
        model = MTSimpleMLP(hidden_size=16)
        strategy = build(Naive, {}, model, plugins)
    else:
        model = packnet_simple_mlp(hidden_size=16)
        strategy = build(PackNet, {"prune_proportion": 0.5, "post_prune_epochs": 1}, model, plugins)
        strategy.train_epochs = 2
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream[: experience.current_experience + 1])
    assert weights(strategy.model).isfinite().all()


def test_online_streams(split2):
    plugin = SelectivePlasticityPlugin(rank=10)
    strategy = build(Naive, {}, mlp(), [plugin])
    small = sliced(split2, train=60, test=50)
    for experience in small.train_stream:
        strategy.train(split_online_stream([experience], experience_size=10), eval_streams=[])
    assert weights(strategy.model).isfinite().all()
    assert plugin.layers["1"].samples == 120
