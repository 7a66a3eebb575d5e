"""Methods of other authors, and controls of ours, that Avalanche does not have."""


def check(name: str, value: float, most: float = float("inf"), words: str = "greater than 0") -> None:
    """Raises ValueError if a setting is not between 0 and ``most``, which ``words`` say."""
    if not 0 < value < most:
        raise ValueError(f"Invalid {name} value: {value} (allowed: {words})")
