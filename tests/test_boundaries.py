"""Boundaries found, not given: on real MNIST, with real Avalanche strategies."""

import pickle
import sys
import warnings
from functools import partial

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.evaluation.metric_results import MetricValue
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from river.drift import PageHinkley
from torch import nn

from avalanche_sp import (
    FoundBoundaries,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
    Settings,
    reference,
    split_mnist,
)
from avalanche_sp.data import benchmark_of
from avalanche_sp.gate.detection import ChangeWatch, InputWatch, page_hinkley
from avalanche_sp.gate.layer_gate import LayerGate
from avalanche_sp.gate.layers import GatedLayer, gated_layers
from avalanche_sp.gate.stream import Moment
from avalanche_sp.optim.functional import eligibility

from conftest import MNIST, accuracy, mlp, sliced, strategy_of, weights

FOUND = ("surprise", "continuous")
EVERY_64_ITERATIONS = Settings(stream_chunk=64 * 16)


def gate(consolidate, **kwargs):
    return SelectivePlasticityPlugin(consolidate=consolidate, settings=EVERY_64_ITERATIONS, **kwargs)


@pytest.fixture(scope="module")
def stream():
    """Three tasks of 100 iterations of 16 images."""
    return sliced(split_mnist(5, dataset_root=MNIST), train=1600)


def trained(stream, plugins, n=3, model=None, seed=0, **kwargs):
    model = model or mlp(64)
    if "optimizer" in kwargs:
        kwargs["optimizer"] = kwargs["optimizer"](model.parameters())
    strategy = strategy_of(model, plugins, batch=16, **kwargs)
    torch.manual_seed(seed)
    for experience in stream.train_stream[:n]:
        strategy.train(experience)
    return strategy


class At:
    """A detector of one's own: finds a change some iterations after a start. It is not asked about the first 20."""

    def __init__(self, iteration=None):
        self.iteration, self.seen, self.copies, self.drift_detected = iteration, [], [], False

    def __deepcopy__(self, memo):
        self.copies.append(At(self.iteration))
        return self.copies[-1]

    def update(self, x):
        self.seen.append(x)
        self.drift_detected = len(self.seen) + 20 == self.iteration


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6])
def test_a_change_is_found_soon_whatever_the_losss_scale(scale):
    torch.manual_seed(0)
    steady = 0.2 + 0.03 * torch.randn(2000)
    watch = ChangeWatch(page_hinkley(Settings()), Settings())
    assert not any(watch.look([[x]])[0] for x in (scale * steady).tolist())
    changed = (scale * (1.0 + 0.1 * torch.randn(20))).tolist()
    found, calm = zip(*(watch.look([[x]]) for x in changed))
    assert 3 < found.index(True) < 10
    assert not any(calm[: found.index(True)])


def test_one_odd_batch_and_a_constant_loss_are_no_change():
    watch = ChangeWatch(page_hinkley(Settings()), Settings())
    for losses in ([0.5] * 100, [0.5, 0.6] * 50, [100.0], [0.5, 0.6] * 50):
        assert not watch.look([x] for x in losses)[0]


@pytest.mark.parametrize("place", [0, 3, 60])
def test_a_loss_that_is_not_finite_hides_no_change(place):
    torch.manual_seed(0)
    steady = (0.2 + 0.03 * torch.randn(200)).tolist()
    watch = ChangeWatch(page_hinkley(Settings()), Settings())
    assert not watch.look([x] for x in [*steady[:place], float("nan"), *steady[place:]])[0]
    assert watch.look([[1.0]] * 10)[0]


def test_a_change_is_found_where_only_one_of_two_numbers_shows_it():
    torch.manual_seed(0)
    steady = (0.2 + 0.03 * torch.randn(500, 2)).tolist()
    for changed in ([1.0, 0.2], [0.2, 1.0]):
        watch = ChangeWatch(page_hinkley(Settings()), Settings())
        assert not watch.look(steady)[0]
        assert watch.look([changed] * 10) == (True, False)


@pytest.mark.parametrize("n", [1, 10, 64])
def test_inputs_that_keep_to_their_place_do_not_move_and_those_that_leave_it_do(n):
    """Against means over all inputs, computed at once."""
    torch.manual_seed(0)
    watch, steady, moving = InputWatch(0.95), torch.randn(400, n, 30), torch.randn(400, n, 30)
    for i, x in enumerate(steady):
        distance = watch.observe(x)
        if i % 4 == 3:
            watch.keep()
        assert watch.moved < 0.2
    assert 0.3 < distance * n / 30 < 3  # what chance makes it, for inputs of variance 1
    for i, x in enumerate(moving):
        watch.observe(x + i / 400)
        watch.keep()
    mean = torch.cat([steady, moving + torch.arange(400).view(-1, 1, 1) / 400]).mean((0, 1))
    torch.testing.assert_close(watch.tensors[1], mean)
    expected = (moving[-20:].mean((0, 1)) + 0.95 - mean).square().sum() / 30
    torch.testing.assert_close(watch.moved, expected, rtol=0.5, atol=0)


def test_inputs_of_another_size_begin_anew():
    watch = InputWatch(0.95)
    watch.keep()
    for width in (5, 5, 7, 7, 5):
        assert watch.observe(torch.ones(4, width)) == 0
        watch.keep()
        assert watch.moved == 0


def test_inputs_that_were_dropped_were_never_there():
    torch.manual_seed(0)
    one, other = InputWatch(0.95), InputWatch(0.95)
    for x in torch.randn(50, 16, 5):
        for watch in (one, other):
            watch.observe(x)
            watch.keep()
        one.observe(x + 9)
        one.drop()
    assert torch.equal(one.moved, other.moved)


def test_inputs_that_are_all_alike_or_not_finite_do_not_move():
    for x in (torch.full((16, 5), 0.1), torch.tensor([[1.0, float("nan")], [2.0, float("inf")]]), torch.zeros(4, 1)):
        watch = InputWatch(0.95)
        for _ in range(50):
            assert watch.observe(x) < 1e-6
            watch.keep()
        assert watch.moved < 1e-3


@pytest.mark.slow
def test_boundaries_are_found_and_what_was_learned_before_is_kept(stream):
    plugin = SelectivePlasticityPlugin(consolidate="surprise")
    found = trained(stream, [plugin])
    assert len(plugin.consolidated_at) == 2
    assert all(0 < at - 100 * (i + 1) <= 20 for i, at in enumerate(plugin.consolidated_at))
    told = trained(stream, [SelectivePlasticityPlugin()])
    naive = trained(stream, [])
    for task in (0, 1):
        assert accuracy(naive.model, stream, task) < 0.3
        assert accuracy(found.model, stream, task) > accuracy(told.model, stream, task) - 0.05 > 0.6


@pytest.mark.slow
def test_a_task_that_comes_back_is_found_though_its_loss_is_low(stream):
    """Else what was learned since, of which nothing is consolidated yet, would be lost."""
    plugin = SelectivePlasticityPlugin(consolidate="surprise")
    strategy = trained(stream, [plugin], n=2)
    kept = accuracy(strategy.model, stream, 1)
    strategy.train(stream.train_stream[0])
    assert [at // 100 for at in plugin.consolidated_at] == [1, 2]
    assert accuracy(strategy.model, stream, 1) > kept - 0.05
    assert accuracy(strategy.model, stream, 0) > 0.9
    unaware = trained(stream, [SelectivePlasticityPlugin(consolidate="surprise", detector=At())], n=2)
    unaware.train(stream.train_stream[0])
    assert accuracy(unaware.model, stream, 1) < 0.5


@pytest.mark.slow
def test_inputs_that_drift_are_consolidated_though_no_iteration_is_surprising(stream):
    """Two pixels more change places every iteration; the detector finds nothing."""
    swaps = torch.randperm(784, generator=torch.Generator().manual_seed(0)).view(-1, 2)

    class Drift(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            moved = swaps[: strategy.clock.train_iterations]
            images = strategy.mb_x.flatten(1).clone()
            images[:, moved] = images[:, moved.flip(1)]
            strategy.mbatch[0] = images.view_as(strategy.mb_x)

    found = []
    for drifts in ([], [Drift()]):
        plugin = SelectivePlasticityPlugin(consolidate="surprise", detector=At())
        trained(stream, [*drifts, plugin], n=1, epochs=4)
        found.append(plugin.consolidated_at)
    assert found[0] == [] and 1 <= len(found[1]) <= 6


def test_inputs_that_are_no_numbers_are_left_alone(stream):
    """Tokens: their mean means nothing. The loss is watched."""
    plugin = SelectivePlasticityPlugin(consolidate="surprise")

    class Tokens(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            strategy.mbatch[0] = (strategy.mb_x.flatten(1) > 0).long()

    model = nn.Sequential(nn.Embedding(2, 1), nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    trained(stream, [Tokens(), plugin], n=2, model=model, optimizer=partial(torch.optim.SGD, lr=0.005))
    assert [at // 100 for at in plugin.consolidated_at] == [1]


def test_without_events_it_remembers_too(stream):
    plugin = gate("continuous")
    strategy = trained(stream, [plugin])
    assert plugin.consolidated_at == [64, 128, 192, 256]
    assert all(accuracy(strategy.model, stream, task) > 0.5 for task in (0, 1))


def adaptive(parameters):
    return SelectivePlasticityOptimizer(parameters, lr=1e-3, plasticity_k=1, beta1=0.0, eps=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("consolidate, optimizer", zip(FOUND, [adaptive, partial(torch.optim.SGD, lr=0.05)]))
def test_an_online_stream_is_the_same_to_it_as_whole_experiences(stream, consolidate, optimizer):
    """Bit for bit: the end of an experience means nothing."""
    ends = []
    for online in (False, True):
        plugin = gate(consolidate)
        model = mlp(64)
        strategy = strategy_of(model, [plugin], batch=16, optimizer=optimizer(model.parameters()))
        for experience in stream.train_stream[:2]:
            parts = split_online_stream([experience], experience_size=16, shuffle=False) if online else [experience]
            for part in parts:
                strategy.train(part, shuffle=False)
        ends.append((weights(strategy.model), plugin.consolidated_at))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] != []


@pytest.mark.parametrize("consolidate", FOUND)
def test_the_first_task_is_learned_as_without_the_plugin(stream, consolidate):
    """Until something is consolidated, bit for bit."""
    n = {"surprise": 1600, "continuous": 63 * 16}[consolidate]
    short = sliced(stream, train=n)
    both = [trained(short, plugins, n=1) for plugins in ([], [gate(consolidate)])]
    assert torch.equal(*(weights(s.model) for s in both))


def test_the_weights_go_back_and_the_gated_part_of_the_later_updates_is_reapplied(stream):
    """The last calm look is that of the 100th iteration, the next task's first is the 101st."""
    model, plugin, copies = mlp(64), gate("surprise"), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    strategy = strategy_of(model, [plugin], optimizer=optimizer, batch=16)

    def look(when):
        copies[when, strategy.clock.train_iterations + 1] = GatedLayer(model[1]).weights_and_bias()

    class Look(SupervisedPlugin):
        def after_update(self, strategy, **kwargs):
            look("after the gate")

    strategy.plugins.append(Look())
    optimizer.register_step_post_hook(lambda *_: look("after the step"))  # before the gate's own, put on later
    torch.manual_seed(0)
    for experience in stream.train_stream[:2]:
        strategy.train(experience)
    at, memory = plugin.consolidated_at[0], plugin.layers["1"]
    before = copies["after the gate", 100]
    steps = copies["after the step", at] - before
    open_gate = reference.gate_matrix(memory.eigenvalues, memory.vectors, memory.mean_eigenvalue, 0.5)
    expected = before + (steps.double() @ open_gate).float()
    torch.testing.assert_close(copies["after the gate", at], expected, atol=1e-5, rtol=1e-4)
    assert (expected - before).norm() < 0.5 * steps.norm()
    assert memory.samples == 16 * at


def test_what_the_gate_lets_through_of_a_change(stream):
    plugin = SelectivePlasticityPlugin(rank=20)
    trained(stream, [plugin], n=1)
    memory = plugin.layers["1"]
    change = torch.randn(3, len(memory.vectors), dtype=torch.float64)
    expected = change @ reference.gate_matrix(memory.eigenvalues, memory.vectors, memory.mean_eigenvalue, 0.3)
    through = LayerGate.of(memory, 0.3, 16).through(change.float(), memory)
    torch.testing.assert_close(through.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Linear(5, 4, bias=False), nn.Conv2d(6, 4, 3, groups=2)])
def test_weights_come_back_as_they_were(layer):
    gated = gated_layers(layer)[""]
    kept = gated.weights_and_bias()
    before = [p.detach().clone() for p in layer.parameters()]
    for p in layer.parameters():
        p.data.add_(1)
    gated.set_weights(kept[:3])
    for p, b in zip(layer.parameters(), before):
        assert torch.equal(p[:3], b[:3]) and torch.equal(p[3:], b[3:] + 1)


def test_a_second_moment_is_kept_as_a_sketch_that_knows_its_leading_eigenspace():
    torch.manual_seed(0)
    x = torch.randn(3000, 40) * 0.8 ** torch.arange(40)
    moment = Moment(40, 8, 5120, x)
    for i, batch in enumerate(x.split((10, 300, 690, 2000))):  # of any size
        moment.add(batch)
        if i == 1:
            moment.drop()
        moment.keep()
    kept = torch.cat([x[:10], x[310:]])
    rows = moment.factor()
    found, exact = (torch.linalg.eigh(m.T @ m / len(m)) for m in (rows, kept))
    torch.testing.assert_close(found[0][-6:], exact[0][-6:], rtol=0.02, atol=0)
    assert (found[1][:, -6:].T @ exact[1][:, -6:]).det().abs() > 0.95
    torch.testing.assert_close(moment.mean_eigenvalue, kept.square().mean())
    assert len(rows) <= 16 and all(t.shape == (40, 16) for t in moment.tensors[:3])


def test_no_sample_is_kept_and_memory_stays_bounded(stream):
    plugin = gate("continuous", rank=8)
    sizes = []

    class Size(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            sizes.append(plugin.state_bytes)

    trained(stream, [plugin, Size()], n=2)
    assert max(sizes[140:]) == max(sizes[70:140])


def test_a_detector_of_ones_own(stream):
    """Copies of it watch the loss and the inputs, new ones after a change; it is itself left alone."""
    detector = At(30)
    plugin = SelectivePlasticityPlugin(consolidate="surprise", detector=detector)
    trained(stream, [plugin], n=1)
    assert plugin.consolidated_at == [32, 64, 96]  # at the look after it
    assert [len(copy.seen) for copy in detector.copies] == [10, 10] * 3 + [0, 0] and detector.seen == []
    assert all(abs(x) <= 5 for copy in detector.copies for x in copy.seen)


def test_stored_samples_are_not_watched(stream):
    """A memory whose loss explodes is no boundary: here each stored sample's label is wrong."""
    detector = At()
    plugin = SelectivePlasticityPlugin(consolidate="surprise", detector=detector)

    class WrongLabels(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            strategy.mbatch[1][16:] = 9

    trained(stream, [ReplayPlugin(30, batch_size=16, batch_size_mem=16), WrongLabels(), plugin], n=2)
    beside = detector.copies[0].seen[120:]
    assert sum(beside) / len(beside) < 1


def test_normalisation_goes_back_to_before_the_change(stream):
    """Its network takes up a new task within a few iterations: a more sensitive detector than the default's is due."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    detector = PageHinkley(min_instances=10, delta=1.0, threshold=10.0, mode="up")
    plugin = SelectivePlasticityPlugin(consolidate="surprise", detector=detector)
    held = []

    class Look(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            held.append([t.clone() for t in model[2].state_dict().values()])

    trained(stream, [plugin, Look()], n=2, model=model)
    (at,) = plugin.consolidated_at
    assert 100 < at <= 108
    assert any(not torch.equal(a, b) for a, b in zip(held[99], held[at - 2]))
    assert all(torch.equal(a, b) for a, b in zip(held[99], held[-1]))


def test_a_growing_head(stream):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(784, 32), IncrementalClassifier(32, 2)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    plugin = SelectivePlasticityPlugin(consolidate="surprise")
    strategy = trained(stream, [plugin], model=Net(), criterion=nn.CrossEntropyLoss())
    head, memory = strategy.model.head.classifier, plugin.layers["head.classifier"]
    assert len(plugin.consolidated_at) == 2 and head.out_features == 6
    naive = trained(stream, [], model=Net(), criterion=nn.CrossEntropyLoss())
    assert len(memory.anchor) == 6  # it had grown before the second boundary was found
    assert accuracy(strategy.model, stream, 0) > accuracy(naive.model, stream, 0)


def test_the_optimizer_goes_back_too_and_consolidates_what_it_held_then(stream):
    plugin = SelectivePlasticityPlugin(consolidate="surprise")
    traces, consolidated = [], []

    class Look(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            state = strategy.optimizer.state[strategy.model[1].weight]
            traces.append(state["exp_avg_sq"].clone())
            consolidated.append(state.get("consolidated"))

    trained(stream, [plugin, Look()], optimizer=adaptive, n=2)
    first = next(i for i, kept in enumerate(consolidated) if kept is not None)
    assert first == plugin.consolidated_at[0] - 1
    assert torch.equal(traces[first], traces[99]) and not torch.equal(traces[first - 1], traces[99])
    torch.testing.assert_close(consolidated[first], eligibility(traces[99]))


def test_boundaries_go_to_the_loggers(stream):
    metric = FoundBoundaries()
    values: list[MetricValue] = []

    class Collect(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            values.extend(metric.after_training_iteration(strategy))

    plugin = SelectivePlasticityPlugin(consolidate="surprise")
    trained(stream, [plugin, Collect()])
    assert [v.value for v in values] == [1, 2] and metric.result() == 2
    assert [v.x_plot for v in values] == plugin.consolidated_at
    assert all("FoundBoundaries" in v.name for v in values)


def ten_iterations(stream):
    """Experiences of ten iterations each, too short to find a boundary in."""
    parts = [stream.train_stream[1].dataset[:160], stream.train_stream[2].dataset[:160]]
    return benchmark_of(parts, parts).train_stream


def test_only_boundaries_found_in_this_run_go_to_the_loggers(stream):
    """The plugin goes on with a new metric, and then with another model, for which it starts again."""
    metric, values = FoundBoundaries(), []

    class Collect(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            metric.before_training_exp(strategy)

        def after_training_iteration(self, strategy, **kwargs):
            values.extend(metric.after_training_iteration(strategy))

    plugin = SelectivePlasticityPlugin(consolidate="surprise", detector=At(30))
    model = trained(stream, [plugin], n=1).model
    for network, known in ((model, 3), (mlp(64), 0)):
        strategy_of(network, [plugin, Collect()], batch=16).train(ten_iterations(stream)[0])
        assert not values and metric.result() == len(plugin.consolidated_at) == known


@pytest.mark.parametrize("consolidate", FOUND)
def test_of_a_loaded_gate_no_warning_says_that_nothing_is_protected(stream, consolidate):
    settings, detector = Settings(stream_chunk=32 * 16), {"detector": At(30)} if consolidate == "surprise" else {}
    first, plugin = (SelectivePlasticityPlugin(consolidate=consolidate, settings=settings, **detector) for _ in "ab")
    model = trained(stream, [first], n=1).model
    plugin.gate.load_state_dict(first.gate.state_dict())
    strategy = strategy_of(model, [plugin], batch=16)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for experience in ten_iterations(stream):
            strategy.train(experience)
        if consolidate == "continuous":
            strategy.train(ten_iterations(stream)[1])
    assert not plugin.consolidated_at and not [w for w in record if "protected" in str(w.message)]


@pytest.mark.parametrize("consolidate", FOUND)
def test_it_can_be_saved_in_the_midst_of_a_stream(stream, consolidate):
    plugin = gate(consolidate)
    strategy = trained(stream, [plugin], n=2)
    copied = pickle.loads(pickle.dumps(strategy))
    (other,) = [p for p in copied.plugins if isinstance(p, SelectivePlasticityPlugin)]
    assert other.consolidated_at == plugin.consolidated_at != [] and other.state_bytes == plugin.state_bytes
    for one in (strategy, copied):
        torch.manual_seed(1)
        one.train(stream.train_stream[2])
    assert torch.equal(weights(strategy.model), weights(copied.model))
    assert other.consolidated_at == plugin.consolidated_at


def test_without_river_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(ImportError, match=r"avalanche-sp\[detection\]"):
        SelectivePlasticityPlugin(consolidate="surprise")
    SelectivePlasticityPlugin(consolidate="surprise", detector=At())
    gate("continuous")


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"consolidate": "never"}, "Invalid consolidate value: 'never' (allowed: 'experience', 'surprise', 'contin"),
        ({"detector": At()}, "Invalid detector: consolidate='experience' detects nothing"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        SelectivePlasticityPlugin(**kwargs)
    assert words in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("consolidate, why", [("surprise", "none in 40 iterations"), ("continuous", "every 4096")])
@pytest.mark.parametrize("is_online", [False, True])
def test_new_classes_of_which_nothing_was_noticed_are_told_once(split5, consolidate, why, is_online):
    """Tasks of 40 iterations of ten samples are too short for it."""
    stream = sliced(split5, 400, 20).train_stream
    plugin, model = SelectivePlasticityPlugin(consolidate=consolidate), mlp()
    strategy = strategy_of(model, [plugin], criterion=nn.CrossEntropyLoss(), batch=10)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for experience in split_online_stream(stream, 10, seed=0) if is_online else stream:
            strategy.train(experience)
    said = [str(w.message) for w in record if "new classes came" in str(w.message)]
    assert not plugin.consolidated_at and len(said) == 1
    assert "at iteration 40," in said[0] and (is_online or why in said[0])


def test_the_boundaries_of_another_model_are_not_its_own(split2):
    plugin = SelectivePlasticityPlugin()
    for _ in range(2):
        strategy = strategy_of(mlp(), [plugin])
        for experience in sliced(split2, 64, 20).train_stream:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                strategy.train(experience)
        assert len(plugin.consolidated_at) == 2


@pytest.mark.parametrize("detector", [1, type("Detector", (), {"update": None})])
def test_a_detector_is_an_object_with_update(detector):
    with pytest.raises(TypeError, match="Invalid detector: "):
        SelectivePlasticityPlugin(consolidate="surprise", detector=detector)
