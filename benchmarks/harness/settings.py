"""A run: its settings, all of them, and nothing else."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.data import DATA
from harness.recipes import ABOUT, recipe_of

ROOT = Path(__file__).resolve().parents[2]

# Class-incremental ("split") and domain-incremental benchmarks of every data set.
BENCHMARKS = tuple(f"{kind}-{data}" for kind in ("split", "permuted") for data in DATA)
# Networks, and their names in reports. A perceptron has the widths of its hidden layers as name, and more in reports:
# its numbers of inputs and classes.
PERCEPTRONS = ("256-256", "100-100", "400-400", "1000-1000", "1000", "436-436", "827-827")
NETWORKS = {name: f"MLP {{}}-{name}-{{}}" for name in PERCEPTRONS} | {
    "cnn": "CNN of two convolutions (16 and 32 channels) and a linear layer",
    "cnn-bn": "the same CNN with BatchNorm after each convolution",
    "slim-resnet18": "ResNet-18 of 20 to 160 channels",
    "vit": "vision transformer of 4 blocks and 64 channels",
}
STRATEGIES = tuple(ABOUT)[: list(ABOUT).index("joint") + 1]  # a comparison's, unless others are asked for
BOUNDS = ("cumulative", "joint")
# The order of the tasks: one after another; the same, each experience one mini-batch, for strategies that are not told
# the boundaries; mixed with their neighbours; each turning slowly into the next; or the first task again at the end.
STREAMS = ("tasks", "online", "blurred", "drifting", "returning")


def title_of(benchmark: str) -> str:
    """A benchmark's name in reports."""
    kind, _, data = benchmark.partition("-")
    return f"{kind.capitalize()} {DATA[data].title}"


def network_title(network: str, benchmark: str = "split-mnist") -> str:
    """A network's name in reports."""
    data = DATA[benchmark.partition("-")[2]]
    return NETWORKS[network].format(data.inputs, data.classes)


@dataclass(frozen=True)
class Run:
    """One training of one strategy on one benchmark with one seed.

    Attributes:
        batch_size: samples of the stream in a mini-batch.
        replay_buffer: stored samples; 0 for strategies without replay.
        seed: decides the data's order, initial weights and permutations. Runs with equal seeds are paired.
        train_per_task: training images a task (permutations); None: all.
        validation: score on 1/6 of the training images, held out, instead of the test set, for tuning.
        overrides: settings of the strategy that replace its recipe's, as a mapping or as pairs.
        stream: one of STREAMS.
        task_incremental: a head for each task, and task labels in training and in tests (classes).
        pixels: one of PIXELS.
    """

    benchmark: str
    strategy: str
    n_tasks: int
    epochs: int = 1
    batch_size: int = 64
    replay_buffer: int = 0
    seed: int = 0
    train_per_task: int | None = None
    validation: bool = False
    network: str = "256-256"
    overrides: tuple[tuple[str, float | str], ...] | Mapping[str, float | str] = ()
    stream: str = "tasks"
    task_incremental: bool = False
    pixels: str = "normalised"

    def __post_init__(self):
        object.__setattr__(self, "overrides", tuple(sorted(dict(self.overrides).items())))

    @property
    def kind(self) -> str:
        """ "split" or "permuted"."""
        return self.benchmark.partition("-")[0]

    @property
    def data(self) -> str:
        """The data set, one of DATA."""
        return self.benchmark.partition("-")[2]

    @property
    def heads(self) -> int:
        return self.n_tasks if self.task_incremental else 1

    @property
    def in_mini_batches(self) -> bool:
        """Whether each experience that the strategy trains on is one mini-batch."""
        untold = self.strategy.endswith(("-surprise", "-continuous"))
        return self.stream == "online" and (untold or self.strategy == "naive-sgd")

    def settings(self) -> dict:
        """All that decides its result, as the store keeps it: its own settings and its recipe's.

        Raises:
            ValueError: the benchmark does not have the strategy or the number of tasks, or the strategy does not have
                a setting.
        """
        if self.kind == "split":
            classes = DATA[self.data].classes
            numbers = [n for n in range(1, classes + 1 - self.task_incremental) if classes % n == 0]
            if self.n_tasks not in numbers:  # with a head for each, one class is no task
                where = f"{self.benchmark}{' with task_incremental' if self.task_incremental else ''}"
                allowed = ", ".join(map(str, numbers))
                raise ValueError(f"Invalid tasks: {self.n_tasks} (allowed on {where}: {allowed})")
        return {**asdict(self), "overrides": dict(self.overrides), **recipe_of(self).to_json()}
