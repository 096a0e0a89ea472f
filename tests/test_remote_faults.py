"""What clients do to the server's executor: absent, late, twice, forged, refusing, coming back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.executors import Reply
from fedsp.ledger import Ledger, read_ledger
from fedsp.messages import ClientUpdate, ServerBroadcast, encode, encode_handout
from fedsp.remote import Deal, FederationError, Patience, RemoteExecutor
from fedsp.wire import Answer, Record, Request, read_request, to_record
from parties import NAMES

PAYLOAD = {"soft_prompt": torch.zeros(2, 2, 1, 3, 4)}
HANDOUT = encode_handout({"weight": torch.ones(3)})


def broadcast(round_idx: int) -> bytes:
    return encode(ServerBroadcast(round_idx, PAYLOAD), "float32")


def update(request: Request, client_id: int | None = None) -> Answer:
    own = request.client_id if client_id is None else client_id
    data = encode(ClientUpdate(request.round_idx, own, PAYLOAD, 5), "float32")
    return Answer(request.request_id, "update", update=data)


class Scripted:
    """A link whose parties do what a test says; time passes only while something is received."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.sessions = dict.fromkeys(NAMES, "1")
        self.asked: list[tuple[str, Request]] = []
        self.inbox: list[tuple[str, Record]] = []
        self.on_request: Callable[[str, Request], None] = self.reply
        self.on_wait: Callable[[], None] = lambda: None
        monkeypatch.setattr("fedsp.remote.time.monotonic", lambda: self.now)

    def reply(self, party: str, request: Request) -> None:
        self.inbox.append((party, to_record(update(request))))

    def present(self) -> dict[str, str]:
        return dict(self.sessions)

    def send(self, party: str, record: Record) -> None:
        request = read_request(record)
        self.asked.append((party, request))
        self.on_request(party, request)

    def receive(self, seconds: float) -> list[tuple[str, Record]]:
        if not self.inbox:
            self.now += seconds
            self.on_wait()
        came, self.inbox = self.inbox, []
        return came

    def close(self) -> None:
        pass


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(monkeypatch)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def make(link: Scripted, tmp_path: Path, told: list[str]) -> Callable[..., RemoteExecutor]:
    def make_executor(**patience: Any) -> RemoteExecutor:
        deal = Deal(NAMES, HANDOUT, {"client": "a"}, dict.fromkeys(range(len(NAMES)), 3))
        waits = {"join_seconds": 60.0, "round_seconds": 100.0, **patience}
        ledger = Ledger(tmp_path / "ledger.jsonl")
        return RemoteExecutor(link, deal, ledger, Patience(**waits), told.append)

    return make_executor


def run(executor: RemoteExecutor, round_idx: int = 0) -> list[Reply]:
    return list(executor.run(round_idx, [0, 1, 2], broadcast(round_idx), lambda client_id: None))


def test_every_client_gets_the_handout_once_and_answers(
    link: Scripted, make: Callable[..., RemoteExecutor], tmp_path: Path
) -> None:
    executor = make()
    assert sorted(reply.client_id for reply in run(executor, 0)) == [0, 1, 2]
    run(executor, 1)
    assert [bool(request.handout) for _, request in link.asked] == [True] * 3 + [False] * 3
    rows = read_ledger(tmp_path / "ledger.jsonl")
    kinds = [row["kind"] for row in rows if row["client"] == 1]
    assert kinds == [
        *("auxiliary_handout", "server_broadcast", "client_update"),
        *("server_broadcast", "client_update"),
    ]
    assert executor.metrics() == dict.fromkeys(
        ("round/absent_clients", "round/refused_clients", "round/late_clients"), 0.0
    )
    resumed = make()
    resumed.load_state_dict(executor.state_dict())
    run(resumed, 2)
    assert not any(request.handout for _, request in link.asked[6:])


def test_too_few_clients_end_the_run_and_name_who_is_missing(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    del link.sessions["beta"]
    with pytest.raises(FederationError, match=r"`join_seconds` 60 there are 2; not there: beta"):
        run(make())
    assert not link.asked
    assert 60 < link.now < 70


def test_fewer_clients_suffice_where_the_operator_says_so(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    del link.sessions["beta"]
    executor = make(min_clients=2)
    assert sorted(reply.client_id for reply in run(executor)) == [0, 2]
    assert executor.metrics()["round/absent_clients"] == 1
    assert link.now == 0  # who never came is not waited for once the others have answered


def test_a_client_that_comes_while_others_work_takes_part(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    del link.sessions["beta"]
    waiting: list[tuple[str, Request]] = []
    link.on_request = lambda party, request: (
        waiting.append((party, request)) if party == "alpha" else link.reply(party, request)
    )

    def arrive() -> None:
        link.sessions["beta"] = "1"
        if len(link.asked) == 3:
            link.reply(*waiting.pop())

    link.on_wait = arrive
    assert sorted(reply.client_id for reply in run(make(min_clients=2))) == [0, 1, 2]


def test_a_client_that_comes_back_is_asked_again(
    link: Scripted, make: Callable[..., RemoteExecutor], told: list[str]
) -> None:
    first: list[Request] = []

    def lose_the_first(party: str, request: Request) -> None:
        if party == "gamma" and not first:
            first.append(request)
        else:
            link.reply(party, request)

    link.on_request = lose_the_first
    link.on_wait = lambda: link.sessions.update(gamma="2")
    executor = make()
    assert sorted(reply.client_id for reply in run(executor)) == [0, 1, 2]
    assert [party for party, _ in link.asked] == [*NAMES, "gamma"]
    # the answer to the first request comes after all: a second one, which the federation leaves out
    link.inbox.append(("gamma", to_record(update(first[0]))))
    run(executor, 1)
    assert executor.metrics()["round/late_clients"] == 1
    assert told == ["gamma: the answer to round 0 came too late"]


def test_a_round_ends_at_its_deadline(
    link: Scripted, make: Callable[..., RemoteExecutor], told: list[str], tmp_path: Path
) -> None:
    late: list[Request] = []
    link.on_request = lambda party, request: (
        late.append(request) if party == "beta" else link.reply(party, request)
    )
    executor = make()
    assert sorted(reply.client_id for reply in run(executor)) == [0, 2]
    assert 100 <= link.now <= 101
    assert executor.metrics()["round/absent_clients"] == 1
    assert told == ["round 0: no answer from beta"]
    # what comes later is in the ledger, for the audit, and in no round
    link.inbox.append(("beta", to_record(update(late[0]))))
    link.on_request = link.reply
    assert [reply.client_id for reply in run(executor, 1)].count(1) == 1
    rows = read_ledger(tmp_path / "ledger.jsonl")
    assert [row["round"] for row in rows if row["client"] == 1 and row["direction"] == "up"] == [
        0,
        1,
    ]


def test_a_client_without_its_handout_gets_it_again(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    executor = make()
    executor.load_state_dict({"handed_out": [0, 1, 2]})

    def want_it(party: str, request: Request) -> None:
        if request.handout or party != "beta":
            link.reply(party, request)
        else:
            missing = to_record(Answer(request.request_id, "handout_missing"))
            link.inbox.append((party, missing))

    link.on_request = want_it
    assert len(run(executor)) == 3
    assert [party for party, request in link.asked if request.handout] == ["beta"]


def test_what_was_asked_counts_as_answered_in_all_starts(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    """A budget is told by it: beta may have answered each time, whatever arrived."""
    assert make().most_answers() == 0
    run(make(), 0)
    answered = []

    def lose_the_first(party: str, request: Request) -> None:
        if party == "beta" and not answered:
            answered.append(request)
            link.sessions["beta"] = "2"
        else:
            link.reply(party, request)

    link.on_request = lose_the_first
    run(make(), 1)
    assert [party for party, _ in link.asked].count("beta") == 3
    assert make().most_answers() == 3


def test_a_client_that_never_keeps_its_handout_gets_it_no_third_time(
    link: Scripted, make: Callable[..., RemoteExecutor], told: list[str]
) -> None:
    def want_more(party: str, request: Request) -> None:
        if party == "beta":
            missing = to_record(Answer(request.request_id, "handout_missing"))
            link.inbox.append((party, missing))
        else:
            link.reply(party, request)

    link.on_request = want_more
    assert len(run(make())) == 2
    assert [party for party, _ in link.asked].count("beta") == 2
    assert told == ["round 0: beta does not take part: handout_missing"]


@pytest.mark.parametrize("reason", ["two\nlines", "\x1b[2J", "x" * 1001])
def test_what_a_terminal_would_obey_is_not_printed(
    link: Scripted, make: Callable[..., RemoteExecutor], told: list[str], reason: str
) -> None:
    def write(party: str, request: Request) -> None:
        answer = Answer(request.request_id, "refusal", reason=reason)
        link.inbox.append((party, to_record(answer)))

    link.on_request = write
    assert not run(make(round_seconds=3.0))
    assert all(line.isprintable() and len(line) < 300 for line in told)
    assert told[0].startswith("alpha: answer: `reason` must be one short line, got '")


def test_a_refusal_is_told_and_the_round_goes_on(
    link: Scripted, make: Callable[..., RemoteExecutor], told: list[str]
) -> None:
    def refuse(party: str, request: Request) -> None:
        if party == "alpha":
            link.inbox.append(
                (party, to_record(Answer(request.request_id, "refusal", reason="no")))
            )
        else:
            link.reply(party, request)

    link.on_request = refuse
    executor = make()
    assert len(run(executor)) == 2
    assert executor.metrics()["round/refused_clients"] == 1
    assert told == ["round 0: alpha does not take part: no"]


def test_forged_and_foreign_answers_are_left_out(
    link: Scripted, make: Callable[..., RemoteExecutor], told: list[str]
) -> None:
    def forge(party: str, request: Request) -> None:
        link.reply(party, request)
        if party == "alpha":
            # beta answers what alpha was asked, under alpha's id
            link.inbox.append(("beta", to_record(update(request))))
            link.inbox.append(("gamma", {"protocol": 99, "fedsp": "9.9"}))
            link.inbox.append(("gamma", {**to_record(update(request)), "request_id": b"x"}))
            link.inbox.append(("gamma", to_record(Answer("unknown", "update", update=b"x"))))

    link.on_request = forge
    replies = run(make())
    assert sorted(reply.client_id for reply in replies) == [0, 1, 2]
    assert told[0] == "beta: an answer that nobody asked for: update"
    assert "the client runs fedsp 9.9 (protocol 99), this side fedsp " in told[1]
    assert "`request_id` must be str, got bytes" in told[2]
    assert told[3] == "gamma: an answer that nobody asked for: update"


def test_a_second_answer_reaches_the_federation_which_rejects_it(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    def twice(party: str, request: Request) -> None:
        link.reply(party, request)
        link.reply(party, request)

    link.on_request = twice
    replies = run(make())
    assert [reply.client_id for reply in replies].count(0) == 2


def test_the_end_is_told_to_those_who_are_there(
    link: Scripted, make: Callable[..., RemoteExecutor]
) -> None:
    del link.sessions["beta"]
    link.on_request = lambda party, request: link.inbox.append(
        (party, to_record(Answer(request.request_id, "done")))
    )
    make().finish()
    assert sorted((party, request.kind) for party, request in link.asked) == [
        ("alpha", "finish"),
        ("gamma", "finish"),
    ]
    assert link.now == 0
