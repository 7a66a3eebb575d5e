"""Seven strategies on five tasks of two classes, MNIST by default; ``--data fashion-mnist`` for the other data set."""

import sys
from functools import partial

from harness.cli import ClassIncremental, compare

STRATEGIES = ("naive-sgd", "owm", "rf-ridge", "gaussian-replay", "sp", "sp-both", "joint")

main = partial(compare, ClassIncremental, __doc__, tasks=5, strategies=STRATEGIES)

if __name__ == "__main__":
    sys.exit(main())
