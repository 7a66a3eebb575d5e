"""An embedding is a linear map of one-hot vectors, and its gate is the diagonal one of this linear layer."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from avalanche_sp import PlasticityGate, Settings, reference
from avalanche_sp.gate.layers import gated_layers

WORDS, LENGTH = 20, 7
# All input vectors in the second moment, and all its eigenvectors gated in every step, as an embedding's are.
WHOLE = Settings(vectors=10**9, gated_vectors=WORDS)


@pytest.fixture(scope="module")
def texts(split2):
    """Two tasks of sentences, and their digits: a row of an image, its pixels in sixteen and in four more shades.

    The four shades are used in the second task alone.
    """
    tasks = []
    for number, experience in enumerate(split2.train_stream):
        x, y, _ = experience.dataset.read_batch(list(range(256)))
        shades = ((x[:, 0, 14, 4:25:3] + 0.43) * 4.9).long().clamp(0, 15)
        tasks.append((torch.where(y.unsqueeze(1) % 2 == 1, shades + 4 * number, shades), y))
    return tasks


class Sentences(nn.Module):
    """Embedded words, or a linear layer of one-hot words; their positions; and a linear classifier of the sentence."""

    def __init__(self, words="embedding", positions=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 5)
        self.positions = None if positions is None else nn.Embedding(LENGTH, 5)
        self.head, self.places, self.words = nn.Linear(LENGTH * 5, 10), positions, words
        if words == "linear":
            linear = nn.Linear(WORDS, 5, bias=False)
            linear.weight = nn.Parameter(self.embedding.weight.detach().T.clone())
            self.embedding = linear

    def forward(self, x):
        e = self.embedding(one_hot(x, WORDS).float() if self.words == "linear" else x)
        if self.places is not None:
            places = torch.arange(LENGTH)
            places = {"one": places, "batch of one": places[None], "each": places.expand_as(x)}[self.places]
            e = e + self.positions(places)
        return self.head(e.flatten(1).tanh())

    @property
    def rows(self):
        return (self.embedding.weight.T if self.words == "linear" else self.embedding.weight).detach().clone()


def trained(model, tasks, optimizer=None, gate=None, **kwargs):
    """The gate after these tasks."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    gate = gate or PlasticityGate(model, optimizer, settings=WHOLE, rank={"embedding": WORDS}, **kwargs)
    for x, y in tasks:
        gate.begin(len(x))
        gate.prepare([(x, y)], cross_entropy)
        for rows in list(torch.arange(len(x)).split(32)) * 3:
            step(model, optimizer, x[rows], y[rows])
        gate.consolidate([(x, y)], cross_entropy)
    return gate


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


SGD, ADAM = (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)), (lambda p: torch.optim.Adam(p, lr=0.01))


@pytest.mark.parametrize("make", [SGD, ADAM])
def test_it_learns_what_a_linear_layer_of_one_hot_words_learns(texts, make):
    """Two tasks, with gate, penalty and solved readout."""
    models, memories = [Sentences("linear"), Sentences()], []
    for model in models:
        gate = trained(model, texts, make(model.parameters()))
        memories.append(gate.memory.layers["embedding"])
    torch.testing.assert_close(models[1].rows, models[0].rows, atol=2e-4, rtol=1e-3)
    dense, memory = memories
    used = len(memory.eigenvalues)
    torch.testing.assert_close(memory.eigenvalues, dense.eigenvalues[-used:], atol=1e-6, rtol=1e-4)
    assert float(dense.eigenvalues[:-used].sum()) < 1e-6 and memory.rows == dense.rows == LENGTH
    torch.testing.assert_close(memory.mean_eigenvalue, dense.mean_eigenvalue)


def test_its_gradient_is_the_gradient_times_the_gate_matrix(texts):
    (x, y), (new, labels) = texts
    model = Sentences()
    gate = trained(model, texts[:1])
    cross_entropy(model(new), labels).backward()
    before = model.embedding.weight.grad.double()
    gate._hooks._gate_gradients(gate._optimizer)
    values, vectors, mean = reference.merged_eigenpairs([one_hot(x.flatten(), WORDS)], WORDS)
    matrix = reference.gate_matrix(values, vectors, mean, 0.5 / LENGTH)
    torch.testing.assert_close(model.embedding.weight.grad.double(), matrix @ before, atol=1e-8, rtol=1e-4)


def test_used_rows_are_held_and_unused_ones_train_freely(texts):
    (x, _), (new, labels) = texts
    used = torch.bincount(x.flatten(), minlength=WORDS) > 0
    fresh = (torch.bincount(new.flatten(), minlength=WORDS) > 0) & ~used
    assert used.sum() > 8 and fresh.sum() >= 3
    moved = {}
    for openness in (0.5, {"embedding": float("inf"), "*": 0.5}):
        model = Sentences()
        gate = trained(model, texts[:1], openness=openness, ungated="train", pull_back=0, readout_step=False)
        before = model.rows
        torch.manual_seed(0)
        step(model, gate._optimizer, new, labels)
        gate.finish_steps()
        moved[len(moved)] = (model.rows - before).norm(dim=1)
    held, free = moved.values()
    assert torch.equal(held[fresh], free[fresh]) and float(held[fresh].min()) > 0
    often = torch.bincount(x.flatten(), minlength=WORDS) > 100
    assert float((held[often] / free[often]).max()) < 0.2


@pytest.mark.parametrize("places", ["one", "batch of one"])
def test_positions_that_a_batch_shares_are_used_by_each_of_its_samples(texts, places):
    memories = [trained(Sentences(positions=p), texts[:1]).memory.layers["positions"] for p in ("each", places)]
    assert [memory.rows for memory in memories] == [LENGTH, LENGTH]
    torch.testing.assert_close(memories[0].eigenvalues, memories[1].eigenvalues)
    assert float(memories[1].closed(0.5)[0].min()) > 0.9
    torch.testing.assert_close(memories[0].sharpness, memories[1].sharpness, atol=0, rtol=0.5)


def test_a_saved_state_goes_on_bit_for_bit(texts, tmp_path):
    ends = []
    for resumes in (False, True):
        model = Sentences(positions="one")
        gate = trained(model, texts[:1])
        x, y = texts[1]
        gate.begin(len(x))
        gate.prepare([(x, y)], cross_entropy)
        optimizer = gate._optimizer
        for number, rows in enumerate(torch.arange(len(x)).split(16)):
            if resumes and number == 11:
                torch.save([gate.state_dict(), model.state_dict(), optimizer.state_dict()], tmp_path / "state")
                states = torch.load(tmp_path / "state", weights_only=True)
                model = Sentences(positions="one")
                model.load_state_dict(states[1])
                optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
                optimizer.load_state_dict(states[2])
                gate = PlasticityGate(model, optimizer, settings=WHOLE, rank={"embedding": WORDS})
                gate.load_state_dict(states[0])
                gate.to("cpu")
            step(model, optimizer, x[rows], y[rows])
        gate.consolidate([(x, y)], cross_entropy)
        ends.append([model.rows, gate.memory.layers["embedding"].anchor, gate.memory.layers["positions"].eigenvalues])
    assert all(map(torch.equal, *ends))
    used = len(gate.memory.layers["embedding"].eigenvalues)
    assert gate.memory.layers["embedding"].state_bytes == 4 * (used + 1) + 8 * used + 4 * 5 * used


def test_a_vocabulary_that_grows_keeps_its_old_words(texts):
    model = Sentences()
    gate = trained(model, texts[:1])
    old = model.rows
    model.embedding = nn.Embedding.from_pretrained(torch.cat([old, torch.randn(4, 5)]), freeze=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate.attach(model, optimizer)
        trained(model, [(texts[1][0] + 4, texts[1][1])], optimizer, gate)
    used = gate.memory.layers["embedding"].vectors
    assert int(used.max()) > WORDS
    moved = (model.rows[:WORDS] - old).norm(dim=1)
    assert float(moved[:4].max()) == 0 and float(moved.max()) > 0


def test_the_row_of_padding_is_no_input(texts):
    model = Sentences()
    model.embedding.padding_idx = int(texts[0][0].flatten().mode().values)
    gate = trained(model, texts)
    assert model.embedding.padding_idx not in gate.memory.layers["embedding"].vectors
    assert gate.memory.layers["embedding"].rows < LENGTH
    torch.testing.assert_close(gate.memory.layers["embedding"].eigenvalues.sum(), torch.tensor(1.0))


def test_a_task_may_have_padding_alone():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4, padding_idx=0)
            self.hidden, self.head = nn.Linear(8, 16), nn.Linear(20, 6)

        def forward(self, inputs):
            x, place = inputs
            return self.head(torch.cat([self.hidden(x).relu(), self.embedding(place)], 1))

    torch.manual_seed(0)
    model = Bag()
    before = model.embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate = PlasticityGate(model, optimizer)
    for task in range(2):
        x, y = torch.randn(60, 8), 2 * task + torch.arange(60) % 2
        data = [((x, torch.full((60,), task)), y)]
        optimizer.zero_grad()
        cross_entropy(model(data[0][0]), y).backward()
        optimizer.step()
        gate.consolidate(data, cross_entropy)
    assert gate.memory.layers["embedding"].vectors.tolist() == [1]
    assert (model.embedding.weight != before).any(1).tolist() == [False, True, False, False, False]


def test_a_weight_that_a_linear_layer_shares_is_gated_as_its_own():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    model[1].weight = model[0].weight
    assert list(gated_layers(model)) == ["1"]


@pytest.mark.parametrize("kwargs", [{"mode": "sum"}, {"mode": "mean", "padding_idx": 3}])
def test_a_bag_s_input_vector_makes_its_output(kwargs):
    torch.manual_seed(0)
    bag, x, weights = nn.EmbeddingBag(9, 4, **kwargs), torch.randint(9, (6, 5)), torch.rand(6, 5)
    (layer,) = gated_layers(bag).values()
    calls = [((x,), {}), ((x.flatten(), torch.tensor([0, 4, 4, 20])), {})]
    if bag.mode == "sum":
        calls.append(((x,), {"per_sample_weights": weights}))
    for args, named in calls:
        out = bag(*args, **named)
        torch.testing.assert_close(layer.input_of(args, named, out) @ bag.weight, out)


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(9, 4, sparse=True), nn.EmbeddingBag(9, 4, sparse=True), nn.EmbeddingBag(9, 4, mode="max")],
)
def test_what_has_no_such_gradient_is_not_gated(layer):
    assert gated_layers(layer) == {}


def test_a_stream_without_boundaries_counts_the_words(texts):
    model, (x, y) = Sentences(positions="batch of one"), texts[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = Settings(stream_chunk=256, stream_look=1, stream_samples=32)
    gate = PlasticityGate(model, optimizer, consolidate="continuous", settings=settings)
    for rows in torch.arange(256).split(32):
        optimizer.zero_grad()
        outputs = model(x[rows])
        loss = cross_entropy(outputs, y[rows])
        loss.backward()
        gate.observe(x[rows], outputs, y[rows], loss, cross_entropy)
        optimizer.step()
    memory, positions = gate.memory.layers["embedding"], gate.memory.layers["positions"]
    expected = torch.bincount(x.flatten(), minlength=WORDS) / x.numel()
    torch.testing.assert_close(torch.zeros(WORDS).index_copy(0, memory.vectors, memory.eigenvalues), expected)
    assert memory.rows == positions.rows == LENGTH
