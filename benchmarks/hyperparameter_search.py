"""Searches a strategy's settings on validation images, with Optuna; several processes may share one search.

python benchmarks/hyperparameter_search.py --benchmark split-mnist --tasks 5 --strategy sp --trials 60
"""

import sys

from harness.cli import about, parsed, status


def main(argv: list[str] | None = None) -> int:
    try:
        from harness.search import Search, search
    except ImportError as error:
        print(f"{error}: pip install '.[search]'", file=sys.stderr)
        return 2
    settings = parsed(Search, argv, f"{__doc__}\n{about('split', 'permuted')}")

    def work() -> int:
        print(*search(settings), sep="\n")
        return 0

    place = settings.storage or settings.output
    return status(work, f"Finished trials are in {place}; the same command goes on from there.")


if __name__ == "__main__":
    sys.exit(main())
