"""What the README says is what the code and the result files say."""

import json
import re
import sys

import pytest

import avalanche_sp

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from harness.jobs import read_results  # noqa: E402
from harness.overview import overview  # noqa: E402
from harness.report import summarize, table, title  # noqa: E402
from tables import DOCUMENTS, updated  # noqa: E402

README = ROOT / "README.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_in_documents_are_the_commands(document):
    text = document.read_text()
    assert text == updated(text)
    assert text.count("<!-- table:") == text.count("<!-- end of table -->")


RESULTS = sorted((ROOT / "docs" / "results").rglob("results.jsonl"))


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.parent.name)
def test_a_committed_table_is_that_of_the_committed_results(results):
    records, folder = read_results(results), results.parent
    assert json.loads((folder / "summary.json").read_text()) == summarize(records)
    text = (folder / "table.md").read_text()
    assert title(records) in text and table(summarize(records)) in text


def test_the_overview_is_that_of_the_committed_results():
    results = ROOT / "docs" / "results"
    text = (results / "overview.md").read_text()
    assert text == overview(results)
    for strategy in ("sp-both", "naive-sgd"):
        row = next(line for line in text.splitlines() if f"`{strategy}`" in line)
        for folder in ("compare", "split5", "classes10"):
            assert f" {acc(folder, strategy)} ± " in row


def test_all_that_is_public_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    classic = set(avalanche_sp.classic.__all__)  # whose modules are there as a whole
    listed = set(re.findall(r"^\.\. auto(?:class|function):: avalanche_sp\.(\w+)$", reference, re.MULTILINE))
    assert listed == set(avalanche_sp.__all__) - classic


def acc(folder, strategy):
    summary = json.loads((ROOT / "docs" / "results" / folder / "summary.json").read_text())
    (mean,) = [s["acc"]["mean"] for s in summary if s["strategy"] == strategy]
    return f"{mean:.1f}"


def test_the_readmes_prose_quotes_the_results():
    text = README.read_text()
    opening = re.sub(r"<!-- table.*?<!-- end of table -->", "", text.split("\n## ")[0], flags=re.DOTALL)
    after = text.split("**Five tasks of two classes**")[1].split("\n\n")[0]
    for strategy in ("sp", "sp-both", "sp-gaussian", "naive-sgd", "ewc", "rf-ridge"):
        assert acc("compare", strategy) in opening
    for strategy in ("sp", "sp-both", "si", "mas", "lwf", "gpm", "owm", "replay-joint", "sp-replay", "joint"):
        assert re.search(rf"`{strategy}`( has)?\s+{acc('split5', strategy)}", after), strategy
    for folder in ("split5", "permuted10k_no_replay"):
        assert acc(folder, "rf-ridge") in after
    assert all(acc("permuted10k_no_replay", strategy) in opening for strategy in ("sp-both", "joint"))
    section = text.split("## The optimizer")[1].split("\n## ")[0]
    study = json.loads((ROOT / "docs" / "results" / "permuted10k" / "summary.json").read_text())
    for strategy in {s["strategy"] for s in study} - {"sp-optimizer", "sp-consolidated-adam"}:
        assert re.search(rf"`{strategy}`\s+{acc('permuted10k', strategy)}", section), strategy
    named = ("sp-both", "sp", "mas", "sp-consolidated", "ewc", "si", "naive-sgd", "gate-constant", "gate-random")
    for strategy in named:
        assert re.search(rf"`{strategy}`\s+{acc('permuted60k', strategy)}", section), strategy
    overhead = json.loads((ROOT / "docs" / "results" / "overhead" / "overhead.json").read_text())
    ours = [overhead[part]["rows"][1] for part in ("step", "large step", "training step")]
    assert {row["name"] for row in ours} == {"SelectivePlasticityOptimizer"}
    assert all(f"{row['ratio']:.2f} times" in text for row in ours)
    for part in ("plugin step", "plugin epoch"):
        assert all(f"{row['ratio']:.2f}" in text for row in overhead[part]["rows"] if "Plugin" in row["name"])
    for folder in ("permuted10k_no_replay", "compare", "split5"):
        assert acc(folder, "sp") in section and acc(folder, "sp-both") in section


def test_the_readmes_lines_of_use_run(split2):
    """The block as a reader pastes it, after what an Avalanche script has anyway."""
    import torch
    from torch import nn

    from avalanche_sp import SelectivePlasticityPlugin

    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    names = {"model": model, "torch": torch}
    exec(block, names)
    for experience in split2.train_stream:
        names["strategy"].train(experience)
    (plugin,) = [p for p in names["strategy"].plugins if isinstance(p, SelectivePlasticityPlugin)]
    assert plugin.layers
    assert all("consolidated" in state for state in names["strategy"].optimizer.state.values())


def test_no_file_is_longer_than_it_should_be():
    for folder in ("avalanche_sp", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 450, file
