"""The readout, solved for an experience with new classes: against plain linear algebra, and on real MNIST."""

import itertools
import math
import warnings
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.training.plugins import ReplayPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_sp import JointReplayLoss, OneHotMSELoss, PlasticityGate, SelectivePlasticityPlugin, Settings, reference
from avalanche_sp.data import split_mnist
from avalanche_sp.gate.classes import (
    ReadoutSamples,
    class_roots,
    class_shift,
    class_sums,
    told_by_classes,
)
from avalanche_sp.gate.functional import leading_eigenvalue
from avalanche_sp.gate.layer_gate import LayerGate
from avalanche_sp.gate.layers import GatedLayer
from avalanche_sp.gate.memory import LayerMemory, Memory
from avalanche_sp.gate.observe import Observation
from avalanche_sp.gate.preparation import (
    DrawnInputs,
    Preparation,
    _error_of_drawn,
    _unexplained,
    bears_steps,
    draw_inputs,
    features_of,
    follow_drift,
    output_sensitivity,
    stable_step,
)
from avalanche_sp.gate.pseudo_samples import PseudoSamples, agreement, drift_map, extended, pseudo_samples
from avalanche_sp.gate.readout import ReadoutProblem, old_quadratic

from conftest import MNIST, accuracy, mlp, sliced, strategy_of

SETTINGS = Settings()


def samples(seed, classes, size=400, inputs=12):
    """Input vectors, the last of which is 1, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.randint(len(classes), (size,), generator=generator)]
    centers = torch.randn(6, inputs, generator=torch.Generator().manual_seed(9))
    noise, mixing = (torch.randn(n, inputs, generator=generator) for n in (size, inputs))
    x = centers[y] + noise @ mixing / 3
    return torch.cat([x, torch.ones(size, 1)], 1), y


def readout_samples(x, y):
    return ReadoutSamples("head", x, y, torch.full((6,), torch.nan), len(x))


def remembered(x, y, rank=13, class_rank=0, old=None):
    """The memory of samples, merged with an older memory; with ``class_rank`` eigenvectors of each class."""
    seen = readout_samples(x, y)
    sums, counts = class_sums(seen)
    roots = class_roots(seen, old, replace(SETTINGS, class_rank=class_rank)) if class_rank else None
    merged = (old or LayerMemory.empty(x.shape[1], x)).merged(x, len(x), 1.0, rank)
    if old is not None:
        sums, counts = sums + old.class_sums, counts + old.class_counts
    return replace(merged, class_sums=sums, class_counts=counts, class_roots=roots)


def covariance(x):
    return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def drawn_from(memory, x, y):
    drawn = pseudo_samples(memory, 3000, readout_samples(x, y))
    return drawn.inputs, drawn.targets


def test_pseudo_samples_have_the_class_means_and_the_covariance_within_classes():
    x, y = samples(0, (1, 2, 5))
    drawn, classes = drawn_from(remembered(x, y), x, y)
    assert set(classes.tolist()) == {1, 2, 5}
    means = torch.stack([x[y == c].mean(0) for c in range(6) if (y == c).any()])
    ours = torch.stack([drawn[classes == c].mean(0) for c in (1, 2, 5)])
    torch.testing.assert_close(ours, means, atol=1e-4, rtol=1e-4)
    spread = [a - m[[(1, 2, 5).index(int(c)) for c in b]] for a, b, m in ((x, y, means), (drawn, classes, ours))]
    within = [s.T @ s / len(s) for s in spread]
    torch.testing.assert_close(within[1], within[0], atol=2e-3, rtol=1e-3)


def test_pseudo_samples_of_few_directions_have_the_class_means_and_the_memory_s_second_moment():
    for rank, rest in ((4, 0.0), (4, 1e-3), (12, 0.0)):  # the means along the vectors alone, beyond them, too many
        x, y = samples(0, (1, 2, 5))
        x = x @ (vectors := torch.linalg.eigh(x.T @ x).eigenvectors[:, -rank:]) @ vectors.T + rest * x
        memory = remembered(x, y, rank)
        drawn, classes = drawn_from(memory, x, y)
        for c in (1, 2, 5):
            torch.testing.assert_close(drawn[classes == c].mean(0), x[y == c].mean(0), atol=1e-4, rtol=1e-4)
        own = drawn.T @ drawn / len(drawn)
        torch.testing.assert_close(own, x.T @ x / len(x), atol=0.02, rtol=0.02)


def test_remainders_of_class_means_beyond_few_eigenvectors_tell_classes_apart():
    """Three classes of little difference and much common variation, which takes all the eigenvectors that are kept."""
    torch.manual_seed(0)
    y = torch.arange(3).repeat(200)
    x = 0.2 * torch.randn(600, 40) + torch.nn.functional.one_hot(y, 40) + 3 * torch.randn(600, 4) @ torch.randn(4, 40)
    memory, seen = remembered(x, y, 4), readout_samples(x, y)
    means, shares = torch.stack([x[y == c].mean(0) for c in range(3)]), torch.full((3,), 1 / 3)
    moments, directions = extended(memory, means, shares, seen)
    torch.testing.assert_close(moments[:4], memory.eigenvalues)
    torch.testing.assert_close(directions.T @ directions, torch.eye(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(means @ directions @ directions.T, means, atol=1e-4, rtol=1e-4)
    beyond = directions[:, 4:]
    within = (x - means[y]) @ beyond
    within = within.square().sum() / (597 * 3)
    between = (shares.sqrt().unsqueeze(1) * means @ beyond).square().sum(0)
    torch.testing.assert_close(moments[4:], within + between)
    made = pseudo_samples(memory, 3000, seen)
    own_means, own_shares = made.means
    torch.testing.assert_close(own_means, means, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own_shares, shares, atol=1e-3, rtol=0)
    drawn = made.inputs @ beyond
    torch.testing.assert_close((drawn.T @ drawn / len(drawn)).diag(), moments[4:], atol=1e-3, rtol=0.02)
    solution = ReadoutProblem(torch.zeros(6, 40), seen, None, memory, OneHotMSELoss(), SETTINGS).solution()
    assert ((x @ solution.T).argmax(1) == y).float().mean() > 0.99  # along the eigenvectors alone: .35


def test_classes_tell_the_old_loss_as_far_as_they_are_as_separable_as_in_one_experience():
    (x, y), (a, b) = samples(0, (0, 1, 2)), samples(1, (0, 1, 2))
    assert told_by_classes(remembered(x, y), readout_samples(x, y)) == pytest.approx(1, abs=1e-3)

    def separability(inputs, classes):
        means = torch.stack([inputs[classes == c].mean(0) for c in range(3)])[classes]
        return (means - inputs.mean(0)).square().sum() / (inputs - means).square().sum()

    expected = separability(torch.cat([a, x * 2]), torch.cat([b, y])) / separability(x, y)
    memory = remembered(x * 2, y, old=remembered(a, b))
    assert told_by_classes(memory, readout_samples(x, y)) == pytest.approx(float(expected), rel=1e-3)
    single = x[:6], torch.arange(6)  # one sample a class
    assert 0 <= told_by_classes(remembered(*single), readout_samples(*single)) <= 1


def test_the_shift_of_class_means_is_zero_for_equal_distributions_and_infinite_for_new_classes():
    (x, y), (a, b) = (samples(seed, (0, 1, 2), size=20_000) for seed in (0, 1))
    memory = remembered(x, y)
    assert class_shift(memory, readout_samples(a, b)) < 0.01
    moved = a + torch.nn.functional.one_hot(b, a.shape[1])  # each class by 1, in a direction of its own
    means = torch.stack([moved[b == c].mean(0) for c in range(3)])[b]
    expected = 1 / (means - moved.mean(0)).square().sum(1).mean()
    assert class_shift(memory, readout_samples(moved, b)) == pytest.approx(float(expected), rel=0.1)
    assert class_shift(memory, readout_samples(a, b + 1)) == math.inf
    lacking = class_shift(memory, readout_samples(a[b < 2], b[b < 2]))
    assert lacking == pytest.approx(float((y == 2).float().mean()), abs=0.01)
    fewer = replace(memory, class_sums=memory.class_sums[:3], class_counts=memory.class_counts[:3])
    assert class_shift(fewer, readout_samples(a, b)) < 0.01  # a head that has grown since
    assert class_shift(fewer, readout_samples(a, b + 1)) == math.inf


def test_classes_with_other_inputs_in_each_experience_tell_little_of_the_old_loss():
    (x, y), memory = samples(0, (0, 1, 2)), None
    for k in range(12):
        places = torch.randperm(12, generator=torch.Generator().manual_seed(k))
        memory = remembered(torch.cat([x[:, places], x[:, 12:]], 1), y, old=memory)
    assert 0 < told_by_classes(memory, readout_samples(x, y)) < 0.5


@pytest.mark.parametrize("rank", [13, 4])
def test_the_old_quadratic_is_the_mean_squared_change_of_the_outputs(rank):
    x, y = samples(0, (0, 1, 2))
    anchor, change = (torch.randn(6, 13, generator=torch.Generator().manual_seed(s)) for s in (5, 6))
    memory = remembered(x, y, rank)
    memory = replace(memory, anchor=anchor @ memory.vectors)
    if rank < 13:  # along other directions the present weights count as those at consolidation
        change = change @ memory.vectors @ memory.vectors.T
    loss = old_quadratic(memory, anchor, torch.tensor(0.7))
    assert float(loss(anchor)) == pytest.approx(0, abs=1e-6)
    expected = 0.35 * (x @ change.T).square().sum() / len(x)
    torch.testing.assert_close(loss(anchor + change), expected, rtol=1e-3, atol=1e-5)
    grown = old_quadratic(replace(memory, anchor=memory.anchor[:4]), anchor, torch.tensor(0.7))
    torch.testing.assert_close(grown(anchor + change), expected, rtol=1e-3, atol=1e-5)


def test_with_the_quadratic_alone_a_squared_error_ends_at_the_minimum_of_all_data():
    """Which is recursive least squares."""
    (x, y), (a, b) = samples(0, (0, 1, 2)), samples(1, (0, 1, 2))
    loss, memory = OneHotMSELoss(), remembered(x, y)
    solved = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y, 6).float()).solution.T
    memory = replace(memory, anchor=solved @ memory.vectors)
    old = PseudoSamples(torch.zeros(6, 13), torch.eye(13), torch.arange(6))  # tell nothing
    exact, merged = replace(SETTINGS, solve_tolerance=1e-9, solve_steps=200), memory.merged(a, len(a), 1.0, 13)
    quadratic = old_quadratic(memory, solved, torch.tensor(2.0))
    problem = ReadoutProblem(solved, readout_samples(a, b), old, merged, loss, exact, quadratic=quadratic, told=0.0)
    both, classes = torch.cat([x, a]), torch.cat([y, b])
    expected = torch.linalg.lstsq(both, torch.nn.functional.one_hot(classes, 6).float()).solution.T
    torch.testing.assert_close(problem.solution(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), OneHotMSELoss()])
def test_a_loss_a_million_times_smaller_has_the_same_solution(criterion):
    """The search stopped at once where a mean is also taken over many units."""
    (x, y), (a, b) = samples(0, (0, 1, 2)), samples(1, (3, 4), 40)
    memory, ends = remembered(x, y), []
    old = pseudo_samples(memory, 400, readout_samples(a, b))
    for scale in (1.0, 1e-6):
        loss = partial(lambda outputs, targets, scale: scale * criterion(outputs, targets), scale=scale)
        present, merged = torch.zeros(6, 13), memory.merged(a, len(a), 1.0, 13)
        ends.append(ReadoutProblem(present, readout_samples(a, b), old, merged, loss, SETTINGS).solution())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
    assert float((a @ ends[0].T).argmax(1).eq(b).float().mean()) > 0.5


def test_a_loss_that_is_zero_for_outputs_of_zero_is_solved():
    x, y = samples(0, (0, 1, 2))
    memory, present = remembered(x, y), torch.randn(6, 13, generator=torch.Generator().manual_seed(5))
    criterion = lambda outputs, targets: outputs.square().sum() / len(outputs)  # noqa: E731
    solution = ReadoutProblem(present, readout_samples(x, y), None, memory, criterion, SETTINGS).solution()
    torch.testing.assert_close(solution, torch.zeros(6, 13), atol=1e-3, rtol=0)


@pytest.mark.parametrize("told, expected", [(30.0, {1.0}), (0.0, {4.0, 16.0, 64.0, 256.0})])
def test_the_ridge_grows_where_half_of_the_samples_tell_nothing_of_the_others(told, expected):
    torch.manual_seed(0)
    y = torch.arange(120) % 6
    x = torch.randn(120, 60) + told * torch.nn.functional.one_hot(y, 60)
    present, memory = nn.Linear(60, 6).weight.detach(), LayerMemory.empty(60, x).merged(x, 120, 1.0, 60)
    for criterion in (nn.CrossEntropyLoss(), OneHotMSELoss()):
        problem = ReadoutProblem(present, readout_samples(x, y), None, memory, criterion, SETTINGS)
        assert problem.held_out_ridge() in expected
    one = readout_samples(x[:1], y[:1])
    assert ReadoutProblem(present, one, None, memory, nn.CrossEntropyLoss(), SETTINGS).held_out_ridge() == 1


def test_wrong_labels_cost_no_more_than_without_the_gate(split5):
    parts = [e.dataset.read_batch(list(range(400)))[:2] for e in split5.train_stream]
    x, y = (torch.cat(part) for part in zip(*parts))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    wrong = torch.rand(len(y), generator=generator) < 0.4
    labels = torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)
    ends = []
    for gated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        gate = PlasticityGate(model, optimizer) if gated else None
        for rows in order[:1600].split(400):
            data = TensorDataset(x[rows].flatten(1), labels[rows])
            if gate is not None:
                gate.prepare(data, nn.CrossEntropyLoss())
            for part in rows.repeat(5).split(40):
                optimizer.zero_grad()
                nn.CrossEntropyLoss()(model(x[part].flatten(1)), labels[part]).backward()
                optimizer.step()
            if gate is not None:
                gate.consolidate(data, nn.CrossEntropyLoss())
        rows = order[1600:]
        ends.append((model(x[rows].flatten(1)).argmax(1) == y[rows]).float().mean())
    assert ends[1] > ends[0]


def test_differences_of_means_below_their_standard_error_are_no_directions():
    torch.manual_seed(0)
    y = torch.arange(3).repeat(200)
    x = torch.randn(600, 4) @ torch.randn(4, 40)  # of rank 4: its means have nothing beyond
    seen = readout_samples(x + 0.1 * torch.randn(600, 40), y)
    means, apart = torch.stack([x[y == c].mean(0) for c in range(3)]), torch.linalg.svd(x).Vh[-1]
    for size, many in ((0.0, 0), (0.002, 0), (0.02, 1)):  # the standard error is .1 / sqrt(600)
        far = means + size * apart * torch.tensor([[1.0], [-1.0], [0.0]])
        _, directions = extended(remembered(x, y, 4), far, torch.full((3,), 1 / 3), seen)
        assert directions[:, 4:].any(0).sum() == many


def test_pseudo_samples_of_many_classes_of_two_samples_have_the_memory_s_second_moment():
    torch.manual_seed(0)
    y = torch.arange(60).repeat(2)
    x = torch.randn(60, 64)[y] + 0.3 * torch.randn(120, 64)
    sums = torch.zeros(60, 64).index_add_(0, y, x)
    memory = replace(
        LayerMemory.empty(64, x).merged(x, 120, 1.0, 64), class_sums=sums, class_counts=torch.full((60,), 2.0)
    )
    drawn = pseudo_samples(memory, 120, ReadoutSamples("", x, y, torch.full((60,), torch.nan), 120)).inputs
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), x.T @ x / 120, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rank", [4, 13])
def test_pseudo_samples_do_not_depend_on_the_signs_of_eigenvectors_and_each_consolidation_draws_others(rank):
    x, y = samples(0, (1, 2, 5))
    memory = remembered(x, y, rank, class_rank=2)
    signs = torch.tensor([1.0, -1.0]).repeat(7)
    roots = memory.class_roots * signs[:2, None]
    flipped = replace(memory, vectors=memory.vectors * signs[:rank], class_roots=roots)
    drawn, other = (drawn_from(m, x, y)[0] for m in (memory, flipped))
    torch.testing.assert_close(drawn, other, atol=1e-4, rtol=1e-4)
    later = drawn_from(replace(memory, samples=memory.samples + 1), x, y)[0]
    assert (later - drawn).abs().max() > 0.1


def test_inputs_that_are_all_zero_do_not_move():
    zeros = torch.zeros(20, 13)
    assert drift_map(zeros, zeros, torch.eye(13), SETTINGS)(torch.ones(2, 13)).tolist() == torch.zeros(2, 13).tolist()


def test_pseudo_samples_have_each_class_s_own_leading_covariance_and_share_the_rest():
    x, y = samples(0, (1, 2, 5))
    x[y == 2, :4] *= 3  # a covariance unlike the others'
    drawn, classes = drawn_from(remembered(x, y, class_rank=4), x, y)
    own, share, rest = {}, {}, torch.zeros(13, 13)
    for c in (1, 2, 5):
        torch.testing.assert_close(drawn[classes == c].mean(0), x[y == c].mean(0), atol=1e-4, rtol=1e-4)
        values, vectors = torch.linalg.eigh(covariance(x[y == c]))
        own[c] = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
        share[c] = (y == c).float().mean()
        rest += share[c] * (covariance(x[y == c]) - own[c])
    for c in (1, 2, 5):  # the shared noise of one class has the shared covariance on average alone
        error = covariance(drawn[classes == c]) - own[c] - rest
        assert error.norm() < 0.2 * rest.norm()
    within = sum((classes == c).float().mean() * covariance(drawn[classes == c]) for c in (1, 2, 5))
    expected = sum(share[c] * covariance(x[y == c]) for c in (1, 2, 5))
    torch.testing.assert_close(within, expected, atol=2e-2, rtol=1e-2)  # roots are kept in half precision


def test_class_roots_of_two_experiences_are_those_of_all_their_samples():
    (x, y), (more, z) = samples(0, (1, 2)), samples(1, (2, 3))
    ours = remembered(more, z, class_rank=13, old=remembered(x, y, class_rank=13)).class_roots.float()
    every, labels = torch.cat([x, more]), torch.cat([y, z])
    for c in (1, 2, 3):
        expected = covariance(every[labels == c])
        torch.testing.assert_close(ours[c].T @ ours[c], expected, atol=0.02 * float(expected.max()), rtol=0)
    assert not ours[0].any()


def test_class_roots_are_few_if_there_are_many_classes():
    x, y = samples(0, (1, 2))
    seen = ReadoutSamples("", x, y, torch.full((300,), torch.nan), len(x))
    assert class_roots(seen, None, SETTINGS).shape == (300, 3, 13)
    assert class_roots(seen, None, replace(SETTINGS, class_vectors=299)).shape == (300, 0, 13)


def test_a_memory_that_moves_is_that_of_the_moved_inputs():
    x, y = samples(0, (0, 3))
    drift = torch.eye(13) + 0.2 * torch.randn(13, 13, generator=torch.Generator().manual_seed(3))
    ours, expected = (
        remembered(x, y, class_rank=13).moved(lambda rows: rows @ drift),
        remembered(x @ drift, y, class_rank=13),
    )
    for one, other in zip(ours.class_roots.float(), expected.class_roots.float()):
        torch.testing.assert_close(one.T @ one, other.T @ other, atol=0.02 * float(other.square().sum()), rtol=0)
    torch.testing.assert_close(ours.roots.T @ ours.roots, expected.roots.T @ expected.roots, atol=1e-3, rtol=1e-3)
    merged = ours.merged(x, len(x), 1.0, 13).eigenvalues
    torch.testing.assert_close(merged, expected.merged(x, len(x), 1.0, 13).eigenvalues, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours.class_sums, expected.class_sums, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(ours.mean_eigenvalue, expected.mean_eigenvalue, atol=1e-4, rtol=1e-3)


def test_a_solution_that_fails_leaves_the_memory_as_it_was(split5, monkeypatch):
    model = mlp()
    gate = PlasticityGate(model, torch.optim.SGD(model.parameters(), lr=0.02))
    tasks = [TensorDataset(*e.dataset.read_batch(list(range(200)))[:2]) for e in split5.train_stream[:2]]
    gate.consolidate(tasks[0], OneHotMSELoss())
    gate.prepare(tasks[1], OneHotMSELoss())
    memory = gate.memory

    def fails(*_, **__):
        raise FloatingPointError

    monkeypatch.setattr(ReadoutProblem, "solution", fails)
    with pytest.raises(FloatingPointError):
        gate.consolidate(tasks[1], OneHotMSELoss())
    assert gate.memory is memory


def test_a_linear_drift_is_found():
    x, _ = samples(0, (0, 3))
    drift = torch.eye(13) + 0.1 * torch.randn(13, 13, generator=torch.Generator().manual_seed(3))
    exact = replace(SETTINGS, drift_ridge=1e-9)
    changes = drift_map(x, x @ drift, torch.eye(13), exact)(x)
    torch.testing.assert_close(changes, x @ drift - x, atol=1e-3, rtol=1e-3)


def test_the_drift_is_the_ridge_regression_of_the_changes():
    (x, _), (old, _) = samples(0, (0, 3)), samples(1, (1,), 9)
    after = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    ridge = SETTINGS.drift_ridge * x.square().sum() / 13
    change = torch.linalg.solve(x.T @ x + ridge * torch.eye(13), x.T @ (after - x))
    ours = drift_map(x, after, torch.eye(13), SETTINGS)(old)
    torch.testing.assert_close(ours, old @ change, atol=1e-4, rtol=1e-4)


def test_a_drift_that_is_common_to_all_classes_moves_old_inputs_as_far():
    """No gated layer below is known to have changed, so the share is 0 without that. The loss is a squared error."""
    old, (x, y) = samples(0, (0, 1)), samples(1, (2, 3, 4, 5))
    mixing = 0.2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    settings = replace(SETTINGS, drift_ridge=1e-4)
    memory, head = Memory({"head": remembered(*old)}), nn.Linear(12, 6)
    pseudo = PseudoSamples(old[0], torch.eye(13), old[1])
    prepared = Preparation("head", True, x, y, pseudo, None, torch.eye(13), {}, {}, {})

    def drift(inputs, places):
        return torch.cat([inputs[:, :-1] + inputs[:, :-1] @ mixing + 1 + places, inputs[:, -1:]], 1)

    def followed(places):
        now, squared_error = readout_samples(drift(x, places[y]), y), object()
        seen = Observation({}, len(x), 4, torch.zeros(()), squared_error, now)
        return follow_drift(memory, prepared, seen, {"head": GatedLayer(head)}, settings)

    common, apart = torch.zeros(6, 12), 9 * torch.eye(6, 12)
    expected = drift(old[0], common[old[1]])
    for moved, samples_of_old, where in ((followed(common), expected, 1), (followed(apart), old[0], 0)):
        sums = remembered(samples_of_old, old[1]).class_sums
        torch.testing.assert_close(moved[0].layers["head"].class_sums, sums, atol=where + 1e-5, rtol=0.01 * where)
        torch.testing.assert_close(moved[1].inputs, samples_of_old, atol=0.05 * where, rtol=0)


@pytest.mark.parametrize(
    "quadratic, solved, continues",
    [(False, True, False), (True, True, False), (False, False, False), (False, False, True), (True, False, True)],
)
def test_old_inputs_move_by_the_part_of_a_drift_that_classes_share(quadratic, solved, continues):
    """No gated layer below is known to have changed, so the first order tells that nothing moves."""
    old, (x, y) = samples(0, (0, 1)), samples(1, (2, 3, 4, 5))
    mixing, shifts = (torch.randn(n, 13, generator=torch.Generator().manual_seed(5)) for n in (13, 6))
    after = x + 0.2 * x @ mixing + 0.5 * shifts[y]
    settings = replace(SETTINGS, drift_agreement=2.0)
    memory, head = remembered(*old), nn.Linear(12, 6)
    pseudo = PseudoSamples(old[0], torch.eye(13), old[1])
    prepared = Preparation("head", solved, x, y, pseudo, None, torch.eye(13), {}, {}, {})
    now = readout_samples(after, y)
    seen = Observation({}, len(x), 4, torch.zeros(()), object() if quadratic else None, now)
    layers = {"head": GatedLayer(head)}
    moved = follow_drift(Memory({"head": memory}), prepared, seen, layers, settings, continues=continues)[1].inputs

    def changes(part):
        return drift_map(x[part], after[part], torch.eye(13), settings)(memory.roots)

    alike = agreement(y, changes)
    assert 0.2 < alike < 0.9
    share = 1.0 if continues else alike**2 if solved and not quadratic else 0.0
    expected = old[0] + share * drift_map(x, after, torch.eye(13), settings)(old[0])
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


def in_order(x, y):
    order = y.argsort()
    return x[order], y[order]


def followed(old, new, change):
    """The memory of old inputs and their pseudo-samples, these themselves, after ``change`` of (inputs, classes)."""
    drawn = DrawnInputs(torch.zeros(0), torch.cat([old[0], new[0]]), old[1], new[1])
    pseudo = PseudoSamples(old[0], torch.eye(13), old[1])
    prepared = Preparation("head", True, *new, pseudo, drawn, torch.eye(13), {}, {}, {})
    now = readout_samples(change(*new), new[1])
    seen = Observation({}, len(new[1]), 2, torch.zeros(()), None, now)
    layers, settings = {"head": GatedLayer(nn.Linear(12, 6))}, replace(SETTINGS, drift_ridge=1e-4)
    after = change(drawn.features, torch.cat([old[1], new[1]]))
    memory, pseudo = follow_drift(Memory({"head": remembered(*old)}), prepared, seen, layers, settings, after)
    return memory.layers["head"], pseudo


def test_old_inputs_that_are_run_through_the_network_tell_their_drift():
    """The first order knows nothing of it here."""
    mixing = 0.2 * torch.randn(13, 13, generator=torch.Generator().manual_seed(3))
    old, new = in_order(*samples(0, (0, 1))), in_order(*samples(1, (2, 3)))
    known, pseudo = followed(old, new, lambda x, y: x + x @ mixing)
    torch.testing.assert_close(pseudo.targets, old[1])
    expected = remembered(old[0] + old[0] @ mixing, old[1])
    torch.testing.assert_close(known.class_sums, expected.class_sums, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(known.roots.T @ known.roots, expected.roots.T @ expected.roots, atol=1e-2, rtol=1e-3)


def test_each_class_moves_and_scatters_as_its_drawn_inputs_though_no_linear_map_does():
    generator = torch.Generator().manual_seed(3)
    shifts, wide = 5 * torch.randn(6, 13, generator=generator), torch.tensor([0.1, 1.0, 2.0, 0.3, 1.0, 1.0])
    old, new = in_order(*samples(0, (0, 1, 2))), in_order(*samples(1, (3, 4)))

    def change(x, y):
        return x + shifts[y] + wide[y].unsqueeze(1) * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    known, pseudo = followed(old, new, change)
    expected = change(*old)
    for label in range(3):
        ours, real = pseudo.inputs[pseudo.targets == label], expected[old[1] == label]
        torch.testing.assert_close(ours.mean(0), real.mean(0), atol=0.05 * float(shifts.norm(dim=1).mean()), rtol=0)
        torch.testing.assert_close(ours.var(0).sum(), real.var(0).sum(), atol=0, rtol=0.1)
    memory = remembered(pseudo.inputs, pseudo.targets)
    torch.testing.assert_close(known.class_sums, memory.class_sums, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(known.roots.T @ known.roots, memory.roots.T @ memory.roots, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(known.mean_eigenvalue, memory.mean_eigenvalue, atol=1e-2, rtol=1e-3)


def test_what_no_map_explains_is_given_in_turn_and_its_class_means_as_far_as_they_are_known():
    left, sources = torch.tensor([[1.0], [3.0], [-2.0], [-2.0]]), torch.tensor([0, 0, 2, 2])
    targets = torch.tensor([0, 0, 0, 2])
    # Means 2 and -2, scatter 2 / 2 within classes: the standard error of a mean is 1/2.
    for error, kept in ((0.0, 1 - 0.5 / 4), (1.5, 0.5), (9.0, 0.0)):
        expected = torch.tensor([[-1.0], [1.0], [-1.0], [0.0]]) + kept * torch.tensor([[2.0], [2.0], [2.0], [-2.0]])
        torch.testing.assert_close(_unexplained(left, sources, torch.tensor(error), targets), expected)


def test_the_error_of_drawn_inputs_is_that_of_their_class_means_without_noise():
    generator = torch.Generator().manual_seed(0)
    classes, targets = torch.arange(4000) % 4, torch.arange(9000) % 5  # one class without a drawn input
    drawn, real = (torch.randn(n, 8, generator=generator) for n in (4000, 9000))
    assert _error_of_drawn(drawn, classes, real, targets) < 3e-3
    far = torch.tensor([0.0, 1.0, 0.0, 2.0])[classes].unsqueeze(1)
    error = _error_of_drawn(0.1 * drawn + far, classes, 0.1 * real, targets)
    torch.testing.assert_close(error, torch.tensor(10.0), atol=0.1, rtol=0)
    few = [_error_of_drawn(drawn[i : i + 40], classes[:40], real, targets) for i in range(0, 4000, 40)]
    assert torch.stack(few).mean() < 0.3  # the squared standard error of a mean is 0.8


def test_new_classes_are_drawn_with_their_means_and_the_old_covariance():
    x, y = in_order(*samples(1, (3, 4), 3000))
    seen = readout_samples(x, y)
    rows, old, new = draw_inputs(remembered(*samples(0, (0, 1))), seen)
    assert old.unique().tolist() == [0, 1] and new.unique().tolist() == [3, 4] and len(rows) == len(old) + len(new)
    drawn, made = rows[: len(old)], rows[len(old) :]
    for label in (3, 4):
        deviation = made[new == label].mean(0) - x[y == label].mean(0)
        assert deviation.norm() < 0.3 * drawn.std(0).norm()
    within = [torch.cat([r[t == c] - r[t == c].mean(0) for c in t.unique()]) for r, t in ((drawn, old), (made, new))]
    scale = float(covariance(within[0]).diagonal().max())
    torch.testing.assert_close(covariance(within[1]), covariance(within[0]), atol=0.25 * scale, rtol=0)


class Skip(nn.Module):
    """A network whose last layer also has the network's inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(12, 8), nn.Linear(20, 6)

    def forward(self, x):
        return self.head(torch.cat([self.first(x).relu(), x], 1))


def test_the_network_runs_on_input_vectors_of_its_first_layer_if_nothing_else_depends_on_the_data():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6))
    rows, other = samples(0, (0, 1))[0][:300], torch.randn(7, 3, 4)

    def run(model, first, head, inputs):
        return features_of(model, inputs, rows, GatedLayer(first), GatedLayer(head), lambda m, x: m(x))

    expected = torch.cat([plain[1](rows[:, :-1]).relu(), torch.ones(300, 1)], 1)
    torch.testing.assert_close(run(plain, plain[1], plain[4], other), expected)
    assert plain.training and not plain[1]._forward_pre_hooks
    skip = Skip()
    assert run(skip, skip.first, skip.head, other.flatten(1)) is None
    convolution = nn.Sequential(nn.Conv2d(1, 2, (3, 4)), nn.Flatten(), nn.Linear(2, 6))
    assert run(convolution, convolution[0], convolution[2], other.unsqueeze(1)) is None


class Heads(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.first, self.task = nn.Linear(784, 64), 0
        self.heads = nn.ModuleList(nn.Linear(64, size) for size in sizes)

    def forward(self, x):
        return self.heads[self.task](self.first(x.flatten(1)).relu())


def test_heads_of_different_sizes_share_no_sums_of_the_data(split5):
    torch.manual_seed(0)
    model = Heads(5, 3)
    gate = PlasticityGate(model, torch.optim.Adam(model.parameters()))
    for model.task, experience in enumerate(split5.train_stream[:2]):
        x, y = experience.dataset.read_batch(list(range(200)))[:2]
        gate.prepare(task := TensorDataset(x, y % 2), nn.CrossEntropyLoss())
        gate.consolidate(task, nn.CrossEntropyLoss())
        assert (gate.memory.layers["first"].data_sums is None) == (model.task == 1)


def test_old_features_are_followed_in_double_precision(split5):
    torch.set_default_dtype(torch.float64)
    try:
        model = mlp(32)
        adam = torch.optim.Adam(model.parameters())
        gate = PlasticityGate(model, adam)
        for experience in split5.train_stream[:2]:
            x, y = experience.dataset.read_batch(list(range(200)))[:2]
            gate.prepare(task := TensorDataset(x.double(), y), nn.CrossEntropyLoss())
            nn.functional.cross_entropy(model(x.double()), y).backward()
            adam.step()
            gate.consolidate(task, nn.CrossEntropyLoss())
    finally:
        torch.set_default_dtype(torch.float32)
    assert gate.memory.consolidations == 2


def readouts_after(benchmark, criterion, told=True, hidden=256):
    """An MLP and its gate's memory after an MNIST stream; without ``told`` no old input is run through it."""
    model = mlp(hidden)
    plugin = SelectivePlasticityPlugin()
    if not told:
        plugin.gate._entered = lambda observation, layers: None
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    strategy = strategy_of(model, [plugin], criterion=criterion, optimizer=adam)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return model.eval(), plugin.gate.memory


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), OneHotMSELoss()], ids=type)
def test_the_sums_of_the_data_by_class_are_kept_and_give_truer_means_of_old_features(criterion):
    benchmark, errors = sliced(split_mnist(5, dataset_root=MNIST), 600), {}
    x, y = zip(*(next(iter(DataLoader(e.dataset, 600)))[:2] for e in benchmark.train_stream))
    x, y = torch.cat(x), torch.cat(y)
    for told in (True, False):
        model, memory = readouts_after(benchmark, criterion, told)
        features, known = model[:-1](x).detach(), memory.layers["5"]
        means = torch.zeros(10, 256).index_add_(0, y, features) / y.bincount().unsqueeze(1)
        ours = known.class_sums[:, :-1] / known.class_counts.unsqueeze(1)
        errors[told] = float((ours - means).square().sum())
    assert errors[True] < 0.8 * errors[False]
    vectors = torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)
    sums = torch.zeros(10, 785).index_add_(0, y, vectors)
    torch.testing.assert_close(memory.layers["1"].data_sums, sums, atol=1e-2, rtol=1e-3)
    rounded = memory.within(memory.state_bytes - 1)
    torch.testing.assert_close(rounded.layers["1"].data_sums, sums, atol=0.1, rtol=1e-3)  # half precision
    small = rounded.within(rounded.state_bytes - 1)
    assert small.layers["1"].data_sums is None and small.layers["5"].class_sums is not None


def test_a_narrow_layer_keeps_no_sums_of_the_data():
    benchmark = sliced(split_mnist(5, dataset_root=MNIST), 100, experiences=2)
    for hidden in (9, 10):
        _, memory = readouts_after(benchmark, nn.CrossEntropyLoss(), hidden=hidden)
        assert (memory.layers["1"].data_sums is None) == (hidden < 10)


@pytest.mark.parametrize("order", list(itertools.permutations([(0, 1), (2, 3), (4, 5)]))[::2], ids=str)
def test_on_a_frozen_trunk_it_is_the_ridge_regression_on_all_samples_in_any_order(order):
    torch.manual_seed(0)
    trunk, readout = nn.Linear(13, 20), nn.Linear(20, 6)
    trunk.requires_grad_(False)
    model, tasks = nn.Sequential(trunk, nn.ReLU(), readout), [samples(0, classes) for classes in order]
    optimizer = torch.optim.SGD(readout.parameters(), lr=0.05)
    settings = Settings(solve_steps=200)
    gate, criterion = PlasticityGate(model, optimizer, settings=settings), OneHotMSELoss()
    for x, y in tasks:
        gate.prepare(TensorDataset(x, y), criterion)
        for rows in torch.arange(len(x)).split(50):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
        gate.consolidate(TensorDataset(x, y), criterion)
    x, y = (torch.cat(part) for part in zip(*tasks))
    features = torch.cat([torch.relu(trunk(x)), torch.ones(len(x), 1)], 1).double()
    ridge = settings.solve_ridge * (features.T @ features).trace() / 21
    rows = torch.cat([features, ridge.sqrt() * torch.eye(21).double()])
    targets = torch.cat([nn.functional.one_hot(y, 6).double(), torch.zeros(21, 6).double()])
    expected = reference.least_squares(rows, targets)
    difference = (GatedLayer(readout).weights_and_bias().double() - expected).norm() / expected.norm()
    assert difference < 1e-3


LOSSES = {
    "squared error": OneHotMSELoss(),
    "cross-entropy": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "focal": lambda outputs, y: (
        (1 - outputs.softmax(1).gather(1, y[:, None])[:, 0]) * nn.functional.cross_entropy(outputs, y, reduction="none")
    ).mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("old, new", [(300, 20), (20, 300)])
def test_rare_classes_are_learned_and_kept(split5, loss, old, new):
    """By the numbers of samples, most of them were given up: in a joint loss they weigh next to nothing."""
    small = sliced(split5, train=old, test=200)
    few, model = sliced(split5, train=new, test=200), mlp(64)
    strategy = strategy_of(
        model, [SelectivePlasticityPlugin()], optimizer=torch.optim.Adam(model.parameters()), criterion=LOSSES[loss]
    )
    for experience in (*small.train_stream[:3], *few.train_stream[3:4]):
        strategy.train(experience)
    model.eval()
    assert accuracy(model, small, 3) > 0.4
    assert sum(accuracy(model, small, task) for task in range(3)) / 3 > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_each_short_experience_is_learned_and_the_old_ones_are_kept(split5, loss, optimizer):
    """Thirteen iterations a task, in which the gate alone learns nothing."""
    small = sliced(split5, train=416, test=200)
    model = mlp(64)
    step = torch.optim.SGD(model.parameters(), lr=0.05) if optimizer == "sgd" else torch.optim.Adam(model.parameters())
    strategy = strategy_of(model, [SelectivePlasticityPlugin()], optimizer=step, criterion=LOSSES[loss])
    learned = []
    for task, experience in enumerate(small.train_stream):
        strategy.train(experience)
        learned.append(accuracy(model.eval(), small, task))
    assert min(learned) > 0.55
    assert sum(accuracy(model, small, task) for task in range(5)) / 5 > 0.65


@pytest.mark.parametrize(
    "network, optimizer, epochs, stored", [("mlp", "sgd", 5, 0), ("cnn", "adam", 1, 0), ("cnn", "adam", 1, 100)]
)
def test_short_tasks_of_the_same_classes_are_learned_as_well_as_without_the_plugin(
    permuted3, network, optimizer, epochs, stored
):
    small, ends = sliced(permuted3, train=416, test=200), []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        plugins += [ReplayPlugin(stored)] if stored else []
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)]
        model = mlp(64) if network == "mlp" else nn.Sequential(*convolutions)
        step = partial(torch.optim.SGD, lr=0.02) if optimizer == "sgd" else torch.optim.Adam
        loss = nn.CrossEntropyLoss()
        strategy = strategy_of(model, plugins, optimizer=step(model.parameters()), criterion=loss, epochs=epochs)
        learned = []
        for task, experience in enumerate(small.train_stream):
            strategy.train(experience)
            learned.append(accuracy(model.eval(), small, task))
        ends.append((min(learned[1:]), sum(accuracy(model, small, task) for task in range(3))))
    assert ends[1][0] > ends[0][0] - 0.02
    assert ends[1][1] > ends[0][1]


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


LINKS = {
    "scale": (Halved(), nn.CrossEntropyLoss()),
    "log-softmax": (nn.LogSoftmax(1), nn.NLLLoss()),
    "softmax": (nn.Softmax(1), lambda outputs, y: nn.functional.nll_loss(outputs.clamp_min(1e-12).log(), y)),
    "sigmoid": (
        nn.Sigmoid(),
        lambda outputs, y: (
            nn.functional.binary_cross_entropy(outputs, nn.functional.one_hot(y, 10).float(), reduction="sum") / len(y)
        ),
    ),
}


@pytest.mark.parametrize("link", LINKS)
def test_a_readout_whose_outputs_the_network_changes_in_a_known_way_is_solved(split5, link):
    small, (last, loss) = sliced(split5, train=416, test=200), LINKS[link]
    torch.manual_seed(0)
    model = nn.Sequential(*mlp(64), last)
    step = torch.optim.SGD(model.parameters(), lr=0.05)
    strategy = strategy_of(model, [SelectivePlasticityPlugin()], optimizer=step, criterion=loss)
    for experience in small.train_stream:
        strategy.train(experience)
    assert sum(accuracy(model.eval(), small, task) for task in range(5)) / 5 > 0.65


class LastStep(nn.Module):
    """A recurrent network: the readout of its last state, or the last one of the readouts of all states."""

    def __init__(self, form, batch_first=True):
        super().__init__()
        self.rnn, self.readout, self.form = nn.GRU(28, 32, batch_first=batch_first), nn.Linear(32, 10), form

    def forward(self, x):
        x = x.view(-1, 28, 28)
        if not self.rnn.batch_first:
            states = self.rnn(x.transpose(0, 1))[0]
            return self.readout(states)[-1] if self.form == "late" else self.readout(states[-1])
        states = self.rnn(x)[0]
        return self.readout(states)[:, -1] if self.form == "late" else self.readout(states[:, -1])


class OnePlace(nn.Module):
    """One state of a sequence, at another place for each sample, as the last token before the padding is."""

    def __init__(self, form):
        super().__init__()
        self.states, self.readout, self.form = nn.Sequential(nn.Linear(112, 32), nn.ReLU()), nn.Linear(32, 10), form

    def forward(self, x):
        x = x.view(-1, 7, 112)
        place, rows = x[:, 3].argmax(1) % 7, torch.arange(len(x))
        states = self.states(x)
        return self.readout(states)[rows, place] if self.form == "late" else self.readout(states[rows, place])


class Mean(nn.Module):
    """A convolutional network: the readout of the mean, or the mean of a convolution with a unit a class."""

    def __init__(self, form):
        super().__init__()
        self.body, self.form = nn.Sequential(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 16, 5, 3), nn.ReLU()), form
        self.readout = nn.Conv2d(16, 10, 1) if form == "late" else nn.Linear(16, 10)

    def forward(self, x):
        x = self.body(x.view(-1, 28, 28))
        return self.readout(x).mean((2, 3)) if self.form == "late" else self.readout(x.mean((2, 3)))


class Biased(nn.Module):
    """The bias of the readout: its own, or another parameter."""

    def __init__(self, form):
        super().__init__()
        self.body, self.readout = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), nn.Linear(64, 10, False)
        self.form, self.bias = form, nn.Parameter(torch.zeros(10), requires_grad=form == "late")

    def forward(self, x):
        return self.readout(self.body(x)) + self.bias


class Wide(nn.Module):
    """A readout of ten units, or the first ten of forty."""

    def __init__(self, form):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU())
        self.readout = nn.Linear(64, 40 if form == "late" else 10)

    def forward(self, x):
        return self.readout(self.body(x))[:, :10]


FORMS = {
    "a last step": (LastStep, 0.01),
    "a last step, time first": (partial(LastStep, batch_first=False), 0.01),
    "a place of its own": (OnePlace, 0.01),
    "a mean": (Mean, 0.01),
    "a bias": (Biased, 0.05),
    "the first units": (Wide, 0.05),
}


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=() if f in ("a mean", "a bias") else pytest.mark.slow) for f in FORMS]
)
def test_one_network_written_in_two_ways_learns_as_much(split5, form):
    small, (network, margin), kept = sliced(split5, train=416, test=200), FORMS[form], {}
    for name in ("early", "late"):
        torch.manual_seed(0)
        model = network(name)
        step = torch.optim.Adam(model.parameters())
        strategy = strategy_of(model, [SelectivePlasticityPlugin()], optimizer=step, criterion=nn.CrossEntropyLoss())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cannot solve the last layer")
            for experience in small.train_stream:
                strategy.train(experience)
        kept[name] = sum(accuracy(model.eval(), small, task) for task in range(5)) / 5
    assert kept["late"] > kept["early"] - margin and kept["early"] > 0.25


@pytest.mark.parametrize("pools", [False, True])
def test_a_bias_after_the_readout_is_known_in_a_last_batch_of_one_sample(split5, pools):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.readout, self.shift = nn.Linear(28 if pools else 784, 10), nn.Parameter(torch.randn(10))

        def forward(self, x):
            outputs = self.readout(x.view(len(x), 28, 28)).mean(1) if pools else self.readout(x.flatten(1))
            return outputs + self.shift

    torch.manual_seed(0)
    model, x, y = Shifted(), *split5.train_stream[0].dataset.read_batch(list(range(257)))[:2]
    gate = PlasticityGate(model, torch.optim.Adam(model.parameters()))
    gate.consolidate(list(zip(x.split(256), y.split(256))), nn.CrossEntropyLoss())
    assert gate.memory.layers["readout"].class_counts is not None


def test_a_warning_says_that_the_readout_cannot_be_solved(split5):
    small = sliced(split5, train=416, test=200)
    for last, warned in ((nn.Tanh(), True), (nn.Identity(), False), (nn.LogSoftmax(1), False)):
        model = nn.Sequential(*mlp(64), last)
        plugin = SelectivePlasticityPlugin()
        step = torch.optim.SGD(model.parameters(), lr=0.05)
        strategy = strategy_of(model, [plugin], optimizer=step, criterion=nn.CrossEntropyLoss())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            strategy.train(small.train_stream[0])
        assert any("cannot solve the last layer" in str(w.message) for w in caught) == warned


def test_beside_stored_samples_short_experiences_are_kept_better_than_by_these_alone(split5):
    small, kept = sliced(split5, train=416, test=200), {}
    for name, plugins in (("alone", []), ("gated", [SelectivePlasticityPlugin()])):
        model = mlp(64)
        step = torch.optim.SGD(model.parameters(), lr=0.05)
        strategy = strategy_of(model, [ReplayPlugin(100), *plugins], optimizer=step, criterion=nn.CrossEntropyLoss())
        for experience in small.train_stream:
            strategy.train(experience)
        kept[name] = sum(accuracy(model.eval(), small, task) for task in range(5)) / 5
    assert kept["gated"] > kept["alone"] + 0.1 and kept["gated"] > 0.7


@pytest.mark.parametrize("criterion, rate", [(OneHotMSELoss, 0.1), (nn.CrossEntropyLoss, 0.15)])
def test_a_high_rate_is_stable_beside_stored_samples_also(split5, criterion, rate):
    """Their gradient passes the gate, so a solved readout would make the loss too sharp for it."""
    model = mlp(256)
    step = torch.optim.SGD(model.parameters(), lr=rate)
    plugins = [ReplayPlugin(100), SelectivePlasticityPlugin()]
    strategy = strategy_of(model, plugins, optimizer=step, criterion=JointReplayLoss(criterion()))
    torch.manual_seed(0)
    for experience in split5.train_stream:
        strategy.train(experience)
    assert sum(accuracy(model.eval(), split5, task) for task in range(5)) / 5 > 0.82


def test_gradient_descent_is_stable_up_to_the_stable_step():
    curvature, weight, sharp, rate = torch.tensor(0.5), 3.0, torch.tensor(40.0), 0.4
    factor = stable_step(rate, curvature, weight, sharp)
    hessian = curvature * sharp * weight / (1 + weight)
    for share, is_stable in ((0.99, True), (1.01, False)):
        x = torch.tensor(1.0)
        for _ in range(2000):
            x = x - rate * share * factor * hessian * x
        assert (x.abs() < 1) == is_stable
    assert stable_step(rate, curvature, weight, torch.tensor(1.0)) == 1.0 == stable_step(0.0, curvature, weight, sharp)


def test_masked_units_stay_as_they_are(split2):
    """Avalanche's incremental head masks the units of classes that have not come."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), IncrementalClassifier(32, 1))
    strategy = strategy_of(model, [SelectivePlasticityPlugin()], criterion=nn.CrossEntropyLoss())
    for experience in split2.train_stream:
        strategy.train(experience)
    model.eval()
    assert all(accuracy(model, split2, task) > 0.6 for task in range(2))


@pytest.mark.parametrize(
    "name, criterion, first",
    [
        ("SGD", nn.CrossEntropyLoss(), (True, False)),
        ("Adam", nn.CrossEntropyLoss(), (False, True)),
        ("AdamW", nn.CrossEntropyLoss(), (False, True)),
        ("Adam", OneHotMSELoss(), (True, False)),
        ("SGD", OneHotMSELoss(), (True, False)),
    ],
)
def test_the_readout_is_frozen_between_prepare_and_consolidate_and_solved_for_new_classes_alone(name, criterion, first):
    """The first experience's as well for an adaptive optimizer and a loss that is not quadratic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 20), nn.ReLU(), nn.Linear(20, 6))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05)
    gate = PlasticityGate(model, optimizer)
    before = []
    for classes in ((0, 1), (0, 1), (2, 3)):
        x, y = samples(len(before), classes)
        start = GatedLayer(model[2]).weights_and_bias()
        gate.prepare(TensorDataset(x, y), criterion)
        prepared = GatedLayer(model[2]).weights_and_bias()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        before.append((torch.equal(start, prepared), torch.equal(prepared, GatedLayer(model[2]).weights_and_bias())))
        gate.consolidate(TensorDataset(x, y), criterion)
    assert before == [first, (True, False), (False, True)]


@pytest.mark.parametrize("kind", ["Adam", "NAdam", "RMSprop"])
@pytest.mark.parametrize("rate, solved", [(1e-6, True), (0.5, False)])
def test_a_first_readout_that_the_optimizers_steps_would_overshoot_is_left(kind, rate, solved):
    """Features near zero need large weights, and then a step below changes the outputs by far too much."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 20), nn.ReLU(), nn.Linear(20, 6))
    with torch.no_grad():
        model[0].weight.mul_(0.1), model[0].bias.mul_(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    gate = PlasticityGate(model, getattr(torch.optim, kind)(model.parameters(), lr=rate))
    gate.prepare(TensorDataset(*samples(0, (0, 1, 2, 3))), nn.CrossEntropyLoss())
    assert [torch.equal(p, was) for p, was in zip(model.parameters(), before)] == [True, True, not solved, not solved]
    assert model[2].weight.requires_grad and (gate._prepared is not None) == solved
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rate, expected", [(0.01, True), (10.0, False)])
def test_steps_of_adam_are_tried_on_all_samples_and_taken_back(rate, expected):
    """Held against a copy that torch's Adam trains; weights and gradients come back bit for bit."""
    x, y = samples(0, (0, 3))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]  # which large steps cannot fit
    model, criterion = nn.Linear(13, 6), nn.CrossEntropyLoss()
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    model.weight.grad = gradient = torch.randn(6, 13)
    copied = deepcopy(model)
    adam = torch.optim.Adam([copied.weight], lr=rate)
    for _ in range(3):
        adam.zero_grad()
        criterion(copied(x), y).backward()
        adam.step()
    better = bool(criterion(copied(x), y) < criterion(torch.zeros(len(x), 6), y))
    parts = list(zip(x.split(150), y.split(150)))
    bears = bears_steps(model, parts, {model.weight: rate}, 3, criterion, lambda network, rows: network(rows))
    assert bears == better == expected
    assert not model.weight.any() and model.weight.grad is gradient and model.training


def test_the_leading_eigenvalue_is_that_of_the_gated_second_moment():
    x, y = samples(0, (0, 3))
    second = x.T @ x / len(x)
    torch.testing.assert_close(leading_eigenvalue(x), torch.linalg.eigvalsh(second)[-1], atol=1e-3, rtol=1e-3)
    memory = remembered(*samples(1, (1, 2)), rank=6)
    gate = LayerGate.of(memory, 0.5, 32)
    root = gate.through(torch.eye(13), memory)
    expected = torch.linalg.eigvals(second @ root).real.max()
    ours = leading_eigenvalue(x, lambda rows: gate.through(rows, memory))
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=2e-2)


def test_a_scaled_gate_lets_through_that_share():
    memory, change = remembered(*samples(1, (1, 2)), rank=6), torch.randn(3, 13)
    whole, half = (LayerGate.of(memory, 0.5, 32, scale).through(change, memory) for scale in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_experience_is_no_sharper_than_the_first(adaptive):
    """Except for an optimizer whose steps don't grow with the sharpness."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 6))
    kind, criterion = torch.optim.Adam if adaptive else torch.optim.SGD, OneHotMSELoss()
    optimizer = kind(model.parameters(), lr=0.001 if adaptive else 0.01)
    gate, scales = PlasticityGate(model, optimizer, openness=100.0), []
    for number, classes in enumerate([(0,), (1,), (2, 3)]):
        x, y = samples(number, classes)
        x = x if number else x / 10  # the first inputs are weak
        gate.prepare(TensorDataset(x, y), criterion)
        scales.append(dict(gate._prepared.scale) if gate._prepared is not None else {})
        for rows in torch.arange(len(x)).split(50):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
        gate.consolidate(TensorDataset(x, y), criterion)
    assert scales[0] == {}
    if adaptive:
        assert scales[1:] == [{}, {}]
    else:
        assert all(0 < s["0"] <= 1 for s in scales[1:]) and min(s["0"] for s in scales[1:]) < 1


@pytest.fixture(scope="module")
def tasks():
    """Split MNIST with a head for each task; 200 images each."""
    return sliced(split_mnist(5, return_task_id=True, dataset_root=MNIST), train=200)


def trained_heads(tasks, plugins, kind, criterion):
    """The network after these tasks, and its mean accuracy on them."""
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(OrderedDict(features=mlp(64)[:-1], head=nn.Linear(64, 10)))
    else:
        features = nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Flatten())
        model = nn.Sequential(OrderedDict(features=features, head=nn.Linear(512, 10)))
    model = as_multitask(model, "head")
    strategy, right = strategy_of(model, plugins, criterion=criterion), []
    for experience in tasks.train_stream:
        strategy.train(experience)
    for experience in tasks.test_stream:
        x, y, t = experience.dataset.read_batch(list(range(200)))
        with torch.no_grad():
            right.append(float((model.eval()(x, t).argmax(1) == y).float().mean()))
    return model, sum(right) / len(right)


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("kind, criterion", [("mlp", OneHotMSELoss()), ("cnn", nn.CrossEntropyLoss())])
def test_heads_of_tasks_end_no_worse_than_without_the_plugin(tasks, kind, criterion, replays):
    ends = []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        plugins += [ReplayPlugin(100)] if replays else []
        ends.append(trained_heads(tasks, plugins, kind, criterion)[1])
    assert ends[1] > 0.93 and ends[1] >= ends[0] - 0.01


def test_a_new_task_s_head_is_the_ridge_regression_of_its_samples(tasks):
    settings = Settings(readout_rank=65)
    model, _ = trained_heads(tasks, [SelectivePlasticityPlugin(settings=settings)], "mlp", OneHotMSELoss())
    x, y, t = tasks.train_stream[4].dataset.read_batch(list(range(200)))
    with torch.no_grad():
        features = model.eval().model.features(x)
    features = torch.cat([features, torch.ones(200, 1)], 1).double()
    wanted = nn.functional.one_hot(y, 10).double()
    ridge = settings.solve_ridge * features.square().sum() / 65
    rows = torch.linalg.solve(features.T @ features + ridge * torch.eye(65), features.T @ wanted).T[8:]
    found = GatedLayer(model.head.classifiers["4"].classifier).weights_and_bias()[8:]
    assert float((found - rows).norm() / rows.norm()) < 0.05


def test_the_leading_sensitivity_is_that_of_the_jacobian():
    first, readout = nn.Linear(4, 30), nn.Linear(30, 6)
    with torch.no_grad():  # nearly one direction: its leading eigenvalue is nearly its trace
        readout.weight.add_(torch.ones(6, 1) @ torch.randn(1, 30))
    model, x = nn.Sequential(first, readout), torch.randn(4000, 4)
    found = output_sensitivity(model, x, {"0": GatedLayer(first)}, lambda model, x: model(x))["0"]
    moment = readout.weight.T @ readout.weight
    torch.testing.assert_close(found.mean, moment.trace() / 30, rtol=0.1, atol=0)
    torch.testing.assert_close(found.leading, torch.linalg.eigvalsh(moment)[-1], rtol=0.1, atol=0)


def test_a_class_a_task_does_not_spike_at_a_rate_that_the_first_task_bears():
    """The solved readout has large weights along one direction, the new class against the old ones."""
    model, criterion = mlp(256), OneHotMSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.07)
    gate = PlasticityGate(model, optimizer)
    for task in sliced(split_mnist(10, dataset_root=MNIST), 1000).train_stream[:2]:
        x, y = (torch.stack(part) for part in zip(*[(x, torch.tensor(y)) for x, y, _ in task.dataset]))
        gate.prepare(TensorDataset(x, y), criterion)
        losses = []
        for rows in torch.arange(len(x)).split(50):
            optimizer.zero_grad()
            losses.append(criterion(model(x[rows]), y[rows]))
            losses[-1].backward()
            optimizer.step()
        gate.consolidate(TensorDataset(x, y), criterion)
    assert max(losses) < losses[0] + 0.3


def test_an_experience_that_was_interrupted_leaves_no_frozen_readout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 20), nn.ReLU(), nn.Linear(20, 6))
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.05), OneHotMSELoss()
    gate = PlasticityGate(model, optimizer)
    x, y = samples(0, (0, 1))
    gate.consolidate(TensorDataset(x, y), criterion)
    gate.prepare(TensorDataset(*samples(1, (2, 3))), criterion)  # and never trained
    gate.prepare(TensorDataset(x, y), criterion)  # no class is new: nothing is solved
    before = GatedLayer(model[2]).weights_and_bias()
    criterion(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(GatedLayer(model[2]).weights_and_bias(), before)
