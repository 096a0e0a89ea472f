"""The benchmark of poisoned clients: they send what their attack is called."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.aggregation import Aggregator, CoordinateMedian, StreamingMean
from fedsp.callbacks import FederatedCallback
from fedsp.payload import Payload, flatten
from fedsp.stages import Stage
from tiny import adamw, fit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from poisoned import ATTACKS, Noise, PoisonedClient, Scaled, rules, table


class FirstRound(FederatedCallback):
    """Keeps the first round's broadcast, updates and aggregate, as vectors."""

    def __init__(self) -> None:
        self.updates: dict[int, Tensor] = {}
        self.reference = self.aggregate = torch.empty(0)

    def on_update_accepted(
        self, trainer: Any, round_idx: int, client_id: int, update: Payload, reference: Payload
    ) -> None:
        if round_idx == 0:
            self.updates[client_id], self.reference = flatten(update), flatten(reference)

    def on_aggregate_end(self, trainer: Any, round_idx: int, payload: Payload) -> None:
        if round_idx == 0:
            self.aggregate = flatten(payload)


def first_round(folder: Path, name: str, poisoned: list[int], rule: Aggregator) -> FirstRound:
    """Three clients, of whom some mirror their change at the broadcast."""
    seen = FirstRound()
    client = PoisonedClient(
        Scaled(-1),
        poisoned,
        auxiliary=Stage(0),
        soft_prompt=Stage(3, adamw(0.05)),
    )
    run = folder / name
    fit(folder, run, num_rounds=1, client=client, aggregator=rule, callbacks=[seen])
    record = json.loads((run / "rounds.jsonl").read_text())
    assert record["rejected"] == {}, "a forged update is a valid one"
    return seen


def test_a_flipped_change_is_the_mirrored_one_and_the_median_stays_among_the_honest(
    tmp_path: Path,
) -> None:
    honest = first_round(tmp_path, "honest", [], StreamingMean())
    median = first_round(tmp_path, "median", [0], CoordinateMedian())
    mean = first_round(tmp_path, "mean", [0], StreamingMean())
    middle = (honest.updates[0] + median.updates[0]) / 2
    assert torch.allclose(middle, honest.reference, atol=1e-6)
    assert (honest.updates[0] - honest.reference).norm() > 0.1
    for client_id in (1, 2):
        assert torch.equal(median.updates[client_id], honest.updates[client_id])
    others = torch.stack([honest.updates[1], honest.updates[2]])
    low, high = others.amin(0), others.amax(0)
    within = (low - 1e-6 <= median.aggregate) & (median.aggregate <= high + 1e-6)
    assert within.all()
    within = (low - 1e-6 <= mean.aggregate) & (mean.aggregate <= high + 1e-6)
    assert not within.all(), "the mean is bent"


def test_noise_is_as_long_as_it_is_told_and_the_same_for_the_same_seed() -> None:
    change = torch.tensor([3.0, 4.0, 0.0])

    def forged(seed: int) -> Tensor:
        return Noise(10)(change, torch.Generator().manual_seed(seed))

    assert float(forged(0).norm()) == pytest.approx(50)
    assert torch.equal(forged(0), forged(0))
    assert not torch.equal(forged(0), forged(1))


def test_every_rule_takes_a_cohort_of_ten_with_two_poisoned() -> None:
    for rule in rules(2, 1.0).values():
        rule.check(10)


def test_the_table_has_a_row_for_a_rule_and_a_column_for_an_attack() -> None:
    cells = {"mean": dict.fromkeys(ATTACKS, 1.25), "Krum": dict.fromkeys(ATTACKS, 2.5)}
    lines = table("loss", cells).splitlines()
    assert lines[0] == "| loss | none | sign flip | scaled sign flip | random |"
    assert lines[2:] == ["| mean | 1.250 | 1.250 | 1.250 | 1.250 |", lines[3]]
    assert lines[3].startswith("| Krum | 2.500 |")
