"""Simulated clients: what they keep, what they receive and what of it the ledger says."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from fedsp.client import ClientModule
from fedsp.client_state import ClientStateStore
from fedsp.executors import InProcessExecutor, Reply, Simulation
from fedsp.ledger import Ledger, read_ledger
from fedsp.messages import (
    Contract,
    MessageError,
    ServerBroadcast,
    decode_update,
    encode,
    encode_handout,
)
from fedsp.stages import Stage
from tiny import adamw, make_client, make_data, make_server


@dataclass
class World:
    """An executor with what it stands on."""

    executor: InProcessExecutor
    client: ClientModule
    store: ClientStateStore
    ledger: Path
    contract: Contract
    prefix: torch.Tensor
    handout: bytes

    def broadcast(self, round_idx: int) -> bytes:
        return encode(
            ServerBroadcast(round_idx, {"soft_prompt": self.prefix}), self.contract.wire_dtype
        )

    def run(self, round_idx: int, cohort: list[int]) -> dict[int, Reply]:
        replies = self.executor.run(
            round_idx, cohort, self.broadcast(round_idx), lambda client_id: None
        )
        return {reply.client_id: reply for reply in replies}

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        rows = read_ledger(self.ledger)
        return [row for row in rows if all(row[k] == v for k, v in wanted.items())]

    def update(self, reply: Reply, round_idx: int) -> torch.Tensor:
        return decode_update(
            reply.data,
            self.contract,
            reference={"soft_prompt": self.prefix},
            round_idx=round_idx,
            client_id=reply.client_id,
        ).payload["soft_prompt"]


def make_world(
    folder: Path,
    name: str = "run",
    wire_dtype: Any = "float32",
    client: ClientModule | None = None,
    **options: Any,
) -> World:
    server, data = make_server(folder), make_data(folder)
    client = client or make_client(**options)
    server.configure_model()
    data.limit_tokens(60)
    data.setup("fit")
    backbone, prompt = server.require_model()
    auxiliary = server.auxiliary_recipe.build(backbone)
    handout = encode_handout(auxiliary.handout())
    client.install(auxiliary, prompt.num_virtual_tokens)
    contract = Contract({"soft_prompt": prompt.shape}, wire_dtype, None)
    store = ClientStateStore(folder / name / "clients")
    simulation = Simulation(
        fabric=Fabric(accelerator="cpu", devices=1),
        client=client,
        data=data,
        store=store,
        ledger=Ledger(folder / name / "ledger.jsonl"),
        contract=contract,
        seed=0,
        participations=dict.fromkeys(range(3), 3),
    )
    ledger = folder / name / "ledger.jsonl"
    executor = InProcessExecutor(simulation)
    return World(executor, client, store, ledger, contract, prompt.prefix(), handout)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


# --- private states -----------------------------------------------------------------------------


def test_every_client_of_the_cohort_keeps_a_state_and_no_other(world: World) -> None:
    world.run(0, [0, 2])
    assert world.store.versions() == {0: 0, 2: 0}
    world.run(1, [2, 1])
    assert world.store.versions() == {0: 0, 1: 1, 2: 1}


def test_clients_without_any_step_keep_nothing_and_send_back_what_came(tmp_path: Path) -> None:
    world = make_world(tmp_path, auxiliary=Stage(0), soft_prompt=Stage(0))
    replies = world.run(0, [0, 1])
    assert world.store.versions() == {}
    assert not (tmp_path / "run" / "clients").exists()
    for reply in replies.values():
        assert reply.stages == {}
        assert torch.equal(world.update(reply, 0), world.prefix)


@pytest.mark.parametrize("stage", ["auxiliary", "soft_prompt"])
def test_only_the_stage_that_ran_is_in_the_state(tmp_path: Path, stage: str) -> None:
    off = {"auxiliary": Stage(0), "soft_prompt": Stage(0)}
    world = make_world(tmp_path, **{**off, stage: Stage(1, adamw(1e-3))})
    (reply,) = world.run(0, [1]).values()
    assert reply.stages.keys() == {stage}
    state: Any = world.store.get(1)
    assert state["model"].keys() == ({"auxiliary"} if stage == "auxiliary" else set())
    assert state["training"].keys() == {stage, "batches"}


class Diverging(ClientModule):
    """Its losses are NaN in one round."""

    def __init__(self, bad_round: int) -> None:
        super().__init__(Stage(1, adamw(1e-3)), Stage(2, adamw(1e-2)))
        self.bad_round = bad_round

    def receive(self, broadcast: ServerBroadcast) -> None:
        super().receive(broadcast)
        self.is_bad = broadcast.round_idx == self.bad_round

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.is_bad else loss


@pytest.mark.parametrize("bad_round", [0, 1])
def test_a_loss_that_is_not_finite_leaves_the_private_state_as_it_was(
    tmp_path: Path, bad_round: int
) -> None:
    world = make_world(tmp_path, client=Diverging(bad_round))
    world.run(0, [1])
    before = str(world.store.get(1))
    if bad_round == 0:
        assert world.store.versions() == {}
    reply = world.run(1, [1])[1]
    assert math.isfinite(reply.stages["soft_prompt"].loss) == (bad_round == 0)
    assert (str(world.store.get(1)) == before) == (bad_round == 1)
    reply = world.run(2, [1])[1]
    assert math.isfinite(reply.stages["soft_prompt"].loss)
    assert torch.isfinite(world.update(reply, 2)).all()


@pytest.mark.parametrize("stage", ["auxiliary", "soft_prompt"])
def test_a_last_step_that_diverges_after_a_finite_loss_is_not_kept(
    tmp_path: Path, stage: str
) -> None:
    """The loss is taken before the step, so it says nothing of where the step leads."""

    def exploding(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=float("inf"), weight_decay=1.0)

    off = {"auxiliary": Stage(0), "soft_prompt": Stage(0), "reparameterization_size": 4}
    world = make_world(tmp_path, **{**off, stage: Stage(1, exploding)})
    (reply,) = world.run(0, [0]).values()
    assert torch.isfinite(torch.tensor(reply.stages[stage].loss))
    assert world.store.versions() == {}
    (reply,) = world.run(1, [0]).values()
    assert torch.isfinite(torch.tensor(reply.stages[stage].loss))


def test_a_client_goes_on_from_its_own_state_whoever_worked_in_between(tmp_path: Path) -> None:
    alone, crowded = make_world(tmp_path, "alone"), make_world(tmp_path, "crowded")
    alone.run(0, [1])
    crowded.run(0, [0, 1, 2])
    lonely, busy = alone.run(1, [1])[1], crowded.run(1, [2, 0, 1])[1]
    assert lonely.data == busy.data
    assert str(alone.store.get(1)) == str(crowded.store.get(1))


def test_the_order_of_the_cohort_does_not_matter(tmp_path: Path) -> None:
    worlds = [make_world(tmp_path, name) for name in ("forth", "back")]
    for round_idx in range(2):
        forth = worlds[0].run(round_idx, [0, 1, 2])
        back = worlds[1].run(round_idx, [2, 1, 0])
        assert list(back) == [2, 1, 0]
        for client_id in range(3):
            assert forth[client_id].data == back[client_id].data
            states = [str(world.store.get(client_id)) for world in worlds]
            assert states[0] == states[1]


def test_an_executor_goes_on_after_a_restart_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = make_world(tmp_path, "whole", reparameterization_size=4)
    cut = make_world(tmp_path, "cut", reparameterization_size=4)
    for world in (whole, cut):
        world.run(0, [0, 1])
    state = cut.executor.state_dict()
    cut.executor.commit()
    cut.run(1, [0, 1])  # a round that the checkpoint does not know
    resumed = make_world(tmp_path, "cut", reparameterization_size=4)
    resumed.executor.load_state_dict(state)
    expected, got = whole.run(1, [2, 0, 1]), resumed.run(1, [2, 0, 1])
    assert {c: r.data for c, r in expected.items()} == {c: r.data for c, r in got.items()}


# --- what travels -------------------------------------------------------------------------------


def test_the_handout_is_in_the_ledger_once_a_client_with_its_bytes_and_hash(world: World) -> None:
    world.run(0, [0, 1])
    world.run(1, [1, 2])
    world.run(2, [0, 1, 2])
    rows = world.rows(kind="auxiliary_handout")
    assert [(row["round"], row["client"]) for row in rows] == [(0, 0), (0, 1), (1, 2)]
    assert {row["direction"] for row in rows} == {"down"}
    assert {row["bytes"] for row in rows} == {len(world.handout)}
    assert {row["sha256"] for row in rows} == {hashlib.sha256(world.handout).hexdigest()}


def test_a_handout_after_a_restart_is_the_same_and_not_a_clients_own_model(
    tmp_path: Path,
) -> None:
    """Clients 0 and 1 hold a model already; client 2 joins when 0 has trained in this process."""
    first = make_world(tmp_path)
    first.run(0, [0, 1])
    state = first.executor.state_dict()
    second = make_world(tmp_path)
    second.executor.load_state_dict(state)
    second.run(1, [0, 2])
    rows = second.rows(kind="auxiliary_handout")
    assert [row["client"] for row in rows] == [0, 1, 2]
    assert {row["sha256"] for row in rows} == {hashlib.sha256(second.handout).hexdigest()}


def test_a_client_refuses_the_broadcast_of_another_round(world: World) -> None:
    with pytest.raises(MessageError, match="server_broadcast: expected round_idx 4, got 3"):
        world.executor.turn(4, 0, world.broadcast(3))


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_broadcast_and_updates_are_in_the_ledger_as_they_are(
    tmp_path: Path, wire_dtype: Any
) -> None:
    world = make_world(tmp_path, wire_dtype=wire_dtype)
    replies = world.run(3, [2, 0])
    broadcast = world.broadcast(3)
    for row in world.rows(kind="server_broadcast"):
        assert (row["round"], row["direction"]) == (3, "down")
        assert row["bytes"] == len(broadcast)
        assert row["sha256"] == hashlib.sha256(broadcast).hexdigest()
    updates = world.rows(kind="client_update")
    assert [row["client"] for row in updates] == [2, 0]
    for row in updates:
        data = replies[row["client"]].data
        assert (row["round"], row["direction"]) == (3, "up")
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert [(row["client"], row["kind"]) for row in world.rows()] == [
        (client, kind)
        for client in (2, 0)
        for kind in ("auxiliary_handout", "server_broadcast", "client_update")
    ]


def test_a_payload_is_in_the_ledger_before_it_is_handed_on(world: World) -> None:
    """The start of a client is told first, then what it receives is written, then its answer."""
    counts: list[int] = []
    replies: Iterator[Reply] = world.executor.run(
        0, [0, 1], world.broadcast(0), lambda client_id: counts.append(len(world.rows()))
    )
    for reply in replies:
        assert world.rows()[-1]["sha256"] == hashlib.sha256(reply.data).hexdigest()
    assert counts == [0, 3]


def test_a_client_starts_from_the_broadcast_as_it_travelled(tmp_path: Path) -> None:
    """In bfloat16 the clients' reference is the rounded prompt."""
    world = make_world(tmp_path, wire_dtype="bfloat16", auxiliary=Stage(0), soft_prompt=Stage(0))
    (reply,) = world.run(0, [0]).values()
    assert torch.equal(world.update(reply, 0), world.prefix.bfloat16().float())
    assert not torch.equal(world.update(reply, 0), world.prefix)
