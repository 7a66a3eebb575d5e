"""Selective plasticity for continual learning: a gate for any PyTorch loop, an Avalanche plugin and an optimizer.

Names are imported when they are first used, so ``avalanche_sp.gate`` and the optimizer work without Avalanche.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avalanche_sp.data import permuted_mnist, split_mnist
    from avalanche_sp.data.gaussians import GaussianBuffer
    from avalanche_sp.gate import PlasticityGate, Settings
    from avalanche_sp.optim import SelectivePlasticityOptimizer
    from avalanche_sp.training.consolidation import ConsolidationPlugin
    from avalanche_sp.training.feature_gaussians import FeatureGaussians
    from avalanche_sp.training.loggers import MetricsCSVLogger
    from avalanche_sp.training.losses import JointReplayLoss, OneHotMSELoss
    from avalanche_sp.training.metrics import (
        AccuracyMatrix,
        ClaimedRank,
        Eligibility,
        FoundBoundaries,
        GateOpenness,
        LossSurprise,
        PresynapticSurprise,
        average_accuracy,
        average_forgetting,
        backward_transfer,
        learning_accuracy,
        selective_plasticity_metrics,
    )
    from avalanche_sp.training.plots import plot_accuracy_matrix
    from avalanche_sp.training.plugin import SelectivePlasticityPlugin
    from avalanche_sp.training.strategy import SelectivePlasticity

_MODULES = {
    "data": ["permuted_mnist", "split_mnist"],
    "data.gaussians": ["GaussianBuffer"],
    "gate": ["PlasticityGate", "Settings"],
    "optim": ["SelectivePlasticityOptimizer"],
    "training.consolidation": ["ConsolidationPlugin"],
    "training.feature_gaussians": ["FeatureGaussians"],
    "training.loggers": ["MetricsCSVLogger"],
    "training.losses": ["JointReplayLoss", "OneHotMSELoss"],
    "training.metrics": [
        "AccuracyMatrix",
        "ClaimedRank",
        "Eligibility",
        "FoundBoundaries",
        "GateOpenness",
        "LossSurprise",
        "PresynapticSurprise",
        "average_accuracy",
        "average_forgetting",
        "backward_transfer",
        "learning_accuracy",
        "selective_plasticity_metrics",
    ],
    "training.plots": ["plot_accuracy_matrix"],
    "training.plugin": ["SelectivePlasticityPlugin"],
    "training.strategy": ["SelectivePlasticity"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
