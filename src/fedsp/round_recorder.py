"""Writes `rounds.jsonl`: who took part in a round, how the prompt moved, how alike updates were.

It only looks: nothing in a run depends on it. One line a round, appended when the round ends; a
round that is repeated after a resume replaces its earlier line.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.callbacks import FederatedCallback
from fedsp.state_files import write_text_atomically

MAX_COMPARED = 32  # updates of a round that are held in memory and compared, the first ones
_DIGITS = 6


class RoundRecorder(FederatedCallback):
    """Records every round of a run; the trainer adds one by itself."""

    def __init__(self) -> None:
        """Wait for the first round; there is nothing to set."""
        self._trimmed = False
        self._record: dict[str, Any] = {}
        self._changes: dict[int, Tensor] = {}
        self._before = self._aggregate = torch.empty(0)

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Begin the record with the prompt that the round starts from."""
        if not self._trimmed:
            _keep_rounds_before(round_idx, trainer.folder.rounds)
            self._trimmed = True
        self._before = self._aggregate = _server_prompt(trainer)
        self._changes = {}
        self._record = {
            "round": round_idx,
            "cohort": list(cohort),
            "parameters": self._before.numel(),
            "clients": {},
            "rejected": {},
        }

    def on_client_end(
        self, trainer: Any, round_idx: int, client_id: int, stages: dict[str, Any]
    ) -> None:
        """Note a client's losses and seconds by stage."""
        self._record["clients"][str(client_id)] = {
            name: {"loss": _plain(result.loss), "seconds": round(result.seconds, 3)}
            for name, result in stages.items()
        }

    def on_update_accepted(
        self, trainer: Any, round_idx: int, client_id: int, update: Tensor, reference: Tensor
    ) -> None:
        """Keep what the client changed, for as many clients as are compared."""
        if len(self._changes) < MAX_COMPARED:
            self._changes[client_id] = flatten(update) - flatten(reference)

    def on_update_rejected(self, trainer: Any, round_idx: int, client_id: int, reason: str) -> None:
        """Note why."""
        self._record["rejected"][str(client_id)] = reason

    def on_aggregate_end(self, trainer: Any, round_idx: int, prefix: Tensor) -> None:
        """Keep the aggregate, between the clients' part of the drift and the server's."""
        self._aggregate = flatten(prefix)

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Append the round's line."""
        after = _server_prompt(trainer)
        norm = self._before.norm()
        steps = {
            "total": after - self._before,
            "clients": self._aggregate - self._before,
            "server": after - self._aggregate,
        }
        drift = {name: step.norm() for name, step in steps.items()}
        self._record["drift"] = {name: _plain(float(value)) for name, value in drift.items()}
        self._record["relative_drift"] = {
            name: _plain(float(value / norm)) for name, value in drift.items()
        }
        self._record["similarity"] = similarity(self._changes)
        self._changes = {}
        _append(trainer.folder.rounds, self._record)


def flatten(payload: Tensor) -> Tensor:
    """Return all numbers of what travels as one vector in double precision, on the CPU.

    Args:
        payload: [L, 2, K, P, D] The soft prompt.
    """
    return payload.detach().flatten().to("cpu", torch.float64)


def similarity(changes: dict[int, Tensor]) -> dict[str, Any]:
    """Compare the directions in which clients moved the prompt.

    Args:
        changes: By client, [D] what it added to the broadcast.

    Returns:
        `clients`, the matrix `cosine` of all pairs in that order (None where a change is zero),
        and `mean` over the pairs of two clients (None without any).
    """
    clients = list(changes)
    if not clients:
        return {"clients": [], "cosine": [], "mean": None}
    stacked = torch.stack([changes[client] for client in clients])
    # a zero change has no direction: 0 / 0 is NaN, which becomes None
    unit = stacked / stacked.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).clamp(-1.0, 1.0)
    pairs = cosine[tuple(torch.triu_indices(len(clients), len(clients), offset=1))]
    known = pairs[pairs.isfinite()]
    return {
        "clients": clients,
        "cosine": [[_plain(value) for value in row] for row in cosine.tolist()],
        "mean": _plain(float(known.mean())) if len(known) else None,
    }


def _server_prompt(trainer: Any) -> Tensor:
    return flatten(trainer.server.require_model()[1].prefix())


def _plain(value: float) -> float | None:
    """Round for the file; JSON has no NaN."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _keep_rounds_before(round_idx: int, path: Path) -> None:
    """Drop lines of rounds that are about to be repeated, and a half-written one."""
    if not path.exists():
        return
    lines = path.read_text().split("\n")[:-1]
    kept = [line for line in lines if json.loads(line)["round"] < round_idx]
    write_text_atomically(path, "".join(f"{line}\n" for line in kept))


def _append(path: Path, record: dict[str, Any]) -> None:
    # one call: a killed process leaves a whole line or a torn one at the end, which is dropped
    data = json.dumps(record, allow_nan=False).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, data)
    finally:
        os.close(file)
