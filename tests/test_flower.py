"""Flower between a server and a client: records as they were sent, sessions, and who gets in."""

import asyncio
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from federation_processes import write_federation
from fedsp.federation_settings import FederationSettings
from fedsp.flower_gate import MAX_BODY_BYTES, Gate
from fedsp.flower_link import FlowerLink
from fedsp.flower_node import FlowerNode
from fedsp.flower_records import pack_record, unpack_record
from fedsp.messages import MessageError
from fedsp.remote import FederationError
from fedsp.wire import Record
from parties import NAMES
from processes import free_port

KEY = b"-----BEGIN PUBLIC KEY-----"


@pytest.fixture(scope="module")
def settings(root: Path) -> FederationSettings:
    return write_federation(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation") / "root"


@pytest.fixture(scope="module")
def link(root: Path, settings: FederationSettings) -> Iterator[FlowerLink]:
    opened = FlowerLink(root / "server", settings.meeting_point, NAMES, print)
    yield opened
    opened.close()


class Client:
    """A client in a thread that sends back what came, backwards, until it is told to end."""

    def __init__(self, root: Path, settings: FederationSettings, name: str) -> None:
        self.is_over = False
        self.told: list[str] = []
        node = FlowerNode(root / "clients" / name, settings.meeting_point, self.told.append)
        self.thread = threading.Thread(
            target=node.serve, args=(self.answer, lambda: self.is_over), daemon=True
        )
        self.thread.start()

    def answer(self, record: Record) -> Record:
        self.is_over = record["kind"] == "finish"
        return {**record, "data": bytes(record["data"])[::-1]}


def wait_for(link: FlowerLink, party: str) -> str:
    deadline = time.monotonic() + 60
    while party not in link.present():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return link.present()[party]


def exchange(link: FlowerLink, party: str, record: Record) -> Record:
    link.send(party, record)
    came = link.receive(60)
    assert [name for name, _ in came] == [party]
    return came[0][1]


def test_records_come_back_and_a_new_session_has_another_name(
    link: FlowerLink, root: Path, settings: FederationSettings
) -> None:
    assert link.present() == {}
    first = Client(root, settings, "beta")
    session = wait_for(link, "beta")
    small: Record = {"kind": "round", "number": 3, "share": 0.5, "data": b""}
    assert exchange(link, "beta", small) == small
    # larger than a piece of Flower's, and than any request that the gate lets through
    large = bytes(range(256)) * (80 * 2**12)
    answer = exchange(link, "beta", {**small, "data": large})
    assert answer["data"] == large[::-1]
    exchange(link, "beta", {**small, "kind": "finish"})
    first.thread.join(30)
    assert not first.thread.is_alive()
    second = Client(root, settings, "beta")
    assert wait_for(link, "beta") != session
    exchange(link, "beta", {**small, "kind": "finish"})
    second.thread.join(30)


def test_old_ciphers_are_not_spoken(
    link: FlowerLink, root: Path, settings: FederationSettings
) -> None:
    address = settings.meeting_point
    trusting = ssl.create_default_context(cafile=root / "server" / "ca.crt")
    trusting.maximum_version = ssl.TLSVersion.TLSv1_2

    def speak() -> str:
        with (
            socket.create_connection((address.host, address.port), timeout=10) as line,
            trusting.wrap_socket(line, server_hostname=address.host) as spoken,
        ):
            return str(spoken.cipher())

    assert "GCM" in speak()
    trusting.set_ciphers("ECDHE+AES+SHA:!AESGCM")
    with pytest.raises(ssl.SSLError):
        speak()


def test_what_was_not_fetched_is_withdrawn_when_there_is_something_newer(
    link: FlowerLink, root: Path, settings: FederationSettings
) -> None:
    # it was there once, and is not there to fetch it
    first = Client(root, settings, "gamma")
    wait_for(link, "gamma")
    exchange(link, "gamma", {"kind": "finish", "data": b""})
    first.thread.join(30)
    link.send("gamma", {"kind": "round", "number": 1, "data": b""})
    link.send("gamma", {"kind": "finish", "number": 2, "data": b""})
    client = Client(root, settings, "gamma")
    came = []
    while not came:
        came = link.receive(60)
    assert [record["number"] for _, record in came] == [2]
    client.thread.join(30)


def test_a_second_client_with_the_same_key_is_told(
    link: FlowerLink, root: Path, settings: FederationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(root, settings, "alpha")
    wait_for(link, "alpha")
    monkeypatch.setattr("fedsp.flower_node.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("fedsp.flower_node._OLD_SECONDS", 0.3)
    second = FlowerNode(root / "clients" / "alpha", settings.meeting_point, print)
    with pytest.raises(
        FederationError, match=r"is a second client running with the same node\.key"
    ):
        second.serve(client.answer, lambda: False)
    exchange(link, "alpha", {"kind": "finish", "data": b""})
    client.thread.join(30)


def test_clocks_that_differ_are_named(
    link: FlowerLink, root: Path, settings: FederationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = datetime.now(UTC) - timedelta(hours=2)
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", lambda: behind)
    node = FlowerNode(root / "clients" / "alpha", settings.meeting_point, print)
    with pytest.raises(FederationError, match=r"its clock says .* UTC, this machine's .* UTC"):
        node.serve(lambda record: record, lambda: False)


def test_a_party_without_a_key_stops_the_server(root: Path, settings: FederationSettings) -> None:
    free = replace(settings.meeting_point, port=free_port())
    with pytest.raises(FederationError, match=r"delta\.pub: no public key of a party"):
        FlowerLink(root / "server", free, [*NAMES, "delta"], print)


@pytest.mark.parametrize(
    ("path", "key", "length", "status"),
    [
        ("/v1/fleet/pull-messages", KEY, b"10", 200),
        ("/v1/fleet/pull-messages", b"another", b"10", 403),
        ("/v1/fleet/pull-messages", None, b"10", 403),
        ("/v1/fleet/pull-messages", KEY, b"%d" % (MAX_BODY_BYTES + 1), 403),
        ("/v1/fleet/pull-messages", KEY, None, 403),
        ("/v1/fleet/pull-messages", KEY, b"-1", 403),
        ("/v1/control/start-run", KEY, b"10", 403),
        ("/v1/runtime/push-messages", KEY, b"10", 403),
        ("/docs", KEY, b"0", 403),
        ("/health", KEY, b"0", 403),
    ],
)
def test_the_gate_opens_to_known_keys_and_client_routes_only(
    path: str, key: bytes | None, length: bytes | None, status: int
) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"flwr-public-key", b64encode(key))] if key is not None else []
    headers += [(b"content-length", length)] if length is not None else []
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(Gate(application, [KEY])(scope, None, send))
    assert sent[0]["status"] == status


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fields": ConfigRecord({"a": 1})}),
        RecordDict({"fields": MetricRecord({"a": 1}), "bytes": ArrayRecord({})}),
        RecordDict({"fields": ConfigRecord({"a": [1, 2]}), "bytes": ArrayRecord({})}),
    ],
)
def test_foreign_records_are_refused(content: RecordDict) -> None:
    with pytest.raises(MessageError):
        unpack_record(content)


def test_a_record_is_the_same_after_packing() -> None:
    record: Record = {"a": 1, "b": "text", "c": 0.25, "d": b"", "e": b"\x00\xff" * 1000}
    assert unpack_record(pack_record(record)) == record
