"""The report after the last round: the comparison, the costs, the places and the next commands."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedsp.history import Evaluation
from fedsp.report import (
    best_label,
    cost_rows,
    file_rows,
    next_commands,
    result_table,
    resume_command,
    selection_results,
)
from fedsp.run_folder import RunFolder


def lines(renderable: Any, tmp_path: Path) -> list[list[str]]:
    with (tmp_path / "out").open("w") as file:
        console = Console(width=80, record=True, file=file)
        console.print(renderable)
    return [line.split() for line in console.export_text().splitlines()]


def finished(monitor: str = "server/val_loss", mode: Any = "min", best: int = 1) -> Any:
    rounds = [
        {"server/val_loss": 3.9, "server/val_accuracy": 0.6, "baseline/val_loss": 3.95},
        {"server/val_loss": 3.8, "server/val_accuracy": 0.5},
        {"server/val_loss": 3.85, "server/val_accuracy": 0.4, "baseline/val_loss": 3.99},
    ]
    history = SimpleNamespace(
        rounds=rounds,
        zero_shot={"server/val_loss": 4.0},
        best=SimpleNamespace(round_idx=best),
        evaluation=Evaluation(monitor=monitor, mode=mode),
    )
    return SimpleNamespace(history=history)


def test_fedsp_is_compared_with_zero_shot_and_with_the_server_alone(tmp_path: Path) -> None:
    splits = {
        "selection": {
            "zero_shot": {"loss": 4.0},
            "server_only": {"loss": 3.9},
            "best": {"loss": 3.8},
        },
        "test": {"zero_shot": {"loss": 5.0}, "server_only": {"loss": 5.0}, "best": {"loss": 4.0}},
    }
    assert lines(result_table(splits, "FedSP, round 7"), tmp_path) == [
        ["selection", "test"],
        ["loss", "change", "loss", "change"],
        ["zero-shot", "4.0000", "5.0000"],
        ["server", "only", "3.9000", "-2.50", "%", "5.0000", "+0.00", "%"],
        ["FedSP,", "round", "7", "3.8000", "-5.00", "%", "4.0000", "-20.00", "%"],
        ["vs.", "server", "only", "-2.56", "%", "-20.00", "%"],
    ]


def test_accuracies_are_compared_in_points(tmp_path: Path) -> None:
    splits = {
        "test": {
            "zero_shot": {"loss": 4.0, "accuracy": 0.25},
            "server_only": {"loss": 3.9, "accuracy": 0.3},
            "best": {"loss": 3.8, "accuracy": 0.425},
        }
    }
    table = lines(result_table(splits, "FedSP"), tmp_path)
    assert table[2] == ["zero-shot", "4.0000", "25.0", "%"]
    assert table[4] == ["FedSP", "3.8000", "-5.00", "%", "42.5", "%"]
    assert table[5] == ["vs.", "server", "only", "-2.56", "%", "+12.5"]


def test_without_a_baseline_there_is_no_row_for_it(tmp_path: Path) -> None:
    splits = {"test": {"zero_shot": {"loss": 4.0}, "best": {"loss": 3.8}}}
    assert len(lines(result_table(splits, "FedSP"), tmp_path)) == 4


def test_two_splits_with_accuracy_fit_eighty_columns(tmp_path: Path) -> None:
    figures = {key: {"loss": 10.5, "accuracy": 0.5} for key in ("zero_shot", "server_only", "best")}
    table = result_table({"selection": figures, "test": figures}, "FedSP, round 100")
    with (tmp_path / "out").open("w") as file:
        Console(width=80, file=file).print(table)
    text = (tmp_path / "out").read_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("10.5000") == 6


def test_each_side_is_shown_at_its_own_best_round() -> None:
    found = selection_results(finished(), {})
    assert found["zero_shot"] == {"loss": 4.0}
    assert found["best"] == {"loss": 3.8, "accuracy": 0.5}
    assert found["server_only"] == {"loss": 3.95}


def test_the_initial_prompt_may_be_the_best() -> None:
    trainer = finished(best=-1)
    assert selection_results(trainer, {"server/val_loss": 3.7})["best"] == {"loss": 3.7}
    assert best_label(trainer) == "FedSP, initial"


def test_without_selection_the_last_round_is_named() -> None:
    trainer = finished()
    assert best_label(trainer) == "FedSP, round 1"
    trainer.history.best = None
    assert best_label(trainer) == "FedSP, last round"


def test_costs_are_sums_over_the_rounds() -> None:
    rounds = [
        {"round/seconds": 40.0, "comm/up_bytes": 1e6, "comm/down_bytes": 3e6},
        {"round/seconds": 25.0, "comm/up_bytes": 1e6, "comm/down_bytes": 1e6},
    ]
    assert cost_rows(rounds) == [
        ("rounds", "2 in 1 m 05 s"),
        ("traffic", "2.00 MB up, 4.00 MB down with the hand-out"),
    ]
    rounds[0] |= {"client/tokens_per_second": 1500.0, "server/tokens_per_second": 20_000.0}
    rounds[1] |= {"client/tokens_per_second": 2500.0}
    speed = [("speed", "client 2 000 tokens/s"), ("", "server 20.0 k tokens/s")]
    assert cost_rows(rounds)[-2:] == speed
    rounds[0]["round/rejected_updates"] = 2.0
    assert cost_rows(rounds)[-1] == ("rejected", "2 updates")


def test_only_files_that_exist_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert file_rows(folder) == []
    folder.ledger.touch()
    folder.checkpoints.mkdir()
    for client, size in ((0, 1000), (1, 2500)):
        state = folder.clients / f"{client:06d}" / "round-000000.safetensors"
        state.parent.mkdir(parents=True)
        state.write_bytes(bytes(size))
    assert file_rows(folder) == [
        ("checkpoints", f"{tmp_path}/checkpoints/"),
        ("ledger", f"{tmp_path}/ledger.jsonl"),
        ("client states", f"{tmp_path}/clients/, 3.50 kB"),
    ]


def test_commands_are_given_where_their_files_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my run")
    assert next_commands(folder) == []
    folder.adapter.mkdir(parents=True)
    folder.config.touch()
    commands = [command for _, command in next_commands(folder)]
    assert commands == [
        f"fedsp validate --config '{tmp_path}/my run/config.yaml'",
        f"fedsp predict --config '{tmp_path}/my run/config.yaml' --input FILE",
        f"fedsp chat '{tmp_path}/my run'",
    ], "no test split, and tuned weights that peft cannot read"
    (folder.adapter / "adapter_config.json").touch()
    folder.results.write_text('{"test": {}}')
    commands = [command for _, command in next_commands(folder)]
    assert commands == [
        f"fedsp test --config '{tmp_path}/my run/config.yaml'",
        f"fedsp predict --config '{tmp_path}/my run/config.yaml'",
        f"fedsp chat '{tmp_path}/my run'",
        f"peft.PeftModel.from_pretrained(model, '{tmp_path}/my run/adapter')",
    ]


@pytest.mark.parametrize("has_config", [True, False])
def test_the_resume_command_fits_how_the_run_was_started(has_config: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    if has_config:
        folder.config.touch()
        expected = f"fedsp fit --config {tmp_path}/config.yaml --ckpt_path last"
    else:
        expected = "trainer.fit(..., ckpt_path='last')"
    assert resume_command(folder) == expected
    folder.started_by = "fedsp federation server acme/server"
    assert resume_command(folder) == folder.started_by
