"""The headline comparison: 2-task Split MNIST, every strategy, replay with 200 and with 2000 stored samples."""

import sys
from functools import partial

from harness.cli import ClassIncremental, compare
from harness.settings import ROOT

main = partial(compare, ClassIncremental, __doc__, replay_buffer=(200, 2000), output=ROOT / "results" / "compare")

if __name__ == "__main__":
    sys.exit(main())
