"""The plugin with real Avalanche strategies on real MNIST."""

import copy
import math

import numpy as np
import pytest
import torch
from avalanche.training.plugins import LwFPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin
from avalanche_sp.replay import stream_rows, times_as_closed, times_as_open, trust_in

from conftest import mlp, strategy_of, weights


def trained(benchmark, plugins, seed=0, **kwargs):
    model = mlp()
    if "optimizer" in kwargs:
        kwargs["optimizer"] = kwargs["optimizer"](model.parameters())
    strategy = strategy_of(model, plugins, **kwargs)
    torch.manual_seed(seed)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return strategy


def linear_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def weight_and_bias(layer):
    return torch.cat([layer.weight, layer.bias.unsqueeze(1)], dim=1).detach().numpy().astype(np.float64)


def four_bits(rows):
    step = abs(rows).max(1, keepdims=True) / 7
    return np.round(rows / step) * step


class Spy(SelectivePlasticityPlugin):
    """Compares every gradient with gating each sample by itself and pulling back, the way the docstring says it."""

    compared, pulled_beyond = 0, False

    def before_training_epoch(self, strategy, **kwargs):
        super().before_training_epoch(strategy, **kwargs)
        self.steps, self.drift, self.beyond = 0, {}, {}

    def after_update(self, strategy, **kwargs):
        super().after_update(strategy, **kwargs)
        self.steps += 1
        if self.layers and self.steps % self.every(strategy) == 0:
            for name, layer in linear_layers(strategy.model).items():
                self.drift[name] = weight_and_bias(layer) - self.anchors[name]
        rough = self.layers and self.layers["1"].rough_anchor is not None
        if rough and self.steps % (2 * self.every(strategy)) == 0:
            alike = self.likeness(self.layers["1"]) ** 1.5  # which data feeds
            for name, layer in linear_layers(strategy.model).items():
                v = self.layers[name].vectors.numpy().astype(np.float64)
                drift = weight_and_bias(layer) - four_bits(self.anchors[name])
                self.beyond[name] = alike * (drift - self.drift[name] @ v @ v.T)

    def likeness(self, activity):
        v = activity.vectors.numpy().astype(np.float64)
        values, mean = activity.eigenvalues.numpy().astype(np.float64), activity.mean_eigenvalue.item()
        rest = (len(v) * mean - values.sum()) / (len(v) - v.shape[1])
        c = v @ np.diag(values) @ v.T + rest * (np.eye(len(v)) - v @ v.T)
        above = c - mean * np.eye(len(v))
        x = np.concatenate(self.met).astype(np.float64)
        return np.clip((x @ above * x).sum() / (x * x).sum() * np.trace(c) / (above * c).sum(), 0, 1)

    def every(self, strategy):
        return min(8, max(1, int(20 / max(1, self.seen / len(strategy.experience.dataset)))))

    def after_training_exp(self, strategy, **kwargs):
        super().after_training_exp(strategy, **kwargs)
        self.anchors = {name: weight_and_bias(layer) for name, layer in linear_layers(strategy.model).items()}
        self.seen = getattr(self, "seen", 0) + len(strategy.experience.dataset)
        self.met = []

    def before_backward(self, strategy, **kwargs):
        super().before_backward(strategy, **kwargs)
        if not self.layers:
            return
        model, n = strategy.model, stream_rows(strategy)
        x, z, seen = strategy.mb_x, [], []
        for module in model:
            if isinstance(module, nn.Linear):
                seen.append((module, x.detach()))
            x = module(x)
            if isinstance(module, nn.Linear):
                z.append(x)
        loss = strategy._criterion(x, strategy.mb_y)
        deltas = torch.autograd.grad(loss, z)
        if self.steps % 8 == 0:
            self.met.append(np.pad(seen[0][1][:n].numpy(), ((0, 0), (0, 1)), constant_values=1))
        self.expected = []
        for (name, layer), (_, inputs), delta in zip(linear_layers(model).items(), seen, deltas):
            activity = self.layers[name]
            v = activity.vectors.numpy().astype(np.float64)
            f = activity.closed.numpy().astype(np.float64)
            stored = len(strategy.dataloader.datasets[1]) if n < len(inputs) else 0
            stored /= 2 * strategy.clock.train_exp_counter  # of each class
            opening = 1 + (stored / 12) ** 2
            old = self.seen / len(strategy.experience.dataset)  # samples for each new one
            fading = opening**2 * (1 + old * stored / (stored + 50))
            mean = activity.mean_eigenvalue.item()
            rest = (len(v) * mean - activity.eigenvalues.sum().item()) / (len(v) - v.shape[1])
            f_rest = rest / (rest + opening * self.openness * mean)
            in_step = np.where(np.arange(len(f)) < len(f) - 16, f_rest, f)  # the others are taken back later
            total = np.zeros((layer.out_features, layer.in_features + 1))
            for i in range(len(inputs)):
                x_i = np.append(inputs[i].numpy(), 1.0).astype(np.float64)
                if i >= n:
                    x_i *= 1 - f_rest
                else:
                    kept = v.T @ x_i
                    x_i = v @ ((1 - in_step) * kept) + (1 - f_rest) * (x_i - v @ kept)
                total += np.outer(delta[i].numpy(), x_i)
            if name in self.drift:
                c = v @ np.diag(activity.eigenvalues.numpy().astype(np.float64)) @ v.T
                pull = 2 * self.pull_back * self.every(strategy) * old / fading * self.drift.pop(name) @ c
                total += pull - pull @ v @ np.diag(f) @ v.T
            if name in self.beyond:
                drift = self.beyond.pop(name)
                weight = 0.15 * 2 * self.every(strategy) * 2 * self.pull_back * min(20, old) / fading
                total += weight * rest * (1 - f_rest) * drift
                self.pulled_beyond = True
            self.expected.append((layer, total))

    def before_update(self, strategy, **kwargs):
        if not self.layers:
            return
        for layer, total in self.expected:
            np.testing.assert_allclose(layer.weight.grad, total[:, :-1], atol=5e-5, rtol=1e-4)
            np.testing.assert_allclose(layer.bias.grad, total[:, -1], atol=5e-5, rtol=1e-4)
        self.compared += 1


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("pull_back", [0.0, 1.0])
def test_gradients_equal_gating_every_stream_sample(split5, replay, pull_back, monkeypatch):
    monkeypatch.setattr("avalanche_sp.activity._STRONGEST", 16)
    spy = Spy(openness=0.05, pull_back=pull_back, rank=20)
    plugins = [spy] + ([ReplayPlugin(50, batch_size=20, batch_size_mem=12)] if replay else [])
    criterion = JointReplayLoss(OneHotMSELoss()) if replay else OneHotMSELoss()
    trained(split5, plugins, criterion=criterion, batch=20)
    assert spy.compared > 50
    assert spy.pulled_beyond == (pull_back > 0)


def test_what_remembers_all_its_weights_and_what_is_fed_by_data(split2):
    model = mlp()
    model[1].requires_grad_(False)  # a frozen trunk, so what it makes is given, too
    plain = SelectivePlasticityPlugin(rank=10)
    trained(split2, [plain])
    assert {name: a.fed_by_data for name, a in plain.layers.items()} == {"1": True, "3": False, "5": False}
    assert all(a.rough_anchor is not None for a in plain.layers.values())
    for rank, pull, remembers in ((10, 1.0, True), (33, 1.0, False), (10, 0.0, False)):  # of 33 directions
        plugin = SelectivePlasticityPlugin(rank=rank, pull_back={"3": pull, "*": 1.0})
        strategy_of(model, [plugin]).train(split2.train_stream[0])
        assert (plugin.layers["3"].rough_anchor is not None) == remembers
        assert {name: a.fed_by_data for name, a in plugin.layers.items()} == {"3": True, "5": False}


def test_it_holds_directions_that_it_does_not_store(split5):
    """Where nothing pulled beyond them, the first layer's weights would move further along the others."""
    moved = []
    for pull in (1.0, 0.0):
        plugin = SelectivePlasticityPlugin(rank=10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("avalanche_sp.drift._BEYOND", pull)
            strategy = strategy_of(mlp(), [plugin], batch=10)
            torch.manual_seed(0)
            total = 0.0
            for experience in split5.train_stream:
                before = weight_and_bias(strategy.model[1])
                strategy.train(experience)
                v = plugin.layers["1"].vectors.numpy().astype(np.float64)
                drift = weight_and_bias(strategy.model[1]) - before
                total += np.linalg.norm(drift - drift @ v @ v.T)
        moved.append(total)
    assert moved[0] < 0.95 * moved[1]


def test_it_remembers_where_naive_training_forgets(split2):
    kept = []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        strategy = trained(split2, plugins, epochs=3)
        x, y, _ = split2.test_stream[0].dataset.read_batch(list(range(200)))
        kept.append((strategy.model(x).argmax(1) == y).float().mean().item())
    assert kept[0] < 0.3 < 0.6 < kept[1]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-3),
        lambda p: SelectivePlasticityOptimizer(p, warmup_steps=5),
    ],
    ids=["momentum", "adam", "sp"],
)
@pytest.mark.parametrize("replay", [False, True])
def test_switched_off_it_changes_nothing_bit_for_bit(split2, optimizer, replay):
    def plugins():
        return [ReplayPlugin(60)] if replay else []

    without = trained(split2, plugins(), optimizer=optimizer, criterion=nn.CrossEntropyLoss())
    off = SelectivePlasticityPlugin(openness=math.inf)
    beside = trained(split2, [off, *plugins()], optimizer=optimizer, criterion=nn.CrossEntropyLoss())
    assert torch.equal(weights(without.model), weights(beside.model))
    assert not off.layers and off.state_bytes == 0


def test_switched_on_the_first_experience_is_still_ungated_bit_for_bit(split2):
    both = []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        strategy = strategy_of(mlp(), plugins)
        torch.manual_seed(0)
        strategy.train(split2.train_stream[0])
        both.append((weights(strategy.model), torch.random.get_rng_state()))
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])  # consolidation draws no global random numbers


def test_either_order_beside_replay_is_the_same(split5):
    results = []
    for order in (1, -1):
        plugins = [ReplayPlugin(50), SelectivePlasticityPlugin()][::order]
        results.append(weights(trained(split5, plugins).model))
    assert torch.equal(*results)


@pytest.mark.parametrize("stored, batch", [(50, 32), (20, 32), (200, 64)])
def test_stream_rows_counts_what_is_not_memory(split2, stored, batch):
    """Labels tell stream from memory here, as the two experiences share no class; 600 % 64 leaves a remainder."""

    class Check(SupervisedPlugin):
        checked = 0

        def before_backward(self, strategy, **kwargs):
            current = torch.tensor(list(strategy.experience.classes_in_this_experience))
            is_stream = torch.isin(strategy.mb_y, current)
            n = stream_rows(strategy)
            assert is_stream[:n].all() and not is_stream[n:].any()
            self.checked += 1

    check = Check()
    trained(split2, [ReplayPlugin(stored), check], batch=batch, epochs=2)
    assert check.checked == 4 * math.ceil(600 / batch)


def test_the_model_is_left_as_it_was_found(split2):
    model = mlp()
    frozen = copy.deepcopy(model)
    hooks_seen = []

    class Look(SelectivePlasticityPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            hooks_seen.append(sum(len(m._forward_hooks) for m in strategy.model.modules()))

    strategy = strategy_of(model, [Look()])
    for experience in split2.train_stream:
        strategy.train(experience)
    assert set(hooks_seen) == {0}
    for module, original in zip(model.modules(), frozen.modules()):
        assert type(module) is type(original)
        assert set(vars(module)) == set(vars(original))
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


def test_an_error_in_the_forward_pass_leaves_no_trace_in_the_next_iteration(split2):
    strategy = trained(split2, [SelectivePlasticityPlugin()])

    def interrupt(layer, inputs):
        raise KeyboardInterrupt

    handle = strategy.model[5].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(split2.train_stream[0])
    handle.remove()
    assert any(m._forward_hooks for m in strategy.model.modules())  # there was no after_forward
    strategy.train(split2.train_stream[0])
    assert not any(m._forward_hooks for m in strategy.model.modules())


def test_another_plugins_passes_through_the_model_are_not_gated(split2):
    """Such as MIR's, between before_forward and the strategy's own forward pass, with a batch of another size."""

    twin = mlp()

    class Probe(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            for p in strategy.model.parameters():
                p.grad = None
            nn.functional.cross_entropy(strategy.model(strategy.mb_x[:7]), strategy.mb_y[:7]).backward()
            seen = [p.grad.clone() for p in strategy.model.parameters()]
            twin.load_state_dict(strategy.model.state_dict())
            twin.zero_grad()
            nn.functional.cross_entropy(twin(strategy.mb_x[:7]), strategy.mb_y[:7]).backward()
            for a, p in zip(seen, twin.parameters()):
                assert torch.equal(a, p.grad)
            strategy.optimizer.zero_grad()

    with_probe = trained(split2, [SelectivePlasticityPlugin(), Probe()])
    assert torch.equal(weights(with_probe.model), weights(trained(split2, [SelectivePlasticityPlugin()]).model))


def test_works_beside_a_plugin_that_copies_the_model(split2):
    trained(split2, [LwFPlugin(1.0, 2.0), SelectivePlasticityPlugin()])
    trained(split2, [SelectivePlasticityPlugin(), LwFPlugin(1.0, 2.0)])


def test_weights_move_in_the_open_directions(split2):
    changes, vectors = [], {}
    for plugins in ([SelectivePlasticityPlugin(openness=0.05, rank=10, pull_back=0, readout_step=False)], []):
        model = mlp()
        strategy = strategy_of(model, plugins)
        torch.manual_seed(0)
        strategy.train(split2.train_stream[0])
        before = copy.deepcopy(model)
        strategy.train(split2.train_stream[1])
        layers = zip(linear_layers(model).items(), linear_layers(before).values())
        changes.append({n: torch.from_numpy(weight_and_bias(new) - weight_and_bias(old)) for (n, new), old in layers})
        vectors = vectors if not plugins else {n: a.vectors.double() for n, a in plugins[0].layers.items()}
    for name, v in vectors.items():
        claimed, free = zip(*((c[name] @ v, c[name] - c[name] @ v @ v.T) for c in changes))
        assert claimed[0].norm() < 0.1 * claimed[1].norm()
        assert free[0].norm() > 2 * claimed[0].norm() / claimed[1].norm() * free[1].norm()


def test_the_pull_back_keeps_more_of_what_was_learned(split2):
    kept = []
    for weight in (0.0, 1.0):
        strategy = trained(split2, [SelectivePlasticityPlugin(openness=20.0, pull_back=weight)], epochs=5)
        x, y, _ = split2.test_stream[0].dataset.read_batch(list(range(200)))
        kept.append((strategy.model(x).argmax(1) == y).float().mean().item())
    assert kept[1] > kept[0] + 0.02


def test_memory_stays_bounded_however_many_experiences_come(split5):
    plugin = SelectivePlasticityPlugin(rank=7)
    strategy = strategy_of(mlp(), [plugin])
    sizes = []
    for experience in split5.train_stream:
        strategy.train(experience)
        sizes.append(plugin.state_bytes)
    assert len(set(sizes)) == 1
    assert all(a.vectors.shape[1] == 7 for a in plugin.layers.values())
    assert {a.samples for a in plugin.layers.values()} == {sum(len(e.dataset) for e in split5.train_stream)}


def test_consolidated_activity_is_that_of_the_network(split2):
    """Against a plain second moment over the same samples, for the first layer, whose input doesn't change."""
    plugin = SelectivePlasticityPlugin(rank=785)
    trained(split2, [plugin])
    x = torch.cat([e.dataset.read_batch(list(range(600)))[0].flatten(1) for e in split2.train_stream])
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    first = plugin.layers["1"]
    expected = x.T @ x / len(x)
    consolidated = first.vectors @ torch.diag(first.eigenvalues) @ first.vectors.T
    torch.testing.assert_close(consolidated, expected, atol=1e-2, rtol=0)
    torch.testing.assert_close(first.mean_eigenvalue, expected.trace() / 785)


def test_stored_samples_open_the_gate(split2):
    opened = []
    for replay in ([], [ReplayPlugin(40)]):
        plugin = SelectivePlasticityPlugin()
        strategy = strategy_of(mlp(), [plugin, *replay])
        strategy.train(split2.train_stream[0])
        torch.manual_seed(0)

        class Note(SelectivePlasticityPlugin):
            def after_training_epoch(self, strategy, **kwargs):
                opened.append(plugin.layers["1"].openness)

        strategy.plugins.append(Note(openness=math.inf))
        strategy.train(split2.train_stream[1])
    assert opened[0] < opened[1]


def test_the_optimizer_is_told_the_surprise(split2):
    plugin = SelectivePlasticityPlugin()
    strategy = trained(split2, [plugin], optimizer=SelectivePlasticityOptimizer)
    surprise = strategy.optimizer.param_groups[0]["surprise"]
    assert surprise is plugin.surprise or torch.equal(surprise, plugin.surprise)
    assert 0 <= surprise <= 1


def test_a_layers_rank_may_follow_its_energy(split2):
    few, many = (SelectivePlasticityPlugin(rank={"1": share, "*": 20}) for share in (0.8, 0.95))
    for plugin in (few, many):
        trained(split2, [plugin])
        activity = plugin.layers["1"]
        energy = activity.mean_eigenvalue * len(activity.vectors)
        share = 0.8 if plugin is few else 0.95
        assert activity.eigenvalues.sum() > share**2 * energy  # of the first, that share was kept, and of both then
        assert [len(plugin.layers[name].eigenvalues) for name in ("3", "5")] == [20, 20]
    assert len(few.layers["1"].eigenvalues) < len(many.layers["1"].eigenvalues)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"rank": 0}, "Invalid rank value: 0 (allowed: an integer, 1 or more; or a share of the energy, greater than"),
        ({"rank": 2.5}, "Invalid rank value: 2.5"),
        ({"rank": 1.0}, "Invalid rank value: 1.0"),
        (
            {"rank": {"1": 0.9, "*": 20}, "consolidate": "continuous"},
            "Invalid rank value: 0.9 (allowed with consolidate='continuous': an integer)",
        ),
        ({"pull_back": -1}, "Invalid pull_back value: -1 (allowed: 0 or more)"),
        ({"openness": 0}, "Invalid openness value: 0 (allowed: greater than 0; math.inf is off)"),
        ({"openness": -0.1}, "Invalid openness value: -0.1"),
        ({"openness": float("nan")}, "Invalid openness value: nan"),
        ({"consolidation_samples": 0}, "Invalid consolidation_samples value: 0"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        SelectivePlasticityPlugin(**kwargs)
    assert words in str(error.value)


def test_a_loss_that_is_not_finite_raises_before_the_step(split2):
    class Sick(OneHotMSELoss):
        calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            return super().forward(outputs, targets) * (math.nan if self.calls == 4 else 1.0)

    strategy = strategy_of(mlp(), [SelectivePlasticityPlugin()], criterion=Sick())
    with pytest.raises(FloatingPointError, match="the loss is nan at iteration 3 of training experience 0"):
        strategy.train(split2.train_stream[0])
    assert weights(strategy.model).isfinite().all()


def test_a_memory_of_next_to_nothing_changes_next_to_nothing():
    """Every rule for stored samples begins where there are none."""
    assert trust_in(0) == 0 and times_as_open(0) == 1
    assert [times_as_closed(epoch, 0) for epoch in range(3)] == [1, 2**5, 3**5]
    assert trust_in(1e9) == pytest.approx(1) and times_as_closed(9, 1e9) == pytest.approx(1)
    counts = [0, 1, 10, 100, 1000]
    assert sorted(map(trust_in, counts)) == list(map(trust_in, counts))
    assert sorted(map(times_as_open, counts)) == list(map(times_as_open, counts))
