"""SelectivePlasticityOptimizer: the elementwise gate, as a torch optimizer."""

from avalanche_sp.optim.optimizer import SelectivePlasticityOptimizer

__all__ = ["SelectivePlasticityOptimizer"]
