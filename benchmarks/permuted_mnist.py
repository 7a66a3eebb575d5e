"""Permuted MNIST, domain-incremental: compares strategies on any number of tasks.

python benchmarks/permuted_mnist.py --tasks 10 --train-per-task 10000 --strategies naive-sgd,ewc,sp --seeds 10
"""

import sys

from harness.cli import check_against, compare, parsed, parser, positive, runs_of


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__.splitlines()[0], benchmark="permuted-mnist", output="permuted_mnist", tasks=None)
    p.add_argument("--train-per-task", type=positive, default=None, help="training images a task (all: 60000)")
    args = parsed(p, "permuted-mnist", argv)
    check_against(p, args)
    return compare(runs_of(args, "permuted-mnist"), args)


if __name__ == "__main__":
    sys.exit(main())
