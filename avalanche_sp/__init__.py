"""Selective plasticity for continual learning: an Avalanche plugin and a PyTorch optimizer."""

import avalanche_sp.checkpoints  # noqa: F401
from avalanche_sp.classic import permuted_mnist, split_mnist
from avalanche_sp.consolidation import ConsolidationPlugin
from avalanche_sp.gaussians import GaussianBuffer
from avalanche_sp.loggers import MetricsCSVLogger
from avalanche_sp.losses import JointReplayLoss, OneHotMSELoss
from avalanche_sp.metrics import (
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
from avalanche_sp.optimizer import SelectivePlasticityOptimizer
from avalanche_sp.plots import plot_accuracy_matrix
from avalanche_sp.plugin import SelectivePlasticityPlugin

__all__ = [
    "AccuracyMatrix",
    "ClaimedRank",
    "ConsolidationPlugin",
    "Eligibility",
    "FoundBoundaries",
    "GateOpenness",
    "GaussianBuffer",
    "JointReplayLoss",
    "LossSurprise",
    "MetricsCSVLogger",
    "OneHotMSELoss",
    "PresynapticSurprise",
    "SelectivePlasticityOptimizer",
    "SelectivePlasticityPlugin",
    "average_accuracy",
    "average_forgetting",
    "backward_transfer",
    "learning_accuracy",
    "permuted_mnist",
    "plot_accuracy_matrix",
    "selective_plasticity_metrics",
    "split_mnist",
]
