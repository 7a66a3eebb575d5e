"""Puts the tables that the benchmarks wrote into README.md and docs/, where <!-- table: FILE --> asks for them.

    python benchmarks/compare.py --seeds 10 --output docs/results/compare && python benchmarks/tables.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def updated(document: str) -> str:
    """The document's text with each table as its file has it.

    Raises:
        FileNotFoundError: a place names a file that isn't there.
    """
    return PLACE.sub(lambda place: place[1] + (ROOT / place[2]).read_text(), document)


def main() -> int:
    for path in DOCUMENTS:
        path.write_text(updated(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
