"""The gate in other trainers, and in a loop of one's own: the examples, with small models made on the spot."""

import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from avalanche_sp import SelectivePlasticityOptimizer, split_mnist
from avalanche_sp.gate import PlasticityGate

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
    optimizers = [SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)]
    trainer = SimpleNamespace(
        optimizers=optimizers, train_dataloader=loader, current_epoch=1, precision_plugin=plugins.Precision()
    )
    callback = SelectivePlasticityCallback(torch.nn.functional.cross_entropy)
    callback.on_train_start(trainer, model)
    callback.on_train_epoch_start(trainer, model)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizers[0].step()
    callback.on_train_end(trainer, model)
    assert callback.gate.memory.samples == 96
    assert all("consolidated" in optimizers[0].state[p] for p in model.parameters())


class Rows(IterableDataset):
    """Samples whose number nobody is told."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_lightnings_precisions_and_data_without_a_length(precision, tmp_path):
    lightning = pytest.importorskip("lightning")
    example = importlib.import_module("lightning_trainer")
    callback = example.SelectivePlasticityCallback(torch.nn.functional.cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = example.Classifier()
        for group in ((0, 1), (2, 3)):
            trainer = lightning.Trainer(
                max_epochs=1, accelerator="cpu", precision=precision, callbacks=[callback], logger=False,
                enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
            )  # fmt: skip
            trainer.fit(module, DataLoader(Rows(example.samples(group, 320, seed=0)), batch_size=32))
    assert callback.gate.memory.samples == 640 and callback.gate.memory.consolidations == 2


@pytest.mark.slow
def test_lightning_takes_one_loader(tmp_path):
    lightning = pytest.importorskip("lightning")
    example = importlib.import_module("lightning_trainer")
    loader = DataLoader(example.samples((0, 1), 64, seed=0), batch_size=32)
    callback = example.SelectivePlasticityCallback(torch.nn.functional.cross_entropy)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="Invalid train_dataloaders: .* one DataLoader"):
        warnings.simplefilter("ignore")
        lightning.Trainer(accelerator="cpu", callbacks=[callback], logger=False, default_root_dir=tmp_path).fit(
            example.Classifier(), {"a": loader, "b": loader}
        )


@pytest.mark.slow
def test_hugging_faces_data_without_a_length(tmp_path):
    transformers = pytest.importorskip("transformers")
    example = importlib.import_module("huggingface_trainer")
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=example.WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=example.LENGTH, num_labels=example.CLASSES,
        )
    )  # fmt: skip
    callback = example.SelectivePlasticityCallback(forward=lambda model, inputs: model(**inputs).logits)
    optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=16, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    data = Rows(example.sentences((0, 1), 80, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(
            model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)
        ).train()
    assert callback.gate.memory.samples == 80
    assert all("consolidated" in state for state in optimizer.state.values())


@pytest.mark.slow
def test_gpt2s_readout_of_the_last_token_before_the_padding_is_solved():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, num_labels=6, pad_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2ForSequenceClassification(config)

    def sentences(first):
        generator = torch.Generator().manual_seed(first)
        y = torch.randint(2, (300,), generator=generator) + first
        x = torch.randint(1, 64, (300, 12), generator=generator)
        x[:, 3], x[:, 5] = 10 + y, 20 + y
        x[torch.arange(12) >= torch.randint(7, 13, (300, 1), generator=generator)] = 0
        return list(zip(x.split(16), y.split(16)))

    def outputs(model, x):
        return model(input_ids=x, attention_mask=(x != 0).long()).logits

    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=0.002), torch.nn.CrossEntropyLoss()
    gate, tasks = PlasticityGate(model, optimizer, forward=outputs), [sentences(first) for first in (0, 2, 4)]
    for task in tasks:
        gate.prepare(task, criterion)
        for x, y in task * 4:
            optimizer.zero_grad()
            criterion(outputs(model, x), y).backward()
            optimizer.step()
        gate.consolidate(task, criterion)
    right = [torch.cat([outputs(model, x).argmax(1) == y for x, y in task]).float().mean() for task in tasks]
    assert min(right) > 0.65 and sum(right) / 3 > 0.8, right
