"""All that the benchmarks use of the package beyond its public names."""

from avalanche_sp.data import TensorClassificationDataset, TensorSource, benchmark_of, permute_pixels, split_classes
from avalanche_sp.training.replay import stream_rows

__all__ = [
    "TensorClassificationDataset", "TensorSource", "benchmark_of", "permute_pixels", "split_classes", "stream_rows"
]  # fmt: skip
