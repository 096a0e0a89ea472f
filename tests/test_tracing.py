"""The trace of a round: read back as JSON, with every part of the round in it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commands import changed, command, make_config, of_class, write_config
from fedsp.callbacks import FederatedCallback
from fedsp.tracing import TraceRound
from tiny import fit


class FailsInRound(FederatedCallback):
    def on_server_train_start(self, trainer: Any, round_idx: int) -> None:
        raise RuntimeError("expected")


def test_a_round_is_traced_by_configuration(tmp_path: Path) -> None:
    callbacks = [of_class("fedsp.tracing.TraceRound", round_idx=1)]
    config = changed(make_config(tmp_path), {"trainer.callbacks": callbacks})
    outcome = command("fit", "--config", write_config(tmp_path / "config.yaml", config))
    assert outcome.status == 0, outcome
    assert [path.name for path in (tmp_path / "run").glob("trace*")] == ["trace-round-1.json"]
    trace = json.loads((tmp_path / "run" / "trace-round-1.json").read_text())
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = {event["name"]: event for event in events if event["cat"] == "user_annotation"}
    clients = [name for name in spans if name.startswith("client ")]
    assert len(clients) == 2  # of the cohort, not of the 3 clients
    assert spans.keys() >= {"server training", "evaluation selection"}
    inside = [event for event in events if _is_inside(event, spans["server training"])]
    assert any(event["name"] == "aten::addmm" for event in inside)
    assert any("Backward" in event["name"] for event in inside)


def _is_inside(event: dict[str, Any], span: dict[str, Any]) -> bool:
    return span["ts"] <= event["ts"] and event["ts"] + event["dur"] <= span["ts"] + span["dur"]


@pytest.mark.parametrize("round_idx", [-1, 3])
def test_a_round_that_never_comes_is_refused(round_idx: int) -> None:
    trainer = SimpleNamespace(num_rounds=3)
    with pytest.raises(ValueError, match=rf"TraceRound's `round_idx` must be .* got {round_idx}\."):
        TraceRound(round_idx).on_setup_start(trainer)


def test_a_round_that_fails_leaves_no_trace_and_no_profiler(tmp_path: Path) -> None:
    trace = TraceRound(round_idx=0)
    with pytest.raises(RuntimeError, match="expected"):
        fit(tmp_path, tmp_path / "run", num_rounds=1, callbacks=[trace, FailsInRound()])
    assert not list((tmp_path / "run").glob("trace*"))
    fit(tmp_path, tmp_path / "again", num_rounds=1, callbacks=[trace])
    assert (tmp_path / "again" / "trace-round-0.json").exists()
