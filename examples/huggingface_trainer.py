"""The gate in Hugging Face's Trainer: a small BERT learns two groups of token classes, one after the other.

    pip install 'avalanche-sp[huggingface]'
    python examples/huggingface_trainer.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from avalanche_sp.integrations.huggingface import SelectivePlasticityCallback

CLASSES, LENGTH, WORDS = 4, 12, 40


def sentences(classes, count, seed):
    """Sentences of random words, of which the words of the sentence's class are the most frequent."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        label = classes[i % len(classes)]
        words = torch.randint(WORDS, (LENGTH,), generator=generator)
        topic = 10 * label + torch.randint(10, (LENGTH,), generator=generator)
        chosen = torch.rand(LENGTH, generator=generator) < 0.8
        rows.append({"input_ids": torch.where(chosen, topic, words), "labels": label})
    return rows


def accuracy(model, rows):
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    return 100 * float((logits.argmax(1) == torch.tensor([row["labels"] for row in rows])).float().mean())


def run(gated):
    """Accuracy on the first and the second group of classes after both were trained, one after the other."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=LENGTH, num_labels=CLASSES, hidden_dropout_prob=0.0,
        )
    )  # fmt: skip
    callbacks = [SelectivePlasticityCallback()] if gated else []
    with tempfile.TemporaryDirectory() as folder:
        for group in ((0, 1), (2, 3)):
            arguments = TrainingArguments(
                folder, num_train_epochs=3, per_device_train_batch_size=16, learning_rate=2e-3, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=1.0,
            )  # fmt: skip
            Trainer(model, arguments, train_dataset=sentences(group, 1280, seed=group[0]), callbacks=callbacks).train()
    return [accuracy(model, sentences(group, 200, seed=9 + group[0])) for group in ((0, 1), (2, 3))]


def main():
    for gated in (False, True):
        old, new = run(gated)
        print(f"{'with' if gated else 'without'} the gate: first classes {old:.1f}%, new classes {new:.1f}%")


if __name__ == "__main__":
    main()
