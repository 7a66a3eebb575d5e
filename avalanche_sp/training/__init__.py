"""What Avalanche's strategies take: plugins, losses, metrics and loggers."""
