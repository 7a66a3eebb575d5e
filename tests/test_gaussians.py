"""The memory that stores no sample: its Gaussians, the samples drawn from them, and how it stands in for replay."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
from avalanche.training.plugins import SupervisedPlugin
from torch.utils.data import DataLoader, TensorDataset

from avalanche_sp import GaussianBuffer, JointReplayLoss, OneHotMSELoss, SelectivePlasticityPlugin
from avalanche_sp.data import TensorClassificationDataset, TensorSource, benchmark_of
from avalanche_sp.data.gaussians import Gaussian, draw
from avalanche_sp.gate.packed import PackedRows
from avalanche_sp.training.replay import stream_rows

from conftest import mlp, strategy_of, weights


def images_of(experience, label):
    dataset = experience.dataset
    x, y, _ = dataset.read_batch(list(range(len(dataset))))
    return x[y == label].flatten(1)


def remembering(benchmark, experiences=None, **kwargs):
    """A buffer that has been shown a benchmark's experiences."""
    buffer = GaussianBuffer(**kwargs)
    for experience in benchmark.train_stream[:experiences]:
        buffer.post_adapt(None, experience)
    return buffer


def covariance(gaussian):
    rows = gaussian.components.unpacked()
    return rows.T @ rows


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_size": 0}, r"Invalid max_size value: 0 \(allowed: an integer, 1 or more\)"),
        ({"gaussians": 0}, r"Invalid gaussians value: 0 \(allowed: an integer, 1 or more\)"),
        ({"max_bytes": 0}, r"Invalid max_bytes value: 0 \(allowed: an integer, 1 or more\)"),
        ({"max_bytes": 2.5}, r"Invalid max_bytes value: 2.5 \(allowed: an integer, 1 or more\)"),
        ({"max_size": "200"}, r"Invalid max_size value: '200' \(allowed: an integer, 1 or more\)"),
        ({"gaussians": None}, r"Invalid gaussians value: None \(allowed: an integer, 1 or more\)"),
        ({"stored": -1}, r"Invalid stored value: -1 \(allowed: an integer, 0 to 1999\)"),
        ({"max_size": 50, "stored": 50}, r"Invalid stored value: 50 \(allowed: an integer, 0 to 49\)"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianBuffer(**kwargs)


def test_a_gaussian_is_its_samples_principal_components(split2):
    x = images_of(split2.train_stream[0], 1)
    gaussian = Gaussian.of(x, 1, 0, 12)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    rows = (vectors * values.clamp_min(0).sqrt()).T.flip(0)[:12]
    torch.testing.assert_close(gaussian.mean.float(), x.mean(0), rtol=0, atol=2e-3)
    expected = PackedRows.of(rows).unpacked()  # four bits a number
    assert (covariance(gaussian) - expected.T @ expected).norm() / expected.square().sum() < 0.01
    assert (covariance(gaussian) - rows.T @ rows).norm() / rows.square().sum() < 0.1
    assert gaussian.variance == pytest.approx(float(values.sum()), rel=1e-4)
    assert gaussian.explained == pytest.approx(float(values[-12:].sum()), rel=0.05)
    lengths = gaussian.components.unpacked().norm(dim=1)
    assert (lengths[:-1] >= 0.9 * lengths[1:]).all()  # strongest first
    gaussian.cut_to(5)
    assert (covariance(gaussian) - expected[:5].T @ expected[:5]).norm() / expected.square().sum() < 0.01


def test_merged_gaussians_have_the_moments_of_both(split2):
    x = images_of(split2.train_stream[0], 3)
    ones, others = x[:40], x[40:]
    merged = Gaussian.of(ones, 3, 0, 39).merged(Gaussian.of(others, 3, 0, 60), 20)
    whole = Gaussian.of(x, 3, 0, 20)
    assert merged.samples == len(x)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=4e-3)
    assert merged.variance == pytest.approx(whole.variance, rel=1e-3)
    assert (covariance(merged) - covariance(whole)).norm() / whole.explained < 0.08


def test_what_is_drawn_has_the_gaussians_mean_and_directions(split2):
    x = images_of(split2.train_stream[0], 0)
    gaussian = Gaussian.of(x, 0, 0, 8)
    drawn = draw([gaussian], torch.zeros(20000, dtype=torch.long), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), gaussian.mean.float(), rtol=0, atol=0.05)
    # Midway, in ratio, between the variance that the components have and all of it.
    wider = (gaussian.variance / gaussian.explained) ** 0.5
    expected = wider * covariance(gaussian)
    assert (torch.cov(drawn.T) - expected).norm() / expected.norm() < 0.05
    flat = Gaussian.of(x[:1], 0, 0, 8)  # a single sample has no variance
    again = draw([flat], torch.zeros(3, dtype=torch.long), torch.Generator())
    torch.testing.assert_close(again, x[:1].expand(3, -1), rtol=0, atol=4e-3)


def test_samples_of_several_gaussians_are_drawn_together(split2):
    """As many components as each has; the slow way sums them up one by one."""
    x = images_of(split2.train_stream[0], 2)
    gaussians = [Gaussian.of(part, 2, 0, k) for part, k in ((x[:60], 7), (x[60:70], 0), (x[70:90] * 1e5, 3))]
    which = torch.tensor([2, 0, 1, 0, 2, 2])
    drawn = draw(gaussians, which, torch.Generator().manual_seed(5))
    noise = iter(torch.randn(3 + 7 + 0 + 7 + 3 + 3, generator=torch.Generator().manual_seed(5)))
    for row, number in zip(drawn, which.tolist()):
        gaussian = gaussians[number]
        expected = gaussian.mean.float().clone()
        for component in gaussian.components.unpacked():
            expected += next(noise) * (gaussian.variance / gaussian.explained) ** 0.25 * component
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_inputs_may_have_any_scale(split2, scale):
    x = images_of(split2.train_stream[0], 4)
    plain, scaled = Gaussian.of(x, 4, 0, 8), Gaussian.of(x * scale, 4, 0, 8)
    torch.testing.assert_close(scaled.mean / scale, plain.mean.float(), rtol=0, atol=2e-3, check_dtype=False)
    torch.testing.assert_close(covariance(scaled) / scale**2, covariance(plain), rtol=0, atol=1e-3)
    assert draw([scaled], torch.zeros(5, dtype=torch.long), torch.Generator()).isfinite().all()
    halves = (Gaussian.of(part * scale, 4, 0, 8) for part in (x[:50], x[50:]))
    merged = next(halves).merged(next(halves), 8)
    # Rounded to half precision twice: each part, and the whole.
    torch.testing.assert_close(merged.mean / scale, x.mean(0), rtol=0, atol=2e-3)


COMPONENT, MEAN = 392 + 4, 2 * 784  # bytes, of 784 pixels


def components(buffer):
    return [[len(g.components.scale) for g in known] for known in buffer.classes]


def test_ten_classes_take_190_kilobytes_and_further_ones_as_much_each(split5, permuted3):
    buffer = remembering(split5)
    assert components(buffer) == [[8] * 4] * 10
    assert buffer.state_bytes == 10 * 4 * (MEAN + 8 * COMPONENT) == 189_440
    assert remembering(split5, 1).state_bytes <= 189_440
    later = remembering(permuted3)  # a cluster of fewer than 8 samples has fewer components
    assert [len(known) for known in later.classes] == [4] * 30
    assert 0.9 * 3 * 189_440 < later.state_bytes <= 3 * 189_440


@pytest.mark.parametrize("max_bytes", [60_000, 100_000, 500_000])
def test_memory_is_bounded_however_many_experiences_come(permuted3, max_bytes):
    buffer, numbers = GaussianBuffer(max_bytes=max_bytes), []
    for n, experience in enumerate(permuted3.train_stream, 1):
        buffer.post_adapt(None, experience)
        numbers.append(len(buffer.classes[0]))
        assert len(buffer.classes) == 10 * n
        assert buffer.state_bytes <= max_bytes
        assert max_bytes == 500_000 or 0.8 * max_bytes < buffer.state_bytes  # 60 samples have fewer components
    assert numbers == {60_000: [1, 1, 1], 100_000: [2, 1, 1], 500_000: [4, 4, 3]}[max_bytes]


@pytest.mark.parametrize("max_bytes", [8_000, 20_000, 40_000])
def test_memory_is_bounded_for_classes_of_any_scale(max_bytes):
    """Means that cancel, and means below or beyond half precision, take as much as ordinary ones."""
    generator, buffer = torch.Generator().manual_seed(0), GaussianBuffer(max_bytes=max_bytes)
    centers = torch.tensor([1.0, -1.0]).repeat(30).unsqueeze(1)
    for label, scale in enumerate((1.0, 1e-3, 1e-12, 1e6, 1e-30)):
        x = scale * (centers + 0.1 * torch.randn(60, 500, generator=generator))
        buffer.update_from_dataset(inputs_of(x, label))
        assert 0.5 * max_bytes < buffer.state_bytes <= max_bytes or label < 3
        assert buffer.state_bytes <= max_bytes
        mean = sum(g.samples / 60 * g.mean for g in buffer.classes[-1])
        torch.testing.assert_close(mean / scale, x.mean(0) / scale, rtol=0, atol=2e-3)


def inputs_of(x, label=0):
    """A dataset of inputs of one class."""
    return TensorClassificationDataset.from_source(TensorSource(x, torch.full((len(x),), label)))


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.arange(80).view(8, 10), TypeError, "Invalid new_data: inputs of torch.int64 .allowed: floating-point"),
        (torch.rand(8, 9), ValueError, r"Invalid new_data: inputs of shape \(9,\) \(allowed: \(10,\), as those"),
        (torch.full((8, 10), -1e20), ValueError, r"an input of magnitude 1e\+20 \(allowed: 1e\+15 at most\)"),
        (torch.rand(0, 10), ValueError, r"Invalid new_data: 0 samples \(allowed: 1 or more\)"),
    ],
)
def test_inputs_that_cannot_be_replayed_are_named_and_change_nothing(x, error, message):
    buffer = GaussianBuffer(50, stored=5)
    buffer.update_from_dataset(inputs_of(torch.rand(20, 10)))
    before = pickle.dumps(buffer)
    with pytest.raises(error, match=message):
        buffer.update_from_dataset(inputs_of(x, 1))
    assert pickle.dumps(buffer) == before


def test_a_constant_class_works_without_a_warning():
    buffer = GaussianBuffer(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.update_from_dataset(inputs_of(torch.full((40, 12), 3.0)))
        buffer.update_from_dataset(inputs_of(torch.full((40, 12), 1e15), 1))
    x, y, _ = buffer.buffer.read_batch(list(range(len(buffer.buffer))))
    assert torch.equal(x[y == 0], torch.full_like(x[y == 0], 3.0)) and set(y.tolist()) == {0, 1}


def test_a_bound_that_the_means_alone_exceed_is_named(permuted3):
    buffer = GaussianBuffer(max_bytes=np.int64(20 * MEAN))
    for experience in permuted3.train_stream[:2]:
        buffer.post_adapt(None, experience)
    assert components(buffer) == [[0]] * 20
    with pytest.raises(ValueError, match=r"Invalid max_bytes value: 31360 \(allowed for 30 classes: 47040 or more"):
        buffer.post_adapt(None, permuted3.train_stream[2])
    assert len(buffer.classes) == 20 and len(buffer.buffer) > 0


def test_gaussians_are_merged_as_classes_come(split5):
    buffer, numbers = GaussianBuffer(max_bytes=60_000), []
    for experience in split5.train_stream:
        buffer.post_adapt(None, experience)
        numbers.append(len(buffer.classes[0]))
    assert numbers == [4, 3, 2, 1, 1]
    assert [g.label for known in buffer.classes for g in known] == list(range(10))
    assert sum(g.samples for known in buffer.classes for g in known) == 5 * 600


@pytest.mark.parametrize(
    "max_size, stored", [(1, 0), (7, 0), (11, 0), (500, 0), (15, 5), (40, 39)]
)
def test_it_never_has_more_rows_than_its_size(split5, max_size, stored):
    buffer = remembering(split5, max_size=max_size, stored=stored)
    assert 0 < len(buffer.buffer) <= max_size
    labels = [int(y) for _, y, _ in buffer.buffer]
    if max_size - stored >= 10:
        assert set(labels) == set(range(10))  # no class is forgotten
    buffer.resize(None, 3)
    assert 0 < len(buffer.buffer) <= 3


def test_its_own_size_is_the_only_one_to_give():
    buffer = GaussianBuffer(300)
    plugin = buffer.replay_plugin(batch_size_mem=16)
    assert plugin.storage_policy is buffer and plugin.mem_size == 300 and plugin.batch_size_mem == 16


def test_it_is_updated_from_a_dataset_as_avalanches_buffers_are(split2):
    told, shown = GaussianBuffer(stored=20), remembering(split2, 1, stored=20)
    told.update_from_dataset(split2.train_stream[0].dataset)
    torch.testing.assert_close(told.classes[2][1].mean, shown.classes[2][1].mean, rtol=0, atol=0)
    assert told.state_bytes == shown.state_bytes and len(told.buffer) == len(shown.buffer)


def without_task_labels(n=400):
    """Avalanche's own benchmark: pairs of input and label."""
    y = torch.arange(n) % 8
    data = TensorDataset(torch.randn(n, 20) + 5 * torch.nn.functional.one_hot(y, 20), y)
    data.targets = y.tolist()
    data = as_classification_dataset(data)
    return class_incremental_benchmark({"train": data, "test": data}, num_experiences=2)


@pytest.mark.parametrize("stored", [0, 10])
def test_samples_need_no_task_label(stored):
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(20, 8), Seen()
    buffer = GaussianBuffer(40, stored=stored)
    strategy = strategy_of(model, [SelectivePlasticityPlugin(), buffer.replay_plugin(batch_size_mem=16), seen])
    benchmark = without_task_labels()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    assert {len(row) for row in buffer.buffer} == {2} and set(buffer.buffer.targets.uniques) == set(range(8))
    labels = torch.cat(seen.labels)
    assert len(labels) and set(labels.tolist()) == set(benchmark.train_stream[0].classes_in_this_experience)
    assert (torch.cat(seen.replayed).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_are_new_in_each_epoch_with_any_number_of_workers(split2, workers):
    buffer = remembering(split2, 1, max_size=60).buffer
    epochs = []
    for _ in range(2):
        torch.manual_seed(3)
        loader = DataLoader(buffer, batch_size=10, num_workers=workers, collate_fn=buffer.collate_fn)
        epochs.append([torch.cat([x for x, *_ in loader]).flatten(1) for _ in range(2)])
    assert torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][1], epochs[1][1])  # with the same seed
    assert len(torch.cat(epochs[0]).unique(dim=0)) == 2 * len(buffer)  # no two are the same


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_draws_have_the_samples_data_type_and_not_the_default_one(split2, dtype):
    torch.set_default_dtype(torch.float16)
    try:
        torch.manual_seed(0)
        assert remembering(split2, 1).buffer.read_batch([0, 1])[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    x, y, _ = split2.train_stream[0].dataset.read_batch(list(range(100)))
    buffer = GaussianBuffer(20)
    buffer.update_from_dataset(TensorClassificationDataset.from_source(TensorSource(x.to(dtype), y)))
    assert buffer.buffer.read_batch([0, 1])[0].dtype == dtype


def test_its_length_follows_what_the_components_explain(split2):
    rough, fine = remembering(split2, 1, max_bytes=20_000), remembering(split2, 1, max_bytes=400_000)
    assert 0.4 * 2000 < len(rough.buffer) < 0.75 * 2000
    assert 0.9 * 2000 < len(fine.buffer) <= 2000
    fine.resize(None, 50)
    assert 30 < len(fine.buffer) <= 50
    assert set(fine.buffer.targets.uniques) == set(range(5))


def test_draws_are_new_in_each_batch_and_the_same_in_each_run(split2):
    first, again = remembering(split2, 1), remembering(split2, 1)
    torch.manual_seed(0)
    some = [first.buffer.read_batch([0, 1, 500]) for _ in range(2)]
    assert not torch.equal(some[0][0], some[1][0]) and torch.equal(some[0][1], some[1][1])
    torch.manual_seed(0)
    for batch in some:
        assert torch.equal(again.buffer.read_batch([0, 1, 500])[0], batch[0])


def test_no_sample_is_kept(split2):
    """Nothing in it, down to the last tensor, is as large as the images it was shown."""
    buffer = remembering(split2, 1)
    experience = split2.train_stream[0].dataset
    stored = pickle.dumps(buffer)
    assert len(stored) < len(experience) * 784 * 4 / 5
    image = experience.read_batch([0])[0].flatten()
    assert image.numpy().tobytes() not in stored and image.half().numpy().tobytes() not in stored


def test_stored_samples_stand_beside_what_is_drawn(split5):
    torch.manual_seed(0)
    buffer = remembering(split5, 3, max_size=2060, stored=60)
    drawn = remembering(split5, 3)
    assert len(buffer.buffer) == len(drawn.buffer) + 60
    x, y, _ = buffer.buffer.read_batch(list(range(len(buffer.buffer))))
    assert y[-60:].unique().tolist() == list(range(6))
    everything = torch.cat([images_of(split5.train_stream[label // 2], label) for label in range(6)])
    nearest = torch.cdist(x.flatten(1), everything).min(1).values
    assert nearest[-60:].max() < 0.2 < nearest[:-60].min()
    for experience in range(3):  # as many of each
        assert int((y[-60:] // 2 == experience).sum()) == 20
    assert buffer.state_bytes == drawn.state_bytes  # the Gaussians' alone


class Seen(SupervisedPlugin):
    """The replayed part of each mini-batch."""

    def __init__(self):
        super().__init__()
        self.replayed, self.labels = [], []

    def before_forward(self, strategy, **kwargs):
        n = stream_rows(strategy)
        self.replayed.append(strategy.mb_x[n:].clone())
        self.labels.append(strategy.mb_y[n:].clone())


def trained(benchmark, experiences=2):
    model, seen = mlp(), Seen()
    plugins = [
        SelectivePlasticityPlugin(),
        GaussianBuffer(200).replay_plugin(batch_size_mem=32),
        seen,
    ]
    strategy = strategy_of(model, plugins, criterion=JointReplayLoss(OneHotMSELoss()))
    for experience in benchmark.train_stream[:experiences]:
        strategy.train(experience)
    return strategy, seen


def test_beside_the_plugin_drawn_samples_are_replayed(split5):
    strategy, seen = trained(split5, 3)
    replayed, labels = torch.cat(seen.replayed[38:]), torch.cat(seen.labels[38:])  # in the third experience
    assert set(labels.tolist()) == {0, 1, 2, 3} and replayed[0].shape == (1, 28, 28)
    for label in range(4):
        of_it = images_of(split5.train_stream[label // 2], label).mean(0)
        assert torch.corrcoef(torch.stack([replayed[labels == label].flatten(1).mean(0), of_it]))[0, 1] > 0.95
    assert torch.equal(weights(strategy.model), weights(trained(split5, 3)[0].model))
    accuracy = strategy.eval(split5.test_stream[:3])  # without an evaluator: it runs
    assert accuracy is not None


def test_it_keeps_what_training_without_it_forgets(split2):
    def kept(plugins):
        model = mlp()
        strategy = strategy_of(model, plugins, epochs=4)
        for experience in split2.train_stream:
            strategy.train(experience)
        model.eval()
        x, y, _ = split2.test_stream[0].dataset.read_batch(list(range(200)))
        return float((model(x).argmax(1) == y).float().mean())

    assert kept([]) < 0.1
    assert kept([GaussianBuffer(500).replay_plugin()]) > 0.6


def test_a_task_label_is_drawn_with_its_classes(split2):
    tasks = [
        TensorClassificationDataset.from_source(
            TensorSource(*e.dataset.read_batch(list(range(200)))[:2]), e.current_experience
        )
        for e in split2.train_stream
    ]
    buffer = remembering(benchmark_of(tasks, tasks))
    _, labels, task_labels = buffer.buffer.read_batch(list(range(len(buffer.buffer))))
    assert torch.equal(task_labels, labels // 5)


def test_beside_avalanches_own_datasets_which_are_read_sample_by_sample(split2):
    tasks = []
    for experience in split2.train_stream:
        x, y, _ = experience.dataset.read_batch(list(range(200)))
        data = TensorDataset(x, y)  # whose labels are tensors
        data.targets = y.tolist()
        tasks.append(_make_taskaware_classification_dataset(data, task_labels=0))
    seen = Seen()
    replay = GaussianBuffer(200).replay_plugin(batch_size_mem=16)
    model = mlp()
    strategy = strategy_of(model, [SelectivePlasticityPlugin(), replay, seen], batch=16)
    for experience in benchmark_of(tasks, tasks).train_stream:
        strategy.train(experience)
    replayed, labels = torch.cat(seen.replayed[13:]), torch.cat(seen.labels[13:])
    assert len(replayed) > 190 and replayed[0].shape == (1, 28, 28) and set(labels.tolist()) == set(range(5))
    assert len(replayed.unique(dim=0)) == len(replayed)
    assert weights(model).isfinite().all()


def test_experiences_of_another_kind(split2):
    class Experience:
        def __init__(self, dataset):
            self.dataset = dataset

    x, y, t = split2.train_stream[0].dataset.read_batch(list(range(60)))
    plain = GaussianBuffer()  # an Avalanche dataset over any other, read sample by sample
    plain.post_adapt(None, Experience(AvalancheDataset([TensorDataset(x, y, t)])))
    own = GaussianBuffer()
    own.post_adapt(None, Experience(TensorClassificationDataset.from_source(TensorSource(x, y))))
    assert plain.state_bytes == own.state_bytes and len(plain.buffer) == len(own.buffer)

    with pytest.raises(TypeError, match=r"Invalid targets: shape \(60,\), torch.float32 .* class"):
        GaussianBuffer().post_adapt(None, Experience(AvalancheDataset([TensorDataset(x, y.float(), t)])))
    before = copy.deepcopy(own.classes)
    bad = x.clone()
    bad[3, 0, 5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        own.post_adapt(None, Experience(AvalancheDataset([TensorDataset(bad, y, t)])))
    assert len(own.classes) == len(before)
