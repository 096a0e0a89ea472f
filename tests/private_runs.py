"""What a private run told and spent, and one that is stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedsp.callbacks import FederatedCallback
from fedsp.trainer import FederatedTrainer

REPEATABLE = pytest.mark.filterwarnings("ignore:.*noise_seed. is set:UserWarning")


def spent(trainer: FederatedTrainer, name: str = "epsilon") -> list[float]:
    return [metrics[f"privacy/{name}"] for metrics in trainer.history.rounds]


def results(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return found["differential_privacy"]


class Stops(FederatedCallback):
    """A process that dies in a round: after the aggregate, before anything of it is saved."""

    def __init__(self, round_idx: int, hook: str = "on_aggregate_end") -> None:
        self._round_idx = round_idx
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Any, round_idx: int, *rest: Any) -> None:
        if round_idx == self._round_idx:
            raise KeyboardInterrupt
