"""Answers that a round leaves out, tells of and counts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.aggregation import (
    CoordinateMedian,
    MultiKrum,
    NormClipping,
)
from fedsp.executors import Reply
from fedsp.federation import Communication
from fedsp.messages import (
    ClientUpdate,
    ServerBroadcast,
    decode_broadcast,
    encode,
    encode_handout,
)
from scripted import Calls, Scripted, make_federation, wander


def misbehaving(prefix: Tensor, round_idx: int, client_id: int) -> Tensor:
    """Client 1 sends NaN, client 2 too large a change, client 0 is honest."""
    return prefix + {0: 0.01, 1: float("nan"), 2: 100.0}[client_id]


def test_rejected_updates_are_left_out_told_of_and_counted(tmp_path: Path) -> None:
    federation = make_federation(
        tmp_path, misbehaving, communication=Communication(max_update_norm=10.0)
    )
    start = federation.broadcast["soft_prompt"].clone()
    calls = Calls()
    metrics = federation.collect(0, [0, 1, 2], calls)
    assert metrics["round/clients"] == 3
    assert metrics["round/rejected_updates"] == 2
    assert torch.allclose(federation.broadcast["soft_prompt"], start + 0.01, atol=1e-6)
    rejected = [call for call in calls.made if call[0] == "on_update_rejected"]
    assert [(round_idx, client_id) for _, round_idx, client_id, _ in rejected] == [(0, 1), (0, 2)]
    assert "max_update_norm" in rejected[1][3]


@pytest.mark.parametrize(
    ("cohort", "min_updates", "adopted"),
    [([0, 1, 2], 1, True), ([0, 1, 2], 2, False), ([1, 2], 1, False), ([], 1, False)],
)
def test_too_few_accepted_updates_keep_the_servers_prompt(
    tmp_path: Path, cohort: list[int], min_updates: int, adopted: bool
) -> None:
    communication = Communication(max_update_norm=10.0, min_updates=min_updates)
    federation = make_federation(tmp_path, misbehaving, communication=communication)
    start = federation.broadcast["soft_prompt"].clone()
    calls = Calls()
    federation.collect(0, cohort, calls)
    assert torch.equal(federation.broadcast["soft_prompt"], start) != adopted
    assert ("on_aggregate_end" in calls.names()) == adopted
    assert torch.isfinite(federation.server.require_model()[1].prefix()).all()


def attack(prefix: Tensor, round_idx: int, client_id: int) -> Tensor:
    """Client 2 pulls away, the others agree."""
    return prefix + {0: 0.01, 1: 0.03, 2: 100.0}[client_id]


def test_robust_rules_follow_the_honest_clients_of_a_round(tmp_path: Path) -> None:
    length = 1024**0.5  # of a change by 1 in every number of the tiny prompt
    for rule, expected in (
        (CoordinateMedian(), 0.03),
        (MultiKrum(0), 0.01),
        (NormClipping(0.03 * length), 0.07 / 3),
        (NormClipping(0.02 * length, CoordinateMedian()), 0.02),
    ):
        federation = make_federation(tmp_path, attack, aggregator=rule)
        start = federation.broadcast["soft_prompt"].clone()
        assert start.numel() == length**2
        federation.collect(0, [0, 1, 2], Calls())
        assert torch.allclose(federation.broadcast["soft_prompt"], start + expected, atol=1e-6)


def test_a_rule_is_not_asked_about_fewer_updates_than_it_needs(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, misbehaving, aggregator=MultiKrum(0))
    start = federation.broadcast["soft_prompt"].clone()
    federation.collect(0, [0, 1, 2], Calls())  # one of the three is rejected
    assert torch.equal(federation.broadcast["soft_prompt"], start)


FAULTS = {
    "another client": "expected client_id 1, got 7",
    "another round": "expected round_idx 0, got 5",
    "weights": "expected the kind client_update, got 'auxiliary_handout'",
    "noise": "bytes of numbers",
    "a broadcast": "expected the kind client_update, got 'server_broadcast'",
}


class Forging(Scripted):
    """Client 1 answers with other bytes than its own update."""

    fault = ""

    def forged(self, prefix: Tensor) -> bytes:
        own = {"soft_prompt": prefix}
        messages = {
            "another client": lambda: encode(ClientUpdate(0, 7, own, 1), "float32"),
            "another round": lambda: encode(ClientUpdate(5, 1, own, 1), "float32"),
            "weights": lambda: encode_handout({"lm_head.weight": prefix}),
            "noise": lambda: b"not a message at all",
            "a broadcast": lambda: encode(ServerBroadcast(0, own), "float32"),
        }
        return messages[self.fault]()

    def run(self, *args: Any) -> Iterator[Reply]:
        prefix = decode_broadcast(args[2], self.contract).payload["soft_prompt"]
        for reply in super().run(*args):
            data = reply.data if reply.client_id != 1 else self.forged(prefix)
            yield Reply(reply.client_id, data, reply.stages)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_not_that_clients_prompt_is_rejected_and_the_others_count(
    tmp_path: Path, fault: str
) -> None:
    federation = make_federation(tmp_path)
    federation.executor = executor = Forging(wander)
    executor.contract, executor.fault = federation.contract, fault
    start = federation.broadcast["soft_prompt"].clone()
    calls = Calls()
    metrics = federation.collect(0, [0, 1, 2], calls)
    expected = torch.stack([wander(start, 0, client_id) for client_id in (0, 2)]).double().mean(0)
    assert torch.equal(federation.broadcast["soft_prompt"], expected.float())
    assert metrics["round/clients"] == 3
    assert metrics["round/rejected_updates"] == 1
    (rejection,) = [call for call in calls.made if call[0] == "on_update_rejected"]
    assert rejection[1:3] == (0, 1)
    assert re.search(FAULTS[fault], rejection[3])


def test_if_nobody_answers_well_the_prompt_stays(tmp_path: Path) -> None:
    federation = make_federation(tmp_path)
    federation.executor = executor = Forging(wander)
    executor.contract, executor.fault = federation.contract, "noise"
    start = federation.broadcast["soft_prompt"].clone()
    federation.collect(0, [1], Calls())
    assert torch.equal(federation.broadcast["soft_prompt"], start)


class Insistent(Scripted):
    """After the honest answers: client 0 once more, and two that were not asked."""

    def run(self, *args: Any) -> Iterator[Reply]:
        yield from super().run(*args)
        prefix = decode_broadcast(args[2], self.contract).payload["soft_prompt"]
        for client_id in (0, 1, 2**40):
            update = ClientUpdate(args[0], client_id, {"soft_prompt": prefix + 9}, 1)
            yield Reply(client_id, encode(update, "float32"), {})


def test_second_answers_and_answers_of_who_was_not_asked_are_rejected(tmp_path: Path) -> None:
    federation = make_federation(tmp_path)
    federation.executor = executor = Insistent(wander)
    executor.contract = federation.contract
    start = federation.broadcast["soft_prompt"].clone()
    calls = Calls()
    metrics = federation.collect(4, [0, 2], calls)
    expected = torch.stack([wander(start, 4, client_id) for client_id in (0, 2)]).double().mean(0)
    assert torch.equal(federation.broadcast["soft_prompt"], expected.float())
    assert metrics["round/clients"] == 2
    assert metrics["round/rejected_updates"] == 3
    assert [call[2:] for call in calls.made if call[0] == "on_update_rejected"] == [
        (0, "client 0 has answered round 4 already"),
        (1, "client 1 was not asked in round 4"),
        (2**40, "client 1099511627776 was not asked in round 4"),
    ]
    assert [call[2] for call in calls.made if call[0] == "on_client_end"] == [0, 2]


def test_second_answers_do_not_make_up_for_missing_ones(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, communication=Communication(min_updates=3))
    federation.executor = executor = Insistent(wander)
    executor.contract = federation.contract
    start = federation.broadcast["soft_prompt"].clone()
    federation.collect(4, [0, 2], Calls())
    assert torch.equal(federation.broadcast["soft_prompt"], start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_update_norm": 0.0}, "`trainer.communication.max_update_norm` must be above 0"),
        ({"max_update_norm": float("nan")}, "`trainer.communication.max_update_norm` must be"),
        ({"min_updates": 0}, "`trainer.communication.min_updates` must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Communication(**options)
