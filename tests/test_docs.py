"""What the README says is what the code and the result files say."""

import json
import re

import pytest

import avalanche_sp
import avalanche_sp.data
import avalanche_sp.gate
import tables
from harness.studies import STUDIES

from conftest import ROOT

README = ROOT / "README.md"


def test_all_that_is_public_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    builders = set(avalanche_sp.data.__all__)  # whose modules are there as a whole
    names = re.findall(r"^\.\. auto(?:class|function):: avalanche_sp\.(?:gate\.)?(\w+)$", reference, re.MULTILINE)
    assert set(names) >= set(avalanche_sp.__all__) - builders
    assert set(names) == (set(avalanche_sp.__all__) - builders) | set(avalanche_sp.gate.__all__) - {"ChangeDetector"}


@pytest.fixture(scope="module")
def acc():
    """Mean ACC of a strategy in a study of the stored results, as documents show it."""
    frame = tables.stored()
    selected = {name: STUDIES[name].select(frame).groupby("strategy")["acc"].mean() for name in STUDIES}
    return lambda study, strategy: f"{selected[study][strategy]:.1f}"


def test_the_readmes_prose_quotes_the_results(acc):
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
    for strategy in {row.strategy for row in STUDIES["permuted10k"].rows} - {"sp-optimizer", "sp-consolidated-adam"}:
        assert re.search(rf"`{strategy}`\s+{acc('permuted10k', strategy)}", section), strategy
    named = ("sp-both", "sp", "mas", "sp-consolidated", "ewc", "si", "naive-sgd", "gate-constant", "gate-random")
    for strategy in named:
        assert re.search(rf"`{strategy}`\s+{acc('permuted60k', strategy)}", section), strategy
    overhead = json.loads((ROOT / "docs" / "results" / "overhead.json").read_text())
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
