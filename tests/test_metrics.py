"""Measures by hand, and metrics through Avalanche's real evaluator and loggers."""

import csv
import io
import math
import warnings

import numpy as np
import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.evaluation.metrics import StreamBWT, accuracy_metrics
from avalanche.logging import InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import avalanche_sp
from avalanche_sp import (
    AccuracyMatrix,
    ConsolidationPlugin,
    LossSurprise,
    MetricsCSVLogger,
    OneHotMSELoss,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
    plot_accuracy_matrix,
    selective_plasticity_metrics,
)

from conftest import mlp, strategy_of

R = [[90, 10, 5], [95, 80, 7], [60, 85, 70]]


def test_measures_by_hand():
    assert avalanche_sp.average_accuracy(R) == pytest.approx((60 + 85 + 70) / 3)
    assert avalanche_sp.backward_transfer(R) == pytest.approx(((60 - 90) + (85 - 80)) / 2)
    assert avalanche_sp.average_forgetting(R) == pytest.approx(((95 - 60) + (80 - 85)) / 2)
    assert avalanche_sp.learning_accuracy(R) == pytest.approx((90 + 80 + 70) / 3)
    assert avalanche_sp.backward_transfer([[50]]) == 0 and avalanche_sp.average_forgetting([[50]]) == 0


def test_a_matrix_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"Invalid matrix shape: \(1, 2\)"):
        avalanche_sp.average_accuracy([[1, 2]])


def strategy_with(plugins, metrics, loggers=()):
    model = mlp()
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
        criterion=OneHotMSELoss(),
        train_mb_size=32,
        eval_mb_size=100,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, loggers=list(loggers)),
    )


def train(benchmark, plugins, metrics, loggers=()):
    strategy = strategy_with(plugins, metrics, loggers)
    torch.manual_seed(0)
    strategy.eval(benchmark.test_stream)  # before any training: not a row
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    return strategy


def test_accuracy_matrix_and_bwt_equal_avalanches_own(split5):
    bwt = StreamBWT()
    metrics = [*selective_plasticity_metrics(), accuracy_metrics(experience=True), bwt]
    strategy = train(split5, [SelectivePlasticityPlugin()], metrics)
    matrix = metrics[3].result()
    assert matrix.shape == (5, 5)
    last = strategy.evaluator.get_last_metrics()
    theirs = [100 * last[f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00{j}"] for j in range(5)]
    np.testing.assert_allclose(matrix[-1], theirs)
    assert last["BWT_Percent/eval_phase/test_stream"] == pytest.approx(100 * bwt.result())
    assert last["ACC_Percent/eval_phase/test_stream"] == pytest.approx(matrix[-1].mean())


def test_metrics_reach_every_logger(split2, tmp_path, capsys):
    text, tensorboard = io.StringIO(), TensorboardLogger(tb_log_dir=tmp_path)
    metrics = selective_plasticity_metrics()
    loggers = [InteractiveLogger(), TextLogger(text), tensorboard, MetricsCSVLogger(tmp_path / "logs" / "all.csv")]
    strategy = train(split2, [SelectivePlasticityPlugin(rank=20)], metrics, loggers)
    tensorboard.writer.flush()
    last = strategy.evaluator.get_last_metrics()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    with open(tmp_path / "logs" / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    printed = capsys.readouterr().out
    for metric in ("GateOpenness", "PresynapticSurprise", "ClaimedRank"):
        for layer in ("1", "3", "5", "mean"):
            assert f"{metric}/{layer}/train_phase/train_stream/Task000" in last
    assert "LossSurprise/train_phase/train_stream/Task000" in last
    for measure in ("ACC", "BWT", "Forgetting", "LearningAccuracy"):
        assert f"{measure}_Percent/eval_phase/test_stream" in last
    for name, value in last.items():
        assert name in text.getvalue() and name in printed
        assert events.Scalars(name)[-1].value == pytest.approx(value)
        row = [row for row in rows if row["name"] == name][-1]
        assert float(row["value"]) == value and row["phase"] == ("eval" if "eval" in name else "train")
        assert int(row["step"]) == events.Scalars(name)[-1].step


def test_csv_logger_keeps_what_a_file_holds_and_leaves_out_what_is_no_number(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCSVLogger(path).log_single_metric("Loss/train_phase", 0.25, 3)
    logger = MetricsCSVLogger(path)
    for value in (np.float32(0.5), torch.tensor(2.0), {"matrix": 1}, torch.zeros(2), np.zeros(2), "text", None):
        logger.log_single_metric("Thing, other/eval_phase", value, 4)
    logger.log_single_metric("no phase", 7, 5)
    assert path.read_text().splitlines() == [  # flushed, though nothing was closed
        "step,phase,name,value",
        "3,train,Loss/train_phase,0.25",
        '4,eval,"Thing, other/eval_phase",0.5',
        '4,eval,"Thing, other/eval_phase",2.0',
        "5,,no phase,7.0",
    ]


def test_csv_logger_refuses_a_file_of_another_kind(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="its first line is 'a,b'"):
        MetricsCSVLogger(path)
    assert path.read_text() == "a,b\n1,2\n"


class Surprises(SupervisedPlugin):
    """Notes the plugin's surprise at every iteration."""

    def __init__(self, plugin):
        super().__init__()
        self.plugin, self.epochs = plugin, []

    def before_training_epoch(self, strategy, **kwargs):
        self.epochs.append([])

    def after_training_iteration(self, strategy, **kwargs):
        self.epochs[-1].append(float(self.plugin.surprise))


def test_loss_surprise_is_the_mean_over_each_epoch(split2):
    plugin, metric = SelectivePlasticityPlugin(readout_step=False), LossSurprise()  # or no loss would be a surprise
    notes = Surprises(plugin)
    assert metric.result() is None
    strategy = train(split2, [plugin, notes], [metric])
    values = strategy.evaluator.get_all_metrics()["LossSurprise/train_phase/train_stream/Task000"][1]
    assert len(notes.epochs) == 2
    assert values == pytest.approx([np.mean(epoch) for epoch in notes.epochs])
    assert 0 < metric.result() == values[-1] < 1


def test_accuracy_matrix_to_csv(split5, tmp_path):
    metric = AccuracyMatrix()
    train(split5, [], [metric])
    metric.to_csv(tmp_path / "matrix.csv")
    lines = (tmp_path / "matrix.csv").read_text().splitlines()
    assert lines[0] == "trained_on,0,1,2,3,4"
    table = np.array([[float(value) for value in line.split(",")] for line in lines[1:]])
    np.testing.assert_array_equal(table[:, 0], range(5))
    np.testing.assert_array_equal(table[:, 1:], metric.result())


def test_accuracy_matrix_to_csv_leaves_what_was_not_evaluated_empty(split2, tmp_path):
    metric = AccuracyMatrix()
    strategy = strategy_with([], [metric])
    strategy.train(split2.train_stream[0])
    strategy.eval(split2.test_stream[1:])
    metric.to_csv(tmp_path / "matrix.csv")
    header, row = (tmp_path / "matrix.csv").read_text().splitlines()
    assert header == "trained_on,0,1" and row.startswith("0,,")


def measures(metrics, stream="test"):
    ending = f"_Percent/eval_phase/{stream}_stream"
    return {name.removesuffix(ending): value for name, value in metrics.items() if name.endswith(ending)}


def test_one_evaluation_at_the_end_is_enough_for_acc(split5):
    metric = AccuracyMatrix()
    strategy = strategy_with([], [metric])
    for experience in split5.train_stream:
        strategy.train(experience)
    found = measures(strategy.eval(split5.test_stream))
    assert found == {"ACC": pytest.approx(metric.result()[-1].mean())}
    assert 10 < found["ACC"] < 100 and np.isnan(metric.result()[:-1]).all()


def test_evaluating_what_was_trained_on_gives_each_measure_every_time(split5):
    """What lies above the diagonal enters none of them."""
    metric = AccuracyMatrix()
    strategy = strategy_with([], [metric])
    for experience in split5.train_stream[:3]:
        strategy.train(experience)
        found = measures(strategy.eval(split5.test_stream[: experience.current_experience + 1]))
        matrix = metric.result()
        assert found["ACC"] == pytest.approx(matrix[-1].mean())
        assert found["BWT"] == pytest.approx(avalanche_sp.backward_transfer(matrix))
        assert set(found) == {"ACC", "BWT", "Forgetting", "LearningAccuracy"}
    assert np.isnan(matrix[0, 1:]).all()


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 2, 1, 2], [2, 0]])
def test_measures_follow_the_order_of_training(split5, tmp_path, order):
    metric = AccuracyMatrix()
    strategy = strategy_with([], [metric])
    evaluated = [split5.test_stream[j] for j in sorted(set(order))]
    for j in order:
        strategy.train(split5.train_stream[j])
        found = measures(strategy.eval(evaluated))
    matrix, learned = metric.result(), {j: row for row, j in enumerate(order)}
    assert found["ACC"] == pytest.approx(np.nanmean(matrix[-1]))
    assert found["LearningAccuracy"] == pytest.approx(np.mean([matrix[row, j] for j, row in learned.items()]))
    earlier = [j for j in learned if j != order[-1]]
    lost = [matrix[-1, j] - matrix[learned[j], j] for j in earlier]
    assert found["BWT"] == pytest.approx(np.mean(lost)) and found["BWT"] < -20
    assert found["Forgetting"] >= -found["BWT"]
    metric.to_csv(tmp_path / "r.csv")
    assert [line.split(",")[0] for line in (tmp_path / "r.csv").read_text().splitlines()[1:]] == [str(j) for j in order]


def test_a_matrix_is_of_one_stream(split2):
    test, trained_on = AccuracyMatrix(), AccuracyMatrix("train")
    strategy = strategy_with([], [test, trained_on])
    for experience in split2.train_stream:
        strategy.train(experience)
        before = strategy.eval(split2.test_stream)
        matrix = test.result()
        after = strategy.eval(split2.train_stream)
        np.testing.assert_array_equal(test.result(), matrix)
        assert measures(after) == measures(before)
    assert measures(after, "train")["ACC"] == pytest.approx(trained_on.result()[-1].mean())
    assert not np.array_equal(test.result(), trained_on.result())
    assert [m.stream for m in selective_plasticity_metrics("valid") if isinstance(m, AccuracyMatrix)] == ["valid"]


def test_a_partial_evaluation_leaves_no_stale_score(split5):
    text, metric = io.StringIO(), AccuracyMatrix()
    strategy = strategy_with([], [metric], [TextLogger(text)])
    strategy.train(split5.train_stream[0])
    assert "ACC" in measures(strategy.eval(split5.test_stream[:1]))
    strategy.train(split5.train_stream[1])
    found = measures(strategy.eval(split5.test_stream[:1]))
    assert all(math.isnan(value) for value in found.values()) and len(found) == 4
    found = measures(strategy.eval(split5.test_stream[1:2]))  # the rest of it, by the same network
    assert found["ACC"] == pytest.approx(metric.result()[-1].mean()) and not math.isnan(found["BWT"])


def test_an_online_stream_counts_as_the_one_it_was_split_from(split2):
    metric = AccuracyMatrix()
    strategy = strategy_with([], [metric])
    for experience in split2.train_stream:
        for part in split_online_stream([experience], experience_size=200):
            strategy.train(part)
        found = measures(strategy.eval(split2.test_stream))
    r = metric.result()
    assert r.shape == (6, 2) and found["LearningAccuracy"] == pytest.approx((r[2, 0] + r[5, 1]) / 2)
    assert found["BWT"] == pytest.approx(r[5, 0] - r[2, 0]) == -found["Forgetting"]


def test_a_warning_tells_why_acc_is_alone(split2, split5):
    metric = AccuracyMatrix()
    strategy = strategy_with([], [metric])
    strategy.train(split_online_stream(split2.train_stream, experience_size=300))
    with pytest.warns(UserWarning, match=r"not report BWT, Forgetting, LearningAccuracy: experience 0 was not eval"):
        found = measures(strategy.eval(split2.test_stream))
    assert found == {"ACC": pytest.approx(metric.result()[-1].mean())}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert measures(strategy.eval(split2.test_stream)) == found  # the warning comes once

    strategy = strategy_with([], [AccuracyMatrix()])
    strategy.train(split5.train_stream[:3])
    with pytest.warns(UserWarning, match="that were trained are not those that were evaluated"):
        assert set(measures(strategy.eval(split2.test_stream))) == {"ACC"}


def test_a_warning_tells_of_a_stream_that_is_never_evaluated(split2):
    strategy = strategy_with([], [AccuracyMatrix("valid"), AccuracyMatrix("train"), AccuracyMatrix()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for experience in [*split2.train_stream, split2.train_stream[0]]:
            strategy.train(experience)
            strategy.eval(split2.test_stream)
            strategy.eval(split2.train_stream)
    told = [str(w.message) for w in caught if "AccuracyMatrix" in str(w.message)]
    assert told == ["AccuracyMatrix('valid') has no entry. After training these streams were evaluated: test, train."]


def test_a_row_is_of_one_network(split2):
    """An evaluation in the middle of an experience is not mixed with one at its end."""
    metric = AccuracyMatrix()

    class Halfway(SupervisedPlugin):
        def after_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 0:
                strategy.eval(split2.test_stream)
                strategy.model.train()
                assert not np.isnan(metric.result()[-1]).any()

    strategy = strategy_with([Halfway()], [metric])
    strategy.train_epochs = 2
    strategy.train(split2.train_stream[0], eval_streams=[])
    strategy.eval(split2.test_stream[:1])
    assert metric.result().shape == (1, 1)


def test_plot_of_an_accuracy_matrix():
    figure = Figure()
    ax = figure.subplots()
    assert plot_accuracy_matrix([[90, np.nan], [60, 85]], ax) is ax
    assert [text.get_text() for text in ax.texts] == ["90", "60", "85"]
    np.testing.assert_array_equal(ax.images[0].get_array().compressed(), [90, 60, 85])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2"]
    figure.canvas.draw()
    with pytest.raises(ValueError, match=r"Invalid matrix shape: \(3,\)"):
        plot_accuracy_matrix([1, 2, 3])


def test_eligibility_is_what_the_optimizers_gate_reads(split5, tmp_path):
    metrics = selective_plasticity_metrics()
    model = mlp()
    optimizer = SelectivePlasticityOptimizer(model.parameters(), beta1=0.0, eps=1e-3)
    tensorboard = TensorboardLogger(tb_log_dir=tmp_path)
    strategy = strategy_of(model, [ConsolidationPlugin()], optimizer=optimizer)
    strategy.evaluator.metrics, strategy.evaluator.loggers = metrics, [tensorboard]
    for experience in split5.train_stream[:3]:
        strategy.train(experience)
    tensorboard.writer.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    last = strategy.evaluator.get_last_metrics()
    for layer in (1, 3, 5):
        e = torch.cat([optimizer.get_param_eligibility(p).flatten() for p in model[layer].parameters()])
        name = f"Eligibility/{layer}/train_phase/train_stream/Task000"
        shown = [scalar.value for scalar in events.Scalars(name)]
        assert last[name] == float(e.mean()) == pytest.approx(shown[-1])
        assert shown[0] == pytest.approx(1) and shown == sorted(shown)
    assert "Eligibility/mean/train_phase/train_stream/Task000" in last


@pytest.mark.parametrize("openness_setting, claimed", [(1e-9, 20), (1e9, 0)])
def test_gate_metrics_say_what_the_gate_did(split2, openness_setting, claimed):
    openness, surprise, rank, *_ = metrics = selective_plasticity_metrics()
    plugin = SelectivePlasticityPlugin(openness=openness_setting, rank=20, pull_back=0, readout_step=False)
    strategy = train(split2, [plugin], metrics)
    assert set(openness.result()) == set(plugin.layers) == {"1", "3", "5"}
    for layer in plugin.layers:
        assert 0 < surprise.result()[layer] < 1
        assert openness.result()[layer] == pytest.approx(0 if claimed else 1, abs=1e-3)
        assert rank.result()[layer] == claimed
    history = strategy.evaluator.get_all_metrics()["ClaimedRank/mean/train_phase/train_stream/Task000"]
    assert history[1] == [claimed, claimed]


def test_openness_and_surprise_are_shares_of_the_streams_energy(split2):
    """With full rank the whole input lies along the vectors: nothing is new, and f alone says what passes."""
    openness, surprise, *_ = metrics = selective_plasticity_metrics()
    plugin = SelectivePlasticityPlugin(openness=1.0, rank=785)
    train(split2, [plugin], metrics)
    for layer in plugin.layers:
        assert surprise.result()[layer] == pytest.approx(0, abs=0.01)
        assert 0 < openness.result()[layer] < 1


def test_without_plugin_or_gate_the_gate_metrics_are_silent(split2):
    for plugins in ([], [SelectivePlasticityPlugin(openness=math.inf)]):
        metrics = selective_plasticity_metrics()
        strategy = train(split2, plugins, metrics)
        names = strategy.evaluator.get_last_metrics()
        assert not any(word in name for name in names for word in ("GateOpenness", "LossSurprise", "Eligibility"))
        assert metrics[0].result() == {} and metrics[-1].result() is None
