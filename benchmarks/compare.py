"""The headline comparison: 2-task Split MNIST, every strategy, replay with 200 and with 2000 stored samples."""

import sys

from harness.cli import ClassIncremental, compare, parsed
from harness.settings import ROOT

DEFAULT = ClassIncremental(replay_buffer=(200, 2000), output=ROOT / "results" / "compare")


def main(argv: list[str] | None = None) -> int:
    return compare(parsed(ClassIncremental, argv, __doc__, DEFAULT))


if __name__ == "__main__":
    sys.exit(main())
