"""The page that says, op by op, how tight structure is: ``python tests/opinfo_table.py`` writes it.

Only the compact selection of samples is run, so that a test can hold the page to what is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from opinfo import COMPACT, Finding, database, findings

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "structure.md"
HEADER = ("op", "as it is", "in place", "its gradient", "taken as dense")
WORDS = ("exact", "exact here", "over", "dense")
ABSENT = "–"

# Everything above this word on the page is written by hand.
MARK = "Written by "
SOURCE = MARK + "`python tests/opinfo_table.py` with torch {version}: {counts}.\n\n"


def row(found: Sequence[Finding]) -> tuple[str, ...]:
    """One line of the table, from the findings on the variants of an op."""
    verdicts = [f.verdict if f.samples else _reason(f) for f in found]
    dense = sorted(set().union(*(f.dense_ops for f in found)))
    return (f"`{found[0].op}`", *verdicts, ", ".join(f"`{name}`" for name in dense))


def _reason(finding: Finding) -> str:
    """Why there is nothing to compare, where that is not for want of a variant."""
    why = next(iter(finding.skipped), "no samples")
    return ABSENT if why in ("no such variant", "no derivative, or a large one") else why


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(old: str) -> str:
    """The page as it should be, with the words that it had."""
    rows = sorted(row(list(findings(op, COMPACT))) for op in database())
    counted = Counter(each[1] for each in rows)
    counts = ", ".join(f"{counted[word]} {word}" for word in WORDS)
    source = SOURCE.format(version=torch.__version__.split("+")[0], counts=counts)
    table = [line(HEADER), line(["---"] * len(HEADER)), *map(line, rows)]
    return old[: old.index(MARK)] + source + "\n".join(table) + "\n"


def lines_by_op() -> dict[str, str]:
    """The lines of the table as they stand on the page, by op."""
    text = PAGE.read_text(encoding="utf-8").splitlines()
    return {each.split(" | ")[0].strip("| "): each for each in text if each.startswith("| `")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
