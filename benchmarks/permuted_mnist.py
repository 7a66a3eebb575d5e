"""Permuted MNIST, domain-incremental: compares strategies on any number of tasks.

python benchmarks/permuted_mnist.py --tasks 10 --train-per-task 10000 --strategies naive-sgd,ewc,sp --seeds 10
"""

import sys

from harness.cli import PermutedMNIST, compare, comparison


def main(argv: list[str] | None = None) -> int:
    return compare(comparison(PermutedMNIST, argv, __doc__))


if __name__ == "__main__":
    sys.exit(main())
