"""The figure of what each layer's protection contributes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from harness.settings import NETWORKS
from harness.statistics import bootstrap

# Two panels a network; two bars a layer, told apart by lightness, too (P. Tol, Colour schemes, 2021).
PANELS = {
    "Protection of one layer": (("only", "none", "alone, minus none"), ("without", "default", "all but it, minus all")),
    "Openness of one layer": (("opened", "default", "times 4"), ("closed", "default", "divided by 4")),
}
COLOURS = ("#332288", "#ddaa33")


def draw(found: dict[str, dict[str, dict[int, float]]], output: Path) -> Path:
    """Bars with 95% bootstrap intervals: differences in ACC, paired by seed.

    Args:
        found: ACC by network, variant ("none", "only 1", "1 opened") and seed.
        output: folder of ``layers.png``.
    """
    fig, axes = plt.subplots(len(found), 2, figsize=(8.4, 2.6 * len(found)), squeeze=False, layout="constrained")
    for row, (network, accs) in zip(axes, found.items()):
        layers = [name.removeprefix("only ") for name in accs if name.startswith("only ")]
        for ax, (title, bars) in zip(row, PANELS.items()):
            for i, (kind, reference, label) in enumerate(bars):
                names = [f"{kind} {n}" if f"{kind} {n}" in accs else f"{n} {kind}" for n in layers]
                gains = [[accs[name][s] - accs[reference][s] for s in accs[reference]] for name in names]
                means = np.array([np.mean(g) for g in gains])
                low, high = np.array([bootstrap(g) for g in gains]).T
                x = np.arange(len(layers)) + 0.38 * (i - 0.5)
                errors = np.clip([means - low, high - means], 0, None)
                ax.bar(x, means, 0.36, yerr=errors, capsize=3, color=COLOURS[i], label=label, hatch=("", "//")[i])
            ax.axhline(0, color="#555555", lw=0.8)
            ax.set_xticks(range(len(layers)), [f"layer {n}" for n in layers], fontsize=8)
            ax.set_title(f"{title}\n{NETWORKS[network].split(' of')[0]}", fontsize=8, loc="left")
            ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
            ax.tick_params(labelsize=7)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("ACC, percentage points", fontsize=8)
    path = output / "layers.png"
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path
