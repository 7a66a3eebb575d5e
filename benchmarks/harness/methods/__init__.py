"""Methods of other authors, and controls of ours, that Avalanche does not have."""

from avalanche_sp.arguments import check_number


def check(name: str, value: float, most: float = float("inf"), words: str = "greater than 0") -> None:
    """Raises ValueError if a setting is not between 0 and ``most``, which ``words`` say."""
    check_number(f"{name} value", value, (lambda v: 0 < v < most, words))
