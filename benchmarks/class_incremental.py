"""Groups of classes, one after another, class-incremental or task-incremental: compares strategies.

python benchmarks/class_incremental.py --data fashion-mnist --tasks 5 --strategies naive-sgd,sp,replay-joint --seeds 10
"""

import sys
from functools import partial

from harness.cli import ClassIncremental, compare

main = partial(compare, ClassIncremental, __doc__)

if __name__ == "__main__":
    sys.exit(main())
