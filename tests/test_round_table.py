"""The table of rounds: what it shows, how it is marked, and that it fits."""

import math
import re

import pytest

from fedsp.round_table import (
    ACCURACY,
    AUXILIARY,
    BASELINE,
    CLIENT_EPSILON,
    EPSILON,
    F1,
    RoundTable,
)

NOISE = (EPSILON, CLIENT_EPSILON)

ROUND = {
    "round/clients": 10.0,
    "round/rejected_updates": 1.0,
    "client/train_loss": 4.12345,
    "client/auxiliary_loss": 3.5,
    "client/tokens_per_second": 1234.5,
    "server/train_loss": 3.25,
    "server/val_loss": 3.125,
    "server/val_accuracy": 0.5125,
    "server/val_f1": 0.375,
    "server/tokens_per_second": 45_678.0,
    "baseline/val_loss": 3.2,
    "privacy/epsilon": 12.345,
    "privacy/client_epsilon": 1234.5,
    "comm/up_bytes": 42_600.0,
    "comm/down_bytes": 3_940_000.0,
    "round/seconds": 12.4,
}


def test_a_round_shows_every_figure_under_its_heading() -> None:
    table = RoundTable(width=140)
    groups, titles = (line.plain for line in table.header())
    row = table.row("7", ROUND).plain
    values = (
        "7 10 1 4.1235 3.5000 1234 3.2500 3.1250 51.2% 37.5% 45.7k 3.2000 12.3 1234 42.6kB 3.94MB "
        "12 s"
    )
    assert row.split() == values.split()
    assert titles.split() == ["round", *(column.title for column in table.columns)]
    ends = [{match.end() for match in re.finditer(r"\S+", line)} for line in (titles, row)]
    assert ends[0] <= ends[1]
    assert groups.replace("-", " ").split() == [
        "*",
        "=",
        "best",
        "clients",
        "server",
        "baseline",
        "budget",
        "traffic",
    ]


def test_the_best_round_is_marked() -> None:
    table = RoundTable(width=120)
    assert table.row("3", ROUND, is_best=True).plain.startswith("      * 3 ")
    assert "*" not in table.row("3", ROUND).plain


def test_what_is_missing_stays_blank_and_keeps_its_place() -> None:
    table = RoundTable(width=120)
    full = table.row("zero-shot", ROUND).plain
    row = table.row("zero-shot", {"server/val_loss": 3.125}).plain
    assert row.split() == ["zero-shot", "3.1250"]
    assert row.index("3.1250") == full.index("3.1250")


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize(
    "without", [(), (F1,), (ACCURACY, F1), (ACCURACY, F1, AUXILIARY, BASELINE)]
)
def test_lines_fit_the_terminal(width: int, without: tuple) -> None:
    table = RoundTable(width=width, without=without)
    lines = [
        *table.header(),
        table.row("100000", ROUND, is_best=True),
        table.row("zero-shot", ROUND),
    ]
    assert max(len(line.plain) for line in lines) <= min(width, table.width)


def test_eighty_columns_hold_everything_but_accuracy_and_speed() -> None:
    assert len(RoundTable(width=80, without=[ACCURACY, F1, *NOISE]).columns) == 10
    metrics = {column.metric for column in RoundTable(width=80, without=[F1, *NOISE]).columns}
    assert metrics == ROUND.keys() - {
        "privacy/epsilon",
        "privacy/client_epsilon",
        "server/val_f1",
        "round/rejected_updates",
        "round/seconds",
        "client/tokens_per_second",
        "server/tokens_per_second",
    }


def test_losses_stay_in_a_very_narrow_terminal() -> None:
    metrics = [column.metric for column in RoundTable(width=10).columns]
    assert "server/val_loss" in metrics
    assert "client/train_loss" in metrics


@pytest.mark.parametrize("loss", [math.nan, math.inf, 9.99999, 12.34567, 123.4567, 1e7])
def test_no_loss_breaks_the_columns(loss: float) -> None:
    table = RoundTable(width=120)
    row = table.row("1", {**ROUND, "server/val_loss": loss}).plain
    assert len(row) == len(table.row("1", ROUND).plain)
