"""The plugin with real Avalanche strategies on real MNIST."""

import copy
import math

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import LwFPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_sp import (
    JointReplayLoss,
    OneHotMSELoss,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
    Settings,
    reference,
)
from avalanche_sp.gate.layers import GatedLayer, gated_layers
from avalanche_sp.gate.trust import StoredSamples
from avalanche_sp.training.replay import memory_size, stream_rows

from conftest import accuracy, mlp, sliced, strategy_of, weights


def trained(benchmark, plugins, seed=0, **kwargs):
    model = mlp()
    if "optimizer" in kwargs:
        kwargs["optimizer"] = kwargs["optimizer"](model.parameters())
    strategy = strategy_of(model, plugins, **kwargs)
    torch.manual_seed(seed)
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return strategy


class Step(torch.optim.SGD):
    """SGD that shows its gradients to ``check``, as the gate has left them."""

    check = None

    def step(self, closure=None):
        self.check()
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"])


class Spy(SelectivePlasticityPlugin):
    """Compares every gradient with gating each sample by itself and with the penalty, as the docstring says it."""

    compared, pulled_beyond, seen, least_held = 0, False, 0, 1.0

    def before_training_epoch(self, strategy, **kwargs):
        super().before_training_epoch(strategy, **kwargs)
        strategy.optimizer.check = self.check
        self.steps, self.drifted, self.alike, self.expected = 0, {}, None, []
        self.ratio = self.seen / len(strategy.experience.dataset)
        self.every = min(8, max(1, int(20 / max(1, self.ratio))))
        stored = memory_size(strategy) / 2 / max(strategy.clock.train_exp_counter, 1)  # of each class
        opening = 1 + (stored / 12) ** 2
        self.strength = 2 * self.gate.pull_back * self.every
        self.strength /= opening**2 * (1 + self.ratio * stored / (stored + 50))
        self.gates, self.gates_in_step, self.rests, self.moments = {}, {}, {}, {}
        for name, m in self.layers.items():
            self.moments[name] = reference.modelled_moment(m.eigenvalues, m.vectors, m.mean_eigenvalue)
            openness = opening * self.gate.openness
            gate = reference.gate_matrix(m.eigenvalues, m.vectors, m.mean_eigenvalue, openness)
            v = m.vectors.double()
            rest = (gate.trace() - (v.T @ gate @ v).trace()) / (len(v) - v.shape[1])  # 1 - f_rest
            weaker = v[:, :-16]  # along these the updates are taken back later
            in_step = gate + weaker @ (rest * weaker.T - weaker.T @ gate)
            self.gates[name], self.gates_in_step[name], self.rests[name] = gate, in_step, rest

    def before_backward(self, strategy, **kwargs):
        super().before_backward(strategy, **kwargs)
        if not self.layers:
            return
        n, x, z, inputs = stream_rows(strategy), strategy.mb_x, [], {}
        for name, module in strategy.model.named_children():
            if isinstance(module, nn.Linear):
                inputs[name] = nn.functional.pad(x.detach(), (0, 1), value=1).double()
            x = module(x)
            if isinstance(module, nn.Linear):
                z.append(x)
        deltas = torch.autograd.grad(strategy._criterion(x, strategy.mb_y), z)
        if self.steps % 8 == 0:
            self.met.append(inputs["1"][:n])
        for (name, xs), delta in zip(inputs.items(), deltas):
            v, rest, is_stored = self.layers[name].vectors.double(), self.rests[name], torch.arange(len(xs)) >= n
            held = float(self.gate.statistics[name].holding)
            self.least_held = min(self.least_held, held)
            gate = held * self.gates_in_step[name] + (1 - held) * rest * torch.eye(len(v)).double()
            total = reference.gated_gradient(delta, xs, gate, is_stored, rest)
            if name in self.drifted:
                w, anchor, kept = self.drifted.pop(name), self.anchors[name], v @ (v.T @ self.moments[name])
                total += reference.penalty_gradient(w, anchor, kept, self.strength * self.ratio) @ self.gates[name]
                if self.alike is not None:
                    weight = 0.15 * self.alike**1.5 * 2 * self.strength * min(20, self.ratio)
                    weight *= float(self.layers[name].rest) * rest
                    eye = torch.eye(len(v)).double()
                    beyond = reference.penalty_gradient(w, reference.four_bits(anchor), eye, weight)
                    total += beyond - reference.penalty_gradient(w, anchor, v @ v.T, weight)
                    self.pulled_beyond = True
            self.expected.append((gated_layers(strategy.model)[name], total))

    def check(self):
        for layer, total in self.expected:
            torch.testing.assert_close(layer.weight.grad, total[:, :-1].float(), atol=5e-5, rtol=1e-4)
            torch.testing.assert_close(layer.bias.grad, total[:, -1].float(), atol=5e-5, rtol=1e-4)
        self.compared += bool(self.expected)
        self.expected = []

    def after_update(self, strategy, **kwargs):
        super().after_update(strategy, **kwargs)
        self.steps += 1
        if self.layers and self.gate.pull_back and self.steps % self.every == 0:
            self.drifted = {name: layer.weights_and_bias() for name, layer in gated_layers(strategy.model).items()}
            met = torch.cat(self.met)  # by the first layer, which data feed
            self.alike = reference.likeness(met, self.moments["1"]) if self.steps % (2 * self.every) == 0 else None

    def after_training_exp(self, strategy, **kwargs):
        super().after_training_exp(strategy, **kwargs)
        self.anchors = {name: layer.weights_and_bias() for name, layer in gated_layers(strategy.model).items()}
        self.seen += len(strategy.experience.dataset)
        self.met = []


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("pull_back", [0.0, 1.0])
def test_gradients_equal_gating_every_stream_sample(split5, replay, pull_back):
    spy = Spy(
        openness=0.05, pull_back=pull_back, rank=20, readout_step=False, settings=Settings(gated_vectors=16)
    )
    plugins = [spy] + ([ReplayPlugin(50, batch_size=20, batch_size_mem=12)] if replay else [])
    criterion = JointReplayLoss(OneHotMSELoss()) if replay else OneHotMSELoss()
    few = sliced(split5, 260, experiences=4)
    trained(few, plugins, criterion=criterion, batch=20, optimizer=lambda p: Step(p, lr=0.02))
    assert spy.compared > 35
    assert spy.pulled_beyond == (pull_back > 0)
    assert (spy.least_held < 1) == replay


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
    """Without a penalty beyond them, the first layer's weights would move further along the others."""
    moved = []
    for beyond in (1.0, 0.0):
        plugin = SelectivePlasticityPlugin(rank=10, settings=Settings(beyond=beyond))
        strategy = strategy_of(mlp(), [plugin], batch=10)
        torch.manual_seed(0)
        total = 0.0
        for experience in split5.train_stream:
            before = GatedLayer(strategy.model[1]).weights_and_bias().double()
            strategy.train(experience)
            v = plugin.layers["1"].vectors.double()
            drift = GatedLayer(strategy.model[1]).weights_and_bias().double() - before
            total += (drift - drift @ v @ v.T).norm()
        moved.append(total)
    assert moved[0] < 0.95 * moved[1]


def test_it_remembers_where_naive_training_forgets(split2):
    kept = []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        strategy = trained(split2, plugins, epochs=3)
        kept.append(accuracy(strategy.model, split2, 0))
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


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)]


def test_the_model_is_left_as_it_was_found(split2):
    model = mlp()
    original = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    strategy = strategy_of(model, [SelectivePlasticityPlugin()], optimizer=optimizer)
    for experience in split2.train_stream:
        strategy.train(experience)
        assert not hooks(model) and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        strategy.eval(split2.test_stream)
        assert not hooks(model)
    for module, was in zip(model.modules(), original.modules()):
        assert type(module) is type(was) and set(vars(module)) == set(vars(was))
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_error_in_the_forward_pass_leaves_no_trace_in_the_next_training(split2):
    """Two strategies train alike, though one of them was interrupted before."""
    ends = []
    for interrupted in (True, False):
        strategy = trained(split2, [SelectivePlasticityPlugin()])
        if interrupted:

            def interrupt(layer, inputs):
                raise KeyboardInterrupt

            handle = strategy.model[5].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                strategy.train(split2.train_stream[0])
            handle.remove()
        torch.manual_seed(1)
        strategy.train(split2.train_stream[0])
        assert not hooks(strategy.model)
        ends.append(weights(strategy.model))
    assert torch.equal(*ends)


def test_evaluations_in_the_midst_of_an_experience_change_nothing(split2):
    ends = []
    for every in (-1, 5):
        model = mlp()
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
            criterion=OneHotMSELoss(),
            train_mb_size=32,
            plugins=[SelectivePlasticityPlugin(openness=0.05)],
            evaluator=None,
            eval_every=every,
            peval_mode="iteration",
        )
        for experience in split2.train_stream:
            strategy.train(experience, eval_streams=[split2.test_stream], shuffle=False)
        ends.append(weights(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("replay", [False, True])
def test_another_plugins_passes_through_the_model_are_not_gated(split2, replay):
    """Such as MIR's, between before_forward and the strategy's own forward pass, with a batch of another size."""

    twin = mlp()

    class Probe(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            strategy.optimizer.zero_grad()
            twin.load_state_dict(strategy.model.state_dict())
            twin.zero_grad()
            for model in (strategy.model, twin):
                nn.functional.cross_entropy(model(strategy.mb_x[:7]), strategy.mb_y[:7]).backward()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(strategy.model.parameters(), twin.parameters()))
            strategy.optimizer.zero_grad()

    ends = []
    for probes in ([], [Probe()]):
        memory = [ReplayPlugin(40)] if replay else []
        ends.append(weights(trained(split2, [*memory, SelectivePlasticityPlugin(), *probes]).model))
    assert torch.equal(*ends)


def test_a_plugin_with_a_loaded_gate_notes_its_own_consolidations_alone(split5):
    first = SelectivePlasticityPlugin()
    strategy = strategy_of(mlp(), [first])
    for experience in split5.train_stream[:2]:
        strategy.train(experience)
    second = SelectivePlasticityPlugin()
    second.gate.load_state_dict(first.gate.state_dict())
    resumed = strategy_of(strategy.model, [second])
    resumed.train(split5.train_stream[2])
    assert second.consolidated_at == [resumed.clock.train_iterations]


@pytest.mark.parametrize("order", [1, -1])
def test_beside_a_plugin_that_copies_the_model_it_remembers(split2, order):
    """LwF keeps a copy of the model, which is not gated, and distils from it."""
    kept = []
    for plugins in ([], [SelectivePlasticityPlugin()]):
        strategy = trained(split2, [LwFPlugin(1.0, 2.0), *plugins][::order], epochs=3)
        kept.append(accuracy(strategy.model, split2, 0))
    assert kept[0] < 0.4 < 0.6 < kept[1]


def test_weights_move_in_the_open_directions(split2):
    changes, vectors = [], {}
    for plugins in ([SelectivePlasticityPlugin(openness=0.05, rank=10, pull_back=0, readout_step=False)], []):
        model = mlp()
        strategy = strategy_of(model, plugins)
        torch.manual_seed(0)
        strategy.train(split2.train_stream[0])
        before = {name: layer.weights_and_bias().double() for name, layer in gated_layers(model).items()}
        strategy.train(split2.train_stream[1])
        changes.append({n: layer.weights_and_bias().double() - before[n] for n, layer in gated_layers(model).items()})
        vectors = vectors if not plugins else {n: m.vectors.double() for n, m in plugins[0].layers.items()}
    for name, v in vectors.items():
        claimed, free = zip(*((c[name] @ v, c[name] - c[name] @ v @ v.T) for c in changes))
        assert claimed[0].norm() < 0.1 * claimed[1].norm()
        assert free[0].norm() > 2 * claimed[0].norm() / claimed[1].norm() * free[1].norm()


def test_the_pull_back_keeps_more_of_what_was_learned(split2):
    kept = []
    for weight in (0.0, 1.0):
        plugin = SelectivePlasticityPlugin(openness=50.0, pull_back=weight, readout_step=False)
        strategy = trained(split2, [plugin], epochs=5)
        kept.append(accuracy(strategy.model, split2, 0))
    assert kept[1] > kept[0] + 0.1


def test_memory_stays_bounded_however_many_experiences_come(split5):
    plugin = SelectivePlasticityPlugin(rank=7)
    strategy = strategy_of(mlp(), [plugin])
    sizes = []
    for experience in split5.train_stream:
        strategy.train(experience)
        sizes.append(plugin.state_bytes)
    assert max(sizes) == sizes[0] and len(set(sizes[1:])) == 1  # from the second on no gradient is left in the readout
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

        class Note(SupervisedPlugin):
            def after_training_epoch(self, strategy, **kwargs):
                opened.append(plugin.gate.statistics["1"].openness)

        strategy.plugins.append(Note())
        strategy.train(split2.train_stream[1])
    assert opened[0] < opened[1] < 1


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
            return super().forward(outputs, targets) * (math.nan if self.calls == 5 else 1.0)  # the first is of prepare

    strategy = strategy_of(mlp(), [SelectivePlasticityPlugin()], criterion=Sick())
    with pytest.raises(FloatingPointError, match="the loss is nan at iteration 3 of training experience 0"):
        strategy.train(split2.train_stream[0])
    assert weights(strategy.model).isfinite().all()


def test_a_memory_of_next_to_nothing_changes_next_to_nothing():
    """Every rule for stored samples begins with none."""

    def of(count):
        return StoredSamples(count, Settings())

    assert of(0).trust == 0 and of(0).opening == 1 and of(0).penalty(7) == 1
    assert of(1e9).trust == pytest.approx(1)
    counts = [of(count) for count in (0, 1, 10, 100, 1000)]
    trust, opening = [c.trust for c in counts], [c.opening for c in counts]
    assert trust == sorted(trust) and opening == sorted(opening)
    penalties = [c.penalty(4) for c in counts]
    assert penalties == sorted(penalties, reverse=True)


def test_mini_batches_of_another_kind_are_refused_before_a_step(split2):
    class Dictionaries(Naive):
        mb_x = property(lambda self: self.mbatch["x"])
        mb_y = property(lambda self: self.mbatch["y"])

        def _unpack_minibatch(self):
            self.mbatch = {"x": self.mbatch[0], "y": self.mbatch[1]}

    model = mlp()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Dictionaries(
        model=model, optimizer=optimizer, train_mb_size=32, plugins=[SelectivePlasticityPlugin()], evaluator=None
    )
    with pytest.raises(TypeError, match="Invalid mini-batch: a dictionary"):
        strategy.train(split2.train_stream[0])
    assert torch.equal(weights(model), before)


def test_a_network_trained_without_the_plugin_keeps_its_classes_by_a_few_samples(split2):
    small, ends = sliced(split2), []
    x, y, _ = small.train_stream[0].dataset.read_batch(list(range(600)))
    for few in (0, 50):
        model = mlp()
        strategy_of(model, [], criterion=nn.CrossEntropyLoss(), epochs=2).train(small.train_stream[0])
        optimizer, plugin = torch.optim.SGD(model.parameters(), lr=0.05), SelectivePlasticityPlugin()
        if few:
            plugin.gate.attach(model, optimizer)
            plugin.gate.consolidate([(x[:few], y[:few])], nn.CrossEntropyLoss())
        strategy = strategy_of(model, [plugin], optimizer=optimizer, criterion=nn.CrossEntropyLoss())
        strategy.train(small.train_stream[1])
        ends.append([float(accuracy(model.eval(), small, task)) for task in (0, 1)])
    (forgotten, _), (kept, learned) = ends
    assert kept > forgotten + 0.4 and learned > 0.7
