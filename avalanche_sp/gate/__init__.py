"""The engine: a gate for any PyTorch loop. It imports torch alone."""

from avalanche_sp.gate.class_gaussians import ClassGaussians
from avalanche_sp.gate.detection import ChangeDetector
from avalanche_sp.gate.gate import PlasticityGate
from avalanche_sp.gate.memory import LayerMemory, Memory
from avalanche_sp.gate.observe import Samples
from avalanche_sp.gate.settings import Settings

__all__ = ["ChangeDetector", "ClassGaussians", "LayerMemory", "Memory", "PlasticityGate", "Samples", "Settings"]
