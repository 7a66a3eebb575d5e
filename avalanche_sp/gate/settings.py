"""The constants of the gate that were tuned, in one frozen object."""

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

# Allowed ranges by name: a test, and its words.
_RANGES = {
    "count": (lambda v: isinstance(v, Integral) and int(v) >= 1, "an integer, 1 or more"),
    "positive": (lambda v: 0 < v < float("inf"), "greater than 0"),
    "not negative": (lambda v: 0 <= v < float("inf"), "0 or more"),
    "share": (lambda v: 0 <= v <= 1, "0 to 1"),
}


def _setting(default: float, allowed: str, meaning: str) -> Any:
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """Constants of :class:`~avalanche_sp.gate.PlasticityGate`. ``docs/trials`` holds the evidence.

    ``Settings.describe()`` lists name, default, range and meaning. Change one with ``Settings(look=4)`` or
    ``dataclasses.replace``.

    Raises:
        ValueError: a value is out of range.
    """

    # Memory of a layer.
    rank: int = _setting(48, "count", "eigenvectors kept for a layer if the end of an experience is told")
    stream_rank: int = _setting(64, "count", "eigenvectors kept for a layer if boundaries are found")
    readout_rank: int = _setting(257, "count", "the same for the last layer, at least: all of 256 inputs and a bias")
    vectors: int = _setting(
        2000, "count", "input vectors of a layer in an experience's second moment; one a sample if that is more"
    )
    largest_imbalance: float = _setting(
        2, "positive", "factor between the samples of new classes and of earlier ones beyond which they count the same"
    )
    observed_a_class: int = _setting(
        500, "count", "samples run through the network for each class of an experience; half of all if that is more"
    )
    # Gate.
    gated_vectors: int = _setting(32, "count", "leading eigenvectors gated in every step; the others at every look")
    same_shift: float = _setting(
        0.2, "not negative", "shift of the class means, in variances between classes, below which the gate is open"
    )
    attention_openness: float = _setting(
        0, "not negative", "factor of the openness of an attention's query, key and value projections; 0 holds them"
    )
    look: int = _setting(8, "count", "optimizer steps between two looks at the weights, at most")
    # Penalty.
    largest_ratio: float = _setting(20, "positive", "upper bound on N_old / N_new; larger values make steps unstable")
    beyond: float = _setting(0.15, "not negative", "weight of the penalty beyond the kept eigenvectors")
    beyond_power: float = _setting(1.5, "not negative", "power of the likeness of stream and memory in that weight")
    beyond_every: int = _setting(2, "count", "looks between two penalties beyond the kept eigenvectors")
    # Newton step of the readout.
    readout_old: float = _setting(2, "positive", "weight of the old quadratic in the readout's step and solution")
    readout_whole: float = _setting(0.05, "positive", "gain, as a share of the loss of zero outputs, of a whole step")
    readout_damping: float = _setting(0.05, "positive", "damping of the step, in units of the mean eigenvalue")
    readout_stream_damping: float = _setting(0.3, "positive", "the same if the boundary was found")
    # Readout, solved.
    solve_ridge: float = _setting(0.02, "positive", "ridge of the weights, in units of the inputs' mean eigenvalue")
    solve_samples: int = _setting(2000, "count", "pseudo-samples of old classes; fewer if there were fewer old samples")
    solve_held_out: float = _setting(
        0.9, "share", "least gain on half of the new samples, of the other half's, before the ridge is made larger"
    )
    solve_steps: int = _setting(20, "count", "iterations of L-BFGS, at most")
    solve_tolerance: float = _setting(
        5e-3, "positive", "least gain of an iteration, in losses of zero outputs on the new samples"
    )
    solve_trial: int = _setting(
        3, "count", "steps of Adam that a readout solved before the first experience has to bear"
    )
    class_rank: int = _setting(8, "count", "eigenvectors kept of each class's own covariance, at most")
    class_vectors: int = _setting(1024, "count", "the same of all classes together, at most")
    adaptive_eps: float = _setting(
        1e-6, "not negative", "largest eps of an optimizer whose steps do not grow with the sharpness of the loss"
    )
    drift_ridge: float = _setting(0.1, "positive", "ridge of the drift's map, in units of the mean eigenvalue")
    drift_first_order: float = _setting(
        0.002, "not negative", "least share of new outputs' change for which the first order tells old inputs' drift"
    )
    drift_agreement: float = _setting(
        0.5, "positive", "least cosine of old inputs' moves, by two halves of the new classes, to move them all the way"
    )
    gaussian_ridge: float = _setting(0.02, "positive", "ridge of feature Gaussians' covariance, in mean variances")
    # Stored samples, c for each class of each experience.
    half_trust: float = _setting(50, "positive", "c at which stored samples stand for half of the old loss")
    double_openness: float = _setting(12, "positive", "c at which the openness is twice that without stored samples")
    # Streams without told boundaries.
    stream_look: int = _setting(4, "count", "steps between two looks at the stream")
    stream_samples: int = _setting(16, "count", "samples that a look adds to the second moments")
    stream_vectors: int = _setting(8, "count", "input vectors for each of these samples, at most")
    stream_chunk: int = _setting(4096, "count", "samples between two consolidations without a detector")
    stream_memory: int = _setting(5120, "count", "input vectors for which older ones stand in a second moment, at most")
    stream_drift: float = _setting(0.2, "positive", "squared move of the inputs' mean, in variances, that is a change")
    # Change detection.
    detection_decay: float = _setting(0.95, "share", "decay of running means and variances, a step")
    detection_clip: float = _setting(3.0, "positive", "deviations beyond which a number moves the mean no further")
    detection_limit: float = _setting(5.0, "positive", "largest deviation that a detector is told")
    detection_start: int = _setting(20, "count", "steps after a start in which detectors are not asked")
    detection_delta: float = _setting(1.0, "not negative", "Page-Hinkley test: deviations that count as no change")
    detection_threshold: float = _setting(20.0, "positive", "Page-Hinkley test: sum of deviations that is a change")
    surprise_decay: float = _setting(0.99, "share", "decay of the loss's running mean and variance, for the optimizer")
    surprise_full: float = _setting(3.0, "positive", "deviations of the loss that are full surprise")

    def __post_init__(self):
        for f in fields(self):
            value, (allowed, words) = getattr(self, f.name), _RANGES[f.metadata["allowed"]]
            if isinstance(value, bool) or not isinstance(value, Real) or not allowed(value):
                raise ValueError(f"Invalid {f.name} value: {value!r} (allowed: {words})")

    @classmethod
    def describe(cls) -> list[tuple[str, Any, str, str]]:
        """Name, default, allowed range and meaning of each setting."""
        return [(f.name, f.default, _RANGES[f.metadata["allowed"]][1], f.metadata["meaning"]) for f in fields(cls)]
