"""Tensor-backed benchmarks against torchvision, against Avalanche's own, and against the slow route."""

import pickle

import pytest
import torch
from avalanche.benchmarks import PermutedMNIST, SplitMNIST, benchmark_with_validation_stream
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import MNIST as TorchvisionMNIST

from avalanche_sp import permuted_mnist, split_mnist
from avalanche_sp.data import TensorClassificationDataset, TensorSource, benchmark_of

from conftest import MNIST, mlp, strategy_of, weights


def all_of(dataset):
    return dataset.read_batch(list(range(len(dataset))))


def test_torchvision_and_avalanche_find_the_shipped_mnist_offline():
    assert len(TorchvisionMNIST(MNIST, train=True)) == 60000
    assert len(TorchvisionMNIST(MNIST, train=False)) == 10000
    assert len(SplitMNIST(2, dataset_root=MNIST).train_stream) == 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5])
def test_split_mnist_holds_every_image_once(n):
    benchmark = split_mnist(n, dataset_root=MNIST)
    raw = TorchvisionMNIST(MNIST, train=True)
    total = 0
    for e, experience in enumerate(benchmark.train_stream):
        x, y, t = all_of(experience.dataset)
        classes = set(range(10 * e // n, 10 * (e + 1) // n))
        assert set(y.tolist()) == set(experience.classes_in_this_experience) == classes
        assert experience.task_labels == [0] and not t.any()
        expected = int(sum((raw.targets == c).sum() for c in classes))
        assert len(x) == expected
        total += x.sum(dtype=torch.float64).item()
    expected = ((raw.data.double() / 255 - 0.1307) / 0.3081).mean().item()
    assert total / raw.data.numel() == pytest.approx(expected, abs=1e-6)
    assert sum(len(e.dataset) for e in benchmark.test_stream) == 10000


def assert_same_samples(ours, theirs):
    """Bit for bit, for the first fifty; Avalanche's come sorted by class, then in the order of the file."""
    source = ours._flat_data._datasets[0]
    order = sorted(range(len(ours)), key=lambda i: (int(source.labels[i]), int(source.rows[i])))
    assert len(ours) == len(theirs)
    for i, j in zip(order, range(50)):
        (x, y, t), (their_x, their_y, their_t) = ours[i], theirs[j]
        assert torch.equal(x, their_x) and y == their_y and t == their_t


def test_images_equal_avalanches_bit_for_bit():
    ours = split_mnist(2, dataset_root=MNIST).test_stream[1].dataset
    theirs = SplitMNIST(2, fixed_class_order=range(10), dataset_root=MNIST).test_stream[1].dataset
    assert_same_samples(ours, theirs)


@pytest.mark.slow
def test_permutations_equal_avalanches():
    ours = permuted_mnist(2, seed=3, dataset_root=MNIST)
    theirs = PermutedMNIST(2, seed=3, dataset_root=MNIST)
    for a, b in zip(ours.test_stream, theirs.test_stream):
        assert_same_samples(a.dataset, b.dataset)


def test_order_is_shuffled_fixed_by_the_seed_and_leaves_the_global_state_alone():
    state = torch.random.get_rng_state()
    first, same, other = (split_mnist(2, seed=s, dataset_root=MNIST).train_stream[0].dataset for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    y = all_of(first)[1]
    assert torch.equal(y, all_of(same)[1]) and not torch.equal(y, all_of(other)[1])
    assert (y.diff() != 0).float().mean() > 0.7  # five classes mixed: 80% of neighbours differ


def test_class_order_and_task_ids():
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    benchmark = split_mnist(5, class_order=order, return_task_id=True, dataset_root=MNIST)
    assert [e.classes_in_this_experience for e in benchmark.train_stream] == [[8, 9], [6, 7], [4, 5], [2, 3], [0, 1]]
    assert [e.task_label for e in benchmark.train_stream] == [0, 1, 2, 3, 4]
    assert benchmark.train_stream[3].dataset[0][2] == 3


def test_train_size_draws_anew_for_each_experience():
    benchmark = permuted_mnist(3, train_size=100, dataset_root=MNIST)
    rows = [set(e.dataset._flat_data._datasets[0].rows.tolist()) for e in benchmark.train_stream]
    assert [len(r) for r in rows] == [100, 100, 100]
    assert rows[0] != rows[1] != rows[2]
    assert len(benchmark.test_stream[0].dataset) == 10000


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: split_mnist(3), "Invalid n_experiences value: 3 (allowed: 1, 2, 5 or 10)"),
        (lambda: split_mnist("5"), "Invalid n_experiences value: '5' (allowed: 1, 2, 5 or 10)"),
        (lambda: split_mnist(5.0), "Invalid n_experiences value: 5.0 (allowed: 1, 2, 5 or 10)"),
        (lambda: split_mnist(2, class_order=[1, 2]), "Invalid class_order value: [1, 2]"),
        (lambda: permuted_mnist(0), "Invalid n_experiences value: 0 (allowed: an integer, 1 or more)"),
        (lambda: permuted_mnist("2"), "Invalid n_experiences value: '2' (allowed: an integer, 1 or more)"),
        (lambda: permuted_mnist(2, train_size=60001), "Invalid train_size value: 60001 (allowed: an integer, 1 to 60"),
        (lambda: permuted_mnist(2, train_size=1.5), "Invalid train_size value: 1.5 (allowed: an integer, 1 to 60000)"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_a_root_without_mnist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"Invalid dataset_root: no MNIST in {tmp_path}"):
        split_mnist(2, dataset_root=tmp_path)


# -- The fast route ----------------------------------------------------------------------------------------------


class SampleBySample(Dataset):
    """The same samples as plain items: what the slow route reads."""

    def __init__(self, dataset):
        self.x, self.y, _ = all_of(dataset)
        self.targets = self.y.tolist()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.targets[i]


def slow(benchmark):
    return benchmark_of(
        *(
            [_make_taskaware_classification_dataset(SampleBySample(e.dataset), task_labels=0) for e in stream]
            for stream in (benchmark.train_stream, benchmark.test_stream)
        )
    )


POLICIES = {
    "no replay": None,
    "default": lambda: None,
    "class-balanced": lambda: ClassBalancedBuffer(60),
    "reservoir": lambda: ReservoirSamplingBuffer(60),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_training_ends_in_the_weights_of_the_slow_route(permuted3, policy):
    results = []
    for benchmark in (permuted3, slow(permuted3)):
        model = mlp()
        plugins = [] if policy is None else [ReplayPlugin(60, storage_policy=policy())]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        strategy = strategy_of(model, plugins, optimizer=optimizer, criterion=nn.CrossEntropyLoss())
        torch.manual_seed(0)
        for experience in benchmark.train_stream:
            strategy.train(experience, num_workers=0)
            strategy.eval(benchmark.test_stream)
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.fixture
def dataset(split2):
    return split2.train_stream[0].dataset


def test_any_loader_reads_the_same_batches(dataset):
    x, y, t = all_of(dataset)
    for kwargs in ({}, {"collate_fn": dataset.collate_fn}, {"num_workers": 1}):
        batches = list(DataLoader(dataset, batch_size=250, **kwargs))
        assert [len(b[1]) for b in batches] == [250, 250, 100]
        for i, whole in enumerate((x, y, t)):
            assert torch.equal(torch.cat([b[i] for b in batches]), whole)


def test_a_sample_is_an_ordinary_one(dataset):
    x, y, t = dataset[3]
    assert x.shape == (1, 28, 28) and x.dtype == torch.float32
    assert isinstance(y, int) and t == 0
    sample = dataset[-1]
    assert len(sample) == 3 and sample[1] == dataset[len(dataset) - 1][1]
    assert len(list(dataset)) == len(dataset)
    with pytest.raises(IndexError):
        len(dataset[len(dataset)])
    assert len(dataset[10:20]) == 10


def test_subset_and_concat_keep_the_fast_route(split2):
    a, b = (e.dataset for e in split2.train_stream)
    mixed = a.subset([5, 3, 8]).concat(b.subset([7, 1]))
    assert isinstance(mixed, TensorClassificationDataset)
    x, y, _ = mixed.read_batch([4, 0, 2])
    for i, sample in enumerate((b[1], a[5], a[8])):
        assert torch.equal(x[i], sample[0]) and y[i] == sample[1]
    nested = mixed.subset([4, 2]).subset([1, 0]).concat(mixed)
    assert nested.read_batch(list(range(7)))[1].tolist() == [int(s[1]) for s in nested]
    assert nested._layout is not None


def test_transforms_are_applied_by_the_slow_route(dataset):
    flipped = dataset.replace_current_transform_group((lambda x: -x, None))
    x, y, _ = next(iter(DataLoader(flipped, batch_size=8)))
    plain = dataset.read_batch(list(range(8)))
    assert torch.equal(x, -plain[0]) and torch.equal(y, plain[1])
    assert torch.equal(dataset.read_batch([0])[0], plain[0][:1])  # the original is unaffected


def test_attributes_join_the_samples(dataset):
    numbered = dataset.update_data_attribute(
        "number", DataAttribute(list(range(len(dataset))), "number", use_in_getitem=True)
    )
    batch = next(iter(DataLoader(numbered, batch_size=8)))
    assert len(batch) == 4 and batch[3].tolist() == list(range(8))


def test_validation_streams_and_pickles_work(split2):
    benchmark = benchmark_with_validation_stream(split2, validation_size=0.25, seed=0)
    assert len(benchmark.valid_stream[0].dataset) == 150
    copied = pickle.loads(pickle.dumps(benchmark.train_stream[0].dataset))
    assert torch.equal(all_of(copied)[0], all_of(benchmark.train_stream[0].dataset)[0])


def test_a_source_shares_its_images():
    images, labels = torch.randn(5, 1, 2, 2), torch.arange(5)
    source = TensorSource(images, labels, rows=torch.tensor([4, 2]), pixels=torch.tensor([3, 2, 1, 0]))
    assert source.images is images
    x, y = source.gather(torch.tensor([1, 0, 1]))
    assert y.tolist() == [2, 4, 2]
    assert torch.equal(x[1].flatten(), images[4].flatten().flip(0))
