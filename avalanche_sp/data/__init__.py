"""Classic continual-learning benchmarks, as fast as raw tensors (compare ``avalanche.benchmarks.classic``)."""

from avalanche_sp.data.mnist import benchmark_of, permuted_mnist, split_mnist
from avalanche_sp.data.tensor_dataset import TensorClassificationDataset, TensorSource

__all__ = ["benchmark_of", "split_mnist", "permuted_mnist", "TensorClassificationDataset", "TensorSource"]
