"""The gate in other trainers, and in a loop of one's own: the examples, with small models made on the spot."""

import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from avalanche_sp import split_mnist

from conftest import MNIST, ROOT, mlp


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.mark.slow
@pytest.mark.parametrize("name, library", [("huggingface_trainer", "transformers"), ("lightning_trainer", "lightning")])
def test_a_trainer_keeps_the_first_classes_and_learns_the_new_ones(name, library):
    pytest.importorskip(library)
    example = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old_alone, _ = example.run(gated=False)
        old, new = example.run(gated=True)
    assert old > old_alone + 50
    assert new > 65


def test_a_plain_loop_keeps_the_first_digits_and_learns_the_new_ones():
    example = importlib.import_module("plain_loop")
    benchmark = split_mnist(2, dataset_root=MNIST)
    tasks, test = example.tasks_of(benchmark.train_stream, 1000), example.tasks_of(benchmark.test_stream, 300)
    (forgotten, _), (old, new) = (example.train(tasks, test, gated) for gated in (False, True))
    assert old > forgotten + 50
    assert new > 70


@pytest.mark.slow
def test_a_run_that_lightning_resumes_after_its_first_epoch_is_consolidated():
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    from avalanche_sp.integrations.lightning import SelectivePlasticityCallback

    model = mlp()
    x, y, _ = split_mnist(5, dataset_root=MNIST).train_stream[0].dataset.read_batch(list(range(96)))
    loader = DataLoader(TensorDataset(x, y), 32)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01)]
    trainer = SimpleNamespace(
        optimizers=optimizers, train_dataloader=loader, current_epoch=1, precision_plugin=plugins.Precision()
    )
    callback = SelectivePlasticityCallback(torch.nn.functional.cross_entropy)
    callback.on_train_start(trainer, model)
    callback.on_train_epoch_start(trainer, model)
    callback.on_train_end(trainer, model)
    assert callback.gate.memory.samples == 96
