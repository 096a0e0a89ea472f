"""Throughput: rates against hand figures, and what a real run logs of them."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsp.batching import Batching
from fedsp.phases import StageResult
from fedsp.throughput import Throughput, Work
from tiny import fit, make_data

RATES = {
    f"{who}/{unit}_per_second"
    for who in ("client", "server", "evaluation")
    for unit in ("tokens", "examples")
}


def result(seconds: float, num_tokens: int, num_examples: int) -> StageResult:
    return StageResult(1.0, 1, num_tokens, seconds, num_examples)


def trainer() -> Any:
    data = SimpleNamespace(num_examples=lambda split: 12, num_tokens=lambda split: 60)
    return SimpleNamespace(data=data)


def test_rates_are_work_over_the_seconds_of_all_clients() -> None:
    throughput, metrics = Throughput(), {}
    throughput.on_round_start(trainer(), 0, [0, 1])
    stages = {"auxiliary": result(1.0, 100, 4), "soft_prompt": result(3.0, 200, 8)}
    throughput.on_client_end(trainer(), 0, 0, stages)
    throughput.on_client_end(trainer(), 0, 1, {"soft_prompt": result(1.0, 40, 2)})
    throughput.on_server_train_end(trainer(), 0, result(0.5, 300, 6))
    throughput.on_round_metrics(trainer(), 0, metrics)
    assert metrics == {
        "client/auxiliary_seconds": 1.0,
        "client/auxiliary_tokens_per_second": 100.0,
        "client/auxiliary_examples_per_second": 4.0,
        "client/soft_prompt_seconds": 4.0,
        "client/soft_prompt_tokens_per_second": 60.0,
        "client/soft_prompt_examples_per_second": 2.5,
        "client/tokens_per_second": 340 / 5,
        "client/examples_per_second": 14 / 5,
        "server/tokens_per_second": 600.0,
        "server/examples_per_second": 12.0,
    }


def test_every_round_begins_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("fedsp.throughput.time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    throughput.on_evaluation_start(trainer(), "selection", 3)
    throughput.on_evaluation_end(trainer(), "selection", {})
    first: dict[str, float] = {}
    throughput.on_round_metrics(trainer(), 0, first)
    assert first == {
        "round/evaluation_seconds": 2.0,
        "evaluation/tokens_per_second": 30.0,
        "evaluation/examples_per_second": 6.0,
    }
    throughput.on_round_start(trainer(), 1, [])
    second: dict[str, float] = {}
    throughput.on_round_metrics(trainer(), 1, second)
    assert second == {}


def test_without_time_there_is_no_rate() -> None:
    assert Work(0.0, 10, 1).metrics("client/") == {}


def test_a_run_logs_every_rate(tmp_path: Path) -> None:
    data = make_data(tmp_path, batching=Batching(batch_size=1))
    run = fit(tmp_path, tmp_path / "run", num_rounds=1, data=data)
    with run.folder.metrics.open() as file:
        row = next(csv.DictReader(file))
    assert row.keys() >= RATES
    assert all(float(row[name]) > 0 for name in RATES)
    metrics = run.history.rounds[0]
    seconds = metrics["client/auxiliary_seconds"] + metrics["client/soft_prompt_seconds"]
    assert 0 < seconds < metrics["round/client_seconds"]
    # 3 clients, 1 + 2 steps of an example each; 2 server steps; 12 questions are measured once
    assert metrics["client/examples_per_second"] == pytest.approx(3 * 3 / seconds)
    server = metrics["server/examples_per_second"] * metrics["round/server_seconds"]
    assert server == pytest.approx(2)
    evaluated = metrics["evaluation/examples_per_second"] * metrics["round/evaluation_seconds"]
    assert evaluated == pytest.approx(12)
    tokens = sum(example.num_packed_tokens for example in run.data.val_dataloader().dataset)
    rate = metrics["evaluation/tokens_per_second"] * metrics["round/evaluation_seconds"]
    assert rate == pytest.approx(tokens)
