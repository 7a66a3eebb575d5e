"""Settings that may differ from layer to layer: one value for all, or values by patterns of the layers' names."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from torch import nn

from avalanche_sp.gate.layers import GatedLayer, gated_layers

__all__ = ["PerLayer", "per_layer", "value_of", "values_of", "check_patterns", "protected_layers"]

T = TypeVar("T", int, float)
PerLayer: TypeAlias = T | Mapping[str, T]

_INFINITE = float("inf")
# By setting: what its values may be, in code and in words.
_ALLOWED = {
    "openness": (lambda v: v > 0, "greater than 0; math.inf is off"),
    "pull_back": (lambda v: 0 <= v < _INFINITE, "0 or more"),
    "rank": (
        lambda v: v >= 1 if isinstance(v, int) else 0 < v < 1,
        "an integer, 1 or more; or a share of the energy, greater than 0 and less than 1",
    ),
}


def per_layer(name: str, values: PerLayer[T], default: T | None) -> PerLayer[T]:
    """A setting as it was given; a mapping is copied, and its last pattern is for all other layers.

    Args:
        name: the setting's, "openness", "pull_back" or "rank".
        values: one value, or values by patterns as :func:`fnmatch.fnmatchcase` has them.
        default: for layers that no pattern matches; None leaves it to be said later.

    Raises:
        ValueError: a value is out of range, or a pattern is not a string.
    """
    allowed, words = _ALLOWED[name]
    if not isinstance(values, Mapping):
        if not allowed(values):
            raise ValueError(f"Invalid {name} value: {values} (allowed: {words})")
        return values
    for pattern, value in values.items():
        if not isinstance(pattern, str):
            raise ValueError(f"Invalid {name} pattern: {pattern!r} (allowed: a string, such as {str(pattern)!r})")
        if isinstance(value, (str, Mapping)) or not allowed(value):
            raise ValueError(f"Invalid {name} value for the layers {pattern!r}: {value!r} (allowed: {words})")
    return {**values} if default is None else {**values, "*": values.get("*", default)}


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


def protected_layers(model: nn.Module, openness: PerLayer[float]) -> dict[str, GatedLayer]:
    """The model's trainable layers whose gate isn't switched off, by name."""
    return {n: layer for n, layer in gated_layers(model).items() if value_of(openness, n) < _INFINITE}
