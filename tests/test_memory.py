"""A budget in bytes for a gate's memory: kept at every consolidation, by any network."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_sp import OneHotMSELoss, PlasticityGate, SelectivePlasticityPlugin, Settings
from avalanche_sp.gate.consolidate import least_bytes
from avalanche_sp.gate.layers import gated_layers
from avalanche_sp.gate.memory import Memory

from conftest import accuracy, mlp, strategy_of

CROSS_ENTROPY = nn.CrossEntropyLoss()


def images(split5, task, n=128):
    x, y, _ = split5.train_stream[task].dataset.read_batch(list(range(n)))
    return x, y


def shades(split5, task):
    """A row of each image as words, of twenty shades a task."""
    x, y = images(split5, task)
    return ((x[:, 0, 14, 4:25:3] + 0.43) * 4.9).long().clamp(0, 19) + 10 * task, y


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def sentences():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(60, 8), nn.Flatten(), nn.Linear(7 * 8, 24), nn.Tanh(), nn.Linear(24, 10))


NETWORKS = {
    "mlp": (mlp, images, OneHotMSELoss()),
    "cnn": (small_cnn, images, CROSS_ENTROPY),
    "embedding": (sentences, shades, CROSS_ENTROPY),
}


def gated(model, **kwargs):
    return PlasticityGate(model, torch.optim.SGD(model.parameters(), lr=0.01), **kwargs)


def train(gate, xy, criterion=CROSS_ENTROPY):
    """An experience of four steps."""
    gate.prepare(TensorDataset(*xy), criterion)
    for x, y in zip(*(t.split(32) for t in xy)):
        gate._optimizer.zero_grad()
        criterion(gate._model(x), y).backward()
        gate._optimizer.step()
    gate.consolidate(TensorDataset(*xy), criterion)


@pytest.mark.parametrize("share", [0.7, 0.3, 0.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_budget_is_never_exceeded(split5, network, share):
    """From all that the memory would take, 1, to the least, 0."""
    make, data, criterion = NETWORKS[network]
    with pytest.raises(ValueError) as error:
        gated(make(), memory_budget=1)
    words = r"Invalid memory_budget value: 1 \(allowed for this network: (\d+) bytes or more\)"
    least = int(re.fullmatch(words, str(error.value)).group(1))
    whole = gated(make())
    for task in range(5):
        train(whole, data(split5, task), criterion)
    budget = least + int(share * (whole.state_bytes - least))
    gate = gated(make(), memory_budget=budget)
    for task in range(5):
        train(gate, data(split5, task), criterion)
        assert gate.state_bytes == gate.memory.state_bytes <= budget
        assert all(len(memory.eigenvalues) for memory in gate.memory.layers.values())
    ranks = [{name: len(m.eigenvalues) for name, m in g.memory.layers.items()} for g in (gate, whole)]
    vector = max(memory.bytes_along(1) for memory in gate.memory.layers.values())
    assert budget - gate.state_bytes < max(0.25 * budget, vector) or ranks[0] == ranks[1]
    assert all(p.isfinite().all() for p in gate._model.parameters())
    other = gated(make(), memory_budget=budget)
    other.load_state_dict(gate.state_dict())
    assert other.state_bytes == gate.state_bytes
    for name, memory in gate.memory.layers.items():
        assert torch.equal(other.memory.layers[name].vectors, memory.vectors)
        assert (gate.state_dict()["memory"]["layers"][name]["vectors"] is None) == (not memory.of_rows)  # packed
    with pytest.raises(ValueError, match=f"Invalid memory_budget value: {least - 1} "):
        gated(make(), memory_budget=least - 1)


def test_a_pickled_memory_holds_packed_matrices_once(split5):
    make, data, criterion = NETWORKS["mlp"]
    sizes = {}
    for budget in (None, 100_000):
        gate = gated(make(), memory_budget=budget)
        train(gate, data(split5, 0), criterion)
        pickled = pickle.dumps(gate.memory)
        sizes[budget] = len(pickled) / gate.state_bytes
        for name, memory in pickle.loads(pickled).layers.items():
            assert torch.equal(memory.vectors, gate.memory.layers[name].vectors)
            assert torch.equal(copy.deepcopy(gate.memory).layers[name].anchor, gate.memory.layers[name].anchor)
    assert sizes[100_000] < 1.2 * sizes[None]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_least_is_what_one_eigenvector_a_layer_takes(split5, network):
    """Rounded, and with the readout's residual, which a solved readout does not have."""
    make, data, criterion = NETWORKS[network]
    gate = gated(make())
    train(gate, data(split5, 0), criterion)
    layers, least = gated_layers(gate._model), least_bytes(gate.memory, gated_layers(gate._model))
    assert least == least_bytes(Memory(), layers)
    taken = sum(memory.leading(1).rounded().state_bytes for memory in gate.memory.layers.values())
    *_, readout = gate.memory.layers.values()
    assert taken == least - (readout.class_sums.nbytes if readout.residual is None else 0)


def test_a_head_for_each_task_is_counted_before_it_is_trained(split5):
    """Its number of inputs is that of the first head; a layer with another number is no head."""
    gate = gated(mlp())
    train(gate, images(split5, 0))
    gate._model.adapter = nn.Linear(784, 8)
    layers = gated_layers(gate._model)
    least = least_bytes(gate.memory, layers)
    adapter = least - least_bytes(gate.memory, {n: m for n, m in layers.items() if n != "adapter"})
    assert adapter == 8 + (2 * 785 + 4) + (8 + 4)  # two eigenvalues; a vector in half precision; weights at eight bits
    gate._model.head = nn.Linear(32, 10)
    more = least_bytes(gate.memory, gated_layers(gate._model)) - least
    head, known = 8 + (2 * 33 + 4) + (10 + 4), 4 * 10 * 33 + 4 * 10 + (2 * 10 * 33 + 4 * 33)
    assert more == head + known  # residual, class counts and class sums in half precision


def test_matrices_are_rounded_first(split5):
    """A checkpoint holds the rounded matrices. Other fields and the ranks stay."""
    gate = gated(mlp())
    train(gate, images(split5, 0))
    memory = gate.memory
    assert memory.within(None) is memory and memory.within(memory.state_bytes) is memory
    rounded = memory.within(memory.state_bytes - 1)
    for name, layer in memory.layers.items():
        less = rounded.layers[name]
        errors = (less.vectors - layer.vectors).abs().amax(0) / layer.vectors.abs().amax(0)
        assert (errors[-16:] <= 2**-11).all() and 2**-10 < errors[:-16].max() <= 0.501 / 127
        assert (less.anchor - layer.anchor).abs().max() < layer.anchor.abs().max() / 127
        for kind in ("eigenvalues", "rough_anchor", "residual", "class_counts", "class_roots"):
            assert getattr(less, kind) is getattr(layer, kind)
        assert less.rounded().state_bytes == less.state_bytes < 0.7 * layer.state_bytes
    again = Memory.from_state_dict(rounded.state_dict())
    assert again.state_bytes == rounded.state_bytes
    assert all(torch.equal(again.layers[n].anchor, m.anchor) for n, m in rounded.layers.items())


def test_then_the_rough_anchors_go_and_the_weakest_vectors_of_all_layers(split5):
    gate = gated(mlp())
    train(gate, images(split5, 0))
    memory = gate.memory.within(gate.memory.state_bytes - 1)
    rough = memory.within(memory.state_bytes - 1)
    for name, layer in memory.layers.items():
        assert rough.layers[name].rough_anchor is None and len(rough.layers[name].eigenvalues) == len(layer.eigenvalues)
    for budget in (50_000, 30_000, 12_000):
        small, dropped, kept = memory.within(budget), [], []
        for name, layer in memory.layers.items():
            less, n = small.layers[name], len(small.layers[name].eigenvalues)
            relative = (layer.eigenvalues / layer.mean_eigenvalue).tolist()
            dropped += relative[:-n]
            kept += relative[-n:-1]
            torch.testing.assert_close(less.vectors, layer.vectors[:, -n:], rtol=0, atol=0.5 / 127)
            torch.testing.assert_close(less.anchor, layer.anchor[:, -n:], rtol=0, atol=layer.anchor.abs().max() / 254)
            total = less.eigenvalues.sum() + less.rest * (len(less.vectors) - n)
            torch.testing.assert_close(total, layer.mean_eigenvalue * len(less.vectors))  # their energy is in the rest
            for kind in ("residual", "class_counts"):
                assert getattr(less, kind) is getattr(layer, kind)
        assert dropped and max(dropped) <= min(kept)
        assert budget - (2 * 785 + 32 + 12) < small.state_bytes <= budget


def test_an_embeddings_rarest_rows_are_forgotten(split5):
    gate = gated(sentences())
    train(gate, shades(split5, 0))
    whole = gate.memory.layers["0"]
    few = whole.leading(5)
    assert few.vectors.tolist() == whole.vectors[-5:].tolist() and few.anchor.shape == (8, 5)
    gate.memory_budget = least_bytes(gate.memory, gated_layers(gate._model)) + 2000
    train(gate, shades(split5, 0))
    held = gate.memory.layers["0"].vectors
    assert 1 <= len(held) < len(whole.vectors) and set(held.tolist()) <= set(whole.vectors.tolist())


def test_none_and_a_large_budget_change_nothing_and_a_tight_one_still_keeps(split5):
    """Five tasks, with a quarter of the memory."""
    ends, mean, sizes = [], [], []
    for budget in ("naive", None, 10**9, 60_000):
        plugin = SelectivePlasticityPlugin(memory_budget=None if budget == "naive" else budget)
        strategy = strategy_of(mlp(), [] if budget == "naive" else [plugin], epochs=2)
        for experience in split5.train_stream:
            strategy.train(experience)
        ends.append([p.detach().clone() for p in strategy.model.parameters()])
        mean.append(sum(accuracy(strategy.model, split5, task) for task in range(5)) / 5)
        sizes.append(plugin.state_bytes)
    assert all(map(torch.equal, ends[1], ends[2])) and not all(map(torch.equal, ends[2], ends[3]))
    assert sizes[3] <= 60_000 < sizes[2] / 3
    assert mean[3] > max(mean[0] + 0.25, mean[1] - 0.1)


class Often:
    """A detector of one's own: finds a change in every tenth loss that it is told."""

    seen, drift_detected = 0, False

    def update(self, x):
        self.seen += 1
        self.drift_detected = self.seen % 10 == 0


@pytest.mark.parametrize("found", [{"consolidate": "surprise", "detector": Often()}, {"consolidate": "continuous"}])
def test_a_stream_without_told_boundaries_keeps_to_it(split5, found):
    """The memory does; what follows the stream is not counted."""
    plugin = SelectivePlasticityPlugin(**found, settings=Settings(stream_chunk=320), memory_budget=60_000)
    strategy = strategy_of(mlp(), [plugin], batch=16)
    for experience in split5.train_stream[:3]:
        strategy.train(experience)
        assert plugin.gate.memory.state_bytes <= 60_000
    assert plugin.gate.memory.consolidations > 1
    assert plugin.state_bytes > plugin.gate.memory.state_bytes


def test_a_loaded_memory_is_bounded_from_the_next_consolidation_on(split5):
    gate = gated(mlp())
    train(gate, images(split5, 0))
    other = gated(mlp(), memory_budget=60_000)
    other.load_state_dict(gate.state_dict())
    assert other.state_bytes == gate.state_bytes > 60_000
    train(other, images(split5, 1))
    assert other.state_bytes <= 60_000


def test_an_inherited_memory_keeps_to_it(split5):
    gate = gated(mlp(), memory_budget=60_000)
    train(gate, images(split5, 0))
    gate._model.more = nn.Linear(784, 32)
    gate.inherit("more", "1")
    assert "more" in gate.memory.layers and gate.state_bytes <= 60_000
    gate.begin()
    gate.memory_budget = gate.state_bytes
    before = gate.memory
    gate._model.far = nn.Linear(784, 60_000)
    with pytest.raises(ValueError, match="Invalid memory_budget value"):
        gate.inherit("far", "1")
    assert gate.memory is before


def test_a_head_that_outgrows_the_budget_is_named_before_it_is_trained(split5):
    model = mlp()
    gate = gated(model, memory_budget=25_000)
    train(gate, images(split5, 0))
    model[-1] = nn.Linear(model[-1].in_features, 120)
    with pytest.raises(ValueError, match=r"Invalid memory_budget value: 25000 \(allowed for this network: "):
        gate.begin()


@pytest.mark.parametrize("value", [0, -1, 1.5, "1"])
def test_a_budget_is_a_number_of_bytes(value):
    with pytest.raises(ValueError, match=r"Invalid memory_budget value: .* \(allowed: an integer, 1 or more\)"):
        SelectivePlasticityPlugin(memory_budget=value)
