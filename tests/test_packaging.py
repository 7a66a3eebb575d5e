"""The distributions that are built from a checkout: their files, and that it works where the checkout is not."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow

NOT_COPIED = (".*", "build", "dist", "results", "_build", "*.egg-info", "__pycache__", "train-*", "*-images-*")

SMOKE = """
import sys
from pathlib import Path

import torch
from avalanche.training import Naive

import avalanche_sp
from avalanche_sp.data import TensorClassificationDataset, TensorSource, benchmark_of

assert Path(avalanche_sp.__file__).is_relative_to(sys.argv[1]), avalanche_sp.__file__
torch.manual_seed(0)
data = [TensorClassificationDataset.from_source(TensorSource(torch.rand(8, 4), torch.arange(8) % 2)) for _ in range(2)]
model = torch.nn.Linear(4, 2)
plugin = avalanche_sp.SelectivePlasticityPlugin()
strategy = Naive(
    model=model,
    optimizer=avalanche_sp.SelectivePlasticityOptimizer(model.parameters()),
    criterion=avalanche_sp.OneHotMSELoss(),
    train_mb_size=8,
    plugins=[plugin],
    evaluator=None,
)
for experience in benchmark_of(data, data).train_stream:
    before = model.weight.detach().clone()
    strategy.train(experience)
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()
assert len(plugin.layers) == 1
"""


def run(*command, cwd, **env):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of an sdist and of the wheel that is built from it, in a copy of the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_COPIED))
    assert list(checkout.rglob("*-ubyte")) and list(checkout.glob("tests/*.py"))  # what might slip in
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", checkout, cwd=folder)
    return folder / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {PurePosixPath(name) for name in archive.namelist()}
    package = {PurePosixPath(p.relative_to(ROOT).as_posix()) for p in (ROOT / "avalanche_sp").rglob("*.py")}
    package.add(PurePosixPath("avalanche_sp/py.typed"))
    metadata = {name for name in names if name.parts[0].endswith(".dist-info")}
    assert names - metadata == package
    assert "LICENSE" in {name.name for name in metadata}


def test_the_sdist_holds_no_data_tests_or_benchmarks(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = [PurePosixPath(*PurePosixPath(m.name).parts[1:]) for m in archive.getmembers() if m.isfile()]
    assert {f.parts[0] for f in files if len(f.parts) > 1} == {"avalanche_sp", "avalanche_sp.egg-info"}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= {str(f) for f in files}


def test_the_installed_wheel_trains(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    run("-c", SMOKE, target, cwd=tmp_path, PYTHONPATH=str(target))


def test_the_notebooks_first_cell_installs_what_is_missing(dist, tmp_path):
    """The notebook away from its checkout, as in Colab, with the address of a wheel."""
    (wheel,) = dist.glob("*.whl")
    notebook = json.loads((ROOT / "notebooks" / "demo_selective_plasticity.ipynb").read_text())
    cell = "".join(next(c["source"] for c in notebook["cells"] if c["cell_type"] == "code"))
    assert cell.count('PACKAGE = ".."\n') == 1
    run("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    # All packages that are installed here, except a link to a checkout: no .pth file is read there.
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))
    python = Path(sysconfig.get_path("scripts", vars=paths)) / "python"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for address in ("..", str(wheel)):
        script = cell.replace('PACKAGE = ".."', f"PACKAGE = {address!r}")
        (tmp_path / "cell.ipy").write_text(script + "\nimport avalanche_sp\nprint(avalanche_sp.__file__)")
        command = [python, "-m", "IPython", "--no-banner", "cell.ipy"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        if address == "..":
            assert "Invalid PACKAGE: \"..\" is no checkout here" in done.stdout + done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(site), done.stdout + done.stderr
