"""Each setting: its default and a change of it are noticed by a small run, and a value out of range is named."""

import dataclasses
import math
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from avalanche_sp import OneHotMSELoss, PlasticityGate, Settings
from avalanche_sp.gate import ClassGaussians
from avalanche_sp.gate.detection import ChangeWatch, page_hinkley
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.rows import StreamRows
from avalanche_sp.gate.stream import StreamWatch

from conftest import ROOT, weights

FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
SQUARED = OneHotMSELoss()


def task(seed, size=192):
    """Inputs (size, 64) and their classes, 0 to 4; the tasks' inputs are somewhat alike."""
    shared, generator = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    hidden = torch.randn(size, 6, generator=generator)
    mixing = torch.randn(6, 64, generator=shared) + torch.randn(6, 64, generator=generator)
    x = hidden @ mixing / 4 + 0.3 * torch.randn(size, 64, generator=generator)
    return x, (hidden @ torch.randn(6, 5, generator=generator)).argmax(1)


OLD, NEW = task(0), task(1)


def network(kind="mlp", classes=5):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, classes))
    if kind == "attention":
        block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Unflatten(1, (8, 8)), block, nn.Flatten(), nn.Linear(64, 5))
    convolution = nn.Conv2d(1, 4, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), convolution, nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))


def new_classes(settings, adam=None, times=1, kind="mlp", second=(NEW[0], 5 + NEW[1])):
    """The weights after two tasks, by default with classes of their own, of which the second is remembered also.

    Their images are there ``times`` times.
    """
    model = network(kind, classes=10)
    optimizer = adam(model.parameters()) if adam else torch.optim.SGD(model.parameters(), lr=0.02)
    gate = PlasticityGate(model, optimizer, settings=settings)
    for x, y in (OLD, second):
        x, y = x.repeat(times, *[1] * (x.dim() - 1)), y.repeat(times)
        gate.prepare(TensorDataset(x, y), cross_entropy)
        for rows in list(torch.arange(192).split(64)) * 8:
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        gate.consolidate(TensorDataset(x, y), cross_entropy)
    return weights(model)


def two_tasks(settings, kind="mlp", epochs=8, stored=0, samples=192):
    """The weights after two tasks, of which the second is remembered also."""
    model = network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    gate = PlasticityGate(model, optimizer, settings=settings)
    is_stored = torch.arange(64) >= 64 - min(stored, 20)
    for old, (x, y) in ((True, OLD), (False, NEW)):
        gate.begin(samples, stored=0 if old else stored)
        for rows in list(torch.arange(192).split(64)) * epochs:
            gate.replayed(None if old else is_stored)
            optimizer.zero_grad()
            SQUARED(model(x[rows]), y[rows]).backward()
            optimizer.step()
        gate.consolidate(TensorDataset(x, y), SQUARED)
    return weights(model)


def stream(settings, consolidate="continuous", shift=0.0, detector=None, steps=120, kind="mlp"):
    """The weights at the end of a stream, and the steps after which the gate consolidated."""
    model = network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    gate, at = PlasticityGate(model, optimizer, consolidate=consolidate, detector=detector, settings=settings), []
    for step in range(steps):
        x, y = ((OLD, NEW)[step >= 60][i][16 * step % 176 :][:16] for i in (0, 1))
        x = x + shift * step
        optimizer.zero_grad()
        outputs = model(x)
        loss = SQUARED(outputs, y)
        loss.backward()
        gate.observe(x, outputs, y, loss, SQUARED)
        optimizer.step()
        at += [step] * (gate.memory.consolidations - len(at))
    assert at
    return weights(model), at


class Never:
    drift_detected = False

    def update(self, x):
        pass


def long_stream(settings):
    """The second moment of 8000 inputs of a stream, which grow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2))
    watch, optimizer = StreamWatch(None, lambda *_: 4, False, settings), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        x, y = torch.randn(1000, 4) * (1 + step), torch.zeros(1000)
        watch.note("0", GatedLayer(model[0]), x, model(x))
        watch.observe(x, model(x), y, torch.zeros(()), SQUARED, StreamRows(1000, 1000, slice(0, 1000)))
        watch.look(model, {"0": GatedLayer(model[0])}, optimizer)
    seen = watch.observation({"0": GatedLayer(model[0])}).layers["0"].inputs
    return seen.T @ seen


class Told:
    """Notes what a detector is told."""

    drift_detected = False
    numbers: list[float] = []  # shared with the copies that a watch makes

    def update(self, x):
        self.numbers.append(x)


def series():
    torch.manual_seed(0)
    return torch.cat([torch.randn(80), 8 + torch.randn(10), 3 + torch.randn(60)]).tolist()


def told(settings):
    """What a detector is told of a series with a jump."""
    Told.numbers = []
    watch = ChangeWatch(Told(), settings)
    watch.look([y] for y in series())
    return Told.numbers


def found(settings):
    """Where the Page-Hinkley test finds a change in small and slow changes."""
    at = []
    for rise in torch.linspace(4, 12, 20).tolist():
        torch.manual_seed(1)
        watch = ChangeWatch(page_hinkley(settings), settings)
        numbers = torch.cat([torch.randn(60), rise + torch.randn(20)]).tolist()
        at.append(next((i for i, y in enumerate(numbers) if watch.look([[y]])[0]), None))
    return at


def gaussians(settings):
    """The readout of the Gaussians of both tasks' classes. Training on the second moves all by 1, and each class."""
    known, (x, y) = ClassGaussians(settings=settings), NEW
    known.remember(*OLD)
    known.remember(x + 1 + 8 * torch.eye(64)[y], 5 + y, x)
    return known.readout(10)


def surprises(settings):
    """The surprise of each loss of a series."""
    model = network()
    gate = PlasticityGate(model, torch.optim.SGD(model.parameters(), lr=0.1), settings=settings)
    shown = []
    for loss in series():
        gate.observe(OLD[0], None, OLD[1], torch.tensor(loss), SQUARED)
        shown.append(float(gate.surprise))
    return shown


def case(default, changed, run, base=None, **kwargs):
    """A field's default, another value, and a run with all other fields as in ``base``."""
    return default, changed, run, base or {}, kwargs


CASES = {
    "rank": case(48, 40, two_tasks),
    "stream_rank": case(64, 40, stream, {"stream_chunk": 640}),
    "readout_rank": case(257, 40, two_tasks, {"rank": 2}),
    "vectors": case(2000, 320, two_tasks, kind="cnn"),
    "observed_a_class": case(500, 9, two_tasks),
    "gated_vectors": case(32, 31, two_tasks),
    "largest_imbalance": case(2, 4, new_classes, second=(NEW[0].repeat(3, 1), 5 + NEW[1].repeat(3))),
    "same_shift": case(0.2, 0, new_classes, second=OLD),
    "attention_openness": case(0, 1, two_tasks, kind="attention"),
    "look": case(8, 7, two_tasks),
    "largest_ratio": case(20, 21, two_tasks, samples=4),
    "beyond": case(0.15, 0.2, two_tasks, {"rank": 4, "look": 2}),
    "beyond_power": case(1.5, 1.0, two_tasks, {"rank": 4, "look": 2}),
    "beyond_every": case(2, 3, two_tasks, {"rank": 4, "look": 2}),
    "readout_old": case(2, 1, two_tasks),
    "readout_whole": case(0.05, 0.06, two_tasks, epochs=40),
    "readout_damping": case(0.05, 0.06, two_tasks),
    "readout_stream_damping": case(0.3, 0.4, stream, {"stream_chunk": 640}),
    "solve_ridge": case(0.02, 0.021, new_classes),
    "solve_samples": case(2000, 1990, new_classes, times=11),
    "solve_held_out": case(0.9, 0.99, new_classes),
    "solve_steps": case(20, 2, new_classes),
    "solve_tolerance": case(5e-3, 0.1, new_classes),
    "solve_trial": case(3, 2, new_classes, {"solve_held_out": 0.0}, adam=partial(torch.optim.Adam, lr=0.08)),
    "class_rank": case(8, 7, new_classes),
    "class_vectors": case(1024, 50, new_classes),
    "adaptive_eps": case(1e-6, 1e-7, new_classes, adam=partial(torch.optim.Adam, lr=1e-4, eps=1e-6)),
    "drift_ridge": case(0.1, 0.11, new_classes),
    "drift_first_order": case(0.002, 1e6, new_classes, {"drift_agreement": 1e-6}, kind="cnn"),
    "drift_agreement": case(0.5, 0.9, gaussians),
    "gaussian_ridge": case(0.02, 0.021, gaussians),
    "half_trust": case(50, 60, two_tasks, stored=40),
    "double_openness": case(12, 13, two_tasks, stored=40),
    "stream_look": case(4, 5, stream, {"stream_chunk": 640}),
    "stream_samples": case(16, 17, stream, {"stream_chunk": 640}),
    "stream_vectors": case(8, 7, stream, {"stream_chunk": 640}, kind="cnn"),
    "stream_chunk": case(4096, 4080, stream, {"stream_look": 1}, steps=260),
    "stream_memory": case(5120, 6000, long_stream, {"stream_look": 1}),
    "stream_drift": case(0.2, 0.25, stream, consolidate="surprise", shift=0.02, detector=Never()),
    "detection_decay": case(0.95, 0.94, told),
    "detection_clip": case(3.0, 2.9, told),
    "detection_limit": case(5.0, 4.9, told),
    "detection_start": case(20, 21, told),
    "detection_delta": case(1.0, 0.9, found),
    "detection_threshold": case(20.0, 18.0, found),
    "surprise_decay": case(0.99, 0.98, surprises),
    "surprise_full": case(3.0, 2.9, surprises),
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(map(same, one, other)) if isinstance(one, tuple) else one == other


UNCHANGED: dict = {}  # the ends of the runs with a field's default, of which several fields have the same


@pytest.mark.parametrize("name", FIELDS)
def test_a_run_notices_a_change_of_the_setting_and_of_its_default(name):
    default, changed, run, base, kwargs = CASES[name]
    assert Settings(**base, **{name: default}) == Settings(**base)
    key = run, str(base), str(kwargs)
    if key not in UNCHANGED:
        UNCHANGED[key] = run(Settings(**base), **kwargs)
    assert not same(run(Settings(**base, **{name: changed}), **kwargs), UNCHANGED[key])


@pytest.mark.parametrize("name", {case[2]: name for name, case in CASES.items()}.values())
def test_a_run_of_the_same_settings_ends_the_same(name):
    """Else any two would differ. One case of each kind of run."""
    _, _, run, base, kwargs = CASES[name]
    assert same(run(Settings(**base), **kwargs), run(Settings(**base), **kwargs))


def test_each_case_is_of_a_setting():
    assert set(CASES) == set(FIELDS)


BAD = {
    "count": (0, -1, 1.5, math.nan, True, "1", None),
    "positive": (0, -1, math.inf, math.nan, True, "1", None),
    "not negative": (-1, math.inf, math.nan, True, "1", None),
    "share": (-0.1, 1.1, math.nan, True, "1", None),
}


@pytest.mark.parametrize("name", FIELDS)
def test_values_out_of_range_are_named(name):
    for value in BAD[FIELDS[name].metadata["allowed"]]:
        with pytest.raises(ValueError) as error:
            Settings(**{name: value})
        assert str(error.value).startswith(f"Invalid {name} value: {value!r} (allowed: ")


def test_settings_take_numpys_numbers():
    assert Settings(rank=numpy.int64(5), look=numpy.int32(4)) == Settings(rank=5, look=4)


def test_settings_are_frozen_and_described():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().look = 4
    described = Settings.describe()
    assert [name for name, *_ in described] == list(FIELDS)
    assert all(
        default == getattr(Settings(), name) and words and meaning for name, default, words, meaning in described
    )


def test_the_documents_list_each_setting():
    pages = [page for page in (ROOT / "docs").glob("*.md") if "`gated_vectors`" in page.read_text()]
    if not pages:
        pytest.skip("no page lists the settings")
    text = "".join(page.read_text() for page in pages)
    assert [name for name in FIELDS if f"`{name}`" not in text] == []
    rows = [f"| `{name}` | {' | '.join(map(str, about))} |" for name, *about in Settings.describe()]
    assert [row for row in rows if row not in text] == []
