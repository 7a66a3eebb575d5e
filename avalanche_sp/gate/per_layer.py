"""Settings that may differ from layer to layer: one value for all, or values by patterns of the layers' names."""

from collections.abc import Container, Mapping
from fnmatch import fnmatchcase
from numbers import Integral
from typing import TypeAlias, TypeVar

from torch import nn

from avalanche_sp.arguments import AT_LEAST_0, Condition, check_number
from avalanche_sp.gate.layers import GatedLayer, gated_layers

T = TypeVar("T", int, float)
PerLayer: TypeAlias = T | Mapping[str, T]

_INFINITE = float("inf")
_ALLOWED: dict[str, Condition] = {
    "openness": (lambda v: v > 0, "greater than 0; math.inf is off"),
    "pull_back": AT_LEAST_0,
    "rank": (
        lambda v: (isinstance(v, Integral) and int(v) >= 1) or 0 < v < 1,
        "an integer, 1 or more; or a share of the energy, greater than 0 and less than 1",
    ),
}


def per_layer(name: str, values: PerLayer[T], default: T | None) -> PerLayer[T]:
    """A setting with numbers of Python's own types; a mapping is copied, and its last pattern is for all other layers.

    Args:
        name: the setting's, "openness", "pull_back" or "rank".
        values: one value, or values by patterns as :func:`fnmatch.fnmatchcase` has them.
        default: for layers that no pattern matches; None leaves it to be said later.

    Raises:
        ValueError: a value is not a number or is out of range, or a pattern is not a string.
    """
    if not isinstance(values, Mapping):
        return _number(name, values)
    for pattern in values:
        if not isinstance(pattern, str):
            raise ValueError(f"Invalid {name} pattern: {pattern!r} (allowed: a string, such as {str(pattern)!r})")
    numbers = {pattern: _number(name, value, f" for the layers {pattern!r}") for pattern, value in values.items()}
    return numbers if default is None else {**numbers, "*": numbers.get("*", default)}


def _number(name: str, value, where: str = ""):
    check_number(f"{name} value{where}", value, _ALLOWED[name])
    return int(value) if isinstance(value, Integral) else float(value)


def value_of(values: PerLayer[T], layer: str) -> T:
    """A layer's value: that of the first pattern that matches its name."""
    if not isinstance(values, Mapping):
        return values
    return next(value for pattern, value in values.items() if fnmatchcase(layer, pattern))


def values_of(values: PerLayer[T]) -> list[T]:
    """All values that a layer can have."""
    return list(values.values()) if isinstance(values, Mapping) else [values]


def check_patterns(settings: Mapping[str, PerLayer], model: nn.Module) -> None:
    """Raises ValueError for a setting's pattern that is no layer's: a misspelt name would go unnoticed otherwise."""
    patterns = [(name, p) for name, values in settings.items() if isinstance(values, Mapping) for p in values]
    layers = list(gated_layers(model)) if patterns else []
    for name, pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(f"Invalid {name} pattern: {pattern!r} is no layer's (allowed: {', '.join(layers)})")


def protected_layers(
    model: nn.Module, openness: PerLayer[float], frozen: Container[str] = ()
) -> dict[str, GatedLayer]:
    """The model's trainable layers whose gate isn't switched off, by name; of frozen ones those that are named."""
    return {n: layer for n, layer in gated_layers(model, frozen).items() if value_of(openness, n) < _INFINITE}
