"""The engine in plain PyTorch loops: against Avalanche's, against itself, and against the slow reference."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from avalanche.training import Naive
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_sp import OneHotMSELoss, PlasticityGate, SelectivePlasticityPlugin, Settings, reference
from avalanche_sp.data import TensorClassificationDataset, TensorSource, benchmark_of
from avalanche_sp.gate import Samples
from avalanche_sp.gate.layers import gated_layers
from avalanche_sp.gate.observe import evenly_spread, some_inputs

from conftest import weights

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)
    ),
}
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.02),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=2e-3),
}
SIZE, BATCH = 192, 64  # samples of a task, and of a mini-batch of it


def task(seed, size=SIZE):
    """Images (size, 1, 8, 8) with a few strong directions, and their classes, 0 to 4."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(size, 6, generator=generator)
    x = hidden @ torch.randn(6, 64, generator=generator) / 3 + 0.1 * torch.randn(size, 64, generator=generator)
    return x.view(-1, 1, 8, 8), (hidden @ torch.randn(6, 5, generator=generator)).argmax(1)


TASKS = [task(seed) for seed in range(3)]


def made(model="mlp", optimizer="sgd", **kwargs):
    """A network, its optimizer and its gate."""
    torch.manual_seed(0)
    model = MODELS[model]()
    optimizer = OPTIMIZERS[optimizer](model)
    return model, optimizer, PlasticityGate(model, optimizer, **kwargs)


def epoch(model, optimizer, xy, criterion=OneHotMSELoss()):  # noqa: B008
    for x, y in zip(*(t.split(BATCH) for t in xy)):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def learned(model="mlp", optimizer="sgd", **kwargs):
    """The same after the first task, which is remembered."""
    model, optimizer, gate = made(model, optimizer, **kwargs)
    for _ in range(3):
        epoch(model, optimizer, TASKS[0])
    gate.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    return model, optimizer, gate


def hooks(model, optimizer):
    found = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)]
    found += [h for p in model.parameters() for h in p._backward_hooks or ()]
    return found + [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


# -- Batches with stored samples ---------------------------------------------------------------------------------------

MASKS = {
    "first": torch.arange(BATCH) < 20,
    "last": torch.arange(BATCH) >= 44,
    "scattered": torch.arange(BATCH) % 3 == 0,
}


def mixed(mask):
    """Mini-batches of the second task with samples of the first in the places of the mask."""
    x, y = TASKS[1][0].clone(), TASKS[1][1].clone()
    stored = mask.repeat(SIZE // BATCH)
    x[stored], y[stored] = TASKS[0][0][stored], TASKS[0][1][stored]
    return x, y


# -- Loops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, optimizer", [("mlp", "adam"), ("cnn", "sgd")])
@pytest.mark.parametrize("criterion", [OneHotMSELoss(), nn.CrossEntropyLoss()], ids=["squared", "cross-entropy"])
@pytest.mark.parametrize("classes", ["the same classes", "new classes"])
def test_a_plain_loop_ends_where_avalanches_naive_does_bit_for_bit(name, optimizer, criterion, classes):
    model, step, gate = made(name, optimizer, openness=0.1)
    tasks = TASKS
    if classes == "new classes":
        tasks = [(x, (2 * i + y % 2).clamp_max(4)) for i, (x, y) in enumerate(TASKS)]
    for xy in tasks:
        for e in range(2):
            gate.begin(SIZE)
            if not e:
                gate.prepare(TensorDataset(*xy), criterion)
            epoch(model, step, xy, criterion)
        gate.consolidate(TensorDataset(*xy), criterion)
    torch.manual_seed(0)
    other = MODELS[name]()
    plugin = SelectivePlasticityPlugin(openness=0.1)
    strategy = Naive(
        model=other,
        optimizer=OPTIMIZERS[optimizer](other),
        criterion=criterion,
        train_mb_size=BATCH,
        train_epochs=2,
        plugins=[plugin],
        evaluator=None,
    )
    data = [TensorClassificationDataset.from_source(TensorSource(*xy)) for xy in tasks]
    for experience in benchmark_of(data, data).train_stream:
        strategy.train(experience, shuffle=False)
    assert torch.equal(weights(model), weights(other))
    assert all(torch.equal(memory.vectors, plugin.layers[n].vectors) for n, memory in gate.memory.layers.items())


def test_a_plain_loop_without_boundaries_ends_where_avalanches_naive_does_bit_for_bit():
    settings, criterion = Settings(stream_chunk=256, stream_look=2), OneHotMSELoss()
    model, step, gate = made(consolidate="continuous", settings=settings)
    for xy in TASKS:
        for x, y in zip(*(t.split(BATCH) for t in xy)):
            step.zero_grad()
            outputs = model(x)
            loss = criterion(outputs, y)
            loss.backward()
            gate.observe(x, outputs, y, loss, criterion)
            step.step()
    torch.manual_seed(0)
    other, plugin = MODELS["mlp"](), SelectivePlasticityPlugin(consolidate="continuous", settings=settings)
    strategy = Naive(
        model=other,
        optimizer=OPTIMIZERS["sgd"](other),
        criterion=criterion,
        train_mb_size=BATCH,
        plugins=[plugin],
        evaluator=None,
    )
    data = [TensorClassificationDataset.from_source(TensorSource(*xy)) for xy in TASKS]
    for experience in benchmark_of(data, data).train_stream:
        strategy.train(experience, shuffle=False)
    assert gate.memory.consolidations == len(plugin.consolidated_at) == 2
    assert torch.equal(weights(model), weights(other))


def test_the_first_task_is_learned_as_without_the_gate_and_the_second_is_not():
    model, optimizer, _ = made()
    torch.manual_seed(0)
    plain = MODELS["mlp"]()
    other = OPTIMIZERS["sgd"](plain)
    for m, o in ((model, optimizer), (plain, other)):
        epoch(m, o, TASKS[0])
    assert torch.equal(weights(model), weights(plain))
    model, optimizer, gate = learned()
    plain = copy.deepcopy(model)
    epoch(plain, OPTIMIZERS["sgd"](plain), TASKS[1])
    epoch(model, optimizer, TASKS[1])
    assert (weights(model) - weights(plain)).abs().max() > 1e-3


def test_a_prepared_experience_has_the_size_of_its_data():
    gates = []
    for told in (True, False):
        model, optimizer, gate = learned()
        part = [t[:20] for t in TASKS[1]]
        if told:
            gate.begin(20)
        gate.prepare([part], OneHotMSELoss())
        assert gate.ratio == SIZE / 20
        epoch(model, optimizer, part)
        gate.consolidate([part], OneHotMSELoss())
        gates.append(weights(model))
    assert torch.equal(*gates)


def test_a_few_samples_weigh_as_many_as_they_stand_for():
    memories = []
    for times, stand_for in ((10, None), (1, 10 * BATCH)):
        _, _, gate = made()
        gate.consolidate([[t[:BATCH] for t in TASKS[0]]] * times, OneHotMSELoss(), stand_for=stand_for)
        memories.append(gate.memory)
    repeated, few = memories
    assert few.samples == repeated.samples == 10 * BATCH
    for name, layer in few.layers.items():
        other = repeated.layers[name]
        moments = [(m.vectors * m.eigenvalues) @ m.vectors.T for m in (layer, other)]
        torch.testing.assert_close(*moments, atol=1e-4, rtol=1e-3)
        if layer.class_sums is not None:
            torch.testing.assert_close(layer.class_sums, other.class_sums)
            torch.testing.assert_close(layer.class_counts, other.class_counts)


@pytest.mark.parametrize("prepares", [True, False])
@pytest.mark.parametrize(
    "size, stand_for, counted",
    [(30, None, 3 * 96), (30, 50, 50), (150, None, 150), (570, None, 570), (582, None, 3 * 96)],
)
def test_new_classes_that_are_rarer_or_more_frequent_than_those_before_count_as_these(
    prepares, size, stand_for, counted
):
    """Two classes have 96 samples each, and then come three."""
    model, _, gate = made(optimizer="adam")
    (x, _), criterion = task(9, size), nn.CrossEntropyLoss()
    gate.consolidate([(TASKS[0][0], torch.arange(SIZE) % 2)], criterion)
    assert gate.memory.samples == SIZE
    in_training = size if 144 <= size <= 576 else 288
    new = [(x, 2 + torch.arange(size) % 3)]
    for _ in range(2):  # as for two epochs
        gate.begin(size)
        if prepares:
            gate.prepare(new, criterion)
            assert gate.ratio == pytest.approx(SIZE / in_training)
            gate.load_state_dict(gate.state_dict())
            assert gate.ratio == pytest.approx(SIZE / in_training)
    gate.consolidate(new, criterion, stand_for=stand_for)
    assert gate.memory.samples == SIZE + counted
    known = next(m for m in gate.memory.layers.values() if m.class_counts is not None)
    assert float(known.class_counts[2:].sum()) == pytest.approx(counted)
    mixed = [(TASKS[2][0][:20], torch.arange(20) % 5)]  # known classes count as they come
    gate.begin(20)
    assert gate.ratio == pytest.approx((SIZE + counted) / 20)
    gate.consolidate(mixed, criterion)
    assert gate.memory.samples == SIZE + counted + 20


@pytest.mark.parametrize("stored, lacks", [(180, ""), (180, "0, 1"), (10, "")])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), OneHotMSELoss()])
def test_a_warning_names_earlier_classes_without_a_stored_sample(criterion, stored, lacks):
    """Many stored samples open the gate for all old classes alike."""
    _, _, gate = made(optimizer="adam")
    gate.consolidate([(TASKS[0][0], torch.arange(SIZE) % 3)], criterion)
    new = [(TASKS[1][0], 3 + torch.arange(SIZE) % 2)]
    labels = torch.full((stored,), 2) if lacks or stored < 36 else torch.arange(stored) % 3
    gate.begin(SIZE, stored=[TensorDataset(TASKS[0][0][:stored], labels)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate.prepare(new, criterion)
        gate.consolidate(new, criterion)
    named = [str(w.message) for w in caught if "no stored sample is of class" in str(w.message)]
    assert [f"class {lacks}. " in message for message in named] == [True] * bool(lacks)


@pytest.mark.parametrize("comes_late", [True, False])
def test_a_network_that_was_trained_before_the_gate_came_stays_as_it_is(comes_late):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    optimizer, few = OPTIMIZERS["adam"](model), tuple(t[:40] for t in TASKS[0])
    gate = None if comes_late else PlasticityGate(model, optimizer)
    for _ in range(3):
        epoch(model, optimizer, TASKS[0], nn.CrossEntropyLoss())
    gate = gate or PlasticityGate(model, optimizer)
    before, mean = weights(model), model[2].running_mean.clone()
    gate.consolidate([few], nn.CrossEntropyLoss())
    assert torch.equal(weights(model), before) == torch.equal(model[2].running_mean, mean) == comes_late
    gate.consolidate([TASKS[1]], nn.CrossEntropyLoss())  # it is no longer the first
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "groups, adaptive",
    [
        ({"eps": 1e-8}, True),
        ({"eps": 0}, True),
        ({"eps": 1e-3}, False),
        ({}, True),
    ],
)
def test_an_optimizer_is_adaptive_by_its_groups(groups, adaptive):
    model = MODELS["mlp"]()
    gate = PlasticityGate(model, torch.optim.Adam([{"params": model.parameters(), **groups}]))
    assert gate._is_adaptive == adaptive


def second_task(train, name="mlp", optimizer="sgd", mask=None, **kwargs):
    """The weights after two epochs of the second task, each mini-batch of which is trained by ``train``."""
    model, step, gate = learned(name, optimizer, **kwargs)
    gate.begin(SIZE, stored=0 if mask is None else 30)
    x, y = (torch.cat([t, t]) for t in (TASKS[1] if mask is None else mixed(mask)))
    for number, batch in enumerate(zip(x.split(BATCH), y.split(BATCH))):
        train(number, model, step, gate, mask, *batch)
    return weights(model)


def whole(number, model, optimizer, gate, mask, x, y):
    gate.replayed(mask)
    optimizer.zero_grad()
    OneHotMSELoss()(model(x), y).backward()
    optimizer.step()


with_and_without_stored = pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none stored", *MASKS])


@pytest.mark.parametrize("name, optimizer", [("mlp", "adam"), ("cnn", "sgd")])
@with_and_without_stored
def test_four_backward_passes_of_16_end_where_one_of_64_does(name, optimizer, mask):
    def in_parts(number, model, optimizer, gate, mask, x, y):
        optimizer.zero_grad()
        for i in range(4):
            gate.replayed(mask[i::4] if mask is not None else None)
            (OneHotMSELoss()(model(x[i::4]), y[i::4]) / 4).backward()
        optimizer.step()

    ends = [second_task(train, name, optimizer, mask) for train in (whole, in_parts)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@with_and_without_stored
def test_a_grad_scaler_changes_rounding_alone_also_when_it_skips_a_step(optimizer, mask):
    """The fifth loss is infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)

    def loss_of(number, model, x, y):
        return OneHotMSELoss()(model(x), y) * (float("inf") if number == 4 else 1)

    def scaled(number, model, optimizer, gate, mask, x, y):
        gate.replayed(mask)
        optimizer.zero_grad()
        scaler.scale(loss_of(number, model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()

    def skipping(number, model, optimizer, gate, mask, x, y):
        gate.replayed(mask)
        optimizer.zero_grad()
        loss_of(number, model, x, y).backward()
        if number != 4:
            optimizer.step()

    ends = [second_task(train, "cnn", optimizer, mask) for train in (skipping, scaled)]
    assert scaler.get_scale() == 2.0**12  # it rose after three steps, and fell with the one that was skipped
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@with_and_without_stored
def test_a_fused_optimizer_that_unscales_by_itself_is_gated_alike(mask):
    ends = []
    for fused in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        model, _, gate = learned()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, fused=fused)
        gate.attach(model, optimizer)
        gate.begin(SIZE, stored=0 if mask is None else 30)
        x, y = TASKS[1] if mask is None else mixed(mask)
        for _ in range(4):
            for a, b in zip(x.split(BATCH), y.split(BATCH)):
                gate.replayed(mask)
                optimizer.zero_grad()
                scaler.scale(OneHotMSELoss()(model(a), b)).backward()
                scaler.step(optimizer)
                scaler.update()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def whole_gates(gate, stored=0):
    """Each layer's gate as a matrix, and the share that it lets through of stored samples."""
    found = {}
    for name, m in gate.memory.layers.items():
        opening = 1 + (stored / gate.memory.classes / 12) ** 2
        matrix = reference.gate_matrix(m.eigenvalues, m.vectors, m.mean_eigenvalue, opening * gate.openness / m.rows)
        v = m.vectors.double()
        beyond = len(v) - v.shape[1]
        found[name] = matrix, float((matrix.trace() - (v.T @ matrix @ v).trace()) / beyond) if beyond else 1.0
    return found


def reference_gradients(model, gate, x, y, mask):
    """By layer, the gated gradient of each mini-batch sample by itself: (out, d), with the bias last."""
    inputs, outputs, handles = {}, {}, []

    def note(name):
        def hook(layer, args, output):
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    other = copy.deepcopy(model)
    layers = gated_layers(other)
    handles = [layer.module.register_forward_hook(note(name)) for name, layer in layers.items()]
    deltas = torch.autograd.grad(OneHotMSELoss()(other(x), y), [outputs[name] for name in layers])
    for handle in handles:
        handle.remove()
    gates, gradients = whole_gates(gate, 0 if mask is None else 30), {}
    for (name, layer), delta in zip(layers.items(), deltas):
        rows, errors = layer.presynaptic(inputs[name]), layer.postsynaptic(delta)
        matrix, opened = gates[name]
        stored = None if mask is None else mask.repeat_interleave(len(rows) // len(x))
        gradients[name] = reference.gated_gradient(errors, rows, matrix, stored, opened)
    return gradients


@pytest.mark.parametrize("rank", [5, 80], ids=["some kept", "all kept"])
@pytest.mark.parametrize("name", MODELS)
@with_and_without_stored
def test_gradients_are_those_of_gating_each_stream_sample_by_itself(name, mask, rank):
    model, optimizer, gate = learned(name, rank=rank, pull_back=0, settings=Settings(gated_vectors=80))
    gate.begin(SIZE, stored=0 if mask is None else 30)
    x, y = (t[:BATCH] for t in (TASKS[1] if mask is None else mixed(mask)))
    expected = reference_gradients(model, gate, x, y, mask)
    gated = {}
    handle = optimizer.register_step_pre_hook(lambda *_: gated.update(copy.deepcopy(gradients_of(model))))
    whole(0, model, optimizer, gate, mask, x, y)
    handle.remove()
    for layer, gradient in expected.items():
        torch.testing.assert_close(gated[layer].double(), gradient, rtol=1e-4, atol=1e-5)
        assert gradient.abs().max() > 1e-3


@with_and_without_stored
def test_the_gradient_of_a_layer_that_is_used_twice_is_gated_for_both_uses(mask):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Linear(64, 64), nn.Linear(64, 5)

        def forward(self, x):
            return self.last(self.shared(self.shared(x.flatten(1)).relu()).relu())

    torch.manual_seed(0)
    model = Twice()
    optimizer = OPTIMIZERS["sgd"](model)
    gate = PlasticityGate(model, optimizer, rank=70, pull_back=0, settings=Settings(gated_vectors=70))
    epoch(model, optimizer, TASKS[0])
    gate.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    gate.begin(SIZE, stored=0 if mask is None else 30)
    x, y = (t[:BATCH] for t in (TASKS[1] if mask is None else mixed(mask)))
    weight, bias = model.shared.weight.detach(), model.shared.bias.detach()
    first = (x.flatten(1) @ weight.T + bias).requires_grad_()
    second = first.relu() @ weight.T + bias
    deltas = torch.autograd.grad(OneHotMSELoss()(model.last(second.relu()), y), [first, second])
    matrix, opened = whole_gates(gate, 0 if mask is None else 30)["shared"]
    expected = sum(
        reference.gated_gradient(delta, nn.functional.pad(rows.detach(), (0, 1), value=1), matrix, mask, opened)
        for delta, rows in zip(deltas, (x.flatten(1), first.relu()))
    )
    gated = {}
    optimizer.register_step_pre_hook(lambda *_: gated.update(copy.deepcopy(gradients_of(model))))
    whole(0, model, optimizer, gate, mask, x, y)
    torch.testing.assert_close(gated["shared"].double(), expected, rtol=1e-4, atol=1e-5)


def test_where_stored_samples_and_the_stream_are_in_balance_nothing_moves():
    """Each asks for the opposite of the other; if the stream alone were gated, the stored samples would win."""
    torch.manual_seed(0)
    model = nn.Linear(64, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate = PlasticityGate(model, optimizer, rank=20, pull_back=0, settings=Settings(look=1000))
    x, asked = TASKS[0][0][:20].flatten(1), torch.randn(20, 5)
    gate.consolidate([(x, TASKS[0][1][:20])], nn.CrossEntropyLoss())
    gate.begin(20, stored=10)
    moved = []
    for _ in range(3):
        before = weights(model)
        gate.replayed(torch.arange(40) >= 20)
        outputs = model(torch.cat([x, x]))
        targets = outputs.detach() + torch.cat([asked, -asked])
        optimizer.zero_grad()
        nn.functional.mse_loss(outputs, targets).backward()
        optimizer.step()
        moved.append(float((weights(model) - before).norm()))
    assert moved[0] > 1e-3 and moved[1] < 1e-6 and moved[2] < 1e-6


def gradients_of(model):
    layers = gated_layers(model)
    return {
        name: torch.cat([layer.weight.grad.flatten(1), layer.bias.grad.unsqueeze(1)], 1)
        for name, layer in layers.items()
    }


def test_layers_that_share_a_weight_are_gated_each_along_its_own_inputs():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b, self.last = (nn.Linear(n, m) for n, m in zip((64, 16, 16, 16), (16, 16, 16, 5)))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.last(self.b(self.a(self.first(x.flatten(1)).relu()).relu()).relu())

    torch.manual_seed(0)
    model = Shared()
    optimizer = OPTIMIZERS["sgd"](model)
    gate = PlasticityGate(model, optimizer, openness=0.05)
    epoch(model, optimizer, TASKS[0])
    gate.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    gate.begin(SIZE, stored=20)
    seen = {}

    def note(name, _, args, output):
        output.retain_grad()
        seen[name] = args[0].detach(), output

    for name in "ab":
        getattr(model, name).register_forward_hook(partial(note, name))
    x, y = (t[:BATCH] for t in TASKS[1])
    gate.replayed(torch.zeros(BATCH, dtype=torch.bool))
    optimizer.zero_grad()
    OneHotMSELoss()(model(x), y).backward()
    expected = 0
    for name, (inputs, output) in seen.items():
        memory = gate.memory.layers[name]
        closed, rest = memory.closed(0.05 * gate._stored.opening)
        one = torch.cat([inputs, torch.ones(BATCH, 1)], 1)
        whole = output.grad.T @ one
        expected += (whole * (1 - rest) - (whole @ memory.vectors * (closed - rest)) @ memory.vectors.T)[:, :16]
    torch.testing.assert_close(model.a.weight.grad, expected, atol=1e-5, rtol=1e-4)


@with_and_without_stored
def test_gradient_clipping_scales_the_gated_step(mask):
    """By the norm of the gradients as the loop sees them; a bound above it changes nothing."""
    steps = []
    for bound in (float("inf"), 0.01):
        model, optimizer, gate = learned(pull_back=0, settings=Settings(look=1000))
        gate.begin(SIZE, stored=0 if mask is None else 30)
        x, y = (t[:BATCH] for t in (TASKS[1] if mask is None else mixed(mask)))
        before = weights(model)
        gate.replayed(mask)
        OneHotMSELoss()(model(x), y).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        steps.append(weights(model) - before)
    torch.testing.assert_close(steps[1] * norm / 0.01, steps[0], rtol=1e-2, atol=1e-5)
    assert norm > 0.1


@pytest.mark.parametrize("keyword", [False, True])
@with_and_without_stored
def test_a_closure_is_gated_after_it_has_run(mask, keyword):
    def by_closure(number, model, optimizer, gate, mask, x, y):
        def closure():
            optimizer.zero_grad()
            loss = OneHotMSELoss()(model(x), y)
            loss.backward()
            return loss

        gate.replayed(mask)
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss > 0

    ends = [second_task(train, mask=mask) for train in (whole, by_closure)]
    assert torch.equal(*ends)


BLOCKED = """
import sys
for name in ("avalanche", "torchvision", "sklearn", "river"):
    sys.modules[name] = None

import torch
from avalanche_sp.gate import PlasticityGate

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()
gate = PlasticityGate(model, optimizer)
for task in range(2):
    batches = [(torch.randn(16, 4) + task, torch.randint(2, (16,))) for _ in range(4)]
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    gate.consolidate(batches, criterion)
assert gate.memory.samples == 128 and set(gate.memory.layers) == {"0", "2"}
from avalanche_sp import SelectivePlasticityOptimizer, Settings
assert not [name for name, module in sys.modules.items() if name.startswith("avalanche.") and module]
"""


def test_the_engine_works_without_avalanche():
    done = subprocess.run([sys.executable, "-W", "error", "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- Saved, copied, closed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 8])
@pytest.mark.parametrize("name, optimizer", [("mlp", "sgd"), ("cnn", "adam")])
@with_and_without_stored
def test_a_saved_state_goes_on_bit_for_bit_in_the_midst_of_an_experience(name, optimizer, mask, stop):
    x, y = (torch.cat([t] * 6).split(BATCH) for t in (TASKS[1] if mask is None else mixed(mask)))

    def train(run, batches):
        for a, b in batches:
            whole(0, *run, mask, a, b)
        return weights(run[0])

    run = learned(name, optimizer, openness=0.3)
    run[2].begin(SIZE, stored=0 if mask is None else 30)
    train(run, zip(x[:stop], y[:stop]))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    expected = train(run, zip(x[stop:], y[stop:]))
    run[2].consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
    file.seek(0)
    other = made(name, optimizer, openness=0.3)
    for part, state in zip(other, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert torch.equal(train(other, zip(x[stop:], y[stop:])), expected)
    other[2].consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
    assert torch.equal(weights(other[0]), weights(run[0]))
    assert all(torch.equal(m.vectors, run[2].memory.layers[n].vectors) for n, m in other[2].memory.layers.items())


@pytest.mark.parametrize("known, criterion", [(3, OneHotMSELoss()), (5, nn.CrossEntropyLoss())])
def test_a_state_of_a_prepared_experience_goes_on_bit_for_bit(known, criterion):
    """With new classes, and with none."""
    run = made()
    old = TASKS[0][1] < known
    run[2].consolidate(TensorDataset(TASKS[0][0][old], TASKS[0][1][old]), criterion)
    xy, file, other = TASKS[1], io.BytesIO(), made()
    run[2].prepare(TensorDataset(*xy), criterion)
    epoch(*run[:2], xy, criterion)
    assert run[2].state_dict()["prepared"]["solved"] == (known < 5)
    torch.save([part.state_dict() for part in run], file)
    file.seek(0)
    for part, state in zip(other, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    for some in (run, other):
        epoch(*some[:2], xy, criterion)
        some[2].consolidate(TensorDataset(*xy), criterion)
    assert torch.equal(weights(run[0]), weights(other[0]))


@pytest.mark.parametrize("kwargs, hardly", [({"openness": 1e-4}, True), ({"openness": 100.0, "pull_back": 0.0}, False)])
def test_an_experience_that_is_hardly_learned_is_named(kwargs, hardly):
    x, y = TASKS[0]
    contrary = TensorDataset(x, (y + 1) % 5)  # the same inputs with other classes
    model, optimizer, gate = made(optimizer="adam", **kwargs)
    for _ in range(100):
        epoch(model, optimizer, TASKS[0])
    gate.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    gate.prepare(contrary, OneHotMSELoss())
    for _ in range(30):
        epoch(model, optimizer, contrary.tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate.consolidate(contrary, OneHotMSELoss())
        gate.consolidate(contrary, OneHotMSELoss())  # not prepared: its loss before is not known
    said = [str(w.message) for w in caught if "hardly learned" in str(w.message)]
    assert len(said) == hardly
    if hardly:
        assert "experience 2 was" in said[0] and "openness (now 0.0001)" in said[0] and "at layer" in said[0]


@pytest.mark.parametrize("dead, said", [(10, ["59% of the inputs of layer 3 are zero"]), (6, [])])
def test_a_layer_with_few_live_inputs_is_named_after_the_first_experience(dead, said):
    model, _, gate = made()
    with torch.no_grad():
        model[1].bias[:dead] = -1e3
    x, y = TASKS[0]
    dark = TensorDataset(x * (torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.3).view(8, 8), y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate.consolidate(dark, OneHotMSELoss())  # dark pixels are no dead units
        gate.consolidate(dark, OneHotMSELoss())
    found = [str(w.message) for w in caught if "dead units" in str(w.message)]
    assert len(found) == len(said) and all(part in text for part, text in zip(said, found))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_penalty_alone_is_stable_at_any_learning_rate(momentum):
    """By the rate and the many old samples alone, each penalty would throw the weights beyond their place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=momentum)
    gate = PlasticityGate(model, optimizer, readout_step=False)
    x, y = 10 * torch.randn(400, 20), torch.randint(0, 10, (400,))
    gate.consolidate(TensorDataset(x, y), OneHotMSELoss())
    optimizer.param_groups[0]["lr"] = 1.0
    gate.begin(samples=40)
    place = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 0.01
    drifts = []
    for _ in range(100):
        optimizer.zero_grad()
        (0 * model(x)).sum().backward()
        optimizer.step()
        drifts.append(float((model[0].weight.detach() - place).norm()))
    assert drifts[-1] < 0.9 * drifts[0] and max(drifts) < 3 * drifts[0]


def test_a_network_that_calls_no_layer_that_can_be_gated_is_named_and_trains_on():
    model = MODELS["mlp"]()
    model.forward = lambda x: x.flatten(1) @ model[1].weight[:5].T
    gate = PlasticityGate(model, OPTIMIZERS["sgd"](model))
    with pytest.warns(UserWarning, match=r"gates 0% .* Not gated: 1 \(Linear\), .* They train on and may forget"):
        gate.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    assert gate.memory.consolidations == 1 and not gate.memory.layers
    before = weights(model)
    epoch(model, gate._optimizer, TASKS[1])
    assert not torch.equal(weights(model), before)


def test_the_surprise_goes_on_from_a_state():
    one, other = made()[2], made()[2]

    def observe(gate, losses):
        for loss in losses:
            gate.observe(None, None, TASKS[0][1], torch.tensor(loss), OneHotMSELoss())

    observe(one, [1.0, 0.8, 1.1])
    other.load_state_dict(one.state_dict())
    for gate in (one, other):
        observe(gate, [0.9, 1.02])
    assert 0 < one.surprise < 1 and torch.equal(one.surprise, other.surprise)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_surprise(bad):
    gate, seen = made()[2], []
    for loss in (1.0, 0.8, bad, 1.1, 0.9, 1.02):
        gate.observe(None, None, TASKS[0][1], torch.tensor(loss), OneHotMSELoss())
        seen.append(float(gate.surprise))
    assert seen[2] == 0 and 0 < seen[5] < 1


def test_an_experience_may_end_with_the_steps_before_its_state():
    model, optimizer, gate = learned()
    epoch(model, optimizer, TASKS[1])
    other = copy.deepcopy(model)
    resumed = PlasticityGate(other, OPTIMIZERS["sgd"](other))
    resumed.load_state_dict(gate.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())


def test_a_state_is_of_the_models_layers():
    _, _, gate = learned()
    other = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 5)))
    with pytest.raises(ValueError, match=r"Invalid state: of the layers 1, .* \(allowed: of the model's, 1.0\)"):
        PlasticityGate(other, OPTIMIZERS["sgd"](other)).load_state_dict(gate.state_dict())


def test_a_state_goes_into_a_head_that_has_grown():
    model, _, gate = learned()
    state, head = gate.state_dict(), list(model.modules())[-1]
    grown = copy.deepcopy(model)
    grown[-1] = nn.Linear(head.in_features, head.out_features + 3)
    optimizer = OPTIMIZERS["sgd"](grown)
    other = PlasticityGate(grown, optimizer)
    other.load_state_dict(state)
    epoch(grown, optimizer, TASKS[1])
    other.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
    assert len(other.memory.layers[str(len(grown) - 1)].anchor) == head.out_features + 3


def test_a_state_without_a_model_waits_for_one():
    model, optimizer, gate = learned()
    waiting = PlasticityGate()
    waiting.load_state_dict(gate.state_dict())
    other = copy.deepcopy(model)
    step = OPTIMIZERS["sgd"](other)
    waiting.attach(other, step)
    for m, o in ((model, optimizer), (other, step)):
        epoch(m, o, TASKS[1])
    assert torch.equal(weights(model), weights(other))
    assert gate.to("cpu") is gate and gate.state_bytes == waiting.state_bytes > 0


def test_the_state_of_a_gate_that_waits_for_a_model_is_the_one_that_it_was_given():
    state = learned()[2].state_dict()
    waiting = PlasticityGate()
    waiting.load_state_dict(state)
    assert waiting.state_dict() == state


def test_a_model_that_does_not_fit_a_state_leaves_the_gate_as_it_was():
    model, optimizer, gate = learned()
    state, (_, _, other) = gate.state_dict(), made("cnn")
    other.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
    before = other.memory
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer_of_wide = OPTIMIZERS["sgd"](wide)
    of_wide, waiting = PlasticityGate(wide, optimizer_of_wide), PlasticityGate()
    waiting.load_state_dict(state)
    for refuse in (
        lambda: of_wide.load_state_dict(state),
        lambda: waiting.attach(wide, OPTIMIZERS["sgd"](wide)),
        lambda: other.load_state_dict(state),
    ):
        with pytest.raises(ValueError, match="Invalid (model|state)"):
            refuse()
    assert other.memory is before and not of_wide.memory.layers
    epoch(wide, optimizer_of_wide, TASKS[0])
    of_wide.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    gate.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        waiting.attach(model, optimizer)
    assert waiting.memory.layers.keys() == state["memory"]["layers"].keys()


def test_a_model_that_does_not_fit_the_arguments_leaves_the_gate_with_the_first():
    model, optimizer, gate = learned(openness={"1": 0.2})
    memory, other = gate.memory, MODELS["cnn"]()
    with pytest.raises(ValueError, match="Invalid openness"):
        gate.attach(other, OPTIMIZERS["sgd"](other))
    assert gate.memory is memory
    epoch(model, optimizer, TASKS[1])
    gate.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
    assert gate.memory.consolidations == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gate_that_forgets_is_open(name):
    ends = []
    for forgets in (False, True):
        model, optimizer, gate = learned(optimizer=name)
        gate.forget() if forgets else gate.close()
        epoch(model, optimizer, TASKS[1])
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


def test_close_takes_back_what_waits_and_leaves_the_model_alone_from_then_on():
    model, optimizer, gate = learned(openness=0.01)
    for x, y in zip(*(t.split(BATCH) for t in TASKS[1])):
        optimizer.zero_grad()
        OneHotMSELoss()(model(x), y).backward()
        optimizer.step()
    gate.close()
    epoch(model, optimizer, TASKS[1])
    ended = weights(model)
    other = MODELS["mlp"]()
    gate.attach(other, OPTIMIZERS["sgd"](other))
    gate.close()
    gate.attach(model, optimizer)
    assert all(map(torch.equal, weights(model), ended))


def test_of_a_number_of_stored_samples_the_last_layers_step_trusts_none():
    ends = []
    for stored in (0, 3000):
        model, _, gate = learned()
        gate.begin(SIZE, stored=stored)
        gate.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


def test_a_gate_that_moves_keeps_the_stored_samples():
    ends = []
    for moves in (False, True):
        model, _, gate = learned()
        gate.begin(SIZE, stored=[TensorDataset(*TASKS[0])])
        if moves:
            gate.to("cpu")
        gate.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


@with_and_without_stored
def test_close_leaves_no_hook_and_keeps_the_memory(mask):
    model, optimizer, gate = learned()
    gate.begin(SIZE, stored=0 if mask is None else 30)
    whole(0, model, optimizer, gate, mask, *(t[:BATCH] for t in TASKS[1]))
    assert hooks(model, optimizer)
    gate.close()
    assert not hooks(model, optimizer) and not gate.is_attached and set(gate.memory.layers) == {"1", "3"}
    other = copy.deepcopy(model)
    epoch(model, optimizer, TASKS[1])
    epoch(other, OPTIMIZERS["sgd"](other), TASKS[1])
    assert torch.equal(weights(model), weights(other))
    with pytest.raises(ValueError, match="Invalid call: the gate has no model"):
        gate.consolidate(TensorDataset(*TASKS[1]), OneHotMSELoss())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@with_and_without_stored
def test_the_hooks_of_a_copied_model_do_nothing(copied, mask):
    model, optimizer, gate = learned("cnn")
    gate.begin(SIZE, stored=0 if mask is None else 30)
    other = copied(model)
    clean = MODELS["cnn"]()
    clean.load_state_dict(model.state_dict())
    before, gradients = copy.deepcopy(gate.state_dict()), [p.grad.clone() for p in model.parameters()]
    for m in (other, clean):
        gate.replayed(mask)
        OneHotMSELoss()(m(TASKS[1][0][:7]), TASKS[1][1][:7]).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(other.parameters(), clean.parameters()))
    torch.testing.assert_close(gate.state_dict()["statistics"], before["statistics"], rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))


def test_a_pickled_gate_goes_on_with_its_model():
    run = learned()
    other = pickle.loads(pickle.dumps(run))
    other[2].attach(*other[:2])
    for model, optimizer, _ in (run, other):
        epoch(model, optimizer, TASKS[1])
    assert torch.equal(weights(run[0]), weights(other[0]))


# -- Normalisation layers ----------------------------------------------------------------------------------------------


def with_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 8), nn.LayerNorm(8), nn.Linear(8, 5)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=0.1)
    return model, optimizer, PlasticityGate(model, optimizer)


def norm_state(model):
    return torch.cat([t.flatten().float() for i in (1, 4) for t in model[i].state_dict().values()]).clone()


@pytest.mark.parametrize("stored", [0, 30])
def test_normalisation_layers_are_frozen_after_the_first_experience_unless_there_are_stored_samples(stored):
    model, optimizer, gate = with_norms()
    states = [norm_state(model)]
    for xy in TASKS[:2]:
        gate.begin(SIZE, stored=stored)
        epoch(model, optimizer, xy)
        assert all(m.training for m in model.modules())
        gate.consolidate(TensorDataset(*xy), OneHotMSELoss())
        states.append(norm_state(model))
        assert all(m.training for m in model.modules())
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2]) == (stored == 0)


def test_modes_are_restored_after_an_error_in_a_normalisation_layer():
    model, optimizer, gate = with_norms()
    epoch(model, optimizer, TASKS[0])
    gate.consolidate(TensorDataset(*TASKS[0]), OneHotMSELoss())
    with pytest.raises(ValueError):
        model[1](torch.zeros(3))  # BatchNorm2d refuses it
    assert all(m.training for m in model.modules())
    before = norm_state(model)
    epoch(model, optimizer, TASKS[1])
    assert torch.equal(norm_state(model), before)
    model[1].eval()  # by the loop itself
    model(TASKS[1][0])
    assert not model[1].training


# -- Consolidation -----------------------------------------------------------------------------------------------------


def test_an_iterable_of_more_samples_than_wanted_is_read_once_and_evenly():
    model, optimizer, gate = made(consolidation_samples=100, rank=20)
    x, y = task(5, 1280)
    seen = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    gate.consolidate(iter(DataLoader(TensorDataset(x, y), 16)), OneHotMSELoss())
    assert gate.memory.samples == 1280 and gate.memory.classes == len(y.unique())
    used = torch.cat(seen[:-2])  # the last ones show which layers data feed, and the outputs' sensitivity
    assert 50 < len(used) <= 100
    places = [int((x == image).flatten(1).all(1).nonzero()) for image in used]
    assert places == sorted(places) and max(b - a for a, b in zip(places, places[1:])) < 300 and places[-1] > 900
    values, vectors, mean = reference.merged_eigenpairs([torch.cat([used.flatten(1), torch.ones(len(used), 1)], 1)], 20)
    memory = gate.memory.layers["1"]
    torch.testing.assert_close(memory.eigenvalues, values.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(memory.mean_eigenvalue, mean.float())


def test_at_most_half_of_a_long_experience_is_run_through_the_network():
    model, optimizer, gate = made()
    assert [min(n, gate.observed(n, 2)) for n in (300, 1000, 1800, 3000, 9000)] == [300, 1000, 1000, 1500, 2000]
    assert [gate.observed(1600, classes) for classes in (1, 2, 3, 4, 5)] == [800, 1000, 1500, 2000, 2000]
    seen = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    x, y = task(5, 2400)
    gate.consolidate(TensorDataset(x, y % 2), OneHotMSELoss())
    assert 1200 <= sum(seen) < 1200 + 256 and gate.memory.samples == 2400  # and some for measurements
    small = made(consolidation_samples=100)[2]
    assert small.observed(9000, 2) == 100


def test_samples_are_spread_evenly_also_if_labels_come_in_turn():
    for total, limit in ((2000, 1000), (4000, 2000), (10000, 2000), (12665, 2000), (1001, 1000)):
        places = torch.tensor(evenly_spread(total, limit))
        assert len(places.unique()) == limit and (places.diff() > 0).all() and 0 <= places[0] and places[-1] < total
        assert (places - torch.arange(limit) * total / limit).abs().max() <= total / limit
        for period in (2, 3, 5, 10):
            counts = torch.bincount(places % period)
            assert counts.min() > 0.9 * limit / period


@pytest.mark.parametrize(
    "total, classes, expected",
    [(640, 2, 640), (1024, 2, 1000), (2000, 2, 1000), (3000, 2, 1500), (8000, 2, 2000), (1600, 4, 1600)],
)
def test_of_a_loader_as_many_samples_are_run_as_of_a_dataset(total, classes, expected):
    """Labels are sorted, so that the number of classes is known late."""
    gate, every = made()[2], torch.arange(total)
    batches = [(places.unsqueeze(1), places * classes // total) for places in every.split(64)]
    samples = Samples.of(iter(batches), gate.observed)
    places = torch.cat([x.flatten() for x, _ in samples.batches])
    assert expected - 128 < len(places) == samples.number < expected + 64 and samples.total == total
    assert places[0] == 0 and places[-1] >= total - 256 and places.diff().max() <= 256 * (total // expected)
    assert samples.classes == classes
    of_dataset = Samples.of(TensorDataset(every, every * classes // total), gate.observed)
    assert of_dataset.number == expected and of_dataset.classes == classes


def test_a_short_dataset_is_read_once():
    read = []

    class Noted(TensorDataset):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    assert Samples.of(Noted(torch.zeros(400, 1), torch.arange(400) % 2), made()[2].observed).number == 400
    assert read == list(range(400))


@pytest.mark.parametrize("shape", [(256, 1, 28, 28), (1, 1, 28, 28), (256, 7, 12), (4096, 12)])
def test_input_vectors_of_samples_are_spread_over_samples_and_places(shape):
    """Of images, of one that all samples share, of sequences, and of flattened sequences."""
    x = torch.arange(torch.Size(shape).numel()).view(shape).float()
    module = nn.Conv2d(1, 2, 3) if len(shape) == 4 else nn.Linear(12, 2)
    layer = gated_layers(nn.Sequential(module))["0"]
    every = layer.presynaptic(x)
    place = {first: i for i, first in enumerate(every[:, 0].tolist())}
    for most in (300, 512, 10**6):
        rows, _ = some_inputs(layer, x, most)
        assert 0.5 * min(most, len(every)) <= len(rows) <= most
        samples = torch.tensor([place[first] for first in rows[:, 0].tolist()])
        assert len(samples.unique()) == len(rows)
        each = len(every) // len(x)
        assert len((samples // each).unique()) == min(len(x), most)
        if 2 * each <= most < len(every):  # also in the first half of the batch
            assert len((samples % each)[: len(rows) // 2].unique()) > 0.6 * each


def test_a_dataset_and_a_loader_of_it_are_remembered_alike():
    model, optimizer, gate = made()
    data = TensorDataset(*TASKS[0])
    gate.consolidate(data, OneHotMSELoss())
    first = gate.memory.layers["3"]
    model, optimizer, gate = made()
    gate.consolidate(DataLoader(data, 50), OneHotMSELoss())
    assert torch.equal(first.vectors, gate.memory.layers["3"].vectors)


def test_merged_memories_are_those_of_the_full_second_moment():
    model, optimizer, gate = made(rank=65)
    for xy in TASKS:
        gate.consolidate(TensorDataset(*xy), OneHotMSELoss())
    x = torch.cat([torch.cat([x.flatten(1), torch.ones(SIZE, 1)], 1) for x, _ in TASKS])
    values, vectors, mean = reference.merged_eigenpairs([x], 65)
    memory = gate.memory.layers["1"]
    kept = memory.vectors @ memory.eigenvalues.diag() @ memory.vectors.T
    torch.testing.assert_close(kept.double(), vectors @ values.diag() @ vectors.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(memory.mean_eigenvalue, mean.float())


# -- Bad input ---------------------------------------------------------------------------------------------------------


def bad(call, error, words):
    return pytest.param(call, error, words, id=words)


@pytest.mark.parametrize(
    "call, error, words",
    [
        bad(lambda g: PlasticityGate(g[0]), ValueError, "Invalid model and optimizer: one of them is None"),
        bad(lambda g: PlasticityGate(None, g[1]), ValueError, "one of them is None (allowed: both, or none)"),
        bad(lambda g: PlasticityGate(g[0], g[0]), TypeError, "Invalid optimizer: Sequential (allowed: a torch.optim"),
        bad(
            lambda g: PlasticityGate(nn.ReLU(), g[1]),
            ValueError,
            "Invalid model: ReLU has no trainable layer that can be gated",
        ),
        bad(lambda g: g[2].begin(samples=0), ValueError, "Invalid samples value: 0 (allowed: an integer, 1 "),
        bad(lambda g: g[2].begin(stored=-1), ValueError, "Invalid stored value: -1 (allowed: an integer, 0 "),
        bad(lambda g: g[2].begin(stored=TensorDataset(*TASKS[0])), ValueError, "0 or more, or a list of datasets)"),
        bad(lambda g: g[2].load_state_dict({}), ValueError, "Invalid state: no memory, epoch, drift, trained (allowed"),
        bad(lambda g: g[2].inherit("9", "1"), ValueError, "Invalid name value: '9' (allowed: 1, 3)"),
        bad(lambda g: g[2].replayed(torch.ones(4)), ValueError, "Invalid stored value: shape (4,), torch.float32"),
        bad(lambda g: g[2].replayed(torch.ones(2, 2).bool()), ValueError, "Invalid stored value: shape (2, 2)"),
        *(
            bad(
                lambda g, n=n: g[2].consolidate([TASKS[0]], OneHotMSELoss(), stand_for=n),
                ValueError,
                f"Invalid stand_for value: {n!r} (allowed: an integer, 1 or more)",
            )
            for n in (0, 1.5, True)
        ),
        bad(lambda g: g[2].consolidate([], OneHotMSELoss()), ValueError, "Invalid data: no sample (allowed: one or"),
        bad(
            lambda g: g[2].consolidate(TensorDataset(torch.zeros(0, 64), torch.zeros(0)), OneHotMSELoss()),
            ValueError,
            "Invalid data: no sample",
        ),
        bad(
            lambda g: PlasticityGate(consolidate="continuous").consolidate(TASKS, OneHotMSELoss()),
            ValueError,
            "Invalid call: with consolidate='continuous' the gate finds the boundaries",
        ),
        bad(lambda g: PlasticityGate().begin(), ValueError, "Invalid call: the gate has no model"),
    ],
)
def test_bad_input_raises_one_clear_error_and_changes_nothing(call, error, words):
    run = learned()
    before = run[2].memory
    with pytest.raises(error) as raised:
        call(run)
    assert words in str(raised.value)
    assert run[2].memory is before


def test_a_mask_of_another_mini_batch_raises_in_its_backward_pass():
    model, optimizer, gate = learned()
    gate.begin(SIZE, stored=30)
    with pytest.raises(ValueError, match="Invalid stored value: 64 truth values for a mini-batch of 50"):
        whole(0, model, optimizer, gate, MASKS["last"], *(t[:50] for t in TASKS[1]))


def test_a_mask_needs_the_number_of_stored_samples():
    """Else the gate would not be told that they replace it."""
    model, optimizer, gate = learned()
    with pytest.raises(
        ValueError, match=r"Invalid call: no stored sample is known \(allowed after begin\(stored=...\)\)"
    ):
        gate.replayed(MASKS["last"])
    gate.replayed(torch.zeros(BATCH, dtype=torch.bool))
