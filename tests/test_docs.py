"""What the README says is what the code and the result files say."""

import re

import pytest
import torch

import avalanche_sp
import avalanche_sp.data
import avalanche_sp.gate
import tables
from harness.studies import FRONT, OTHERS, STUDIES

from conftest import MNIST, ROOT, sliced

README = ROOT / "README.md"


def test_all_that_is_public_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    builders = set(avalanche_sp.data.__all__)  # whose modules are there as a whole
    names = re.findall(r"^\.\. auto(?:class|function):: avalanche_sp\.(?:gate\.)?(\w+)$", reference, re.MULTILINE)
    assert set(names) >= set(avalanche_sp.__all__) - builders
    assert set(names) == (set(avalanche_sp.__all__) - builders) | set(avalanche_sp.gate.__all__) - {"ChangeDetector"}


@pytest.fixture(scope="module")
def stored():
    return tables.stored()


def test_the_readme_is_short():
    text = README.read_text()
    prose = re.sub(r"```.*?```|\]\(.*?\)|<!--.*?-->", "", text, flags=re.DOTALL)
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"\d[\d.,]*", prose)) <= 60


def test_the_readmes_claims_hold_in_the_stored_results(stored):
    """Those that its table does not show, and those about each column."""
    text = " ".join(README.read_text().split())
    columns = {
        name: study.select(stored).groupby("strategy")["acc"].mean().to_dict() for name, study in FRONT.items()
    }
    assert "ends above every other method of this kind that we ran, in each column (OWM on MNIST alone)" in text
    assert [name for name, acc in columns.items() if "owm" in acc] == ["Split MNIST", "Split MNIST, CNN with BatchNorm"]
    for name, acc in columns.items():
        assert all(acc["sp-both"] > acc[other] for other in OTHERS if other in acc), name
    assert "Gates and Gaussians together are level with Gaussians alone on Split MNIST, and above both controls" in text
    for name, acc in columns.items():
        assert acc["sp-gaussian"] > max(acc["rf-ridge"], acc["gaussian-replay"]), name
    assert columns["Split MNIST"]["sp-gaussian"] - columns["Split MNIST"]["gaussian-replay"] < 0.5
    cnn = columns["Split MNIST, CNN with BatchNorm"]
    assert "In the convolutional network the gates alone have the highest mean" in text
    assert max(cnn["sp"], cnn["sp-both"]) > max(cnn["sp-gaussian"], cnn["rf-ridge"], cnn["gaussian-replay"])
    assert "Where each task has new classes they can be better than the gates" in text
    split = [acc for name, acc in columns.items() if not name.startswith("Permuted")]
    assert sum(max(acc["rf-ridge"], acc["gaussian-replay"]) > acc["sp-both"] for acc in split) >= 2
    assert "gate + optimizer is better than both, and a little better than joint training" in text
    permuted = columns["Permuted MNIST"]
    assert permuted["sp-both"] > max(permuted["rf-ridge"], permuted["gaussian-replay"])
    assert 0 < permuted["sp-both"] - permuted["joint"] < 1
    assert "replay with our optimizer and without gates is then nearly as good" in text
    for name in ("buffers_split2", "buffers_split5"):
        runs = STUDIES[name].select(stored).groupby(["strategy", "replay_buffer"])["acc"].mean()
        assert runs["sp-replay", 1000] - runs["replay-adaptive", 1000] < 1, name
    assert "its gate did not help" in text
    runs = STUDIES["original_working_buffer"].select(stored).groupby("strategy")["acc"].mean()
    assert runs["legacy-sp-replay"] <= runs["legacy-control"]


def test_the_readmes_script_runs(split5, monkeypatch, capsys):
    """As it stands, on the first images of each task."""
    (script,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    asked = []

    def some(*arguments, **options):
        asked.append((arguments, options))
        return sliced(split5, 400, 100)

    monkeypatch.setattr(avalanche_sp, "split_mnist", some, raising=False)
    torch.manual_seed(0)
    exec(script, {})
    ((arguments, options),) = asked
    assert arguments == (5,) and (ROOT / options["dataset_root"]).samefile(MNIST)
    assert float(capsys.readouterr().out.split()[-1]) > 0.5  # 0.2 without the plugin
