"""Time that the gate and the optimizer take: ratios to training without them, in one process, on one thread.

    python benchmarks/overhead.py --rounds 5
    python benchmarks/overhead.py --device cuda --networks 256-256,slim-resnet18 --images 2000

All are measured in turn, round after round, so that a machine whose speed drifts changes both sides of a ratio alike.
Reported are medians over the rounds. Writes overhead.json.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training import Naive
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.optim import SGD, Adam

from avalanche_sp import GaussianBuffer, SelectivePlasticityOptimizer, SelectivePlasticityPlugin, split_mnist
from harness.cli import Names, Numbers, Where, parsed
from harness.data import folder_of
from harness.networks import build_network, network_bytes, perceptron
from harness.run import quiet
from harness.settings import NETWORKS, ROOT

STEP_BATCH, BATCH, ONLINE_BATCH = 128, 64, 10
OURS = "SelectivePlasticityOptimizer"
OPTIMIZERS = {
    "torch.optim.Adam": Adam,
    OURS: SelectivePlasticityOptimizer,
    "torch.optim.Adam(fused=True)": partial(Adam, fused=True),
    f"{OURS}(fused=True)": partial(SelectivePlasticityOptimizer, fused=True),
}

Timers = Mapping[str, Callable[[], float]]  # by name: does the work once, returns seconds


@dataclass(frozen=True)
class Settings(Where):
    """Settings of the measurement.

    Attributes:
        rounds: number of rounds
        device: where the networks are trained: cpu, cuda
        networks: names of harness/settings.py
        images: images of an experience
        output: folder of overhead.json
    """

    rounds: int = 5
    device: str = "cpu"
    networks: Names = ("256-256", "cnn", "slim-resnet18", "vit")
    images: Numbers = (400, 2000, 10000)
    output: Path = ROOT / "results" / "overhead"

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "rounds")
        self.finds("mnist")
        self.one_of("networks", NETWORKS)
        for value in self.images:
            if not 2 * STEP_BATCH <= value <= 10000:
                raise ValueError(f"Invalid images: {value} (allowed: {2 * STEP_BATCH} to 10000)")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"Invalid device: {self.device} (allowed on this machine: cpu)")

    @property
    def root(self) -> str:
        return str(folder_of("mnist", self.dataset_root))


def now() -> float:
    """Seconds, when the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    gc.collect()  # nobody pays for the garbage of the run before
    start = now()
    work()
    return now() - start


def measure(timers: Timers, rounds: int) -> list[dict]:
    """Median seconds of each, and the median of its ratio to a reference, round by round.

    The reference is torch's fused Adam for fused optimizers, else the first.
    """
    times = pd.DataFrame([{name: timer() for name, timer in timers.items()} for _ in range(rounds)])
    rows = []
    for name in timers:
        reference = "torch.optim.Adam(fused=True)" if "fused" in name else next(iter(timers))
        ratios = times[name] / times[reference]
        rows.append({"name": name, "seconds": times[name].median(), "reference": reference, "ratio": ratios.median()})
        rows[-1] |= {"ratio_min": ratios.min(), "ratio_max": ratios.max()}
    return rows


# -- Timers -----------------------------------------------------------------------------------------------------------


def experiences(root: str, *images: int) -> list:
    """The first experiences of five of Split MNIST, each with its number of images."""
    whole = split_mnist(5, dataset_root=root).train_stream
    datasets = [e.dataset.subset(list(range(n))) for e, n in zip(whole, images)]
    return list(benchmark_from_datasets(train=datasets).train_stream)


class StepClock(SupervisedPlugin):
    """Seconds of all training iterations, from before the forward pass to after the optimizer's step."""

    seconds = 0.0

    def before_training_iteration(self, strategy, **kwargs):
        self.seconds -= now()

    def after_training_iteration(self, strategy, **kwargs):
        self.seconds += now()


def trained(
    network: str, before: list, timed: list, make: Callable, plugins: Callable, batch: int, device: str, steps: bool
) -> float:
    """Seconds that Naive takes for the experiences ``timed``, after those ``before``: all, or its iterations alone."""
    torch.manual_seed(0)
    model, clock = build_network(network).to(device), StepClock()
    strategy = Naive(
        model=model,
        optimizer=make(model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch,
        plugins=[*plugins(), clock],
        evaluator=None,
        device=device,
    )
    for experience in before:
        strategy.train(experience)
    clock.seconds = 0.0
    whole = seconds(lambda: [strategy.train(experience) for experience in timed])
    return clock.seconds if steps else whole


def gated(settings: Settings, network: str, images: int, name: str, make: Callable, batch: int, steps: bool) -> Timers:
    """The second experience of Split MNIST, after a first one of 400 images."""
    first, second = experiences(settings.root, 400, images)
    train = partial(trained, network, [first], [second], make, batch=batch, device=settings.device, steps=steps)
    return {name: partial(train, plugins=list), f"{name}, gate": partial(train, plugins=with_gate)}


def with_gate(**arguments) -> list:
    return [SelectivePlasticityPlugin(**arguments)]


def with_gaussians() -> list:
    return [GaussianBuffer().replay_plugin()]


def online(settings: Settings) -> Timers:
    """The first 400 mini-batches of two tasks of five, each an experience: no boundary is told."""
    tasks = split_mnist(5, dataset_root=settings.root).train_stream[:2]
    parts = [part for t in tasks for part, _ in zip(split_online_stream([t], ONLINE_BATCH, seed=0), range(400))]
    make, how = partial(SGD, lr=0.02), ("surprise", "continuous")
    train = partial(trained, "256-256", [], parts, make, batch=ONLINE_BATCH, device=settings.device, steps=False)
    found = {f'SGD, gate(consolidate="{c}")': partial(train, plugins=partial(with_gate, consolidate=c)) for c in how}
    return {"SGD": partial(train, plugins=list), **found}


def drawn(settings: Settings) -> Timers:
    """The steps of a second experience with samples drawn from Gaussians, and with none."""
    first, second = experiences(settings.root, 2000, 2000)
    arguments = {"batch": BATCH, "device": settings.device, "steps": True}
    train = partial(trained, "256-256", [first], [second], partial(SGD, lr=0.05), **arguments)
    return {"SGD": partial(train, plugins=list), "SGD, GaussianBuffer": partial(train, plugins=with_gaussians)}


def optimizer_steps(settings: Settings, width: int) -> Timers:
    """100 steps of each optimizer, gradients ready."""
    timers = {}
    for name, make in OPTIMIZERS.items():
        for consolidated in (False, True) if name.startswith(OURS) else (False,):
            torch.manual_seed(0)
            model = perceptron(width, width).to(settings.device)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer = make(model.parameters())
            optimizer.step()
            if consolidated:
                optimizer.consolidate()
            row = f"{name}, consolidated" if consolidated else name
            timers[row] = partial(seconds, lambda optimizer=optimizer: [optimizer.step() for _ in range(100)])
    return timers


def training_steps(settings: Settings) -> Timers:
    """100 training steps of each optimizer on one batch."""
    x = torch.randn(STEP_BATCH, 784, device=settings.device)
    y = torch.randint(10, (STEP_BATCH,), device=settings.device)

    def run(make: Callable) -> float:
        model, loss = build_network().to(settings.device), nn.CrossEntropyLoss()
        optimizer = make(model.parameters())

        def train() -> None:
            for _ in range(100):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()

        return seconds(train)

    return {name: partial(run, make) for name, make in OPTIMIZERS.items()}


def state_share(network: str, root: str) -> float:
    """Bytes of the gate's memory after two experiences, over those of the network."""
    plugin, tasks = SelectivePlasticityPlugin(), experiences(root, 400, 400)
    trained(network, [], tasks, partial(Adam, lr=1e-3), lambda: [plugin], BATCH, "cpu", steps=False)
    return plugin.state_bytes / network_bytes(build_network(network))


def parts(settings: Settings):
    """Title, batch size and timers of each table, one after another."""
    sgd, adam = partial(SGD, lr=0.05), partial(Adam, lr=1e-3)
    for network in settings.networks:
        for name, make in {"SGD": sgd, "Adam": adam}.items():
            yield f"{network}: training steps", STEP_BATCH, gated(settings, network, 2000, name, make, STEP_BATCH, True)
        for images in settings.images:
            what = f"{network}: an experience of {images} images"
            yield what, BATCH, gated(settings, network, images, "Adam", adam, BATCH, False)
    yield "256-256: 800 mini-batches of an online stream", ONLINE_BATCH, online(settings)
    yield "256-256: training steps with drawn samples", BATCH, drawn(settings)
    yield "100 optimizer steps, 269,322 parameters", 1, optimizer_steps(settings, 256)
    yield "100 optimizer steps, 1,796,010 parameters", 1, optimizer_steps(settings, 1000)
    yield "100 training steps, 269,322 parameters", STEP_BATCH, training_steps(settings)


def main(argv: list[str] | None = None) -> int:
    settings = parsed(Settings, argv, __doc__)
    settings.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    quiet()
    device = torch.cuda.get_device_name() if settings.device != "cpu" else "one thread of a CPU"
    results: dict = {"torch": torch.__version__, "device": device, "rounds": settings.rounds, "parts": []}
    results["state"] = {network: state_share(network, settings.root) for network in settings.networks}
    for what, batch, timers in parts(settings):
        rows = measure(timers, settings.rounds)
        results["parts"].append({"what": what, "batch_size": batch, "rows": rows})
        print(f"\n{what}\n{pd.DataFrame(rows).to_string(index=False, float_format='%.3f')}", flush=True)
    path = settings.output / "overhead.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
