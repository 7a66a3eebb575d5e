"""Puts the comparison's table into README.md, from the file that benchmarks/compare.py wrote.

    python benchmarks/compare.py --seeds 10 --output docs/results/compare && python benchmarks/readme.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, TABLE = ROOT / "README.md", ROOT / "docs" / "results" / "compare" / "table.md"
BETWEEN = re.compile(r"(?<=<!-- table: benchmarks/readme.py -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def updated(readme: str, table: str) -> str:
    """The README's text with the table in its place."""
    if not BETWEEN.search(readme):
        raise ValueError("README.md has no place for the table (<!-- table: ... --> to <!-- end of table -->)")
    return BETWEEN.sub(lambda _: table, readme)


def main() -> int:
    README.write_text(updated(README.read_text(), TABLE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
