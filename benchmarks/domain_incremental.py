"""Permutations of the pixels, one after another, domain-incremental: compares strategies.

python benchmarks/domain_incremental.py --data fashion-mnist --train-per-task 10000 --strategies naive-sgd,ewc,sp
"""

import sys
from functools import partial

from harness.cli import DomainIncremental, compare

main = partial(compare, DomainIncremental, __doc__)

if __name__ == "__main__":
    sys.exit(main())
