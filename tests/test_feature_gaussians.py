"""Gaussians of classes at the readout's inputs: their discriminant, how they follow a drift, and the plugin."""

import copy

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.training import ER_ACE
from avalanche.training.plugins import EWCPlugin, LwFPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import FeatureGaussians, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, Settings
from avalanche_sp.gate import ClassGaussians
from avalanche_sp.gate.functional import leading_eigenpairs
from avalanche_sp.gate.pseudo_samples import agreement

from conftest import accuracy, mlp, strategy_of, weights


def images(benchmark, experiences=5, directions=40):
    """Real images along their leading principal directions, and their classes."""
    parts = [e.dataset.read_batch(list(range(300)))[:2] for e in benchmark.train_stream[:experiences]]
    x, y = torch.cat([x.flatten(1) for x, _ in parts]), torch.cat([y for _, y in parts])
    return x @ leading_eigenpairs(x, directions)[1], y


def remembered(x, y, parts, **kwargs):
    gaussians = ClassGaussians(**kwargs)
    for rows in parts:
        gaussians.remember(x[rows], y[rows])
    return gaussians


def discriminant(x, y):
    """The outputs of linear discriminant analysis on the same samples."""
    means = torch.stack([x[y == c].mean(0) for c in range(10)]).double()
    within = x.double() - means[y]
    covariance = within.T @ within / len(x)
    covariance += Settings().gaussian_ridge * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    share = y.bincount().double() / len(y)
    directions = torch.linalg.solve(covariance, means.T)
    return x.double() @ directions - (means.T * directions).sum(0) / 2 + share.log()


def test_the_readout_is_linear_discriminant_analysis_in_any_order(split5):
    x, y = images(split5)
    expected = discriminant(x, y).log_softmax(1).float()
    orders = [torch.arange(len(y)).split(300), torch.randperm(len(y)).split(400)]  # the second has classes again
    for parts in orders:
        made = remembered(x, y, parts).readout(12)
        outputs = x @ made[:, :-1].T + made[:, -1]
        torch.testing.assert_close(outputs[:, :10].log_softmax(1), expected, atol=2e-3, rtol=2e-3)
        assert (outputs.argmax(1) < 10).all() and (outputs[:, 10:] == -1).all()
    assert (outputs.argmax(1) == y).float().mean() > 0.85


@pytest.mark.parametrize("x", [100 * torch.eye(3, 5), torch.zeros(3, 5)], ids=["apart", "alike"])
def test_classes_of_one_sample_have_a_readout(x):
    made = remembered(x, torch.arange(3), [slice(None)]).readout(4)
    assert made.isfinite().all()
    if x.any():
        assert (x @ made[:, :-1].T + made[:, -1]).argmax(1).tolist() == [0, 1, 2]


def test_a_budget_is_kept_and_costs_little(split5):
    x, y = images(split5)
    full, budget = remembered(x, y, [slice(None)]), 4 * (10 * 41 + 1 + 20 * 40)
    small = remembered(x, y, torch.arange(len(y)).split(300), max_bytes=budget)
    assert len(small.components) == 20 and small.state_bytes <= budget < full.state_bytes
    made = small.readout(10), full.readout(10)
    right = [((x @ w[:, :-1].T + w[:, -1]).argmax(1) == y).float().mean() for w in made]
    assert right[0] > right[1] - 0.05
    with pytest.raises(ValueError, match=r"Invalid max_bytes value: 490 \(allowed for 2 classes of 40 features: 492"):
        remembered(x, y, [slice(0, 300)], max_bytes=490)


def test_a_drift_of_all_classes_is_followed_and_one_of_each_class_is_not(split5):
    x, y = images(split5)
    old, new = y < 6, y >= 6
    generator = torch.Generator().manual_seed(0)
    drift = torch.eye(40) + 0.1 * torch.randn(40, 40, generator=generator)
    after = x @ drift + 5
    gaussians = remembered(x, y, [old], settings=Settings(drift_ridge=1e-4))
    gaussians.remember(after[new], y[new], x[new])
    torch.testing.assert_close(gaussians.means[0], after[y == 0].mean(0), atol=0.3, rtol=0.05)
    exact = remembered(after, y, [old, new])
    torch.testing.assert_close(gaussians.variance, exact.variance, rtol=0.02, atol=0)
    for label in range(6, 10):  # each to a place of its own
        x[y == label] += 0.1
        after[y == label] = x[y == label] + 10 * torch.randn(40, generator=generator)
    gaussians = remembered(x, y, [old])
    before = gaussians.means[0]
    gaussians.remember(after[new], y[new], x[new])
    torch.testing.assert_close(gaussians.means[0], before)


def test_a_single_class_does_not_show_whether_a_drift_is_general():
    x = torch.randn(20, 3)
    assert agreement(torch.zeros(20, dtype=torch.long), lambda part: x[part].mean(0)) == 0
    assert agreement(torch.arange(20), lambda part: 1 + 1e-3 * x[part].mean(0)) > 0.99


def trained(benchmark, *plugins, model=None, experiences=3):
    model = mlp() if model is None else model
    strategy = strategy_of(model, list(plugins), criterion=nn.CrossEntropyLoss(), epochs=2)
    for experience in benchmark.train_stream[:experiences]:
        strategy.train(experience)
    return strategy


def test_only_the_evaluated_readout_is_another_one(split5):
    gaussians = FeatureGaussians()
    with_them = trained(split5, SelectivePlasticityPlugin(), gaussians)
    without = trained(split5, SelectivePlasticityPlugin())
    present, plain = with_them.model.state_dict(), without.model.state_dict()
    assert all(torch.equal(present[name], plain[name]) == ("5." not in name) for name in plain)
    own = gaussians.gaussians.readout(10)
    torch.testing.assert_close(torch.cat([present["5.weight"], present["5.bias"].unsqueeze(1)], 1), own)
    gaussians.before_train_dataset_adaptation(with_them)
    assert torch.equal(weights(with_them.model), weights(without.model))


@pytest.mark.parametrize("gate", [False, True])
def test_later_plugins_find_the_trained_readout(split5, gate):
    """LwF's teacher is copied, and EWC's importances are measured, at the end of an experience."""

    def run(*plugins):
        first = [SelectivePlasticityPlugin()] if gate else []
        return trained(split5, *first, *plugins, LwFPlugin(1.0, 2.0), EWCPlugin(1.0))

    gaussians = FeatureGaussians()
    with_them, without = run(gaussians), run()
    gaussians.before_train_dataset_adaptation(with_them)
    assert torch.equal(weights(with_them.model), weights(without.model))


def test_an_evaluation_between_experiences_has_their_readout(split5):
    """The evaluation comes within a call of train. The next experience starts with the trained readout."""
    found, gaussians = [], FeatureGaussians()

    class Evaluating(SupervisedPlugin):
        def after_training_exp(self, strategy, **kwargs):
            strategy.eval(split5.test_stream[:1])

        def before_eval_exp(self, strategy, **kwargs):
            found.append(torch.equal(strategy.model[5].weight, gaussians.gaussians.readout(10)[:, :-1]))

    strategies = []
    for plugins in ([gaussians, Evaluating()], [Evaluating()]):
        strategies.append(strategy_of(mlp(), plugins, criterion=nn.CrossEntropyLoss()))
        strategies[-1].train(split5.train_stream[:2])
    with_them, without = strategies
    with_them.eval(split5.test_stream[:1])
    assert found == [True, True, False, False, True]  # the two are of the strategy without them
    gaussians.before_train_dataset_adaptation(with_them)
    assert torch.equal(weights(with_them.model), weights(without.model))


def test_without_a_gate_it_keeps_what_training_forgets(split5):
    runs = trained(split5), trained(split5, FeatureGaussians())
    kept = [sum(accuracy(run.model, split5, task) for task in range(2)) / 2 for run in runs]
    assert kept[0] < 0.1 and kept[1] > 0.3


def test_a_head_may_grow(split5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), IncrementalClassifier(32, 2))
    strategy = trained(split5, SelectivePlasticityPlugin(), FeatureGaussians(), model=model)
    assert min(accuracy(strategy.model, split5, task) for task in range(3)) > 0.5


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(split5, tmp_path):
    def made():
        model = mlp()
        optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=1e-3)
        return strategy_of(model, [SelectivePlasticityPlugin(), FeatureGaussians()], optimizer=optimizer)

    whole = made()
    for experience in split5.train_stream[:2]:
        whole.train(experience)
    save_checkpoint(whole, tmp_path / "saved.pkl")
    resumed, _ = maybe_load_checkpoint(made(), tmp_path / "saved.pkl")
    for strategy in (whole, resumed):
        torch.manual_seed(3)
        strategy.train(split5.train_stream[2])
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_a_warning_tells_of_an_experience_without_a_new_class(permuted3):
    with pytest.warns(UserWarning, match="experience 1 brings no new class"):
        trained(permuted3, FeatureGaussians(), experiences=2)


def test_a_warning_tells_of_replay_beside_them(split5):
    with pytest.warns(UserWarning, match="ReplayPlugin trains on earlier samples"):
        trained(split5, FeatureGaussians(), ReplayPlugin(100), experiences=1)


def test_a_warning_tells_of_a_strategy_that_replays_by_itself(split5):
    model = mlp()
    strategy = ER_ACE(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.02), mem_size=60, batch_size_mem=10,
        train_mb_size=32, plugins=[FeatureGaussians()], evaluator=None,
    )  # fmt: skip
    strategy.train(split5.train_stream[0])
    with pytest.warns(UserWarning, match="feature Gaussians: ER_ACE trains on earlier samples"):
        strategy.train(split5.train_stream[1])


def test_bad_arguments_and_models_are_named(split5):
    for kwargs in ({"samples": 1}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match=f"Invalid {next(iter(kwargs))} value: {next(iter(kwargs.values()))}"):
            FeatureGaussians(**kwargs)
    with pytest.raises(ValueError, match=r"Invalid plugins: FeatureGaussians first \(allowed: after Selective"):
        trained(split5, FeatureGaussians(), SelectivePlasticityPlugin())
    with pytest.raises(ValueError, match=r"Invalid plugins: two FeatureGaussians in a strategy \(allowed: one"):
        trained(split5, FeatureGaussians(), FeatureGaussians())
    with pytest.raises(ValueError, match="Invalid model: a head for each task"):
        trained(split5, FeatureGaussians(), model=as_multitask(mlp(), "5"))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda model: mlp(bias=False), ValueError, "'5', has no bias .allowed with FeatureGaussians: a trained nn"),
        (lambda model: model[5].requires_grad_(False) and model, ValueError, "its last layer, '5', is frozen"),
        (lambda model: model.append(nn.LayerNorm(10)), ValueError, "its last layer, '6', is of type LayerNorm"),
        (lambda model: model.append(nn.Tanh()), TypeError, "its last layer, '5', does not make the outputs"),
        (lambda model: nn.Sequential(*model[:5], nn.Linear(32, 1)), TypeError, "Invalid targets: .*, from 0 to 1 .all"),
    ],
)
def test_a_model_is_refused_before_it_is_trained(split5, change, error, message):
    model = change(mlp())
    before = weights(model)
    with pytest.raises(error, match=message):
        trained(split5, FeatureGaussians(), model=model)
    assert torch.equal(weights(model), before)


def test_a_budget_is_refused_before_the_classes_come(split5):
    """Two classes of 32 features and a direction take 396 bytes, and four take 660."""
    for max_bytes, experiences in ((395, 0), (400, 1)):
        gaussians, model = FeatureGaussians(max_bytes=max_bytes), mlp()
        with pytest.raises(ValueError, match=f"Invalid max_bytes value: {max_bytes}"):
            trained(split5, gaussians, model=model)
        plain = trained(split5, experiences=experiences).model if experiences else mlp()
        assert torch.equal(weights(model[:5]), weights(plain[:5])) and len(gaussians.gaussians.means) == 2 * experiences


def test_bad_features_are_named():
    x, y, gaussians = torch.randn(8, 4), torch.arange(8) % 2, ClassGaussians()
    gaussians.remember(x, y)
    for arguments, message in (
        ((x[:3], y), "Invalid features: shape"),
        ((x[:, :3], y), r"Invalid features: 3 for each sample \(allowed: 4"),
        ((x, y, x[:3]), "Invalid before: shape"),
        ((x, y.float()), "Invalid targets: torch.float32"),
        ((x, y - 1), "Invalid targets: torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussians.remember(*arguments)
    means = copy.deepcopy(gaussians.means)
    with pytest.raises(FloatingPointError, match="not finite"):
        gaussians.remember(x / 0, y)
    assert all(torch.equal(gaussians.means[label], mean) for label, mean in means.items())


def test_a_readout_needs_classes_and_an_output_for_each():
    gaussians = ClassGaussians()
    with pytest.raises(ValueError, match="Invalid call: no class is remembered"):
        gaussians.readout(2)
    gaussians.remember(torch.randn(8, 4), torch.arange(8) % 3)
    with pytest.raises(ValueError, match=r"Invalid outputs value: 2 \(allowed: an integer, 3 or more\)"):
        gaussians.readout(2)
    assert gaussians.readout(3).shape == (3, 5)
    with pytest.raises(TypeError, match="Invalid settings: NoneType"):
        FeatureGaussians(settings=None)
