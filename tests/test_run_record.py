"""What is read back from a run's folder, whole, unfinished or damaged."""

import json
from pathlib import Path

import pytest

import runs
from fedsp.run_record import find_runs, flatten_config, read_records, read_run


def test_a_finished_run_is_read_back_whole(tmp_path: Path) -> None:
    run = read_run(runs.write_run(tmp_path / "mine"))
    assert run.missing == ()
    assert (run.method, run.seed, run.name) == ("mine", 0, "mine, seed 0")
    assert run.series("server/val_loss") == ([0.0, 1.0], [2.0, 1.5])
    assert run.total("comm/up_bytes") == 4 * runs.UP
    assert run.handout_bytes() == {0: 2 * runs.HANDOUT}
    assert [it["parameters"] for it in run.finished_records()] == [64, 64]


def test_a_run_of_a_comparison_is_called_by_its_method(tmp_path: Path) -> None:
    run = read_run(runs.write_run(tmp_path / "sciq" / "fedsp" / "seed-3", seed=3))
    assert (run.experiment, run.method, run.name) == ("sciq", "fedsp", "fedsp, seed 3")


def test_a_comparison_stands_for_its_runs_ordered_by_seed(tmp_path: Path) -> None:
    for seed in (10, 9):
        runs.write_run(tmp_path / "fedsp" / f"seed-{seed}")
    assert [path.name for path in find_runs(tmp_path)] == ["seed-9", "seed-10"]


@pytest.mark.parametrize(
    ("make", "state"), [(True, "which holds none of these"), (False, "which is no folder")]
)
def test_a_foreign_folder_is_one_clear_error(tmp_path: Path, make: bool, state: str) -> None:
    folder = tmp_path / "other"
    if make:
        (folder / "photos").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"`RUN_DIR` must be the folder .* {folder}, {state}\.$"):
        find_runs(folder)


def test_an_unfinished_run_says_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", finished=False)
    (folder / "rounds.jsonl").unlink()
    (folder / "ledger.jsonl").unlink()
    run = read_run(folder)
    assert len(run.rounds) == 2
    assert [gap.split()[0:2] for gap in run.missing] == [
        ["The", "run"],
        ["No", "rounds.jsonl:"],
        ["No", "ledger.jsonl:"],
    ]


def test_rounds_come_from_the_results_where_there_is_no_csv(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run")
    (folder / "csv" / "metrics.csv").unlink()
    assert len(read_run(folder).rounds) == 2


def test_of_a_repeated_round_the_last_line_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    lines = [runs.record(0), runs.record(1, parameters=1), runs.record(1, parameters=2)]
    runs.write_lines(path, lines)
    with path.open("a") as file:
        file.write('{"round": 2, "par')
    assert {idx: it["parameters"] for idx, it in read_records(path).items()} == {0: 64, 1: 2}


def test_payloads_of_the_attempt_that_finished_a_round_are_settled(tmp_path: Path) -> None:
    """Round 1 was cut off and repeated, round 2 is not finished."""
    folder = runs.write_run(tmp_path / "run")
    again = [runs.payload(1, 0, "up", "client_update", 7, attempt=1)]
    cut_off = [runs.payload(2, 0, "up", "client_update", 8, attempt=1)]
    runs.write_lines(folder / "ledger.jsonl", runs.payloads(2) + again + cut_off)
    settled = read_run(folder).settled_payloads()
    assert [row["bytes"] for row in settled if row["round"] == 1] == [7]
    assert all(row["round"] < 2 for row in settled)


def test_a_ledger_and_metrics_that_differ_say_where_which_way_and_by_how_much(
    tmp_path: Path,
) -> None:
    folder = runs.write_run(tmp_path / "run")
    assert read_run(folder).ledger_gaps() == []
    lines = [*runs.payloads(2)[1:], runs.payload(1, 1, "up", "client_update", 7)]
    runs.write_lines(folder / "ledger.jsonl", lines)
    assert read_run(folder).ledger_gaps() == [(0, "down", -runs.HANDOUT)]
    assert read_run(folder).late_bytes() == {1: 7}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rounds.jsonl", "[]\n", "rounds.jsonl, line 1: expected a round's JSON"),
        ("results.json", "{", "results.json: expected JSON"),
        ("results.json", "[1]", "results.json: expected names with values, got list"),
        ("config.yaml", "a: [", "config.yaml: expected YAML"),
        ("csv/metrics.csv", "round,x\n0,one\n", "metrics.csv: expected numbers"),
        ("csv/metrics.csv", "x\n1\n", "metrics.csv: expected a column `round`"),
        ("ledger.jsonl", "{}\n", "the ledger is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = runs.write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_settings_are_named_as_typed_and_leave_seeds_and_folder_out(tmp_path: Path) -> None:
    assert read_run(runs.write_run(tmp_path / "run")).settings() == {
        "trainer.num_rounds": 2,
        "model": "fedsp.server.ServerModule",
        "model.training.steps": 10,
    }


def test_lists_of_parts_are_numbered_and_lists_of_values_stay() -> None:
    config = {"a": [{"class_path": "X"}, {"class_path": "Y"}], "b": [1, 2], "c": {}}
    assert flatten_config(config) == {"a.0": "X", "a.1": "Y", "b": [1, 2], "c": {}}


def test_a_run_from_python_has_no_settings(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    run = read_run(folder)
    assert (run.settings(), run.seed) == ({}, None)
    assert json.dumps(run.missing).count("config.yaml") == 1
