"""Writes `rounds.jsonl`: who took part in a round, how the payload moved, how alike updates were.

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
from fedsp.payload import Payload, flatten
from fedsp.state_files import write_text_atomically

MAX_COMPARED = 32  # updates of a round that are compared, the first ones
MAX_HELD = 2**26  # numbers of all payloads that are kept in memory for it: 256 MiB
_CHUNK = 2**20
_DIGITS = 6


class RoundRecorder(FederatedCallback):
    """Records every round of a run; the trainer adds one by itself."""

    on_every_rank = False

    def __init__(self) -> None:
        """Wait for the first round; there is nothing to set."""
        self._trimmed = False
        self._record: dict[str, Any] = {}
        self._changes: dict[int, Tensor] = {}
        self._before = self._aggregate = torch.empty(0)
        self._is_held = True
        self._room = MAX_COMPARED

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Begin the record with the prompt that the round starts from."""
        if not self._trimmed:
            _keep_rounds_before(round_idx, trainer.folder.rounds)
            self._trimmed = True
        payload = trainer.server.payload()
        parameters = sum(tensor.numel() for tensor in payload.values())
        self._is_held = parameters <= MAX_HELD
        self._room = min(MAX_COMPARED, MAX_HELD // max(parameters, 1))
        if self._is_held:
            self._before = self._aggregate = flatten(payload)
        self._changes = {}
        self._record = {
            "round": round_idx,
            "cohort": list(cohort),
            "parameters": parameters,
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
        self, trainer: Any, round_idx: int, client_id: int, update: Payload, reference: Payload
    ) -> None:
        """Keep what the client changed, for as many clients as are compared."""
        if len(self._changes) < self._room:
            self._changes[client_id] = flatten(update) - flatten(reference)

    def on_update_rejected(self, trainer: Any, round_idx: int, client_id: int, reason: str) -> None:
        """Note why."""
        self._record["rejected"][str(client_id)] = reason

    def on_aggregate_end(self, trainer: Any, round_idx: int, payload: Payload) -> None:
        """Keep the aggregate, between the clients' part of the drift and the server's."""
        if self._is_held:
            self._aggregate = flatten(payload)

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Append the round's line."""
        if self._is_held:
            self._record |= _drift(self._before, self._aggregate, flatten(trainer.server.payload()))
        else:
            self._record |= {"drift": None, "relative_drift": None}
        self._record["similarity"] = similarity(self._changes)
        self._changes = {}
        _append(trainer.folder.rounds, self._record)


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
    chunks = zip(*(changes[client].split(_CHUNK) for client in clients), strict=True)
    doubles = (torch.stack(chunk).double() for chunk in chunks)
    products = sum((chunk @ chunk.T for chunk in doubles), torch.zeros(len(clients), len(clients)))
    norms = products.diagonal().sqrt()
    # a zero change has no direction: 0 / 0 is NaN, which becomes None
    cosine = (products / torch.outer(norms, norms)).clamp(-1.0, 1.0)
    pairs = cosine[tuple(torch.triu_indices(len(clients), len(clients), offset=1))]
    known = pairs[pairs.isfinite()]
    return {
        "clients": clients,
        "cosine": [[_plain(value) for value in row] for row in cosine.tolist()],
        "mean": _plain(float(known.mean())) if len(known) else None,
    }


def _drift(before: Tensor, aggregate: Tensor, after: Tensor) -> dict[str, Any]:
    """Return the norms of a round's steps, and the same over the norm that it started from."""
    steps = {"total": after - before, "clients": aggregate - before, "server": after - aggregate}
    norms = {name: _norm(step) for name, step in steps.items()}
    start = _norm(before)
    return {
        "drift": {name: _plain(value) for name, value in norms.items()},
        "relative_drift": {
            name: _plain(value / start) if start else None for name, value in norms.items()
        },
    }


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


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
