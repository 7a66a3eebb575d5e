"""The optimizer inside what people use it with: schedulers, scaling, compilation, several processes, checkpoints."""

import copy
import os
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier
from avalanche.models.packnet import packnet_simple_mlp
from avalanche.training import PackNet
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_sp import ConsolidationPlugin, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, split_mnist

from conftest import MNIST, mlp, sliced, strategy_of, weights


@pytest.fixture(scope="module")
def batch(request):
    x, y, _ = request.getfixturevalue("split2").train_stream[0].dataset.read_batch(list(range(200)))
    return x, y


def loss_of(model, batch, rows=slice(None)):
    x, y = batch
    return nn.functional.cross_entropy(model(x[rows]), y[rows])


def run(model, optimizer, batch, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after()
    return weights(model)


def test_gradient_accumulation_equals_the_whole_batch(batch):
    whole, parts = mlp(), mlp()
    run(whole, SelectivePlasticityOptimizer(whole.parameters(), lr=1e-3), batch, 1)
    optimizer = SelectivePlasticityOptimizer(parts.parameters(), lr=1e-3)
    for i in range(4):
        (loss_of(parts, batch, slice(50 * i, 50 * i + 50)) / 4).backward()
    optimizer.step()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_learning_rate_schedules_take_effect(batch, path):
    steady, scheduled = mlp(), mlp()
    a = SelectivePlasticityOptimizer(steady.parameters(), lr=1e-3, **path)
    b = SelectivePlasticityOptimizer(scheduled.parameters(), lr=1e-3, **path)
    schedule = torch.optim.lr_scheduler.StepLR(b, step_size=2, gamma=0.0)
    run(steady, a, batch, 2)
    run(scheduled, b, batch, 5, schedule.step)  # the rate is 0 from the third step on
    assert torch.equal(weights(scheduled), weights(steady))


def test_a_tensor_lr_is_a_number_lr(batch):
    number, tensor = mlp(), mlp()
    run(number, SelectivePlasticityOptimizer(number.parameters(), lr=1e-2), batch, 3)
    run(tensor, SelectivePlasticityOptimizer(tensor.parameters(), lr=torch.tensor(1e-2)), batch, 3)
    torch.testing.assert_close(weights(tensor), weights(number))


def test_grad_scaler_skips_overflow_and_changes_nothing_else(batch):
    plain, scaled = mlp(), mlp()
    run(plain, SelectivePlasticityOptimizer(plain.parameters()), batch, 2)
    optimizer = SelectivePlasticityOptimizer(scaled.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, batch)).backward()
        if step == 1:
            next(scaled.parameters()).grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(batch):
    eager, compiled = mlp(), mlp()
    a, b = (SelectivePlasticityOptimizer(m.parameters(), warmup_steps=2) for m in (eager, compiled))
    step = torch.compile(b.step, backend="eager")
    for _ in range(3):
        for model in (eager, compiled):
            model.zero_grad()
            loss_of(model, batch).backward()
        a.step()
        step()
    torch.testing.assert_close(weights(compiled), weights(eager))


@pytest.mark.parametrize("fused", [None, True])
def test_a_run_can_switch_from_adam(batch, fused):
    straight, switched = mlp(), mlp()
    adam = torch.optim.Adam(straight.parameters(), lr=2e-3, betas=(0.8, 0.95), fused=fused)
    run(straight, adam, batch, 3)
    switched.load_state_dict(straight.state_dict())
    ours = SelectivePlasticityOptimizer(switched.parameters(), plasticity_k=0.0)
    ours.load_state_dict(copy.deepcopy(adam.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["beta1"], group["trace_decay"], group["plasticity_k"]) == (2e-3, 0.8, 0.95, 0.0)
    assert not {"betas", "amsgrad", "capturable"} & set(group)
    assert torch.equal(run(straight, adam, batch, 3), run(switched, ours, batch, 3))


def test_switching_from_adam_says_that_weight_decay_is_decoupled(batch):
    model = mlp()
    ours = SelectivePlasticityOptimizer(model.parameters())
    with pytest.warns(UserWarning, match="decoupled"):
        ours.load_state_dict(torch.optim.Adam(mlp().parameters(), weight_decay=0.1).state_dict())


def test_older_states_take_the_defaults(batch):
    model = mlp()
    optimizer = SelectivePlasticityOptimizer(model.parameters())
    run(model, optimizer, batch, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for name in ("nonfinite", "fused", "foreach", "surprise"):
        del state["param_groups"][0][name]
    fresh = SelectivePlasticityOptimizer(mlp().parameters(), nonfinite="skip")
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["nonfinite"] == "skip" and fresh.param_groups[0]["surprise"] == 0.0


def test_a_state_that_lacks_settings_leaves_each_groups_own():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [p], "plasticity_k": 2.0, "nonfinite": "skip"}, {"params": [q], "surprise_weight": 0.9}]
    ours = SelectivePlasticityOptimizer(groups, plasticity_k=7.0)
    ours.observe_surprise(0.5)
    ours.load_state_dict(torch.optim.Adam([{"params": [p]}, {"params": [q]}], lr=0.25).state_dict())
    names = ("lr", "plasticity_k", "surprise_weight", "nonfinite", "surprise")
    assert [tuple(group[name] for name in names) for group in ours.param_groups] == [
        (0.25, 2.0, 0.3, "skip", 0.5),
        (0.25, 7.0, 0.9, "raise", 0.5),
    ]
    assert SelectivePlasticityOptimizer([p], **ours.defaults).defaults == ours.defaults


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_torch_save_resumes_bit_for_bit(batch, path, tmp_path):
    whole, first = mlp(), mlp()
    runs = []
    for model in (whole, first):
        optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=1e-2, warmup_steps=4, **path)
        run(model, optimizer, batch, 3)
        optimizer.consolidate()
        optimizer.observe_surprise(0.4)
        run(model, optimizer, batch, 2)
        runs.append(optimizer)
    torch.save({"model": first.state_dict(), "optimizer": runs[1].state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    resumed = mlp(seed=1)
    resumed.load_state_dict(saved["model"])
    optimizer = SelectivePlasticityOptimizer(resumed.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(run(whole, runs[0], batch, 3), run(resumed, optimizer, batch, 3))


def test_avalanche_checkpoint_resumes_bit_for_bit(split5, tmp_path):
    def strategy():
        model = mlp()
        optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=0.05, beta1=0.0, eps=1.0)
        return strategy_of(model, [ConsolidationPlugin()], optimizer=optimizer)

    whole = strategy()
    path = tmp_path / "checkpoint.pkl"
    for i, experience in enumerate(split5.train_stream):
        whole.train(experience)
        if i == 1:
            save_checkpoint(whole, path)
    resumed, first = maybe_load_checkpoint(strategy(), path)
    assert first == 2
    for experience in split5.train_stream[first:]:
        resumed.train(experience)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert "consolidated" in next(iter(resumed.optimizer.state.values()))


def test_a_growing_head_keeps_what_its_old_units_hold(split5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), IncrementalClassifier(16, 1))
    optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=1e-3, beta1=0.0, eps=1e-3)
    strategy = strategy_of(model, [ConsolidationPlugin()], optimizer=optimizer, criterion=nn.CrossEntropyLoss())
    for experience in split5.train_stream[:3]:
        before = (
            optimizer.get_param_eligibility(model[3].classifier.weight) if strategy.clock.train_exp_counter else None
        )
        strategy.train(experience)
        strategy.eval(split5.test_stream[: experience.current_experience + 1])
        if before is not None:
            after = optimizer.get_param_eligibility(model[3].classifier.weight)
            assert len(after) > len(before) and (after[: len(before)] >= before).all() and before.any()
    optimizer.get_diagnostics()


def consolidating(model, plugin, optimizer=None, seen=None):
    """A strategy with a plugin; it adds the names of the consolidated parameters in each iteration to ``seen``."""

    class Look(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            state = strategy.optimizer.state
            seen.append({name for name, p in model.named_parameters() if "consolidated" in state.get(p, {})})

    optimizer = optimizer or SelectivePlasticityOptimizer.for_continual_learning(model.parameters())
    return strategy_of(model, [plugin, *[Look()] * (seen is not None)], optimizer=optimizer)


PLUGINS = [ConsolidationPlugin, partial(SelectivePlasticityPlugin, rank=5, readout_step=False)]


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("how", ["state reset", "new optimizer", "second strategy", "second plugin and strategy"])
def test_the_consolidated_eligibility_outlives_the_optimizers_state(split2, plugin, how):
    few, model, seen = sliced(split2, 64, 20).train_stream, mlp(), []
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_forward_hook(lambda module, args, output: output * module.scale)
    strategy = consolidating(model, plugin(), seen=seen)
    strategy.train(few[0])
    kept = {name: strategy.optimizer.get_param_eligibility(p) for name, p in model.named_parameters()}
    if how == "new optimizer":
        strategy.optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=1e-4)
    elif how != "state reset":
        own = plugin() if how == "second plugin and strategy" else strategy.plugins[0]
        strategy = consolidating(model, own, strategy.optimizer, seen)
    seen.clear()
    strategy.train(few[1], reset_optimizer_state=how == "state reset")
    assert all(names == set(kept) for names in seen)
    for name, p in model.named_parameters():
        assert (strategy.optimizer.get_param_eligibility(p) >= kept[name]).all()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_another_model_and_a_reset_optimizer_begin_without_a_consolidated_eligibility(split2, plugin):
    few, plugin, seen = sliced(split2, 64, 20).train_stream, plugin(), []
    strategy = consolidating(mlp(), plugin)
    strategy.train(few[0])
    strategy.optimizer.reset_eligibility()
    strategy.plugins[:] = consolidating(strategy.model, plugin, seen=seen).plugins
    strategy.train(few[1])
    assert strategy.optimizer.state and not any(seen)
    seen.clear()
    consolidating(mlp(), plugin, seen=seen).train(few[1])
    assert not any(seen)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_strategy_keeps_the_eligibility_and_a_copied_plugin_gives_none_to_another_model(split2, copied):
    few, plugin, seen = sliced(split2, 64, 20).train_stream, ConsolidationPlugin(), []
    strategy = consolidating(mlp(), plugin)
    strategy.train(few[0])
    other = copied(strategy)
    for one in (strategy, other):
        torch.manual_seed(1)
        one.train(few[1], reset_optimizer_state=True)
    assert_same_state(other.optimizer, strategy.optimizer)
    consolidating(mlp(), copied(plugin), seen=seen).train(few[0])
    assert not any(seen)


def assert_same_state(one, other):
    torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)


def test_a_growing_head_goes_on_from_states_with_a_new_plugin(split5):
    few = sliced(split5, 64, 20).train_stream

    def strategy(first=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), IncrementalClassifier(8, 1, masking=False))
        for experience in first:
            model[3].adaptation(experience)
        return consolidating(model, ConsolidationPlugin())

    whole, resumed = strategy(), strategy(few[:2])
    whole.train(few[:2])
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.make_optimizer()
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    for one in (whole, resumed):
        torch.manual_seed(2)
        one.train(few[2])
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert_same_state(resumed.optimizer, whole.optimizer)


def test_avalanches_packnet_builds_it_again_in_each_experience():
    benchmark = sliced(split_mnist(5, return_task_id=True, dataset_root=MNIST), 128, 32)
    torch.manual_seed(0)
    model = packnet_simple_mlp(hidden_size=16)
    first = SelectivePlasticityOptimizer(model.parameters(), lr=2e-3, plasticity_k=3)
    strategy = PackNet(
        model=model, optimizer=first, post_prune_epochs=1, prune_proportion=0.5, train_epochs=2, train_mb_size=64,
        evaluator=None,
    )  # fmt: skip
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience)
    assert strategy.optimizer is not first and strategy.optimizer.defaults == first.defaults
    assert all(int(state["step"]) == 4 for state in strategy.optimizer.state.values() if state)


def test_consolidation_plugin_needs_our_optimizer(split2):
    with pytest.raises(TypeError, match="Invalid optimizer: SGD"):
        strategy_of(mlp(), [ConsolidationPlugin()]).train(split2.train_stream[0])


def sharded(model):
    """FSDP2: every parameter and its state is a DTensor, half of it in each process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def one_process(rank, port, x, y, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    half, results = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2), {}
    for name, wrap in (("ddp", nn.parallel.DistributedDataParallel), ("fsdp", sharded)):
        model = wrap(mlp())
        optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=1e-3, warmup_steps=2)
        run(model, optimizer, (x[half], y[half]), 2)
        optimizer.consolidate()
        run(model, optimizer, (x[half], y[half]), 2)
        whole = [p.full_tensor() if name == "fsdp" else p for p in model.parameters()]
        results[name] = torch.cat([p.detach().flatten() for p in whole])
    for p in model.parameters():
        if rank == 0:  # one process alone meets a NaN
            p.grad.to_local().fill_(float("nan"))
    try:
        optimizer.step()
    except FloatingPointError:
        results["refused"] = True
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_on_the_whole_batch(batch, tmp_path):
    model = mlp()
    optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=1e-3, warmup_steps=2)
    run(model, optimizer, batch, 2)
    optimizer.consolidate()
    run(model, optimizer, batch, 2)
    port = 20000 + os.getpid() % 20000
    mp.start_processes(one_process, (port, *batch, tmp_path), nprocs=2, start_method="forkserver")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("ddp", "fsdp"):
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], weights(model), rtol=1e-3, atol=1e-5)
    assert one["refused"] and other["refused"]
