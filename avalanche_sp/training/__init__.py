"""What Avalanche's strategies take: plugins, losses, metrics and loggers."""
import avalanche_sp.training.checkpoints  # noqa: F401  # dill saves torch's optimizers
