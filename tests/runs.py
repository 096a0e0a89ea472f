"""Folders of runs that never ran: every figure in them is made up, so that it can be checked."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

UP, DOWN, HANDOUT = 100, 90, 1000
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"run_dir": "x", "seed": None, "num_rounds": 2},
    "model": {"class_path": "fedsp.server.ServerModule", "init_args": {"training": {"steps": 10}}},
}
COSINE = [[1.0, 0.5], [0.5, 1.0]]


def metrics(round_idx: int, loss: float) -> dict[str, float]:
    """Two clients send and get a prompt; in round 0 both get the auxiliary model before it."""
    return {
        "round": float(round_idx),
        "server/val_loss": loss,
        "baseline/val_loss": loss + 0.25,
        "client/train_loss": loss + 1,
        "client/train_loss_std": 0.5,
        "comm/up_bytes": 2.0 * UP,
        "comm/down_bytes": 2.0 * DOWN + (2.0 * HANDOUT if round_idx == 0 else 0.0),
        "round/seconds": 10.0,
        "round/client_seconds": 6.0,
        "round/server_seconds": 3.0,
    }


def record(round_idx: int, **changes: Any) -> dict[str, Any]:
    stages = {"auxiliary": {"loss": 9.0, "seconds": 1}, "soft_prompt": {"loss": 3.0, "seconds": 1}}
    return {
        "round": round_idx,
        "cohort": [0, 1],
        "parameters": 64,
        "clients": {"0": stages, "1": stages},
        "rejected": {},
        "drift": {"total": 2.0, "clients": 1.0, "server": 1.0},
        "relative_drift": {"total": 0.2, "clients": 0.1, "server": 0.1},
        "similarity": {"clients": [0, 1], "cosine": COSINE, "mean": 0.5},
        **changes,
    }


def payload(
    round_idx: int, client: int, direction: str, kind: str, num_bytes: int, attempt: int = 0
) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "round": round_idx,
        "client": client,
        "direction": direction,
        "kind": kind,
        "tensors": [],
        "bytes": num_bytes,
        "sha256": "0" * 64,
    }


def payloads(rounds: int) -> list[dict[str, Any]]:
    lines = []
    for idx in range(rounds):
        for client in (0, 1):
            if idx == 0:
                lines.append(payload(idx, client, "down", "auxiliary_handout", HANDOUT))
            lines.append(payload(idx, client, "down", "server_broadcast", DOWN))
            lines.append(payload(idx, client, "up", "client_update", UP))
    return lines


def results(losses: list[float], test_loss: float, **test: float) -> dict[str, Any]:
    best = min(range(len(losses)), key=losses.__getitem__)
    return {
        "selection": {
            "zero_shot": {"server/val_loss": 4.0},
            "best": {"round": best, "server/val_loss": losses[best]},
            "server_only": {"round": 1, "baseline/val_loss": losses[best] + 0.25},
        },
        "test": {
            "zero_shot": {"loss": 4.5},
            "best": {"loss": test_loss, **test},
            "server_only": {"loss": test_loss + 0.25},
        },
        "rounds": [metrics(idx, loss) for idx, loss in enumerate(losses)],
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(
    folder: Path,
    losses: tuple[float, ...] = (2.0, 1.5),
    test_loss: float = 1.75,
    *,
    seed: int = 0,
    finished: bool = True,
    changes: dict[str, Any] | None = None,
    test: dict[str, float] | None = None,
) -> Path:
    """Write what a run of as many rounds as there are losses leaves behind."""
    (folder / "csv").mkdir(parents=True)
    config = {**CONFIG, "seed_everything": seed, **(changes or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [metrics(idx, loss) for idx, loss in enumerate(losses)]
    if rows:
        with (folder / "csv" / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    write_lines(folder / "ledger.jsonl", payloads(len(losses)))
    write_lines(folder / "rounds.jsonl", [record(idx) for idx in range(len(losses))])
    if finished:
        content = results(list(losses), test_loss, **(test or {}))
        (folder / "results.json").write_text(json.dumps(content))
    return folder
