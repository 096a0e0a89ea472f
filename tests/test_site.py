"""What a client's site does with what a server asks, and with what goes wrong at its own place."""

import errno
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from fedsp import wire
from fedsp.ledger import read_ledger
from fedsp.messages import ServerBroadcast, encode, encode_handout
from fedsp.partition import Parties
from fedsp.privacy import LocalPrivacy
from fedsp.site import ClientSite
from fedsp.terms import differing, terms
from fedsp.wire import Answer, Request, read_answer, to_record
from parties import NAMES, make_site, write_party_rows
from tiny import make_client, make_data, make_server, make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_party_rows(tmp_path_factory.mktemp("rows"))["beta"]


@pytest.fixture(scope="module")
def first(folder: Path) -> Request:
    """What a server would ask beta first."""
    server = make_server(folder)
    server.configure_model()
    handout = encode_handout(server.auxiliary_recipe.build(server.require_model()[0]).handout())
    return Request(
        request_id="first",
        kind="round",
        client_id=1,
        participations=3,
        terms=terms({}),
        handout_sha256=hashlib.sha256(handout).hexdigest(),
        handout=handout,
        broadcast=encode(ServerBroadcast(0, server.payload()), "float32"),
    )


@pytest.fixture
def make(folder: Path, rows: str, tmp_path: Path) -> Callable[..., ClientSite]:
    return lambda **client: make_site(folder, tmp_path / "run", "beta", rows, **client)


def ask(site: ClientSite, request: Request) -> Answer:
    return read_answer(site.answer(to_record(request)))


def test_a_site_works_and_writes_down_what_came_and_left(
    make: Callable[..., ClientSite], first: Request
) -> None:
    site = make()
    answer = ask(site, first)
    assert (answer.kind, answer.request_id) == ("update", "first")
    rows = read_ledger(site.folder.ledger)
    expected = [("down", first.handout), ("down", first.broadcast), ("up", answer.update)]
    hashes = [(way, hashlib.sha256(data).hexdigest()) for way, data in expected]
    assert [(row["direction"], row["sha256"]) for row in rows] == hashes
    assert {row["client"] for row in rows} == {1}
    # the same question gets the same answer, from the state before it
    assert ask(site, replace(first, handout=b"")).update == answer.update
    assert not site.has_ended


def test_a_site_that_starts_again_has_its_handout_and_its_state(
    make: Callable[..., ClientSite], first: Request
) -> None:
    site = make()
    ask(site, first)
    server_next = encode(ServerBroadcast(1, wire_payload(first)), "float32")
    second = replace(first, request_id="second", round_idx=1, handout=b"", broadcast=server_next)
    undisturbed = ask(site, second)
    site.close()
    assert ask(make(), second).update == undisturbed.update


def wire_payload(request: Request) -> Any:
    return load(request.broadcast)


def test_a_site_without_its_handout_asks_for_it(
    make: Callable[..., ClientSite], first: Request
) -> None:
    assert ask(make(), replace(first, handout=b"")).kind == "handout_missing"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client_id": 0}, "the server takes this client for client 0, its configuration says 1"),
        ({"terms": {**terms({}), "data.task": "x"}}, "these differ: data.task"),
        ({"handout_sha256": "0" * 64}, "the hand-out is not the one that the server speaks of"),
        ({"broadcast": b"nonsense"}, "not a well-formed message"),
        ({"round_idx": 5}, "expected round_idx 5, got 0"),
        ({"handout": b"short", "handout_sha256": hashlib.sha256(b"short").hexdigest()}, "message"),
    ],
)
def test_what_is_not_as_agreed_is_refused_and_nothing_learned(
    make: Callable[..., ClientSite], first: Request, change: dict[str, Any], reason: str
) -> None:
    site = make()
    answer = ask(site, replace(first, **change))
    assert answer.kind == "refusal"
    assert reason in answer.reason
    assert not [row for row in read_ledger(site.folder.ledger) if row["direction"] == "up"]
    assert not site.has_ended
    # the next question is answered all the same
    assert ask(site, first).kind == "update"


def test_another_release_is_refused_by_name(
    make: Callable[..., ClientSite], first: Request
) -> None:
    record = {**to_record(first), "protocol": wire.PROTOCOL + 1, "fedsp": "9.9.9"}
    answer = read_answer(make().answer(record))
    assert answer.kind == "refusal"
    assert "the server runs fedsp 9.9.9 (protocol 2), this side fedsp " in answer.reason


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "delete"},
        {"round_idx": -1},
        {"participations": 0},
        {"round_idx": "0"},
        {"round_idx": True},
        {"request_id": "x" * 30_000},
        {"terms": "[1]"},
        {"terms": "{"},
        {"terms": '{"a": 1}'},
        {"surplus": 1},
        {"handout": "text"},
    ],
)
def test_malformed_requests_are_refused(
    make: Callable[..., ClientSite], first: Request, change: dict[str, Any]
) -> None:
    assert read_answer(make().answer({**to_record(first), **change})).kind == "refusal"


def test_a_full_disk_ends_the_client_and_tells_the_server_nothing(
    make: Callable[..., ClientSite], first: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make()

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("fedsp.client_state.write_bytes_atomically", full)
    answer = ask(site, first)
    assert (answer.kind, answer.reason) == ("refusal", "the client failed and has ended")
    assert site.has_ended
    assert isinstance(site.failure, OSError)
    assert "No space left" in str(site.failure)
    # what was there before is whole: started again, it answers
    monkeypatch.undo()
    assert ask(make(), first).kind == "update"


def test_a_spent_budget_is_a_refusal(make: Callable[..., ClientSite], first: Request) -> None:
    budget = LocalPrivacy(noise_multiplier=3.0, clip_norm=1.0, delta=1e-5, max_epsilon=3.0)
    site = make(privacy=budget)
    kinds = []
    for round_idx in range(6):
        data = encode(ServerBroadcast(round_idx, wire_payload(first)), "float32")
        kinds.append(ask(site, replace(first, round_idx=round_idx, broadcast=data)).kind)
    assert kinds[0] == "update"
    assert kinds[-1] == "refusal"
    assert not site.has_ended


def test_the_end_is_answered(make: Callable[..., ClientSite]) -> None:
    site = make()
    assert ask(site, Request("last", "finish")).kind == "done"
    assert site.is_over


def test_a_site_without_data_says_where_to_name_it(folder: Path, tmp_path: Path) -> None:
    splits = dict.fromkeys(("server", "public", "selection", "test"))
    data = make_data(folder, clients=None, partitioner=Parties(NAMES, own="beta"), **splits)
    with pytest.raises(ValueError, match=r"`data.clients` is null. Name this party's data"):
        ClientSite(
            make_trainer(tmp_path / "run"), make_server(folder), make_client(), data, 1, print
        )
    assert not (tmp_path / "run").exists()


def test_terms_name_what_differs_and_nothing_else() -> None:
    config = {
        "trainer": {"communication": {"wire_dtype": "float32"}, "num_rounds": 3},
        "client": {"class_path": "c", "init_args": {"joint": False, "privacy": None}},
        "data": {"init_args": {"task": {"class_path": "t"}, "clients": {"class_path": "mine"}}},
    }
    other = {
        "trainer": {"communication": {"wire_dtype": "float16"}, "num_rounds": 9},
        "client": {"class_path": "c", "init_args": {"joint": False, "privacy": {"a": 1}}},
        "data": {"init_args": {"task": {"class_path": "t"}, "clients": {"class_path": "theirs"}}},
    }
    assert differing(terms(config), terms(other)) == ["trainer.communication.wire_dtype"]
    assert differing(terms(config), terms(config)) == []


def test_noise_by_which_earlier_answers_would_be_cheaper_is_refused(
    make: Callable[..., ClientSite], first: Request
) -> None:
    def noisy(noise_multiplier: float, max_epsilon: float = 100.0) -> LocalPrivacy:
        return LocalPrivacy(noise_multiplier, 1.0, 1e-3, max_epsilon)

    make(privacy=noisy(4.0)).close()
    site = make(privacy=noisy(2.0))  # nothing was answered yet
    assert ask(site, first).kind == "update"
    site.close()
    make(privacy=noisy(2.0, max_epsilon=200.0)).close()
    with pytest.raises(ValueError, match=r"\[2.0, 0.001\] .* earlier answers, got \[5.0, 0.001\]"):
        make(privacy=noisy(5.0))
