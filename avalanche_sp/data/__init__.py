"""Classic continual-learning benchmarks, as fast as raw tensors (compare ``avalanche.benchmarks.classic``)."""

from avalanche_sp.data.mnist import permuted_mnist, split_mnist
from avalanche_sp.data.streams import Images, benchmark_of, permute_pixels, split_classes
from avalanche_sp.data.tensor_dataset import TensorClassificationDataset, TensorSource

__all__ = [
    "Images", "TensorClassificationDataset", "TensorSource", "benchmark_of", "permute_pixels", "permuted_mnist",
    "split_classes", "split_mnist",
]  # fmt: skip
