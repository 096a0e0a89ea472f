"""Numbers and lists as people read them in a terminal; no number is computed here."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

Rows = list[tuple[str, str]]


def printable(text: str) -> str:
    """Return a text with what a terminal would obey shown and not sent: others may have made it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(line: str) -> None:
    """Print a line for the operator of a live federation, at once."""
    print(printable(line), flush=True)


def human_bytes(num_bytes: float) -> str:
    """Return bytes with three digits in powers of 1000, such as `61.4 kB`; at most 7 characters."""
    if num_bytes < 999.5:
        return f"{num_bytes:.0f} B"
    return _scaled(num_bytes, ("kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """Return a number of things with three digits, such as `1.56 M`; whole below 10 000."""
    if count < 10_000:
        return f"{count:,.0f}".replace(",", " ")
    return _scaled(count, ("k", "M", "G", "T"))


def human_seconds(seconds: float) -> str:
    """Return a duration such as `0.4 s`, `12 s`, `2 m 05 s` or `3 h 20 m`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def human_loss(loss: float | None) -> str:
    """Return a loss with four decimals; nothing where there is none."""
    return "" if loss is None else f"{loss:.4f}"


def human_share(share: float) -> str:
    """Return a part of one as a percentage with three digits at most, such as `0.78 %`."""
    percent = 100 * share
    if not math.isfinite(percent):
        return "-"
    if 0 < percent < 0.01:
        return "< 0.01 %"
    return f"{_three_digits(percent)} %" if percent < 99.95 else f"{percent:.0f} %"


def human_ratio(ratio: float) -> str:
    """Return `127 times`, with a digit behind the point below ten."""
    return f"{ratio:.1f} times" if ratio < 9.95 else f"{human_count(round(ratio))} times"


def plural(count: int, noun: str) -> str:
    """Return `1 layer` or `3 layers`."""
    return f"{human_count(count)} {noun}{'' if count == 1 else 's'}"


def human_change(value: float, reference: float) -> str:
    """Return how far a value lies from a reference, relative to it, such as `-7.84 %`."""
    if not reference or not math.isfinite(value) or not math.isfinite(reference):
        return ""
    return f"{100 * (value - reference) / abs(reference):+.2f} %"


def sections(content: Sequence[tuple[str, Rows]]) -> Table:
    """Return headed lists of names and texts, aligned; long texts wrap in their column.

    Args:
        content: Heading and rows of each section; sections without rows are left out.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, rows in content:
        for index, (name, text) in enumerate(rows):
            table.add_row(Text("" if index else heading), Text(name), Text(text))
    return table


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 1
    while number / 1000**power >= 999.5 and power < len(units):
        power += 1
    return f"{_three_digits(number / 1000**power)} {units[power - 1]}"


def _three_digits(number: float) -> str:
    if number < 9.995:
        return f"{number:.2f}"
    return f"{number:.1f}" if number < 99.95 else f"{number:.0f}"
