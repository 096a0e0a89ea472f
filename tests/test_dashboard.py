"""The charts arrive in an offline W&B run, and its metrics have the round as their x-axis."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsp.baseline import ServerOnlyBaseline
from fedsp.dashboard import WandbDashboard
from fedsp.tracking import csv_logger, wandb_logger
from tiny import fit


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in an offline run: one record a line."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in result.stdout.splitlines() if line.strip()]


def test_an_offline_run_holds_every_chart_and_the_round_as_x_axis(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    callbacks = [ServerOnlyBaseline(), WandbDashboard()]
    fit(tmp_path, folder, num_rounds=2, callbacks=callbacks, logger=[csv_logger, wandb_logger])
    (run,) = (folder / "wandb").glob("offline-run-*")
    charts = ("loss", "communication_loss", "time", "drift", "similarity")
    for name in (*charts, "participation", "similarity_matrix"):
        (file,) = (run / "files" / "media" / "plotly" / "charts").glob(f"{name}_[0-9]*.plotly.json")
        assert json.loads(file.read_text())["data"]
    axes = [
        record["metric"]["step_metric"]
        for record in wandb_records(run)
        if record["type"] == "metric" and record["metric"].get("glob_name") == "*"
    ]
    assert axes[-1] == "round"


def test_without_a_wandb_logger_it_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"WandbDashboard needs a W&B logger\. Add fedsp"):
        fit(tmp_path, tmp_path / "run", callbacks=[WandbDashboard()])
