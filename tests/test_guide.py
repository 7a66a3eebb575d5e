"""The guide's blocks of code, as a reader pastes them one after another, on small slices of MNIST."""

import re
import runpy

import pytest
import torch
from avalanche.training.templates import SupervisedTemplate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import avalanche_sp
from avalanche_sp import SelectivePlasticityPlugin, split_mnist

from conftest import MNIST, ROOT, sliced

pytestmark = pytest.mark.slow

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
def example(monkeypatch, tmp_path, capsys):
    """Runs a script of examples/ in an empty folder, on the first images of MNIST; returns its output."""
    monkeypatch.chdir(tmp_path)

    def run(name, images=640):
        def some(n_experiences, dataset_root):
            assert (ROOT / dataset_root).samefile(MNIST)
            return sliced(split_mnist(n_experiences, dataset_root=MNIST), images, 200)

        monkeypatch.setattr(avalanche_sp, "split_mnist", some, raising=False)
        torch.manual_seed(0)
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def percentages(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_every_example_is_in_the_guide():
    for path in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{path.name})" in GUIDE, path.name


@pytest.mark.parametrize("name", ["avalanche_plugin", "replay_buffer"])  # naive training: 20
def test_the_examples_of_avalanche_keep_all_digits(example, name):
    assert percentages(example(name))[-1] > 60


def test_the_example_adds_a_class(example):
    old, new = percentages(example("add_class"))
    assert min(old, new) > 75


def test_the_example_finds_boundaries(example):
    pytest.importorskip("river")
    found, accuracies = example("unknown_boundaries", images=3200).splitlines()[-2:]  # 50 mini-batches of 64 a task
    delays = [int(at) - 50 * task for task, at in enumerate(re.findall(r"\d+", found), 1)]
    assert len(delays) == 4 and all(0 < delay <= 16 for delay in delays)
    assert sum(percentages(accuracies)) > 5 * 60


def test_the_example_resumes(example):
    assert "0 experiences were trained before" in example("resume")
    assert "5 experiences were trained before" in example("resume")


def test_the_example_compares_methods(example):
    rows = dict(line.split(" ACC ") for line in example("compare_methods").splitlines() if " ACC " in line)
    acc = {name.strip(): float(text[:-1]) for name, text in rows.items()}
    assert list(acc) == ["naive", "EWC", "replay of 100 samples", "gate", "gate + optimizer"]
    assert min(acc["gate"], acc["gate + optimizer"]) > acc["naive"] + 20


def test_the_example_says_what_is_gated(example):
    gated = ["embedding", "attention.in_proj_weight", "attention.out_proj", "head"]
    with pytest.warns(UserWarning, match="Not gated: hidden"):
        assert example("will_it_work").split() == ["gated:", *gated]


def test_the_example_keeps_a_pretrained_transformer(example):
    pytest.importorskip("transformers")
    old_alone, _, old, new = percentages(example("pretrained_transformer"))
    assert old > old_alone + 30 and new > 65


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
        assert [s.step for s in shown] == [8, 12, 16, 20]  # 200 images in batches of 64, from the second on
        assert all(0 < s.value < 1 for s in shown)
        assert len(events.Scalars(f"ClaimedRank/{layer}/train_phase/train_stream/Task000")) == 5
    assert names["iterations"] == [8, 12, 16, 20]
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
        if "strategy" not in block:
            continue
        strategy, benchmark = names["strategy"], names["benchmark"]
        assert isinstance(strategy, SupervisedTemplate) and strategy.model is names["model"]
        for experience in benchmark.train_stream:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)
        (plugin,) = [p for p in strategy.plugins if isinstance(p, SelectivePlasticityPlugin)]
        gated.append(list(plugin.layers))
    assert gated == [["features.0", "classifier"]] * 5 + [["0", "5", "7.classifier"]]


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
