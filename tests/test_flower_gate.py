"""What a party with a valid key may put into the server's memory: a real SuperLink over TLS."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from sys import getrecursionlimit
from typing import Any

import httpx
import pytest
from flwr.app import Array, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedsp.flower_gate import ANSWER_OVERHEAD_BYTES
from fedsp.flower_link import FlowerLink
from fedsp.flower_node import FlowerNode
from fedsp.flower_records import MESSAGE_TYPE, pack_record
from fedsp.wire import Record
from link_parties import Federation, meet, receive, wait_until

MIB = 2**20


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


class Attacker:
    """Alpha, with its key and a client of its own making."""

    def __init__(self, federation: Federation) -> None:
        self._node = FlowerNode(federation.root / "alpha", federation.address, print)
        self.node = Node(node_id=self._node._activate())

    def fetch(self) -> Message | None:
        return self._node._fetch(self.node)

    def announce(self, message: Message, tree: ObjectTree | None = None) -> str:
        """Announce a message, with other parts than it has where they are given."""
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[tree or get_object_tree(message)],
            )
        session_id: str = self._node._client.PushMessages(request).session_id
        return session_id

    def upload(self, message: Message, session_id: str, *, but_last: bool = False) -> None:
        """Upload the parts of a message, or all but the message itself."""
        parts = [*get_all_nested_objects(message).items()]
        for object_id, part in parts[:-1] if but_last else parts:
            self.push(message, object_id, part.deflate(), session_id)

    def push(self, message: Message, object_id: str, content: bytes, session_id: str) -> None:
        """Upload one part of a message."""
        self._node._client.PushObject(
            PushObjectRequest(
                node=self.node,
                run_id=message.metadata.run_id,
                object_id=object_id,
                object_content=content,
                session_id=session_id,
            )
        )

    def close(self) -> None:
        self._node._leave(self.node.node_id)
        self._node._client.close()


@pytest.fixture
def link(federation: Federation) -> FlowerLink:
    return federation.open()


@pytest.fixture
def attacker(federation: Federation, link: FlowerLink) -> Iterator[Attacker]:
    made = Attacker(federation)
    yield made
    made.close()


def question(link: FlowerLink, attacker: Attacker, record: Record) -> Message:
    link.send("alpha", record)
    message = attacker.fetch()
    assert message is not None
    return message


def held_bytes(link: FlowerLink) -> int:
    """Bytes of all parts that Flower keeps."""
    return sum(len(entry.content) for entry in link._state.object_store.store.values())


def refused() -> Any:
    return pytest.raises(httpx.HTTPStatusError, match="413")


def test_an_answer_without_end_is_refused_and_the_honest_party_s_counts(
    federation: Federation,
) -> None:
    answers = [bytes(40 * MIB), b"honest"]
    link = meet(federation, alpha=lambda record: {**record, "data": answers.pop(0)})
    link.send("alpha", {"kind": "round", "data": b""})
    link.send("beta", {"kind": "round", "data": bytes(6 * MIB)})
    assert receive(link, 1) == [("beta", {"kind": "round", "data": bytes(6 * MIB)})]
    # alpha's session ended over it; in the next one it is asked again and takes part
    wait_until(lambda: federation.told["alpha"].count(f"connected to {federation.address}") == 2)
    link.send("alpha", {"kind": "round", "data": b""})
    assert receive(link, 1) == [("alpha", {"kind": "round", "data": b"honest"})]
    lines = federation.told["server"][1:]
    assert [line.split(", which")[0] for line in lines] == [
        f"alpha: refused an answer of more than {len('round') + ANSWER_OVERHEAD_BYTES} bytes"
    ]
    assert held_bytes(link) == 0


def test_an_answer_may_be_as_large_as_its_question(federation: Federation) -> None:
    link = meet(federation, alpha=lambda record: {"data": bytes(reversed(record["data"]))})
    data = bytes(range(256)) * (48 * 4096)
    link.send("alpha", {"data": data})
    assert receive(link, 1) == [("alpha", {"data": data[::-1]})]
    assert len(federation.told["server"]) == 1


def test_a_part_that_is_sent_again_counts_once(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    asked = question(link, attacker, {"data": b""})
    answer = Message(pack_record({"data": bytes(6 * MIB // 10)}), reply_to=asked)
    session_id = attacker.announce(answer)
    for _ in range(3):
        attacker.upload(answer, session_id, but_last=True)
    attacker.upload(answer, session_id)
    assert receive(link, 1) == [("alpha", {"data": bytes(6 * MIB // 10)})]


def test_an_answer_that_names_one_piece_again_and_again_is_refused(
    federation: Federation,
    link: FlowerLink,
    attacker: Attacker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flower would take a copy of the piece each time: half a gigabyte from 100 kB."""
    asked = question(link, attacker, {"data": b""})

    def deflate(array: Array) -> bytes:
        body = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype}
        text = json.dumps({**body, "arraychunk_ids": [0] * 8000}).encode()
        return add_header_to_object_body(object_body=text, obj=array)

    with monkeypatch.context() as patch:
        patch.setattr(Array, "deflate", deflate)
        answer = Message(pack_record({"data": bytes(MIB // 16)}), reply_to=asked)
        attacker.upload(answer, attacker.announce(answer))
    assert link.receive(2.0) == []
    assert federation.told["server"][-1] == (
        f"alpha: an answer that unpacks to more than {ANSWER_OVERHEAD_BYTES} bytes"
    )
    assert held_bytes(link) == 0


def test_what_is_begun_and_never_ended_does_not_pile_up(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    for number in range(6):
        asked = question(link, attacker, {"data": bytes([number]) * MIB})
        answer = Message(pack_record({"data": bytes([9, number]) * (MIB // 2)}), reply_to=asked)
        attacker.upload(answer, attacker.announce(answer), but_last=True)
    # two questions are open, and each has an answer that is not whole
    assert held_bytes(link) < 2 * (MIB + 2**14)
    assert len(link._state._object_push_sessions) == 2
    assert len(link._state.message_ins_store) == len(link._state.message_res_store) == 2


def test_parts_that_are_only_announced_count_too(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    asked = question(link, attacker, {"data": b""})
    answer = Message(pack_record({"data": b""}), reply_to=asked)
    many = [ObjectTree(object_id=f"{number:064x}") for number in range(2000)]
    with refused():
        attacker.announce(answer, ObjectTree(object_id=answer.object_id, children=many))
    assert len(link._state.object_store) == 0


def test_parts_of_earlier_answers_are_counted_again(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    def half(number: int) -> Any:
        return {"data": bytes([number]) * (6 * MIB // 10)}

    asked = question(link, attacker, {"data": b""})
    first = Message(pack_record(half(1)), reply_to=asked)
    attacker.upload(first, attacker.announce(first), but_last=True)
    asked = question(link, attacker, {"data": b""})
    both = Message(pack_record(half(1) | {"more": half(2)["data"]}), reply_to=asked)
    session_id = attacker.announce(both)
    with refused():
        attacker.upload(both, session_id)


def test_a_part_of_more_than_it_was_announced_with_is_refused(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    # otherwise each answer could hold the one before it, deeper than Flower can follow
    store = link._state.object_store
    parts = [ObjectTree(object_id=f"{depth:064x}") for depth in range(2 * getrecursionlimit())]
    for inner, outer in pairwise(parts):
        nested = ObjectTree(object_id=outer.object_id, children=[inner])
        store.preregister(link._grid.run.run_id, nested)
    asked = question(link, attacker, {"data": b""})
    answer = Message(pack_record({"data": b""}), reply_to=asked)
    with refused():
        attacker.announce(answer, ObjectTree(object_id=answer.object_id, children=[parts[-1]]))
    assert federation.told["server"][1:] == [
        "alpha: refused an answer with a part that is not as it was before"
    ]


def test_a_second_answer_to_a_question_is_refused(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    asked = question(link, attacker, {"data": b""})
    answer = Message(pack_record({"data": b"first"}), reply_to=asked)
    attacker.upload(answer, attacker.announce(answer))
    with refused():
        attacker.announce(Message(pack_record({"data": b"second"}), reply_to=asked))
    assert receive(link, 1) == [("alpha", {"data": b"first"})]


def test_a_party_cannot_ask_another_one_in_the_server_s_name(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    beta = FlowerNode(federation.root / "beta", federation.address, print)
    request = PullMessagesRequest(node=Node(node_id=beta._activate()))
    asked = question(link, attacker, {"data": b""})
    forged = Message(pack_record({"kind": "round"}), link._nodes["beta"], MESSAGE_TYPE, ttl=60.0)
    forged.metadata.__dict__["_run_id"] = asked.metadata.run_id
    forged.metadata.__dict__["_src_node_id"] = asked.metadata.src_node_id
    with refused():
        attacker.announce(forged)
    assert not beta._client.PullMessages(request).messages_list
    beta._client.close()
    assert federation.told["server"][1:] == [
        "alpha: refused a message that is no answer to an open question of its own"
    ]


def test_parts_of_what_was_not_announced_are_refused(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    asked = question(link, attacker, {"data": b""})
    with refused():
        attacker.upload(Message(pack_record({"data": b""}), reply_to=asked), "no session")
    assert len(federation.told["server"]) == 2


def test_parts_beside_those_that_were_announced_are_refused(
    federation: Federation, link: FlowerLink, attacker: Attacker
) -> None:
    asked = question(link, attacker, {"data": b""})
    answer = Message(pack_record({"data": b"mine"}), reply_to=asked)
    session_id = attacker.announce(answer)
    # without a byte of content it would not count, but its name would be kept
    with refused():
        attacker.push(asked, "f" * MIB, b"", session_id)
    assert federation.told["server"][1:] == [
        "alpha: refused a part of an answer that it did not announce"
    ]
    attacker.upload(answer, session_id)
    assert receive(link, 1) == [("alpha", {"data": b"mine"})]
