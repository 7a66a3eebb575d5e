"""All that the benchmarks use of the package beyond its public names."""

from avalanche_sp.classic import TensorClassificationDataset, TensorSource, benchmark_of
from avalanche_sp.gates import resistance
from avalanche_sp.layers import gated_layers, weights_and_bias
from avalanche_sp.packed import PackedRows
from avalanche_sp.replay import stream_rows

__all__ = [
    "PackedRows", "TensorClassificationDataset", "TensorSource", "benchmark_of", "gated_layers", "resistance",
    "stream_rows", "weights_and_bias",
]  # fmt: skip
