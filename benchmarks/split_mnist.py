"""Split MNIST, class-incremental or task-incremental: compares strategies on 2, 5 or 10 tasks.

python benchmarks/split_mnist.py --tasks 5 --strategies naive-sgd,sp,replay-joint,sp-replay --seeds 10
"""

import sys

from harness.cli import SplitMNIST, compare, comparison


def main(argv: list[str] | None = None) -> int:
    return compare(comparison(SplitMNIST, argv, __doc__))


if __name__ == "__main__":
    sys.exit(main())
