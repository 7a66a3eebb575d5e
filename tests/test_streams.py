"""Streams without clean boundaries, and how finding them is counted."""

import numpy as np
import pytest

from harness.run import LONG, build_benchmark, execute, over_time
from harness.settings import Run
from harness.streams import swaps

from conftest import MNIST

pytestmark = pytest.mark.slow


def run_of(strategy="sp", **kwargs):
    return Run(**{"benchmark": "split-mnist", "strategy": strategy, "n_tasks": 5, "epochs": 1, "batch_size": 64,
                  "replay_buffer": 0, "seed": 0} | kwargs)  # fmt: skip


def test_a_tenth_of_a_blurred_task_is_its_neighbours():
    plain, mixed = (build_benchmark(run_of(stream=s), str(MNIST)) for s in ("tasks", "blurred"))
    for i, e in enumerate(mixed.train_stream):
        tasks = np.array(list(e.dataset.targets)) // 2
        assert set(tasks) == {j for j in (i - 1, i, i + 1) if 0 <= j < 5}
        assert abs((tasks != i).mean() - (0.05 if i in (0, 4) else 0.1)) < 0.01
    sizes = [sum(len(e.dataset) for e in b.train_stream) for b in (plain, mixed)]
    assert sizes[0] == sizes[1]


def test_swaps_turn_one_permutation_into_another():
    random = np.random.RandomState(0)
    start, end = random.permutation(50), random.permutation(50)
    moves = swaps(start, end)
    for i, j in moves:
        start[[i, j]] = start[[j, i]]
    assert (start == end).all() and len(moves) < 50


def test_a_drifting_permutation_moves_a_few_pixels_at_a_time():
    """Seen at the pixels that are black in every image: they are where the permutation has put the corners."""
    run = run_of(benchmark="permuted-mnist", n_tasks=2, train_per_task=1000, stream="drifting")
    first, second = (e.dataset.read_batch(list(range(1000)))[0].flatten(1) for e in
                     build_benchmark(run, str(MNIST)).train_stream)  # fmt: skip
    dark = [(block == block.min()).all(0) for block in (*first.split(100), *second.split(100))]
    shared = [(a & b).sum() / (a | b).sum() for a, b in zip(dark, dark[1:])]
    assert min(shared) > 0.6
    assert (dark[9] & dark[-1]).sum() / (dark[9] | dark[-1]).sum() < min(shared)


def test_an_online_stream_is_measured_when_its_tasks_end():
    short = {"benchmark": "permuted-mnist", "n_tasks": 2, "train_per_task": 200, "batch_size": 20, "stream": "online"}
    record = execute(run_of("sp-continuous", **short), str(MNIST))["figures"]
    assert np.shape(record["accuracy_matrix"]) == (2, 2)
    assert record["task_ends"] == [10, 20] and not record["consolidated_at"]
    told = execute(run_of("sp", **short), str(MNIST))["figures"]
    assert told["consolidated_at"] == [10, 20]


def test_a_long_stream_is_scored_on_some_images_and_stored_as_means():
    run = run_of("naive-sgd", benchmark="permuted-mnist", n_tasks=LONG + 1, train_per_task=128)
    figures = execute(run, str(MNIST))["figures"]
    assert "accuracy_matrix" not in figures and "curve" not in figures
    assert {name: len(values) for name, values in figures["over_time"].items()} == dict.fromkeys(
        ("present", "last", "all"), LONG + 1
    )
    assert figures["over_time"]["all"][-1] == pytest.approx(figures["acc"], abs=0.01)


def test_accuracies_over_time_of_a_matrix():
    matrix = np.tril(np.full((12, 12), 50.0)) + 50 * np.eye(12)
    found = over_time(matrix + 7 * np.triu(np.ones((12, 12)), 1))  # accuracies on later tasks are not counted
    assert found["present"] == [100.0] * 12
    assert found["last"][-1] == 55.0 and found["all"][-1] == round((11 * 50 + 100) / 12, 2)
    assert found["last"][1] == found["all"][1] == 75.0
