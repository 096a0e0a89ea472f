"""Rows, groups and intervals, against hand figures and scipy's own interval."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

import runs
from fedsp.comparison import (
    DIFFERENCE,
    Interval,
    cell,
    comparison_table,
    config_differences,
    group_runs,
    interval,
    run_row,
    write_comparison,
)
from fedsp.run_record import Run, read_run


@pytest.fixture
def seeds(tmp_path: Path) -> list[Run]:
    """Two methods with seeds 0 and 1; the second has other steps."""
    other = {"model": {"class_path": "fedsp.server.ServerModule", "init_args": {"training": None}}}
    read = []
    for method, changes, losses in (("a", {}, (1.0, 2.0)), ("b", other, (3.0, 3.0))):
        for seed, loss in enumerate(losses):
            folder = tmp_path / "sciq" / method / f"seed-{seed}"
            test = {"accuracy": 0.5 + 0.1 * seed}
            runs.write_run(folder, test_loss=loss, seed=seed, changes=changes, test=test)
            read.append(read_run(folder))
    return read


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.1, 0.2, 0.9], [5.0, 5.0, 5.0]])
def test_the_interval_is_students(values: list[float]) -> None:
    found = interval(values)
    assert found.half_width is not None
    if np.ptp(values) == 0:
        assert found.half_width == 0
        return
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)


def test_two_values_have_the_tables_interval() -> None:
    """t with one degree of freedom is 12.706; values 1 and 3 have the standard error 1."""
    assert interval([1.0, 3.0]).half_width == pytest.approx(12.706, abs=1e-3)


def test_a_single_value_has_no_interval() -> None:
    assert interval([2.0]) == Interval(2.0, None, 1)


def test_a_row_holds_what_the_folder_holds(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "sciq" / "fedsp" / "seed-4", seed=4, test={"f1": 0.3})
    assert run_row(read_run(folder)) == {
        "experiment": "sciq",
        "method": "fedsp",
        "seed": 4,
        "rounds": 2,
        "best_round": 1,
        "clients": 2,
        "up_bytes": 4 * runs.UP,
        "down_bytes": 4 * runs.DOWN,
        "handout_bytes": 2 * runs.HANDOUT,
        "bytes_per_client": 2 * (runs.UP + runs.DOWN),
        "seconds": 20.0,
        "parameters": 64,
        "selection_loss": 1.5,
        "selection_zero_shot_loss": 4.0,
        "selection_server_only_loss": 1.75,
        "test_loss": 1.75,
        "test_f1": 0.3,
        "test_zero_shot_loss": 4.5,
        "test_server_only_loss": 2.0,
    }


def test_a_run_without_a_round_or_client_has_a_row(tmp_path: Path) -> None:
    row = run_row(read_run(runs.write_run(tmp_path / "run", losses=(), finished=False)))
    assert row["rounds"] == row["clients"] == row["up_bytes"] == 0
    assert not row.keys() & {"bytes_per_client", "parameters", "best_round", "test_loss"}


def test_runs_that_differ_in_seed_and_folder_only_are_one_method(seeds: list[Run]) -> None:
    methods = group_runs(seeds)
    assert [(method.name, len(method.runs)) for method in methods] == [("a", 2), ("b", 2)]
    assert methods[0].intervals["test_loss"].mean == 1.5
    assert methods[1].intervals["test_loss"] == Interval(3.0, 0.0, 2)
    assert "seed" not in methods[0].intervals


def test_an_unfinished_run_does_not_count_beside_finished_ones(tmp_path: Path) -> None:
    whole = read_run(runs.write_run(tmp_path / "a" / "seed-0"))
    part = read_run(runs.write_run(tmp_path / "a" / "seed-1", (2.0,), seed=1, finished=False))
    (method,) = group_runs([whole, part])
    assert (len(method.runs), method.count) == (2, 1)
    assert method.intervals["seconds"] == Interval(20.0, None, 1)
    (method,) = group_runs([part])
    assert (method.count, method.intervals["seconds"].mean) == (1, 10.0)


def test_methods_of_one_name_are_told_apart_by_their_experiments(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "fedsp" / "seed-0", tmp_path / "two" / "fedsp" / "seed-0"]
    for folder, changes in zip(folders, ({}, {"data": 1}), strict=True):
        runs.write_run(folder, changes=changes)
    methods = group_runs([read_run(folder) for folder in folders])
    assert [method.name for method in methods] == ["one/fedsp", "two/fedsp"]
    assert [method.runs[0].method for method in methods] == ["one/fedsp", "two/fedsp"]


def test_differences_to_the_first_method_are_taken_seed_by_seed(tmp_path: Path) -> None:
    losses = {"first": {0: 5.0, 1: 6.0, 2: 9.0}, "other": {2: 8.8, 0: 4.9, 1: 5.7, 7: 1.0}}
    read = [
        read_run(
            runs.write_run(
                tmp_path / "exp" / method / f"seed-{seed}",
                test_loss=loss,
                seed=seed,
                changes={"data": method},
            )
        )
        for method, by_seed in losses.items()
        for seed, loss in by_seed.items()
    ]
    first, other = group_runs(read)
    assert DIFFERENCE not in first.intervals
    found = other.intervals[DIFFERENCE]
    paired = stats.ttest_rel([4.9, 5.7, 8.8], [5.0, 6.0, 9.0]).confidence_interval(0.95)
    assert found.count == 3
    assert found.mean == pytest.approx(-0.2)
    assert found.half_width == pytest.approx((paired.high - paired.low) / 2)


def test_methods_of_different_experiments_are_not_paired(tmp_path: Path) -> None:
    folders = [tmp_path / name / "fedsp" / "seed-0" for name in ("one", "two")]
    for idx, folder in enumerate(folders):
        runs.write_run(folder, changes={"data": idx})
    methods = group_runs([read_run(folder) for folder in folders])
    assert [DIFFERENCE in method.intervals for method in methods] == [False, False]


def test_runs_without_a_configuration_stay_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (runs.write_run(tmp_path / name) / "config.yaml").unlink()
    read = [read_run(tmp_path / name) for name in ("x", "y")]
    assert [method.name for method in group_runs(read)] == ["x", "y"]


def test_differences_name_options_with_each_methods_value(seeds: list[Run]) -> None:
    assert config_differences(group_runs(seeds)) == {"model.training.steps": [10, None]}


def test_files_hold_a_row_a_run_and_the_intervals(seeds: list[Run], tmp_path: Path) -> None:
    write_comparison(seeds, tmp_path)
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], float(row["test_loss"])) for row in rows] == [
        ("a", "0", 1.0),
        ("a", "1", 2.0),
        ("b", "0", 3.0),
        ("b", "1", 3.0),
    ]
    content = json.loads((tmp_path / "comparison.json").read_text())
    found = content["methods"]["a"]["test_loss"]
    assert (found["mean"], found["count"]) == (1.5, 2)
    assert found["half_width"] == pytest.approx(12.706 * 0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("test_loss", Interval(1.5, 0.25, 2), "1.5000 ± 0.2500"),
        ("test_accuracy", Interval(0.5, 0.125, 3), "50.0 ± 12.5 %"),
        ("test_f1", Interval(0.25, None, 1), "25.0 %"),
        ("handout_bytes", Interval(5e6, 0.0, 2), "5.00 MB"),
        ("seconds", Interval(12.0, 1.0, 2), "12 s"),
        ("parameters", Interval(64.0, None, 1), "64"),
        ("test_loss", None, ""),
        (DIFFERENCE, Interval(-0.0471, 0.0059, 3), "-0.0471 ± 0.0059"),
        (DIFFERENCE, Interval(0.5, None, 1), "+0.5000"),
    ],
)
def test_cells_are_as_people_read_them(name: str, found: Interval | None, text: str) -> None:
    assert cell(name, found) == text


def test_the_terminal_shows_a_line_a_method(seeds: list[Run]) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(group_runs(seeds)))
    lines = capture.get().splitlines()
    assert "  test loss" in lines[-3], "a header has as many words a line as its column is wide"
    assert lines[-2].split()[:2] == ["a", "2"]
    assert "1.5000 ± 6.3531" in lines[-2]
    assert "55.0 ± 63.5 %" in lines[-1]
