"""Split MNIST, class-incremental or task-incremental: compares strategies on 2, 5 or 10 tasks.

python benchmarks/split_mnist.py --tasks 5 --strategies naive-sgd,sp,replay-joint,sp-replay --seeds 10
"""

import sys

from harness.cli import check_against, check_task_incremental, compare, parsed, parser, runs_of


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__.splitlines()[0], benchmark="split-mnist", output="split_mnist", tasks=(2, 5, 10))
    p.add_argument(
        "--task-incremental",
        action="store_true",
        help="a head for each task, told which by task labels; then by default 5 tasks, 2 epochs, other strategies",
    )
    args = parsed(p, "split-mnist", argv)
    check_against(p, args)
    check_task_incremental(p, args)
    return compare(runs_of(args, "split-mnist"), args)


if __name__ == "__main__":
    sys.exit(main())
