"""What a round's record says, against hand figures, and that a resume leaves each round once."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsp.callbacks import FederatedCallback
from fedsp.federation import Communication
from fedsp.payload import Payload
from fedsp.round_recorder import MAX_COMPARED, RoundRecorder, similarity
from fedsp.run_record import read_records
from fedsp.sampling import UniformSampler
from tiny import fit


class Server:
    """Holds what is tuned, in two tensors."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def payload(self) -> Payload:
        return payload(self.values)


def payload(values: list[float]) -> Payload:
    return {"a": torch.tensor([values[:1]]), "b": torch.tensor(values[1:])}


def trainer_with(server: Server, folder: Path) -> Any:
    return SimpleNamespace(server=server, folder=SimpleNamespace(rounds=folder / "rounds.jsonl"))


def test_drift_and_similarity_are_the_hand_figures(tmp_path: Path) -> None:
    """From (3, 4) the clients go to (3, 10) and (9, 4), the mean is (6, 7), the server (6, 12)."""
    server = Server([3.0, 4.0])
    trainer, recorder = trainer_with(server, tmp_path), RoundRecorder()
    recorder.on_round_start(trainer, 0, [5, 7])
    result = SimpleNamespace(loss=2.0, seconds=0.5)
    for client, end in ((5, [3.0, 10.0]), (7, [9.0, 4.0])):
        recorder.on_client_end(trainer, 0, client, {"soft_prompt": result})
        recorder.on_update_accepted(trainer, 0, client, payload(end), payload([3.0, 4.0]))
    recorder.on_aggregate_end(trainer, 0, payload([6.0, 7.0]))
    server.values = [6.0, 12.0]
    recorder.on_round_end(trainer, 0, {})
    assert read_records(tmp_path / "rounds.jsonl") == {
        0: {
            "round": 0,
            "cohort": [5, 7],
            "parameters": 2,
            "clients": {
                "5": {"soft_prompt": {"loss": 2.0, "seconds": 0.5}},
                "7": {"soft_prompt": {"loss": 2.0, "seconds": 0.5}},
            },
            "rejected": {},
            "drift": {"total": 8.544, "clients": 4.24264, "server": 5.0},
            "relative_drift": {"total": 1.7088, "clients": 0.848528, "server": 1.0},
            "similarity": {"clients": [5, 7], "cosine": [[1.0, 0.0], [0.0, 1.0]], "mean": 0.0},
        }
    }


@pytest.mark.parametrize(
    ("changes", "cosine", "mean"),
    [
        ({}, [], None),
        ({4: [1.0, 0.0]}, [[1.0]], None),
        ({4: [1.0, 0.0], 2: [-2.0, 0.0]}, [[1.0, -1.0], [-1.0, 1.0]], -1.0),
        ({4: [1.0, 1.0], 2: [0.0, 3.0]}, [[1.0, 0.707107], [0.707107, 1.0]], 0.707107),
        ({4: [0.0, 0.0], 2: [0.0, 3.0]}, [[None, None], [None, 1.0]], None),
    ],
)
def test_cosines_of_known_directions(
    changes: dict[int, list[float]], cosine: list[list[float | None]], mean: float | None
) -> None:
    vectors = {key: torch.tensor(value) for key, value in changes.items()}
    expected = {"clients": list(changes), "cosine": cosine, "mean": mean}
    assert similarity(vectors) == expected


def test_a_prompt_of_no_numbers_has_no_relative_drift(tmp_path: Path) -> None:
    trainer, recorder = trainer_with(Server([]), tmp_path), RoundRecorder()
    recorder.on_round_start(trainer, 0, [])
    recorder.on_round_end(trainer, 0, {})
    (record,) = read_records(tmp_path / "rounds.jsonl").values()
    assert record["relative_drift"] == {"total": None, "clients": None, "server": None}


@pytest.mark.parametrize(
    ("max_held", "compared", "has_drift"),
    [(2**26, MAX_COMPARED, True), (7, 3, True), (1, 0, False)],
)
def test_only_so_much_is_held(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_held: int,
    compared: int,
    has_drift: bool,
) -> None:
    """Payloads of two numbers: in 7 there is room for three."""
    monkeypatch.setattr("fedsp.round_recorder.MAX_HELD", max_held)
    trainer, recorder = trainer_with(Server([1.0, 1.0]), tmp_path), RoundRecorder()
    recorder.on_round_start(trainer, 0, [])
    for client in range(MAX_COMPARED + 5):
        recorder.on_update_accepted(trainer, 0, client, payload([2.0, 1.0]), payload([1.0, 1.0]))
    recorder.on_aggregate_end(trainer, 0, payload([2.0, 1.0]))
    recorder.on_round_end(trainer, 0, {})
    (record,) = read_records(tmp_path / "rounds.jsonl").values()
    assert record["similarity"]["clients"] == list(range(compared))
    assert (record["drift"] is not None) == has_drift


class StopIn(FederatedCallback):
    """Ends the run after a round is recorded and before its checkpoint, as a kill would."""

    def __init__(self, round_idx: int) -> None:
        self.round_idx = round_idx

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        if trainer.history.rounds_done == self.round_idx:
            # the next round is recorded too, as if its checkpoint had been lost
            with trainer.folder.rounds.open("a") as file:
                file.write(json.dumps({"round": self.round_idx, "stale": True}) + '\n{"rou')
            raise KeyboardInterrupt


def test_a_resumed_run_records_every_round_once_and_the_same(tmp_path: Path) -> None:
    sampler = UniformSampler(clients_per_round=2)
    options: dict[str, Any] = {"num_rounds": 3, "sampler": sampler}
    fit(tmp_path, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "cut", callbacks=StopIn(2), **options)
    fit(tmp_path, tmp_path / "cut", ckpt_path="last", **options)
    lines = {
        name: list(map(json.loads, (tmp_path / name / "rounds.jsonl").read_text().splitlines()))
        for name in ("whole", "cut")
    }
    for records in lines.values():
        assert [record["round"] for record in records] == [0, 1, 2]
        for record in records:
            for stages in record["clients"].values():
                for stage in stages.values():
                    del stage["seconds"]
            assert len(record["cohort"]) == len(record["clients"]) == 2
            assert record["drift"]["total"] > 0
    assert lines["whole"] == lines["cut"]


def test_rejected_updates_are_recorded_with_their_reason(tmp_path: Path) -> None:
    communication = Communication(max_update_norm=1e-9)
    fit(tmp_path, tmp_path / "run", num_rounds=1, communication=communication)
    (record,) = read_records(tmp_path / "run" / "rounds.jsonl").values()
    assert set(record["rejected"]) == {"0", "1", "2"}
    assert "norm" in record["rejected"]["0"]
    assert record["similarity"] == {"clients": [], "cosine": [], "mean": None}
    assert record["drift"]["clients"] == 0.0
