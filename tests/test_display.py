"""Numbers as people read them."""

import math

import pytest
from rich.console import Console

from fedsp.display import (
    human_bytes,
    human_change,
    human_count,
    human_loss,
    human_ratio,
    human_seconds,
    human_share,
    plural,
    printable,
    sections,
    tell,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5e12, "5.00 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_have_three_digits_and_a_decimal_unit(num_bytes: float, text: str) -> None:
    assert human_bytes(num_bytes) == text
    assert len(text) <= 7


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (9999, "9 999"),
        (10_000, "10.0 k"),
        (1_558_000, "1.56 M"),
        (7e9, "7.00 G"),
    ],
)
def test_counts_are_whole_until_they_are_long(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 m 00 s"),
        (125, "2 m 05 s"),
        (3599.6, "1 h 00 m"),
        (12_000, "3 h 20 m"),
    ],
)
def test_durations_carry_over_into_the_next_unit(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.00 %"), (1e-6, "< 0.01 %"), (0.0078, "0.78 %"), (0.5, "50.0 %"), (1.0, "100 %")],
)
def test_shares_are_percentages(share: float, text: str) -> None:
    assert human_share(share) == text


def test_a_share_of_nothing_is_a_dash() -> None:
    assert human_share(math.nan) == "-"


def test_change_is_relative_to_the_reference() -> None:
    assert human_change(3.8, 4.0) == "-5.00 %"
    assert human_change(4.2, 4.0) == "+5.00 %"


@pytest.mark.parametrize("reference", [0.0, math.nan, math.inf])
def test_change_against_no_number_is_blank(reference: float) -> None:
    assert human_change(1.0, reference) == ""


def test_losses_have_four_decimals_and_missing_ones_are_blank() -> None:
    assert human_loss(3.14159) == "3.1416"
    assert human_loss(None) == ""


def test_ratios_and_plurals() -> None:
    assert human_ratio(1.26) == "1.3 times"
    assert human_ratio(126.6) == "127 times"
    assert plural(1, "layer") == "1 layer"
    assert plural(2, "layer") == "2 layers"


def test_long_texts_wrap_in_their_own_column_and_brackets_stay() -> None:
    console = Console(width=30, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(
            sections([("Head", [("name", "word " * 6), ("b", "[red]x[/red]")]), ("None", [])])
        )
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == [
        "Head  name  word word word",
        "            word word word",
        "      b     [red]x[/red]",
    ]


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert printable("\x1b[2J\x07\n\u202e a\u00e9") == r"\x1b[2J\x07\n\u202e a" + "\u00e9"


def test_a_line_for_the_operator_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    tell("beta: \x1b[2J\nround 7: all is well")
    assert capsys.readouterr().out == r"beta: \x1b[2J\nround 7: all is well" + "\n"
