"""Strategies of Avalanche on our benchmarks, alone and with the plugin: each does its work, and so does the gate."""

import random
import warnings

import pytest
import torch
from avalanche.benchmarks import nc_benchmark, split_online_stream
from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset as tensor_dataset
from avalanche.models import BaseModel, MTSimpleMLP, SCRModel, avalanche_forward
from avalanche.models.packnet import packnet_simple_mlp
from avalanche.training import (
    AGEM,
    DER,
    ER_ACE,
    EWC,
    GEM,
    LFL,
    MAS,
    MER,
    MIR,
    SCR,
    Cumulative,
    CWRStar,
    FeatureReplay,
    GDumb,
    GenerativeReplay,
    GSS_greedy,
    ICaRL,
    JointTraining,
    LwF,
    Naive,
    PackNet,
    Replay,
    SynapticIntelligence,
)
from avalanche.training.plugins import RWalkPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import SelectivePlasticityPlugin, split_mnist

from conftest import MNIST, mlp, sliced, weights

KEEPS_SAMPLES = {
    "Replay": (Replay, {"mem_size": 40}),
    "AGEM": (AGEM, {"patterns_per_exp": 20, "sample_size": 20}),
    "GEM": (GEM, {"patterns_per_exp": 20, "memory_strength": 0.5}),
    "DER": (DER, {"mem_size": 40, "batch_size_mem": 20}),
    "ER_ACE": (ER_ACE, {"mem_size": 40, "batch_size_mem": 20}),
    "GDumb": (GDumb, {"mem_size": 40, "train_epochs": 20}),
    "GSS": (GSS_greedy, {"mem_size": 60, "mem_strength": 3, "input_size": [1, 28, 28]}),
    "Cumulative": (Cumulative, {}),
    "Joint": (JointTraining, {}),
}
PENALISES_CHANGE = {
    "EWC": (EWC, {"ewc_lambda": 1000.0}),
    "MAS": (MAS, {"lambda_reg": 2.0, "alpha": 0.5}),
    "LwF": (LwF, {"alpha": 20.0, "temperature": 2.0}),
    "RWalk": (Naive, {"plugins": [RWalkPlugin(ewc_lambda=10.0, ewc_alpha=0.9, delta_t=2)]}),
}
# Its penalty is zero on a CPU: it reads the gradients after the step, those of a frozen readout also.
SI = {"SI": (SynapticIntelligence, {"si_lambda": 1.0})}
# MIR replays no class of an experience's last batch, so nothing here: it is for online streams.
MIR = {"MIR": (MIR, {"mem_size": 40, "subsample": 30, "batch_size_mem": 13})}
OTHERS = {"GenerativeReplay": (GenerativeReplay, {}), "CWRStar": (CWRStar, {"cwr_layer_name": "5"})}
STRATEGIES = {"Naive": (Naive, {}), **KEEPS_SAMPLES, **PENALISES_CHANGE, **MIR, **SI, **OTHERS}
NOT_GATED = ("Joint", "GDumb", "Cumulative")  # one experience; another network in each; all samples in each


def build(cls, kwargs, model, plugins):
    return cls(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        eval_mb_size=100,
        evaluator=None,
        **{**kwargs, "plugins": kwargs.get("plugins", []) + plugins},
    )


def accuracy(model, experience):
    x, y, _ = experience.dataset.read_batch(list(range(len(experience.dataset))))
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


@pytest.fixture(scope="module")
def trained(split2):
    """A strategy of STRATEGIES after two tasks, alone or with the plugin: made once."""
    small, made = sliced(split2, train=300, test=200), {}

    def train(name, gated=False):
        if (name, gated) not in made:
            cls, kwargs = STRATEGIES[name]
            plugin, model = SelectivePlasticityPlugin(rank=10), mlp()
            strategy = build(cls, kwargs, model, [plugin] if gated else [])
            torch.manual_seed(0)
            random.seed(0)  # which A-GEM draws its memory with
            outputs = []
            for experiences in [small.train_stream] if cls is JointTraining else small.train_stream:
                strategy.train(experiences)
                outputs.append(strategy.model(small.test_stream[0].dataset.read_batch(list(range(100)))[0]).detach())
            drift = (outputs[-1] - outputs[0]).norm().item()
            both = [accuracy(strategy.model, e) for e in small.test_stream]
            made[name, gated] = strategy.model, plugin, drift, sum(both) / 2, both[0]
        return made[name, gated]

    return train


@pytest.mark.parametrize("name", KEEPS_SAMPLES)
def test_stored_samples_keep_the_first_task(name, trained):
    *_, kept = trained(name)
    *_, naive = trained("Naive")
    assert kept > naive + 10


@pytest.mark.parametrize("name", PENALISES_CHANGE)
def test_a_penalty_holds_the_outputs_for_the_first_task(name, trained):
    _, _, drift, *_ = trained(name)
    _, _, naive, *_ = trained("Naive")
    assert drift < 0.9 * naive


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_plugin_gates_every_layer(name, trained):
    model, plugin, *_ = trained(name, gated=True)
    alone, *_ = trained(name)
    assert set(plugin.layers) == {"1", "3", "5"}
    moved = not torch.equal(weights(model), weights(alone))
    assert moved == (name not in NOT_GATED)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_is_worse_with_the_plugin(name, trained):
    *_, gated, _ = trained(name, gated=True)
    *_, alone, _ = trained(name)
    assert gated > alone - 3


@pytest.mark.parametrize("cls", [Cumulative, ICaRL])
def test_the_plugin_says_that_it_does_not_know_stored_samples_in_a_mixture(cls, split2):
    """They are anywhere among the experience's: no row is gated."""
    train, test = (
        tensor_dataset(*(torch.cat([e.dataset.read_batch(list(range(100)))[i] for e in stream]) for i in (0, 1)))
        for stream in (split2.train_stream, split2.test_stream)
    )
    benchmark = nc_benchmark(train, test, 2, task_labels=False, fixed_class_order=range(10))
    plugin, torso, head = SelectivePlasticityPlugin(), nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU()), None
    if cls is ICaRL:
        head = nn.Linear(32, 10)
        own = {"feature_extractor": torso, "classifier": head, "memory_size": 40, "buffer_transform": None}
        own["fixed_memory"] = True
    else:
        own = {"model": nn.Sequential(torso, nn.Linear(32, 10)), "criterion": nn.CrossEntropyLoss()}
    parameters = own["model"].parameters() if head is None else [*torso.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    strategy = cls(optimizer=optimizer, train_mb_size=20, eval_mb_size=100, evaluator=None, plugins=[plugin], **own)
    strategy.train(benchmark.train_stream[0])
    with pytest.warns(UserWarning, match=f"{cls.__name__} mixes stored samples .* It gates none of them"):
        strategy.train(benchmark.train_stream[1])
    assert len(plugin.layers) == 2
    assert all(statistics.energy == 0 for statistics in plugin.gate.statistics.values())  # of rows that were gated


@pytest.mark.parametrize("name", ["Joint", "GDumb", "Cumulative"])
def test_the_readout_is_solved_on_all_that_a_strategy_trains_on(name, split2):
    """On the experience's own samples alone, the classes of the other experience were lost."""
    small = sliced(split2, train=300, test=200)
    cls, kwargs = STRATEGIES[name]
    plugin, model = SelectivePlasticityPlugin(), mlp()
    strategy = build(cls, kwargs, model, [plugin])
    strategy.optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for experiences in [small.train_stream] if cls is JointTraining else small.train_stream:
            strategy.train(experiences)
    assert plugin.gate.memory.samples == (40 if cls is GDumb else 600)
    assert min(accuracy(strategy.model, experience) for experience in small.test_stream) > 40


@pytest.mark.parametrize("cls", [DER, ER_ACE])
def test_stored_samples_that_a_strategy_draws_itself_open_the_gate(split2, cls):
    """Those of the old classes: the buffer may hold samples of the present experience also."""
    benchmark, plugin, seen = sliced(split2, train=200), SelectivePlasticityPlugin(rank=10), []

    class Note(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            seen.append((plugin.gate.trust, sum(replayed.total for replayed in plugin.gate._replays)))

    strategy = build(cls, {"mem_size": 40, "batch_size_mem": 20}, mlp(), [plugin, Note()])
    for experience in benchmark.train_stream:
        strategy.train(experience)
    old = 20 if cls is ER_ACE else 40  # ER_ACE stores some of the new experience before it trains on it
    assert seen[0] == (0, 0) and seen[-1] == (old / 5 / (old / 5 + 50), old)


def test_the_stored_samples_of_er_ace_are_not_gated(split2):
    """They follow in a forward pass of their own."""
    benchmark, plugin, seen = sliced(split2, train=200), SelectivePlasticityPlugin(rank=10), []

    class Gradients(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            if len(plugin.layers):
                first = strategy.model[1].weight
                streams, stored = (
                    torch.autograd.grad(out, first, torch.autograd.grad(strategy.loss, out, retain_graph=True)[0])[0]
                    for out in (strategy.mb_output, strategy.mb_buffer_out)
                )
                g = plugin.gate._hooks.epoch.gated["1"]
                seen.append((g, first.grad.clone(), streams, stored, g.statistics.holding))

    model = mlp(bias=False)
    strategy = build(ER_ACE, {"mem_size": 40, "batch_size_mem": 20}, model, [plugin, Gradients()])
    strategy.retain_graph = True
    strategy.train(benchmark.train_stream[0])
    strategy.train(benchmark.train_stream[1])
    assert len(seen) == 10
    for g, found, streams, stored, held in seen:
        through = (1 - g.gate.closed_rest) * (streams + stored)
        expected = through - held * g.memory.held(streams, g.gate.closed_more)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
        assert float(stored.norm()) > 0


def test_an_error_in_er_aces_forward_pass_leaves_no_hook_on_the_model(split2):
    class Broken(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            strategy.mb_x.resize_(1)

    model, plugins = mlp(), [SelectivePlasticityPlugin(rank=10)]
    strategy = build(ER_ACE, {"mem_size": 40, "batch_size_mem": 20}, model, plugins)
    strategy.train(sliced(split2, train=100).train_stream[0])
    strategy.plugins.append(Broken())
    with pytest.raises((RuntimeError, IndexError)):
        strategy.train(sliced(split2, train=100).train_stream[1])
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["MultiHead", "PackNet"])
def test_task_incremental(name):
    benchmark = sliced(split_mnist(5, return_task_id=True, dataset_root=MNIST), train=100, test=50)
    (x, y, t), correct = benchmark.test_stream[0].dataset.read_batch(list(range(50))), {}
    for gated in (False, True):
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
            with torch.no_grad():
                correct.setdefault(gated, []).append(avalanche_forward(model.eval(), x, t).argmax(1) == y)
    for right in correct.values():
        assert right[0].float().mean() > 0.8
        assert name != "PackNet" or torch.equal(right[0], right[-1])  # an old task's weights are frozen
    assert correct[True][-1].sum() >= correct[False][-1].sum()


def test_online_streams(split2):
    small, models = sliced(split2, train=60, test=50), []
    for plugins in ([], [SelectivePlasticityPlugin(rank=10)]):
        strategy = build(Naive, {}, mlp(), plugins)
        torch.manual_seed(0)
        for experience in small.train_stream:
            strategy.train(split_online_stream([experience], experience_size=10, seed=0), eval_streams=[])
        models.append(weights(strategy.model))
    assert not torch.equal(*models)
    assert plugins[0].layers["1"].samples == 120


class Features(nn.Module, BaseModel):
    """A network as Avalanche asks for where a strategy reads its features."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = mlp()[:-1], nn.Linear(32, 10)

    def forward(self, x):
        return self.classifier(self.get_features(x))

    def get_features(self, x):
        return self.features(x)


def test_stored_features_are_not_taken_for_stored_inputs(split2):
    plugin = SelectivePlasticityPlugin()
    strategy = build(FeatureReplay, {"mem_size": 40, "batch_size_mem": 20}, Features(), [plugin])
    for experience in sliced(split2, 200, 100).train_stream:
        strategy.train(experience)
    assert plugin.gate.memory.consolidations == 2 and len(plugin.layers) >= 3


def test_a_strategy_that_tells_no_plugin_of_its_steps_is_named_and_trained_as_it_is(split2):
    """With Adam the readout was solved and frozen before, and nothing was consolidated after."""
    ended, named = [], 0
    for plugins in ([SelectivePlasticityPlugin()], []):
        model = mlp()
        strategy = build(MER, {"mem_size": 40, "batch_size_mem": 10, "n_inner_steps": 2}, model, plugins)
        strategy.optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        torch.manual_seed(0)
        random.seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for experience in sliced(split2, 60, 20).train_stream:
                strategy.train(experience)
        told = "MER does not tell its plugins of its steps: nothing is consolidated"
        named += sum(told in str(warning.message) for warning in caught)
        ended.append(weights(model))
    assert named and torch.equal(*ended)


def test_a_loss_of_two_views_is_refused_before_training(split2):
    def strategy_with(plugin):
        torch.manual_seed(0)
        model = SCRModel(mlp()[:-1], nn.Linear(32, 16))
        return SCR(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            augmentations=nn.Identity(),
            mem_size=40,
            train_mb_size=20,
            batch_size_mem=20,
            evaluator=None,
            plugins=[plugin],
        )

    small = sliced(split2, 60, 20)
    with pytest.raises(ValueError, match="Invalid strategy: SCR, .* pull_back=0 and readout_step=False"):
        strategy_with(SelectivePlasticityPlugin()).train(small.train_stream[0])
    plugin = SelectivePlasticityPlugin(pull_back=0, readout_step=False)
    strategy_with(plugin).train(small.train_stream[0])
    assert plugin.gate.memory.consolidations == 1


def test_a_readout_that_a_strategy_freezes_is_named(split2):
    plugin = SelectivePlasticityPlugin()
    strategy = build(LFL, {"lambda_e": 0.1}, Features(), [plugin])
    small = sliced(split2, 200, 20)
    strategy.train(small.train_stream[0])
    with pytest.warns(UserWarning, match="makes the network's outputs and is frozen") as caught:
        strategy.train(small.train_stream[1])
    assert not any("cannot solve the last layer" in str(warning.message) for warning in caught)


def test_an_evaluation_at_an_experiences_end_hides_no_step(split2):
    small, model, plugin = sliced(split2, 100, 20), mlp(), SelectivePlasticityPlugin()
    strategy = build(Naive, {"eval_every": 1}, model, [plugin])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in no step that the gate saw")
        for experience in small.train_stream:
            strategy.train(experience, eval_streams=[small.test_stream])
    assert plugin.gate.memory.consolidations == 2


@pytest.mark.parametrize("same", [False, True])
def test_a_strategy_has_one_plugin(split2, same):
    first = SelectivePlasticityPlugin()
    second, model = first if same else SelectivePlasticityPlugin(), mlp()
    before = weights(model)
    strategy = build(Naive, {}, model, [first, second])
    with pytest.raises(ValueError, match="Invalid plugins: several SelectivePlasticityPlugin"):
        strategy.train(split2.train_stream[0])
    assert torch.equal(weights(model), before)
