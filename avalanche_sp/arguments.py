"""Validation of arguments that are numbers."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeAlias

Condition: TypeAlias = tuple[Callable[[Any], bool], str]
"""What holds for all values that are allowed, and the same in words."""

AT_LEAST_0: Condition = (lambda v: 0 <= v < float("inf"), "0 or more")


def check_number(name: str, value: Any, allowed: Condition) -> None:
    """Raises ValueError if a value is not a number, Python's or numpy's, or is not allowed; a truth value is none."""
    holds, words = allowed
    if not (isinstance(value, Real) and not isinstance(value, bool) and holds(value)):
        raise ValueError(f"Invalid {name}: {value!r} (allowed: {words})")


def check_integer(name: str, value: Any, least: int, most: float = float("inf")) -> None:
    """Raises ValueError if a value is not an integer, Python's or numpy's, from ``least`` to ``most``."""
    words = f"an integer, {least} or more" if most == float("inf") else f"an integer, {least} to {most}"
    check_number(name, value, (lambda v: isinstance(v, Integral) and least <= int(v) <= most, words))
