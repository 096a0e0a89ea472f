"""What arrives in the files of the loggers: the right values at the right rounds, once each."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.loggers import Logger

from fedsp.callbacks import FederatedCallback
from fedsp.tracking import (
    OfflineWandb,
    Tracker,
    csv_logger,
    tensorboard_logger,
    wandb_logger,
)
from tiny import fit, make_trainer


class Fake(Logger):
    """Remembers what it is told."""

    def __init__(self, save_dir: str) -> None:
        self.save_dir_given = save_dir
        self.told: list[tuple[Any, ...]] = []

    name = "fake"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.told.append(("metrics", step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append(("config", params))

    def finalize(self, status: str) -> None:
        self.told.append(("finalize", status))

    def steps(self) -> list[int]:
        return [step for kind, step, *_ in self.told if kind == "metrics"]


class Stop(FederatedCallback):
    """Ends the run after a round is saved, as Ctrl-C would."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        if trainer.history.rounds_done == self.rounds:
            raise KeyboardInterrupt


def table(run: Path) -> list[dict[str, str]]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


# --- the tracker --------------------------------------------------------------------------------


def test_every_logger_is_told_everything_with_the_round_as_the_step(tmp_path: Path) -> None:
    tracker = Tracker([Fake, Fake], tmp_path)
    tracker.log_config({"seed": 0})
    for round_idx in range(2):
        tracker.log({"server/val_loss": 0.5 * round_idx}, round_idx)
    tracker.finalize()
    for logger in tracker.loggers:
        assert isinstance(logger, Fake)
        assert logger.save_dir_given == str(tmp_path)
        assert logger.told == [
            ("config", {"seed": 0}),
            ("metrics", 0, {"server/val_loss": 0.0, "round": 0}),
            ("metrics", 1, {"server/val_loss": 0.5, "round": 1}),
            ("finalize", "success"),
        ]


def test_other_processes_log_nothing(tmp_path: Path) -> None:
    tracker = Tracker([Fake], tmp_path, enabled=False)
    tracker.log({"loss": 1.0}, 0)
    tracker.finalize()
    assert tracker.loggers == []


def test_a_run_tells_its_loggers_each_round_once_and_closes_them(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run", logger=Fake)
    (logger,) = trainer.tracker.loggers
    assert isinstance(logger, Fake)
    assert logger.steps() == [0, 1, 2]
    assert [kind for kind, *_ in logger.told].count("finalize") == 1
    assert logger.told[-1][0] == "finalize"
    assert [entry[2] for entry in logger.told if entry[0] == "metrics"] == trainer.history.rounds


def test_loggers_are_closed_when_a_run_is_interrupted(tmp_path: Path) -> None:
    made: list[Fake] = []

    def logger(save_dir: str) -> Fake:
        made.append(Fake(save_dir))
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "run", logger=logger, callbacks=[Stop(2)])
    assert made[0].steps() == [0, 1]
    assert made[0].told[-1][0] == "finalize"


def test_a_resumed_run_tells_the_rounds_before_again(tmp_path: Path) -> None:
    """A logger that begins anew must not begin in the middle."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "run", logger=Fake, callbacks=[Stop(2)])
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        logger=Fake,
        ckpt_path="last",
        callbacks=[FederatedCallback()],
    )
    (logger,) = trainer.tracker.loggers
    assert isinstance(logger, Fake)
    assert logger.steps() == [0, 1, 2]
    assert [entry[2] for entry in logger.told if entry[0] == "metrics"] == trainer.history.rounds


# --- CSV ----------------------------------------------------------------------------------------


def test_the_csv_file_has_one_row_a_round_with_the_round_as_x(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run")
    rows = table(tmp_path / "run")
    assert [float(row["round"]) for row in rows] == [0, 1, 2]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    for row, metrics in zip(rows, trainer.history.rounds, strict=True):
        assert {name: float(value) for name, value in row.items() if name != "step"} == metrics


def test_the_csv_file_of_a_resumed_run_has_each_round_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "run", callbacks=[Stop(2)])
    assert len(table(tmp_path / "run")) == 2
    fit(tmp_path, tmp_path / "run", ckpt_path="last", callbacks=[FederatedCallback()])
    assert [float(row["round"]) for row in table(tmp_path / "run")] == [0, 1, 2]


def test_a_metric_that_comes_later_gets_a_column_of_its_own(tmp_path: Path) -> None:
    """As with an evaluation every other round."""
    tracker = Tracker([csv_logger], tmp_path)
    tracker.log({"a": 1.0}, 0)
    tracker.log({"a": 2.0, "b": 3.0}, 1)
    tracker.log({"a": 4.0}, 2)
    tracker.finalize()
    assert [(row["round"], row["a"], row["b"]) for row in table(tmp_path)] == [
        ("0", "1.0", ""),
        ("1", "2.0", "3.0"),
        ("2", "4.0", ""),
    ]


def test_every_round_is_in_the_csv_file_as_soon_as_it_is_over(tmp_path: Path) -> None:
    tracker = Tracker([csv_logger], tmp_path)
    for round_idx in range(3):
        tracker.log({"a": 1.0}, round_idx)
        assert len(table(tmp_path)) == round_idx + 1


# --- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_shows_every_metric_at_its_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = fit(tmp_path, tmp_path / "run", logger=tensorboard_logger)
    shown = scalars(tmp_path / "run")
    for name in ("server/val_loss", "client/train_loss", "comm/up_bytes", "round/seconds"):
        assert [step for step, _ in shown[name]] == [0, 1, 2]
        expected = [metrics[name] for metrics in trainer.history.rounds]
        assert [value for _, value in shown[name]] == pytest.approx(expected, rel=1e-6)


def test_tensorboard_shows_each_round_of_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "run", logger=tensorboard_logger, callbacks=[Stop(2)])
    fit(
        tmp_path,
        tmp_path / "run",
        logger=tensorboard_logger,
        ckpt_path="last",
        callbacks=[FederatedCallback()],
    )
    steps = [step for step, _ in scalars(tmp_path / "run")["server/val_loss"]]
    assert steps == [0, 1, 2]


def test_tensorboard_keeps_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = Tracker([tensorboard_logger], tmp_path)
    tracker.log_config({"model": {"soft_prompt": {"num_virtual_tokens": 20}}, "seed": None})
    tracker.log({"loss": 1.0}, 0)
    tracker.finalize()
    kept = (tmp_path / "tensorboard" / "hparams.yaml").read_text()
    assert "num_virtual_tokens: 20" in kept
    assert scalars(tmp_path)["loss"] == [(0, 1.0)]


# --- W&B ----------------------------------------------------------------------------------------


def is_offline(logger: Logger) -> bool:
    assert isinstance(logger, OfflineWandb)
    return bool(logger._offline)


@pytest.mark.parametrize(
    ("variables", "offline", "expected"),
    [
        ({}, None, True),
        ({"WANDB_API_KEY": "k"}, None, False),
        ({"WANDB_MODE": "online"}, None, False),
        ({"WANDB_API_KEY": "k"}, True, True),
        ({}, False, False),
    ],
)
def test_wandb_sends_nothing_unless_the_user_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    offline: bool | None,
    expected: bool,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger = OfflineWandb(str(tmp_path), offline=offline)
    assert is_offline(logger) == expected
    assert list(tmp_path.iterdir()) == []  # nothing is started yet


def test_the_plain_wandb_logger_takes_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    logger = wandb_logger(str(tmp_path / "my-run"))
    assert is_offline(logger)
    assert isinstance(logger, OfflineWandb)
    assert logger._wandb_init["name"] == "my-run"
    assert logger._wandb_init["project"] == "fedsp"


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in an offline run: one record a line."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in result.stdout.splitlines() if line.strip()]


def test_wandb_keeps_two_runs_of_one_process_apart_in_their_folders(tmp_path: Path) -> None:
    """Offline, without a network (tests refuse one); each run ends before the next begins."""
    import wandb

    for name in ("one", "two"):
        trainer = make_trainer(tmp_path / name, logger=wandb_logger)
        tracker = Tracker(trainer.loggers, tmp_path / name)
        tracker.log_config({"seed": 3, "model": {"tokens": 20}})
        for round_idx in range(3):
            tracker.log({"server/val_loss": 1.0 / (1 + round_idx), f"{name}/x": 1.0}, round_idx)
        tracker.finalize()
        assert wandb.run is None
    for name, other in (("one", "two"), ("two", "one")):
        (run,) = (tmp_path / name / "wandb").glob("offline-run-*")
        records = wandb_records(run)
        text = json.dumps(records)
        assert f"{name}/x" in text
        assert f"{other}/x" not in text
        rows = [record for record in records if record.get("type") == "history"]
        assert len(rows) == 3, records
        assert math.isclose(1.0 / 3, float(str(find(rows[-1], "server/val_loss"))), rel_tol=1e-6)
        assert [int(str(find(row, "round"))) for row in rows] == [0, 1, 2]


def find(node: Any, name: str) -> Any:
    """Value of a metric wherever the reader puts it."""
    if isinstance(node, dict):
        if name in node:
            return node[name]
        if node.get("key") == name or node.get("nested_key") == [name]:
            return node.get("value_json", node.get("value"))
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            found = find(value, name)
            if found is not None:
                return found
    return None
