"""The table of rounds, one line at a time: its columns, how wide they are, and which fit.

Lines come out as styled text; where they go is not known here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from fedsp.display import human_bytes, human_count, human_loss, human_seconds

Metrics = dict[str, float]
ZERO_SHOT, INITIAL = "zero-shot", "initial"
_LABEL_WIDTH = 9


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Args:
        group: Heading that it shares with its neighbours.
        title: Heading of its own.
        metric: Key in a round's metrics.
        width: Characters.
        show: Turns the value into text of at most `width` characters.
        leaves: Which columns go first where the terminal is narrow: the highest; 0 never goes.
    """

    group: str
    title: str
    metric: str
    width: int
    show: Callable[[float], str]
    leaves: int = 0


def _loss(value: float) -> str:
    return human_loss(value) if value < 9.99995 else f"{value:.5g}"


def _bytes(value: float) -> str:
    return human_bytes(value).replace(" ", "")


def _count(value: float) -> str:
    return f"{value:.0f}"


def _rate(value: float) -> str:
    return human_count(value).replace(" ", "")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _epsilon(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    return human_seconds(seconds).replace(" ", "") if seconds >= 60 else human_seconds(seconds)


BASELINE = Column("baseline", "val", "baseline/val_loss", 8, _loss)
AUXILIARY = Column("clients", "aux", "client/auxiliary_loss", 6, _loss, leaves=2)
ACCURACY = Column("server", "acc", "server/val_accuracy", 6, _percent)
F1 = Column("server", "f1", "server/val_f1", 6, _percent)
EPSILON = Column("budget", "eps", "privacy/epsilon", 6, _epsilon)
CLIENT_EPSILON = Column("budget", "client", "privacy/client_epsilon", 6, _epsilon, leaves=1)
_ALWAYS = (
    Column("clients", "n", "round/clients", 3, _count, leaves=3),
    Column("clients", "rej", "round/rejected_updates", 3, _count, leaves=5),
    Column("clients", "loss", "client/train_loss", 6, _loss),
    AUXILIARY,
    Column("clients", "tok/s", "client/tokens_per_second", 6, _rate, leaves=6),
    Column("server", "train", "server/train_loss", 6, _loss),
    Column("server", "val", "server/val_loss", 6, _loss),
    ACCURACY,
    F1,
    Column("server", "tok/s", "server/tokens_per_second", 6, _rate, leaves=7),
    BASELINE,
    EPSILON,
    CLIENT_EPSILON,
    Column("traffic", "up", "comm/up_bytes", 6, _bytes),
    Column("traffic", "down", "comm/down_bytes", 6, _bytes, leaves=1),
    Column("", "time", "round/seconds", 6, _duration, leaves=4),
)


class RoundTable:
    """Lines of one table, all of the same width."""

    def __init__(self, *, width: int, without: Sequence[Column] = ()) -> None:
        """Choose the columns.

        Args:
            width: Characters that a line may take; columns are left out until it fits.
            without: Columns that this run has nothing for.
        """
        self.columns = [column for column in _ALWAYS if column not in without]
        while self.width > width:
            last = max(self.columns, key=lambda column: column.leaves)
            if not last.leaves:
                break
            self.columns.remove(last)

    @property
    def width(self) -> int:
        """Characters of a line."""
        gaps = sum(_gap(before, after) for before, after in self._neighbours())
        return _LABEL_WIDTH + sum(column.width for column in self.columns) + gaps

    def header(self) -> list[Text]:
        """Return the headings of the groups, with the legend, and those of the columns."""
        groups, titles = Text("* = best".ljust(_LABEL_WIDTH)), Text("round".rjust(_LABEL_WIDTH))
        for group, columns in self._groups():
            span = sum(column.width for column in columns) + len(columns) - 1
            heading = f" {group} " if group and len(group) + 2 <= span else group[:span]
            groups.append("  " + heading.center(span, "-" if group else " "))
            titles.append(" ")
            for column in columns:
                titles.append(" " + column.title.rjust(column.width))
        groups.stylize("dim")
        titles.stylize("bold")
        return [groups, titles]

    def row(self, label: str, metrics: Metrics, *, is_best: bool = False) -> Text:
        """Return one round.

        Args:
            label: Number of the round, or what stands in its place.
            metrics: The round's metrics; what is missing stays blank.
            is_best: Whether to mark it as the best so far.
        """
        mark = "* " if is_best else ""
        line = Text()
        line.append(f"{mark}{label}".rjust(_LABEL_WIDTH), "bold green" if is_best else "bold")
        for before, column in self._neighbours():
            line.append(" " * _gap(before, column))
            line.append(*_cell(column, metrics.get(column.metric), is_best))
        line.rstrip()
        return line

    def _groups(self) -> list[tuple[str, list[Column]]]:
        grouped: list[tuple[str, list[Column]]] = []
        for column in self.columns:
            if not grouped or grouped[-1][0] != column.group:
                grouped.append((column.group, []))
            grouped[-1][1].append(column)
        return grouped

    def _neighbours(self) -> Iterator[tuple[Column | None, Column]]:
        return zip([None, *self.columns[:-1]], self.columns, strict=True)


def _gap(before: Column | None, after: Column) -> int:
    return 1 if before is not None and before.group == after.group else 2


def _cell(column: Column, value: float | None, is_best: bool) -> tuple[str, str]:
    text = "" if value is None else column.show(value) if math.isfinite(value) else str(value)
    style = ""
    if column.metric == "server/val_loss" and is_best:
        style = "bold green"
    elif column.metric == "round/rejected_updates" and value:
        style = "bold yellow"
    elif column.group == "traffic" or not column.group:
        style = "dim"
    return text.rjust(column.width), style
