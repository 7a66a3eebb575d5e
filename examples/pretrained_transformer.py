"""The gate with a pretrained transformer of Hugging Face, in a loop of your own.

    pip install 'avalanche-sp[huggingface]'
    python examples/pretrained_transformer.py

The transformer is made and pretrained on the spot, on sentences of random words. Put the name of yours in its place.
"""

import tempfile

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from avalanche_sp.gate import PlasticityGate

TOPICS, WORDS, LENGTH, MASK = 4, 40, 12, 0


def sentences(topics, count):
    """Word numbers and topics. Of ten words eight are of the sentence's topic."""
    y = torch.tensor(topics).repeat(count // len(topics))
    words = 1 + 10 * y[:, None] + torch.randint(10, (len(y), LENGTH))
    return torch.where(torch.rand(len(y), LENGTH) < 0.8, words, 1 + torch.randint(WORDS, words.shape)), y


def batches(x, y):
    return [(x[rows], y[rows]) for rows in torch.randperm(len(y)).split(16)]


def pretrain(folder):
    config = BertConfig(
        vocab_size=WORDS + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=TOPICS, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for x, _ in batches(*sentences(list(range(TOPICS)), 4000)):
        hidden = torch.rand(x.shape) < 0.15
        optimizer.zero_grad()
        model(x.masked_fill(hidden, MASK), labels=x.masked_fill(~hidden, -100)).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def fine_tune(folder, gated):
    """Accuracy on the first and on the second two topics, trained one after the other."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=TOPICS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    # The model returns an object; the gate needs the tensor of outputs.
    gate = PlasticityGate(model, optimizer, forward=lambda model, x: model(x).logits) if gated else None
    for topics in ([0, 1], [2, 3]):
        task = batches(*sentences(topics, 1280))
        if gate is not None:
            gate.prepare(task, criterion)
        for x, y in task:
            optimizer.zero_grad()
            criterion(model(x).logits, y).backward()
            optimizer.step()
        if gate is not None:
            gate.consolidate(task, criterion)
    model.eval()
    with torch.no_grad():
        tests = [sentences(topics, 400) for topics in ([0, 1], [2, 3])]
        return [100 * (model(x).logits.argmax(1) == y).float().mean().item() for x, y in tests]


def main():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(folder)
        for gated in (False, True):
            old, new = fine_tune(folder, gated)
            print(f"{'with' if gated else 'without'} the gate: first topics {old:.1f}%, new topics {new:.1f}%")


if __name__ == "__main__":
    main()
