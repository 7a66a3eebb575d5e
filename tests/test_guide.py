"""The guide's blocks of code, as a reader pastes them one after another, on small slices of MNIST."""

import re

import pytest
import torch
from avalanche.training.templates import SupervisedTemplate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avalanche_sp import SelectivePlasticityPlugin

from conftest import ROOT, sliced

GUIDE = (ROOT / "docs" / "guide.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def applied(diff, script):
    """The script with the diff's lines in it. A line with + comes after what stands before it in the diff."""
    lines, at = script.splitlines(), 0
    for change in diff.splitlines():
        if change.startswith("+"):
            lines.insert(at, change[1:])
            at += 1
        else:
            at = lines.index(change[1:], at)
            if change.startswith("-"):
                del lines[at]
            else:
                at += 1
    return "\n".join(lines)


@pytest.fixture
def names(split5, monkeypatch, tmp_path):
    """What a reader's interpreter holds, in a folder of its own, after nothing."""
    monkeypatch.setattr("avalanche.benchmarks.SplitMNIST", lambda n_experiences, seed: sliced(split5, 200, 50))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {}


def test_the_guides_script_runs_and_tensorboard_shows_the_openness(names, tmp_path):
    script, *others = blocks("python")
    (look,) = (block for block in others if "get_all_metrics" in block)
    (diff,) = blocks("diff")
    exec(applied(diff, script), names)
    exec(look, names)
    names["evaluator"].loggers[1].writer.flush()
    events = EventAccumulator(str(tmp_path / "tb_data"))
    events.Reload()
    for layer in ("features.0", "classifier", "mean"):
        shown = events.Scalars(f"GateOpenness/{layer}/train_phase/train_stream/Task000")
        assert [s.step for s in shown] == [6, 9, 12, 15]  # 200 images in whole batches of 64, from the second on
        assert all(0 < s.value < 1 for s in shown)
        assert len(events.Scalars(f"ClaimedRank/{layer}/train_phase/train_stream/Task000")) == 5
    assert names["iterations"] == [6, 9, 12, 15]
    assert names["openness"] == pytest.approx([s.value for s in shown])
    assert len((tmp_path / "accuracy.csv").read_text().splitlines()) == 6
    assert (tmp_path / "accuracy.png").stat().st_size > 0
    for measure in ("ACC", "BWT", "Forgetting", "LearningAccuracy"):
        assert len(events.Scalars(f"{measure}_Percent/eval_phase/test_stream")) == 1


def test_the_guides_script_runs_as_it_was(names):
    exec(blocks("python")[0], names)


def test_the_guides_other_strategies_train_and_evaluate(names):
    script, *others = (block for block in blocks("python") if "get_all_metrics" not in block)
    (diff,) = blocks("diff")
    exec(applied(diff, script), names)
    gated = []
    for block in others:
        exec(block, names)
        strategy, benchmark = names["strategy"], names["benchmark"]
        assert isinstance(strategy, SupervisedTemplate) and strategy.model is names["model"]
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)
        (plugin,) = [p for p in strategy.plugins if isinstance(p, SelectivePlasticityPlugin)]
        gated.append(list(plugin.layers))
    assert gated == [["features.0", "classifier"]] * 4 + [["0", "5", "7.classifier"]]


def test_the_guides_example_of_new_strategies_builds_them(monkeypatch):
    from harness import build, recipes, settings
    from harness.recipes import split_mnist

    (example,) = [block for block in blocks("text") if "Recipe(" in block]
    parts = example.split("# recipes/split_mnist.py, in RECIPES\n")
    about, added = (eval("{\n" + part + "}", vars(split_mnist)) for part in parts)
    assert set(about) == set(added) and not set(about) & set(recipes.ABOUT)
    for name in added:
        monkeypatch.setitem(recipes.ABOUT, name, about[name])
        monkeypatch.setitem(split_mnist.RECIPES, name, added[name])
    for name, plugins in zip(added, ([], [SelectivePlasticityPlugin])):
        run = settings.Run("split-mnist", name, n_tasks=5)
        strategy, built = build.build_strategy(run, torch.nn.Linear(784, 10), [], None)
        assert isinstance(strategy.optimizer, torch.optim.Adam)
        assert [type(plugin) for plugin in built] == plugins
    commands = [block for block in blocks("text") if "--strateg" in block]
    assert all(name in commands[0] for name in added)
