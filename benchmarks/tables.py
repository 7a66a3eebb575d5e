"""Writes the tables and figures of README.md and docs/ from the stored results. It trains nothing.

A document asks for a table with a line <!-- table: NAME ARGUMENTS -->: harness/tables.py has the names, and
harness/studies.py the runs that they compare.
"""

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from harness.settings import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "docs" / "results"
PLACE = re.compile(r"<!-- table: (.+?) -->\n.*?<!-- end of table -->", re.DOTALL)


def updated(document: str, frame) -> str:
    """The document with the present tables, of the newest run of each setting."""
    from harness.tables import table  # here, as pandas and scipy are slow to load

    def made(place: re.Match) -> str:
        return f"<!-- table: {place[1]} -->\n{table(frame, *place[1].split())}<!-- end of table -->"

    return PLACE.sub(made, document)


def stored():
    """The newest run of each setting."""
    from harness.store import Store
    from harness.studies import newest

    return newest(Store(RESULTS).frame())


def draw() -> list[Path]:
    """Draws the figures; returns their paths."""
    from harness.figures import draw

    return draw(stored(), RESULTS)


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=form).parse_args(argv)
    with ProcessPoolExecutor(1) as other:  # the figures take as long as the tables
        figures, frame = other.submit(draw), stored()
        for path in DOCUMENTS:
            path.write_text(updated(path.read_text(), frame))
        print(*DOCUMENTS, *figures.result(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
