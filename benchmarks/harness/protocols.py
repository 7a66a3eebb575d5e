"""Published protocols by name: their settings, and the accuracies published with them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.recipes.recipe import CE


@dataclass(frozen=True)
class Protocol:
    """A named protocol.

    Attributes:
        arguments: defaults of the scripts' arguments.
        settings: of the strategies that do not train with their recipes (tuned with one epoch and batches of 64); each
            a number, a number by buffer, or the name of a loss.
        published: accuracy in percent by strategy and buffer (0: none).
        source: of both.
        note: how the conditions differ.
    """

    arguments: dict
    settings: dict[str, dict[str, float | str | dict[int, float]]] = field(default_factory=dict)
    published: dict[tuple[str, int], float] = field(default_factory=dict)
    source: str = ""
    note: str = ""


_MAMMOTH = "P. Buzzega et al., Dark experience for general continual learning, NeurIPS 2020"
_RESERVOIR = "Stored samples are drawn from the stream as it comes there, and when a task ends here."
_VAN_DE_VEN = "G. van de Ven, A. Tolias, Three scenarios for continual learning, 2019"

PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "split-mnist": {
        # Half of each batch is replayed: 64 new samples and 64 stored ones.
        "original": Protocol(
            {"tasks": 2, "epochs": 5, "batch_size": 64, "network": "256-256", "replay_buffer": (2000,)},
            {"replay-gaussian": {"lr": 1e-3}},
            source="the method's first publication: docs/original.md",
        ),
        "mammoth": Protocol(
            {"tasks": 5, "epochs": 1, "batch_size": 10, "network": "100-100", "replay_buffer": (200, 500, 5120)},
            {"replay-sgd": {"lr": {200: 0.01, 500: 0.1, 5120: 0.1}}},
            {("replay-sgd", 200): 80.4, ("replay-sgd", 500): 86.1, ("replay-sgd", 5120): 93.4, ("joint", 0): 95.6},
            _MAMMOTH,
            f"{_RESERVOIR} The learning rates of `replay-sgd` are the published ones.",
        ),
        # 2000 iterations a task: 12,000 images are 93 whole batches of 128.
        "van-de-ven": Protocol(
            {"tasks": 5, "epochs": 21, "batch_size": 128, "network": "400-400"},
            {"naive-adam": {"lr": 1e-3}, "joint": {"lr": 1e-3}},
            {("naive-adam", 0): 19.9, ("ewc", 0): 19.9, ("si", 0): 20.0, ("lwf", 0): 24.2, ("joint", 0): 97.9},
            _VAN_DE_VEN,
            "Pixels are between 0 and 1 there and normalised here.",
        ),
    },
    "permuted-mnist": {
        "mammoth": Protocol(
            {"tasks": 20, "epochs": 1, "batch_size": 128, "network": "100-100", "replay_buffer": (200, 500, 5120)},
            {
                "replay-sgd": {"lr": 0.022},
                "der++": {
                    "lr": {200: 0.011, 500: 0.022, 5120: 0.022},
                    "alpha": {200: 1.0, 500: 1.0, 5120: 0.5},
                    "beta": {200: 1.0, 500: 0.5, 5120: 1.0},
                },
            },
            {("replay-sgd", 200): 72.4, ("replay-sgd", 500): 80.6, ("replay-sgd", 5120): 89.9}
            | {("der++", 200): 83.6, ("der++", 500): 88.2, ("der++", 5120): 92.3, ("joint", 0): 94.3},
            _MAMMOTH,
            f"{_RESERVOIR} The learning rates of `replay-sgd` and `der++` are the published ones divided by 9: pixels "
            "are between 0 and 1 there and normalised here, where their mean square is 9 times as large.",
        ),
        "gpm": Protocol(
            {"tasks": 10, "epochs": 5, "batch_size": 10, "network": "100-100", "replay_buffer": (1000,)},
            {
                "replay-sgd": {"lr": 0.01},
                "gpm": {"lr": 0.01, "loss": CE, "epsilon": 0.95, "epsilon_hidden": 0.99},
                "owm": {"lr": 0.01},
                "sp-both": {"lr": 5e-4},
            },
            {("gpm", 0): 93.9, ("owm", 0): 90.7, ("ewc", 0): 90.0, ("replay-sgd", 1000): 87.2, ("a-gem", 1000): 83.6}
            | {("joint", 0): 96.7},
            "G. Saha, I. Garg, K. Roy, Gradient projection memory, ICLR 2021",
            "The authors' code trains on 54,000 of the 60,000 images, and its layers have no biases.",
        ),
        # 5000 iterations a task: 60,000 images are 468 whole batches of 128.
        "van-de-ven": Protocol(
            {"tasks": 10, "epochs": 11, "batch_size": 128, "network": "1000-1000", "pixels": "0-1"},
            {"naive-adam": {"lr": 1e-4, "loss": CE}, "joint": {"lr": 1e-4}},
            {("naive-adam", 0): 78.5, ("ewc", 0): 94.3, ("si", 0): 95.3, ("lwf", 0): 72.6, ("joint", 0): 97.6},
            _VAN_DE_VEN,
            "Images are padded to 32 x 32 pixels there, and have 28 x 28 here.",
        ),
    },
}


def overrides_of(
    benchmark: str, protocol: str | None, strategy: str, buffer: int, own: Iterable[tuple[str, float | str]]
) -> dict[str, float | str]:
    """A run's overrides: the protocol's published settings, if there are any, then one's own."""
    settings = PROTOCOLS[benchmark][protocol].settings.get(strategy, {}) if protocol else {}
    found = {name: value.get(buffer) if isinstance(value, dict) else value for name, value in settings.items()}
    return {name: value for name, value in found.items() if value is not None} | dict(own)
