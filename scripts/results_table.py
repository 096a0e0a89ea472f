"""Rebuild the table of docs/results.md from results/*.csv, which `fedsp compare` wrote.

    make results-table
    cp runs/sciq/comparison.csv results/sciq.csv   # how a comparison's figures come to be there

Everything between the two marker comments is replaced; the text around it stays.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsp.comparison import cell, row_intervals, shown_columns

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results-table:begin -->", "<!-- results-table:end -->"
TEXT = ("experiment", "method")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all files, in the order of their names."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += [
                {name: text if name in TEXT else float(text) for name, text in row.items() if text}
                for row in csv.DictReader(file)
            ]
    return rows


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table: a line for every method of every experiment, in the rows' order."""
    if not rows:
        return "No runs are in `results/` yet."
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["experiment"], row["method"]), []).append(row)
    first: dict[str, list[dict[str, Any]]] = {}
    found = {
        key: row_intervals(group, first.setdefault(key[0], group)) for key, group in groups.items()
    }
    shown = shown_columns(found.values())
    lines = [["experiment", "method", "seeds", *shown], ["---"] * 2 + ["---:"] * (len(shown) + 1)]
    for key, intervals in found.items():
        cells = (cell(name, intervals.get(name)) for name in shown.values())
        lines.append([*key, str(len(groups[key])), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_table(page: str, table: str) -> str:
    """Return the page with the table between its markers.

    Raises:
        ValueError: If the page has not each marker once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected {BEGIN} and {END} once each in the page")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Rewrite docs/results.md."""
    page = ROOT / "docs" / "results.md"
    table = markdown_table(read_rows(ROOT / "results"))
    page.write_text(replace_table(page.read_text(), table))


if __name__ == "__main__":
    main()
