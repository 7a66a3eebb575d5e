"""Protocols by name: what they set, and that the command line goes first."""


import pytest

import compare
from harness.cli import ClassIncremental, DomainIncremental, comparison
from harness.networks import build_network
from harness.protocols import PROTOCOLS
from harness.recipes import recipe_of, strategies_of
from harness.settings import NETWORKS
from harness.studies import STUDIES

EVERY = [(benchmark, name) for benchmark, protocols in PROTOCOLS.items() for name in protocols]


def runs(benchmark, *arguments):
    kind = {"split-mnist": ClassIncremental, "permuted-mnist": DomainIncremental}[benchmark]
    return comparison(kind, list(map(str, arguments)), "").runs()


@pytest.mark.parametrize("benchmark, name", EVERY)
def test_a_protocol_sets_what_it_says_for_every_run(benchmark, name):
    protocol = PROTOCOLS[benchmark][name]
    listed = [*protocol.settings, *(strategy for strategy, _ in protocol.published)]
    assert set(listed) <= set(strategies_of(benchmark))
    for run in runs(benchmark, "--protocol", name, "--strategies", ",".join(dict.fromkeys([*listed, "sp-replay"]))):
        for argument, value in protocol.arguments.items():
            if argument == "replay_buffer":
                assert run.replay_buffer in (0, *value)
            else:
                assert getattr(run, {"tasks": "n_tasks"}.get(argument, argument)) == value
        recipe_of(run)  # its settings exist


def test_settings_are_published_for_some_strategies_and_buffers_alone():
    mammoth = ["--protocol", "mammoth", "--strategies"]
    lrs = {r.replay_buffer: dict(r.overrides) for r in runs("split-mnist", *mammoth, "replay-sgd")}
    assert lrs[200] == {"lr": 0.01} and lrs[5120] == {"lr": 0.1}
    other = runs("split-mnist", *mammoth, "replay-sgd", "--replay-buffer", 1000)
    assert all(r.overrides == () for r in other + runs("split-mnist", *mammoth, "sp"))


def test_the_losses_and_pixels_of_a_publication_are_those_of_its_runs():
    gpm, ours = runs("permuted-mnist", "--protocol", "gpm", "--strategies", "gpm,sp-both", "--seeds", 1)
    assert (gpm.settings()["loss"], ours.settings()["loss"]) == ("cross-entropy", "squared error")
    (adam,) = runs("permuted-mnist", "--protocol", "van-de-ven", "--strategies", "naive-adam", "--seeds", 1)
    assert (adam.settings()["loss"], adam.settings()["pixels"]) == ("cross-entropy", "0-1")
    (study,) = {cell["pixels"] for cell in STUDIES["protocol_van_de_ven_permuted"].cells()}
    assert study == "0-1"


def test_the_command_line_goes_first():
    arguments = ["--protocol", "original", "--strategies", "sp-replay", "--seeds", 1]
    (run,) = runs("split-mnist", *arguments)
    assert (run.n_tasks, run.epochs, run.batch_size, run.replay_buffer) == (2, 5, 64, 2000)
    few = runs("split-mnist", *arguments, "--epochs", 1, "--replay-buffer", "50,200", "--set", "lr=0.3")
    lr = (("lr", 0.3),)
    assert [(r.epochs, r.replay_buffer, r.overrides) for r in few] == [(1, 50, lr), (1, 200, lr)]


def test_a_scripts_own_defaults_yield_to_a_protocols():
    of_script = comparison(ClassIncremental, [], "", **compare.main.keywords)
    of_protocol = comparison(ClassIncremental, ["--protocol", "mammoth"], "", **compare.main.keywords)
    assert (of_script.tasks, of_script.replay_buffer) == (5, (200,))
    assert (of_protocol.tasks, of_protocol.replay_buffer) == (5, (200, 500, 5120))
    assert of_script.strategies == of_protocol.strategies


@pytest.mark.parametrize("network", [name for name in NETWORKS if name[0].isdigit()])
def test_every_perceptron_is_what_its_name_says(network):
    sizes = [m.out_features for m in build_network(network) if hasattr(m, "out_features")]
    assert sizes == [*map(int, network.split("-")), 10]
