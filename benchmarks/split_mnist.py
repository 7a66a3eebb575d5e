"""Split MNIST: class_incremental.py with its default data set."""

import sys

from class_incremental import main

if __name__ == "__main__":
    sys.exit(main())
