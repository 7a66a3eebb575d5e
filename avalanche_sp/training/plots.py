"""Figures, with matplotlib (Avalanche needs it, so it is there)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_accuracy_matrix(matrix: ArrayLike, ax: Axes | None = None) -> Axes:
    """Heat map of an accuracy matrix: a row for each experience trained on, a column for each one tested.

    Args:
        matrix: R in percent, shape (trained, tested), as ``AccuracyMatrix.result()`` gives it. NaN is left blank.
        ax: matplotlib's axes to draw on. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the matrix is empty or has another number of dimensions than two.
    """
    r = np.asarray(matrix, dtype=float)
    if r.ndim != 2 or not r.size:
        raise ValueError(f"Invalid matrix shape: {r.shape} (allowed: two dimensions, not empty)")
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(1.2 + 0.6 * r.shape[1], 0.9 + 0.5 * len(r)), layout="constrained")[1]
    ax.imshow(r, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for i, j in np.argwhere(~np.isnan(r)):
        ax.text(j, i, f"{r[i, j]:.0f}", ha="center", va="center", color="black" if r[i, j] > 50 else "white")
    ax.set_xticks(range(r.shape[1]), [str(i + 1) for i in range(r.shape[1])])
    ax.set_yticks(range(len(r)), [str(i + 1) for i in range(len(r))])
    ax.set(xlabel="accuracy on task, %", ylabel="after training on task")
    ax.tick_params(length=0)
    return ax
