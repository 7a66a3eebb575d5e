"""Split MNIST, class-incremental: compares strategies on 2, 5 or 10 tasks.

python benchmarks/split_mnist.py --tasks 5 --strategies naive-sgd,sp,replay-joint,sp-replay --seeds 10
"""

import sys

from harness.cli import check_against, compare, parsed, parser, runs_of


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__.splitlines()[0], benchmark="split-mnist", output="split_mnist", tasks=(2, 5, 10))
    args = parsed(p, "split-mnist", argv)
    check_against(p, args)
    return compare(runs_of(args, "split-mnist"), args)


if __name__ == "__main__":
    sys.exit(main())
