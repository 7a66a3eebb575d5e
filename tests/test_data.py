"""The benchmarks' data sets: the shipped ones, and the readers of downloads on small files of the same format."""

import hashlib
import pickle
import re

import numpy as np
import pytest
import torch
from avalanche.benchmarks import datasets
from PIL import Image
from torchvision.datasets import CIFAR10

from harness.build import build_model
from harness.cli import ClassIncremental, comparison
from harness.data import DATA, FOLDER, parts_of
from harness.networks import build_network
from harness.run import build_benchmark, execute
from harness.settings import BENCHMARKS, NETWORKS, Run, network_title, title_of

from conftest import sliced

SHIPPED = [name for name, data in DATA.items() if data.shipped]
OTHERS = ["cnn", "slim-resnet18", "vit"]


def images_of(name, root=None):
    return [part.read() for part in parts_of(name, root)]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_data_set_is_what_is_written_of_it(name):
    data = DATA[name]
    (train, train_labels, (mean, std)), (test, test_labels, _) = images_of(name)
    for images, labels in ((train, train_labels), (test, test_labels)):
        assert images.shape[1:] == data.shape and len(images) == len(labels) and images.dtype == torch.uint8
        assert labels.unique().tolist() == list(range(data.classes)) and labels.dtype == torch.int64
        assert len(labels.bincount().unique()) == 1 or name == "mnist"  # as many of each class
    pixels = train.float() / 255
    assert (mean.item(), std.item()) == pytest.approx((pixels.mean().item(), pixels.std().item()), abs=2e-4)
    sums = dict(re.findall(r"\| (\S+) \| ([0-9a-f]{32}) \|", (FOLDER / name / "README.md").read_text()))
    assert sums and "icence" in (FOLDER / name / "README.md").read_text()
    for file, expected in sums.items():
        assert hashlib.md5((FOLDER / name / file).read_bytes()).hexdigest() == expected


@pytest.mark.parametrize("benchmark", ["permuted-mnist", "split-glyphs"])
def test_pixels_are_between_0_and_1_if_that_is_asked_for(benchmark):
    def images(**settings):
        stream = build_benchmark(Run(benchmark, "naive-sgd", 2, **settings)).train_stream
        return stream[1].dataset.read_batch(list(range(100)))[0]

    data, asked = DATA[benchmark.partition("-")[2]], images(pixels="0-1")
    assert asked.min() == 0 and asked.max() == 1
    torch.testing.assert_close(images(), (asked - data.mean[0]) / data.std[0])


def small_cifar(root, folder, batches, meta, labels, classes):
    """Two images a class in each batch, in CIFAR's format: red, green and blue planes of 32 x 32, row by row."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    rng, count = np.random.default_rng(0), 2 * classes
    for batch in batches:
        content = {"data": rng.integers(0, 256, (count, 3072), np.uint8), labels: [i % classes for i in range(count)]}
        (root / folder / batch).write_bytes(pickle.dumps(content))
    (root / folder / meta).write_bytes(pickle.dumps({"label_names": [], "fine_label_names": []}))


def unchecked(monkeypatch):
    """torchvision's readers without their checks of the whole files' sums."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)


def small_cifar10(root):
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    small_cifar(root, "cifar-10-batches-py", batches, "batches.meta", "labels", 10)


def small_cifar100(root):
    small_cifar(root, "cifar-100-python", ["train", "test"], "meta", "fine_labels", 100)


def picture(path, side, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


def small_tiny_imagenet(root):
    """A training image of each of the 200 classes, and a test image."""
    folder, names = root / "tiny-imagenet-200", [f"n{i:08d}" for i in range(200)]
    for i, name in enumerate(names):
        picture(folder / "train" / name / "images" / f"{name}_0.JPEG", 64, i)
        picture(folder / "val" / "images" / f"val_{i}.JPEG", 64, 1000 + i)
    (folder / "wnids.txt").write_text("\n".join(names))
    rows = (f"val_{i}.JPEG\t{name}\t0\t0\t9\t9\n" for i, name in enumerate(names))
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))


def small_core50(root):
    """An image of each of the 50 objects in each of the eight training sessions, and in the tests."""
    paths = [f"s{session}/o{i + 1}/C_{i}.png" for session in range(9) for i in range(50)]
    for number, path in enumerate(paths):
        picture(root / "core50_32x32" / path, 32, number)
    (root / "batches_filelists").mkdir()
    parts = [list(range(50 * session, 50 * session + 50)) for session in range(9)]
    content = {"paths": paths, "labels": {"ni": [[list(range(50))] * 9]}, "LUP": {"ni": [parts]}}
    for name, value in {**content, "labels2names": {}}.items():
        (root / f"{name}.pkl").write_bytes(pickle.dumps(value))


DOWNLOADS = {"cifar10": small_cifar10, "cifar100": small_cifar100, "tiny-imagenet": small_tiny_imagenet}
DOWNLOADS["core50"] = small_core50
ARGUMENTS = ["--network", "cnn", "--batch-size", "2", "--seeds", "1", "--strategies", "naive-sgd", "--set", "lr=1e-4"]


def test_every_data_set_is_shipped_or_its_download_tested():
    assert {*SHIPPED, *DOWNLOADS} == set(DATA)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_downloaded_data_set_is_read_and_trained_on(name, tmp_path, monkeypatch):
    unchecked(monkeypatch)
    monkeypatch.setattr(datasets.CORe50Dataset, "_create_cat_filelists", lambda self: None)
    DOWNLOADS[name](tmp_path)
    data = DATA[name]
    assert (tmp_path / data.file).exists()
    for images, labels, _ in images_of(name, tmp_path):
        assert images.shape[1:] == data.shape and images.dtype == torch.uint8
        assert labels.unique().tolist() == list(range(data.classes)) and len(labels) == len(images)
    (run,) = comparison(ClassIncremental, [*ARGUMENTS, "--data", name, "--dataset-root", str(tmp_path)], "").runs()
    row = execute(run, tmp_path, curve=False)
    assert row["settings"]["benchmark"] == f"split-{name}" and np.shape(row["figures"]["accuracy_matrix"]) == (2, 2)


def test_download_fetches_what_is_not_there(tmp_path, monkeypatch):
    unchecked(monkeypatch)
    monkeypatch.setattr(CIFAR10, "download", lambda self: small_cifar10(self.root))
    arguments = [*ARGUMENTS, "--data", "cifar10", "--dataset-root", str(tmp_path / "new")]
    with pytest.raises(SystemExit):
        comparison(ClassIncremental, arguments, "")
    comparison(ClassIncremental, [*arguments, "--download"], "").fetch()
    assert len(images_of("cifar10", tmp_path / "new")[0][0]) == 100
    assert comparison(ClassIncremental, arguments, "").runs()


def test_cifars_planes_are_channels(tmp_path, monkeypatch):
    unchecked(monkeypatch)
    small_cifar10(tmp_path)
    written = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"]
    images = images_of("cifar10", tmp_path)[0][0]
    assert torch.equal(images[:20].flatten(1), torch.from_numpy(written))


def test_pixels_of_three_channels_move_together(tmp_path, monkeypatch):
    unchecked(monkeypatch)
    small_cifar10(tmp_path)
    source = build_benchmark(Run("permuted-cifar10", "naive-sgd", 1), tmp_path).test_stream[0].dataset
    x, labels, _ = source.read_batch([0, 1])
    data = DATA["cifar10"]
    pixels = x * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    found = {tuple(p) for p in (255 * pixels[0]).round().int().flatten(1).T.tolist()}
    kept = [{tuple(p) for p in image.int().flatten(1).T.tolist()} for image in images_of("cifar10", tmp_path)[1][0]]
    assert found in kept  # the same colours, at other places


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("data", ["glyphs", "cifar100", "tiny-imagenet"])
def test_every_network_is_for_every_size_and_number_of_classes(network, data):
    model = build_network(network, 1, data)
    assert model(torch.zeros(2, *DATA[data].shape)).shape == (2, DATA[data].classes)
    heads = build_network(network, 2, data)
    assert heads(torch.zeros(2, *DATA[data].shape), torch.tensor([0, 1])).shape == (2, DATA[data].classes // 2)


@pytest.mark.slow
@pytest.mark.parametrize("network", OTHERS)
@pytest.mark.parametrize("strategy", ["sp", "gpm"])
def test_other_networks_train_on_other_data(network, strategy, monkeypatch):
    from harness import run as runs

    few = sliced(build_benchmark(Run("split-glyphs", "sp", 19), None), 32, 20, 2)
    monkeypatch.setattr(runs, "build_benchmark", lambda run, root: few)
    run = Run("split-glyphs", strategy, 19, 1, 16, network=network, overrides={"lr": 0.01})
    figures = execute(run)["figures"]
    assert np.shape(figures["accuracy_matrix"]) == (2, 2) and figures["extra_memory_bytes"] > 0


def test_random_features_are_of_the_data_sets_size():
    model = build_model(Run("split-glyphs", "rf-ridge", 19))
    assert model[1].in_features == 784 and model[-1].out_features == 76


def test_titles_name_data_and_sizes():
    assert title_of("split-fashion-mnist") == "Split Fashion-MNIST" and title_of("permuted-mnist") == "Permuted MNIST"
    assert network_title("256-256", "split-cifar100") == "MLP 3072-256-256-100"
    assert network_title("256-256") == "MLP 784-256-256-10"
    assert len(set(map(title_of, BENCHMARKS))) == len(BENCHMARKS)
