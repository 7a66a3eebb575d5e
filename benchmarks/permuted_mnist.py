"""Permuted MNIST: domain_incremental.py with its default data set."""

import sys

from domain_incremental import main

if __name__ == "__main__":
    sys.exit(main())
