"""The demo notebook runs from an empty kernel, and the committed notebook is such a run."""

import base64
import json
import os

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "demo_selective_plasticity.ipynb"
SIZE = "IMAGES_A_TASK = None"
TESTS = "[experience.dataset for experience in benchmark.test_stream]"  # with fewer training images than all


def executed(images_a_task):
    """The notebook after a run in a kernel of its own, and the final accuracies of its runs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first, second, *_ = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.count(SIZE) == second.source.count(TESTS) == 1
    first.source = first.source.replace(SIZE, f"IMAGES_A_TASK = {images_a_task}")
    second.source = second.source.replace(TESTS, TESTS.replace(".dataset", ".dataset[:500]"))
    runs = ("naive", "gated", "replay_same", "replay_best", "replay_gated", "both_gates", "gaussians")
    pairs = ", ".join(f"{name}={name}['acc']" for name in runs)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps(dict({pairs})))"))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client.execute(env={**os.environ, "PYTHONPATH": path})  # raises where a cell does
    accuracies = json.loads(notebook.cells[-1].outputs[0].text)
    return notebook, accuracies


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def images(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def assert_clean(notebook):
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}  # no error
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} == {"stdout"}  # no warning


@pytest.mark.slow
def test_the_notebook_runs_with_few_images():
    notebook, accuracies = executed(1500)
    assert_clean(notebook)
    assert len(images(notebook)) == 9
    assert accuracies["gated"] > accuracies["naive"] + 30


@pytest.mark.slow
def test_the_notebook_runs_and_its_text_holds():
    notebook, accuracies = executed(None)
    assert_clean(notebook)
    assert len(images(notebook)) == 9
    assert accuracies["naive"] < 25
    assert min(accuracies["gated"], accuracies["both_gates"]) > 85
    assert accuracies["gaussians"] > accuracies["gated"]
    assert accuracies["replay_gated"] > max(accuracies["replay_same"], accuracies["replay_best"])


def test_the_committed_notebook_is_a_clean_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert_clean(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert SIZE in code[0].source
    assert len(images(notebook)) == 9
    second = images(notebook)[1]["data"]["image/png"]  # the picture of the README
    assert base64.b64decode(second) == (ROOT / "docs" / "forgetting.png").read_bytes()
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert all("/" not in output.text for output in outputs(notebook) if output.output_type == "stream")  # no paths
