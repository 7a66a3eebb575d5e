"""The methods that store samples, which replay with the gate is compared with."""

import copy
import random

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import AccuracyMatrix, GaussianBuffer, SelectivePlasticityPlugin
from harness.build import build_strategy
from harness.memory import plugin_bytes, stored_bytes
from harness.methods.rehearsal import ConstantGate, MemoryDistillation
from harness.recipes import USES_REPLAY
from harness.settings import Run

from conftest import mlp, sliced, weights

pytestmark = pytest.mark.slow

SAMPLE = 784 * 4 + 8  # bytes: an image and its label
NETWORK = 4 * sum(p.numel() for p in mlp().parameters())
BUFFER = 100
EXTRA = {  # what each keeps
    "a-gem": BUFFER * SAMPLE,
    "gem": BUFFER * SAMPLE,
    "gdumb": BUFFER * SAMPLE + NETWORK,  # the weights that it begins with again and again
    "er-ace": BUFFER * SAMPLE,
    "der++": BUFFER * (SAMPLE + 10 * 4),
    "replay-joint": BUFFER * SAMPLE,
    "replay-distilled": BUFFER * SAMPLE + NETWORK,
    "replay-gated": BUFFER * SAMPLE,
    "cumulative": 1200 * SAMPLE,
}

SHORT = {"a-gem": {"lr": 0.02}, "replay-gated": {"lr": 0.1, "gate": 0.7}}  # as they are tuned, 36 steps are too few


def trained(name, benchmark, *, buffer=BUFFER, seed=0, plugins=(), **overrides):
    """The strategy after the benchmark's experiences, its accuracy matrix, and the bytes that it keeps."""
    buffer = buffer if name in USES_REPLAY else 0
    n_tasks = len(benchmark.train_stream)
    run = Run("split-mnist", name, n_tasks, 2, 32, buffer, seed, overrides=overrides)
    matrix, model = AccuracyMatrix(), mlp()
    torch.manual_seed(seed)
    random.seed(seed)
    strategy, own = build_strategy(run, model, list(plugins), EvaluationPlugin(matrix))
    for experience in benchmark.train_stream:
        strategy.train(experience, drop_last=True)
        strategy.eval(benchmark.test_stream)
    return strategy, matrix.result(), stored_bytes(strategy) + sum(map(plugin_bytes, own))


@pytest.fixture(scope="module")
def naive(split2):
    return trained("naive-sgd", split2)[1]


@pytest.mark.parametrize("name", EXTRA)
def test_it_learns_keeps_more_than_naive_training_and_repeats_bit_for_bit(name, split2, naive):
    settings = SHORT.get(name, {})
    _, accuracy, extra = trained(name, split2, **settings)
    assert accuracy[0, 0] > 80 and accuracy[1, 1] > 50
    assert accuracy[1, 0] > naive[1, 0]
    assert extra == EXTRA[name]
    few = sliced(split2, 2 * BUFFER)
    one, again, other = (weights(trained(name, few, seed=seed, **settings)[0].model) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("name", ["gaussian-replay", "sp-gaussian"])
def test_samples_drawn_from_gaussians_take_what_the_gaussians_take(name, split2, naive):
    strategy, accuracy, extra = trained(name, split2)
    (policy,) = (p.storage_policy for p in strategy.plugins if isinstance(p, ReplayPlugin))
    assert isinstance(policy, GaussianBuffer)
    gates = sum(p.state_bytes for p in strategy.plugins if isinstance(p, SelectivePlasticityPlugin))
    assert extra - gates == policy.state_bytes < 200_000
    assert accuracy[1, 0] > naive[1, 0] + 20


class Batches(SupervisedPlugin):
    """How many stored samples, and how many in all, each training batch held."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def after_forward(self, strategy, **kwargs):
        apart = getattr(strategy, "mb_buffer_x", ())  # where ER-ACE has its stored samples
        self.sizes.append(len(strategy.mb_x) + len(apart))


@pytest.mark.parametrize("buffer, memory", [(100, 32), (20, 20)], ids=["as many as the stream's", "all there are"])
@pytest.mark.parametrize("name", ["replay-joint", "der++", "er-ace"])
def test_every_method_sees_as_many_samples_in_as_many_steps(name, buffer, memory, split2):
    batches = Batches()
    trained(name, split2, buffer=buffer, plugins=[batches])
    steps = 2 * (600 // 32)
    assert batches.sizes == [32] * steps + [32 + memory] * steps


def test_gdumb_sees_nothing_but_its_buffer_as_often_as_it_is_told(split2):
    batches = Batches()
    trained("gdumb", split2, buffer=20, plugins=[batches], passes=3)
    assert batches.sizes == [20] * 3 * 2
    with pytest.raises(ValueError, match=r"Invalid passes value: 0 \(allowed: 1 or more\)"):
        trained("gdumb", split2, passes=0)


@pytest.mark.parametrize("name", ["a-gem", "gem"])
def test_a_memory_with_less_than_a_sample_of_each_old_task_is_named(name, split5):
    with pytest.raises(ValueError, match="Invalid replay_buffer: 3 .allowed for .*gem: at least a sample of each old"):
        trained(name, split5, buffer=3)


class ByHand(SupervisedPlugin):
    """Training losses of the second experience, and what they should be with a distillation of the given weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.teacher, self.pairs = weight, None, []

    def after_backward(self, strategy, **kwargs):
        if self.teacher is not None:
            distance = strategy.mb_output[32:] - self.teacher(strategy.mb_x[32:])
            loss = strategy.criterion() + self.weight * distance.square().sum() / 32
            self.pairs.append((strategy.loss.item(), loss.item()))

    def after_training_exp(self, strategy, **kwargs):
        self.teacher = copy.deepcopy(strategy.model)


def test_distillation_is_the_distance_from_the_last_experiences_network_for_stored_samples(split2):
    by_hand = ByHand(0.3)
    trained("replay-distilled", split2, plugins=[by_hand], weight=0.3)
    losses, expected = zip(*by_hand.pairs)
    assert len(losses) == 2 * (600 // 32)
    assert losses == pytest.approx(expected, rel=1e-5)
    for weight in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"Invalid weight value: {weight} .allowed: greater than 0"):
            MemoryDistillation(weight)


class Gradients(SupervisedPlugin):
    """The output bias' first gradient in the second experience, and the two parts that it should be made of."""

    def __init__(self):
        super().__init__()
        self.first = True

    def before_backward(self, strategy, **kwargs):
        if self.first and len(strategy.mb_x) > 32:
            error = 2 * (strategy.mb_output - nn.functional.one_hot(strategy.mb_y, 10)).detach() / 32
            self.stream, self.memory = error[:32].sum(0) / 2, error[32:].sum(0) / 2  # tasks of equal size

    def after_backward(self, strategy, **kwargs):
        if self.first and len(strategy.mb_x) > 32:
            self.first, self.found = False, strategy.model[-1].bias.grad.clone()


def test_the_constant_gate_is_on_the_streams_samples_alone(split2):
    gradients = Gradients()
    trained("replay-gated", split2, plugins=[gradients], gate=0.25)
    expected = 0.25 * gradients.stream + gradients.memory
    assert torch.allclose(gradients.found, expected, atol=1e-6)
    for gate in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"Invalid gate value: {gate} .allowed: greater than 0, at most 1"):
            ConstantGate(gate)
