"""The headline comparison: 2-task Split MNIST, every strategy, replay with 200 and with 2000 stored samples."""

import argparse
import sys

from harness.cli import add_common, compare, runs_of
from harness.settings import STRATEGIES

BUFFERS = (200, 2000)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_common(p, seeds=3, output="compare")
    p.set_defaults(
        tasks=2, epochs=1, batch_size=64, network="256-256", strategies=list(STRATEGIES),
        replay_buffer=BUFFERS, validation=False, set=[], against=None, protocol=None,
    )
    args = p.parse_args(argv)
    return compare(runs_of(args, "split-mnist"), args)


if __name__ == "__main__":
    sys.exit(main())
