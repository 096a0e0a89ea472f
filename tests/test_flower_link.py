"""A real SuperLink and real parties over TLS on loopback, whose answers are made by the test."""

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord

from fedsp import credentials, flower_link, flower_node
from fedsp.credentials import create_authority, issue_server_certificate
from fedsp.flower_node import FlowerNode
from fedsp.flower_records import pack_record
from fedsp.wire import Record
from link_parties import SECONDS, Federation, meet, receive, wait_until


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


def test_an_answer_is_received_after_its_sender_has_left(federation: Federation) -> None:
    answered = threading.Event()

    def answer_and_end(record: Record) -> Record:
        answered.set()
        return record

    link = federation.open()
    federation.start("alpha", answer_and_end, answered.is_set)
    wait_until(lambda: "alpha" in link.present())
    link.send("alpha", {"kind": "finish"})
    federation.threads["alpha"].join(SECONDS)
    assert link.present() == {}
    assert receive(link, 1) == [("alpha", {"kind": "finish"})]


def test_an_answer_on_its_way_holds_up_nobody(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced, go_on = threading.Event(), threading.Event()
    push_objects = flower_node.push_objects

    def push_slowly(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread().name == "alpha":
            announced.set()
            go_on.wait(SECONDS)
        push_objects(*args, **kwargs)

    monkeypatch.setattr(flower_node, "push_objects", push_slowly)
    link = meet(federation)
    link.send("alpha", {"kind": "slow"})
    assert announced.wait(SECONDS)
    link.send("beta", {"kind": "fast"})
    assert receive(link, 1) == [("beta", {"kind": "fast"})]
    assert link.receive(0.0) == []
    go_on.set()
    assert receive(link, 1) == [("alpha", {"kind": "slow"})]


class Garbage(ConfigRecord):
    """A record whose bytes say that they are one and are none."""

    def deflate(self) -> bytes:
        body = b"\xff" * 5
        return b"ConfigRecord  %d\x00" % len(body) + body


def forged(content: Any) -> Any:
    """Return what a party that wants to harm the server sends in place of a record."""

    def pack(record: Record) -> Any:
        packed = pack_record(record)
        if threading.current_thread().name == "alpha":
            content(packed)
        return packed

    return pack


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda packed: packed.update(fields=Garbage()), id="no protobuf"),
        pytest.param(lambda packed: packed.pop("bytes"), id="incomplete"),
    ],
)
def test_what_is_no_record_is_told_and_costs_nobody_else_an_answer(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.setattr(flower_node, "pack_record", forged(content))
    link = meet(federation)
    link.send("alpha", {"kind": "round"})
    link.send("beta", {"kind": "round"})
    wait_until(lambda: len(link._state.message_res_store) == 2)
    assert receive(link, 1) == [("beta", {"kind": "round"})]
    wait_until(lambda: link.receive(0.0) == [] and len(federation.told["server"]) == 2)
    assert federation.told["server"][1].startswith("alpha: ")
    monkeypatch.undo()
    link.send("alpha", {"kind": "round"})
    assert receive(link, 1) == [("alpha", {"kind": "round"})]


def test_nothing_stays_in_the_server_s_memory(federation: Federation) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def answer(record: Record) -> Record:
        busy.set()
        go_on.wait(SECONDS)
        return record

    link = meet(federation, alpha=answer)
    link.send("alpha", {"round": 0, "large": os.urandom(6 * 2**20)})
    assert busy.wait(SECONDS)
    link.send("alpha", {"round": 1, "large": os.urandom(6 * 2**20)})
    link.send("alpha", {"round": 2})
    go_on.set()
    assert [record["round"] for _, record in receive(link, 2)] == [0, 2]
    assert len(link._state.object_store) == 0
    assert not link._state.message_ins_store
    assert not link._state.message_res_store


def test_parties_that_come_again_and_again_do_not_fill_the_disk(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_link, "_LOG_BYTES", 1_000)
    link = meet(federation)
    folder = federation.root / "server" / "flower"
    for _ in range(200):
        logging.getLogger("flwr").info("a node was activated")
    link.send("alpha", {})
    assert receive(link, 1) == [("alpha", {})]
    names = ("superlink.log", "superlink.log.1")
    assert sum((folder / name).stat().st_size for name in names) <= 2_000
    assert sorted(path.name for path in folder.glob("*.log*")) == sorted(names)


def test_a_party_whose_upload_expired_comes_back(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = "flwr.supercore.corestate.in_memory_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS"

    def answer_too_late(record: Record) -> Record:
        if record["round"] == 0:
            monkeypatch.setattr(constant, -1)
        return record

    link = meet(federation, alpha=answer_too_late)
    session = link.present()["alpha"]
    link.send("alpha", {"round": 0})
    wait_until(lambda: link.present().get("alpha", session) != session)
    assert "the connection to" in federation.told["alpha"][1]
    monkeypatch.undo()
    link.send("alpha", {"round": 1})
    assert receive(link, 1) == [("alpha", {"round": 1})]


def test_a_party_waits_for_a_server_that_is_not_there_and_says_so_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_node, "RETRY_SECONDS", 0.1)
    tried = threading.Event()
    activate = FlowerNode._activate

    def count(node: FlowerNode) -> int:
        if federation.told["alpha"]:
            tried.set()
        return activate(node)

    monkeypatch.setattr(FlowerNode, "_activate", count)
    federation.start("alpha")
    assert tried.wait(SECONDS)
    link = federation.open()
    wait_until(lambda: "alpha" in link.present())
    wait_until(lambda: len(federation.told["alpha"]) == 2)
    assert "cannot be reached" in federation.told["alpha"][0]
    assert federation.told["alpha"][1] == f"connected to {federation.address}"


def reissue(root: Path, hosts: list[str]) -> None:
    issue_server_certificate(root / "authority", root / "new", hosts)
    for name in ("server.key", "server.crt"):
        (root / "new" / name).replace(root / "server" / name)


def test_a_server_at_another_address_is_refused(federation: Federation) -> None:
    reissue(federation.root, ["fed.example.org"])
    federation.open()
    federation.start("alpha")
    federation.threads["alpha"].join(SECONDS)
    assert "127.0.0.1" in str(federation.failures["alpha"]).split("no good: ")[1]


def test_an_expired_certificate_is_refused(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LongAgo(credentials.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) - credentials.timedelta(days=400)

    # an authority of then, so that its certificate had begun
    monkeypatch.setattr(credentials, "datetime", LongAgo)
    shutil.rmtree(federation.root / "authority")
    create_authority(federation.root / "authority")
    shutil.copy(federation.root / "authority" / "ca.crt", federation.root / "alpha")
    shutil.copy(federation.root / "authority" / "ca.crt", federation.root / "server")
    reissue(federation.root, ["127.0.0.1"])
    federation.open()
    federation.start("alpha")
    federation.threads["alpha"].join(SECONDS)
    assert str(federation.failures["alpha"]).endswith("certificate has expired")
