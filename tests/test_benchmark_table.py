"""The table of all benchmarks: what scripts told, and which of them failed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from figure import Figure, read_figures
from table import Outcome, main, table

FIGURES = [Figure("short", 1.0512, 1.1), Figure("a longer name", 1.2, 1.1), Figure("free", 0.5)]


def test_figures_are_found_among_other_lines() -> None:
    output = "\n".join(["some text", *(figure.line() for figure in FIGURES), "figures: 3"])
    assert read_figures(output) == FIGURES


def test_every_figure_has_a_row_with_its_target() -> None:
    assert table([Outcome("one.py", 0, FIGURES)]).splitlines() == [
        "               ratio   target  met",
        "short          1.051  <= 1.10  yes",
        "a longer name  1.200  <= 1.10  no",
        "free           0.500",
    ]


def write(folder: Path, name: str, *lines: str) -> str:
    (folder / name).write_text("\n".join(lines))
    return name


def test_a_missed_target_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = FIGURES[1].line()
    good = write(
        tmp_path, "good.py", "import sys", "print('seen', sys.argv[1])", f"print({line!r})"
    )
    assert main(tmp_path, [f"{good} --quick"]) == 0
    printed = capsys.readouterr().out
    assert "== good.py --quick\nseen --quick\n" in printed
    assert line not in printed
    assert "a longer name  1.200  <= 1.10  no" in printed


def test_a_script_that_fails_is_in_the_table_and_in_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = FIGURES[0].line()
    bad = write(tmp_path, "bad.py", f"print({line!r})", "raise SystemExit(3)")
    mute = write(tmp_path, "mute.py", "print('done')")
    good = write(tmp_path, "good.py", f"print({line!r})")
    assert main(tmp_path, [bad, mute, "missing.py", good]) == 1
    rows = capsys.readouterr().out.splitlines()[-6:]
    assert [row.split("  ")[0] for row in rows[1:]] == [
        "short",
        "bad.py: exit code 3",
        "mute.py: no figure",
        "missing.py: exit code 2",
        "short",
    ]
    assert [row.split()[-1] for row in rows[1:]] == ["yes", "failed", "failed", "failed", "yes"]
