"""Strategies that are saved and go on, in the weights and the metrics, as if they had not stopped."""

import copy
import csv
import os
import pickle
import re
import subprocess
import sys
import time
from functools import partial

import dill
import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin, ReplayPlugin, SupervisedPlugin

from avalanche_sp import (
    ConsolidationPlugin,
    GaussianBuffer,
    JointReplayLoss,
    MetricsCSVLogger,
    OneHotMSELoss,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
    selective_plasticity_metrics,
)

from conftest import ROOT, mlp, sliced, strategy_of, weights


def everything(folder, strategy_class=Naive, epochs=1, policy=None):
    """Both gates, replay, and an evaluator with every kind of logger, their files in ``folder``."""
    folder.mkdir(exist_ok=True)
    model = mlp()
    model.insert(3, torch.nn.Dropout(0.2))  # draws random numbers in every iteration
    evaluator = EvaluationPlugin(
        *selective_plasticity_metrics(),
        accuracy_metrics(minibatch=True, experience=True, stream=True),
        loss_metrics(epoch=True),
        loggers=[
            InteractiveLogger(),
            TextLogger(open(folder / "log.txt", "a")),
            TensorboardLogger(folder / "tensorboard"),
            MetricsCSVLogger(folder / "metrics.csv"),
        ],
    )
    return strategy_class(
        model=model,
        optimizer=SelectivePlasticityOptimizer(model.parameters(), lr=1e-3, beta1=0.0, eps=1e-3, warmup_steps=20),
        criterion=JointReplayLoss(OneHotMSELoss()),
        train_mb_size=32,
        train_epochs=epochs,
        eval_mb_size=500,
        plugins=[
            ReplayPlugin(mem_size=50, storage_policy=policy),
            SelectivePlasticityPlugin(openness={"1": 0.1}, rank={"1": 12, "*": 10}),
        ],
        evaluator=evaluator,
    )


def state(strategy):
    """All that training has made: compared bit for bit."""
    (plugin,) = (p for p in strategy.plugins if isinstance(p, SelectivePlasticityPlugin))
    (replay,) = (p for p in strategy.plugins if isinstance(p, ReplayPlugin))
    return {
        "weights": weights(strategy.model),
        "optimizer": [s[k] for s in strategy.optimizer.state_dict()["state"].values() for k in sorted(s)],
        "vectors": [activity.vectors for activity in plugin.layers.values()],
        "eigenvalues": [activity.eigenvalues for activity in plugin.layers.values()],
        "memory": [int(y) for _, y, *_ in replay.storage_policy.buffer],
        "metrics": dict(strategy.evaluator.get_all_metrics()),
    }


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def rows(folder, name="metrics.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.reader(file))


def test_a_strategy_with_everything_resumes_bit_for_bit_after_any_experience(split5, tmp_path):
    whole = everything(tmp_path / "whole")
    torch.manual_seed(1)
    for experience in split5.train_stream[:4]:
        whole.train(experience)
        whole.eval(split5.test_stream)
        save_checkpoint(whole, tmp_path / f"{experience.current_experience}.pkl")
    assert (tmp_path / "3.pkl").stat().st_size < 3_000_000  # the images are not in it
    logged = rows(tmp_path / "whole")
    for stopped in range(3):
        torch.manual_seed(99)
        resumed, first = maybe_load_checkpoint(everything(tmp_path / "other"), tmp_path / f"{stopped}.pkl")
        assert first == stopped + 1
        for experience in split5.train_stream[first:4]:
            resumed.train(experience)
            resumed.eval(split5.test_stream)
        assert_equal(state(resumed), state(whole))
        before, after = len(logged), rows(tmp_path / "whole")  # the loggers go on with their own files
        assert len(after) > before and after[before:] == logged[before - len(after) :]
        logged = after


def test_what_is_drawn_after_a_checkpoint_is_what_would_have_been(split5, tmp_path):
    def drawing(name):
        return everything(tmp_path / name, policy=GaussianBuffer(50, stored=10))

    whole = drawing("whole")
    for experience in split5.train_stream[:2]:
        whole.train(experience)
    save_checkpoint(whole, tmp_path / "saved.pkl")
    resumed, first = maybe_load_checkpoint(drawing("other"), tmp_path / "saved.pkl")
    assert first == 2
    for strategy in (whole, resumed):
        torch.manual_seed(2)
        strategy.train(split5.train_stream[2])
    assert_equal(weights(resumed.model), weights(whole.model))


TORCHS = [
    cls
    for cls in vars(torch.optim).values()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]


@pytest.mark.parametrize("cls", TORCHS, ids=lambda cls: cls.__name__)
def test_every_optimizer_of_torch_can_be_saved(cls, tmp_path):
    """torch.optim hides its submodules, so dill would pickle their classes by value, and fail."""
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = cls([p], lr=0.01)
    if cls not in (torch.optim.LBFGS, torch.optim.SparseAdam):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.save([optimizer, p], tmp_path / "saved.pkl", pickle_module=dill)
    loaded, q = torch.load(tmp_path / "saved.pkl", pickle_module=dill, weights_only=False)
    assert type(loaded) is cls and loaded.param_groups[0]["params"][0] is q
    assert_equal(loaded.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        partial(torch.optim.AdamW, lr=1e-3),
    ],
    ids=lambda make: make.func.__name__,
)
def test_a_strategy_with_torchs_optimizer_resumes_bit_for_bit(make, split5, tmp_path):
    def strategy():
        model = mlp()
        return strategy_of(model, [SelectivePlasticityPlugin(), ReplayPlugin(50)], optimizer=make(model.parameters()))

    whole = strategy()
    for experience in split5.train_stream[:2]:
        whole.train(experience)
    save_checkpoint(whole, tmp_path / "saved.pkl")
    resumed, first = maybe_load_checkpoint(strategy(), tmp_path / "saved.pkl")
    assert first == 2 and type(resumed.optimizer) is make.func
    for one in (whole, resumed):
        torch.manual_seed(2)
        one.train(split5.train_stream[2])
    assert_equal(weights(resumed.model), weights(whole.model))


def test_a_scheduler_goes_on_with_its_optimizer(split5, tmp_path):
    def strategy():
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        scheduler = LRSchedulerPlugin(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), reset_lr=False)
        return strategy_of(model, [scheduler], optimizer=optimizer)

    whole = strategy()
    whole.train(split5.train_stream[0])
    save_checkpoint(whole, tmp_path / "saved.pkl")
    resumed, _ = maybe_load_checkpoint(strategy(), tmp_path / "saved.pkl")
    resumed.train(split5.train_stream[1])
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.25)


def test_other_copies_of_torchs_optimizers_are_left_alone():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert b"avalanche_sp" not in pickle.dumps(optimizer)
    assert type(copy.deepcopy(optimizer)) is torch.optim.SGD


def documented():
    """The document's blocks of Python: loop, save and load."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL | re.M)


def test_the_documents_state_without_code_goes_on_bit_for_bit(split5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def strategy():
        model = mlp()
        optimizer = SelectivePlasticityOptimizer.for_continual_learning(model.parameters())
        return strategy_of(model, [ConsolidationPlugin()], optimizer=optimizer)

    _, save, load = documented()
    whole, resumed = strategy(), strategy()
    for experience in split5.train_stream[:2]:
        whole.train(experience)
    exec(save, {"strategy": whole, "torch": torch})
    exec(load, {"strategy": resumed, "torch": torch})
    for one in (whole, resumed):
        torch.manual_seed(2)
        one.train(split5.train_stream[2])
    assert_equal(weights(resumed.model), weights(whole.model))
    assert_equal(resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


def test_after_loading_the_strategy_holds_other_objects(split2, tmp_path):
    """Why the document says to take everything from the strategy."""
    strategy = everything(tmp_path)
    strategy.train(split2.train_stream[0])
    save_checkpoint(strategy, tmp_path / "run.pkl")
    again = everything(tmp_path)
    model, evaluator = again.model, again.evaluator
    resumed, _ = maybe_load_checkpoint(again, tmp_path / "run.pkl")
    assert resumed is again and resumed.model is not model and resumed.evaluator is not evaluator
    assert_equal(weights(resumed.model), weights(strategy.model))


def test_the_documents_loop_goes_on_where_it_stopped(split2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        names = {"strategy": everything(tmp_path), "benchmark": split2}
        exec(documented()[0], names)
        assert names["strategy"].clock.train_exp_counter == 2
    assert names["first"] == 2


class Stopped(Exception):
    pass


class Stop(SupervisedPlugin):
    """Ends a run in the middle of an iteration, as a kill would."""

    def __init__(self, iteration):
        super().__init__()
        self.iteration = iteration

    def before_backward(self, strategy, **kwargs):
        if strategy.clock.train_iterations == self.iteration:
            raise Stopped


@pytest.fixture
def resumable(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from mid_experience_checkpoint import ResumableNaive

    def strategy(name, every=7, policy=None):
        path = tmp_path / name / "run.pkl"
        made = partial(ResumableNaive, checkpoint=path, every=every)
        return everything(tmp_path / name, made, epochs=2, policy=policy and policy())

    return strategy


def go_on(strategy, benchmark, stop_at=None):
    """Trains from the checkpoint on, where there is one, to the end or to an iteration; says from which iteration."""
    strategy, first = maybe_load_checkpoint(strategy, strategy.checkpoint)
    strategy.plugins[:] = [plugin for plugin in strategy.plugins if not isinstance(plugin, Stop)]  # the last stop
    if stop_at is not None:
        strategy.plugins.append(Stop(stop_at))
    began = strategy.clock.train_iterations
    try:
        for experience in benchmark.train_stream[first:]:
            strategy.train(experience)
            strategy.eval(benchmark.test_stream)
            strategy.save()
    except Stopped:
        pass
    assert stop_at in (None, strategy.clock.train_iterations)
    return began


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy, stops, starts",
    [
        (None, (8, 9, 19, 30, 38, 38), [0, 7, 7, 17, 27, 37, 37]),
        (lambda: GaussianBuffer(50, stored=10), (9, 38), [0, 7, 37]),
    ],
    ids=["stored", "drawn"],
)
def test_a_strategy_resumes_bit_for_bit_in_the_middle_of_an_experience(resumable, split5, policy, stops, starts):
    benchmark = sliced(split5, 300, 100, experiences=3)  # 10 iterations an epoch, 20 an experience
    whole, stopped, began = resumable("whole", policy=policy), resumable("stopped", policy=policy), []
    torch.manual_seed(1)
    go_on(whole, benchmark)
    torch.manual_seed(1)
    for stop_at in (*stops, None):
        began.append(go_on(stopped, benchmark, stop_at))
        torch.manual_seed(99)
        if stop_at is not None:
            stopped = resumable("stopped", policy=policy)
    assert began == starts
    assert_equal(state(stopped), state(whole))


def test_an_interrupted_experience_is_the_one_to_go_on_with(resumable, split2):
    go_on(resumable("run"), split2, stop_at=10)
    resumed, _ = maybe_load_checkpoint(resumable("run"), resumable("run").checkpoint)
    with pytest.raises(ValueError, match=r"Invalid experience: 1 \(allowed: 0, the one that was being trained on\)"):
        resumed.train(split2.train_stream[1])


@pytest.mark.slow
def test_the_example_goes_on_after_a_kill(tmp_path):
    """The script itself, in processes that are killed; the metrics' file tells where they are."""

    def started(name):
        command = [ROOT / "examples" / "mid_experience_checkpoint.py", "--images", "640", "--every", "4"]
        command += ["--checkpoint", tmp_path / name]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=env)

    killed = started("killed.pkl")
    while not (tmp_path / "killed.pkl").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    ends = []
    for name in ("killed.pkl", "whole.pkl"):
        process = started(name)
        out, _ = process.communicate()
        assert process.returncode == 0
        ends.append(out.splitlines())
    (resumed, *_), (whole, *_) = ends
    assert whole.startswith("0 tasks trained, 0 iterations") and not resumed.endswith(", 0 iterations in all")
    assert ends[0][-1] == ends[1][-1] and ends[0][-1].startswith("ACC ")
    last = [rows(tmp_path, f"{name}.csv")[-4:] for name in ("killed", "whole")]
    assert last[0] == last[1]
