"""The executor of a live federation: the clients are elsewhere, behind a link.

It knows who is there, whom it asked and how long it waits; nothing of networks.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from fedsp.executors import Executor, Reply
from fedsp.ledger import Ledger, digest, read_ledger
from fedsp.messages import MessageError
from fedsp.wire import Answer, Record, Request, read_answer, to_record

POLL_SECONDS = 1.0


class FederationError(RuntimeError):
    """Something between the parties that a person has to mend; a run can be resumed after it."""


class Link(Protocol):
    """Carries records to and from the parties."""

    def present(self) -> dict[str, str]:
        """Return who is there: its session by party, another one once it has come back."""
        ...

    def send(self, party: str, record: Record) -> None:
        """Send a record to a party that is there."""
        ...

    def receive(self, seconds: float) -> list[tuple[str, Record]]:
        """Return what has come, by party; wait for the first at most so long."""
        ...

    def close(self) -> None:
        """Let go of the network."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long a server waits.

    Args:
        min_clients: Clients of the cohort that must be there before a round starts; None: all.
        join_seconds: How long it waits for them before it gives up.
        round_seconds: How long a round waits for answers; later ones are left out.
    """

    min_clients: int | None = None
    join_seconds: float = 600.0
    round_seconds: float = 3600.0


@dataclass(frozen=True)
class Deal:
    """What the server gives and asks in every request.

    Args:
        parties: Names, in the order of the client ids.
        handout: The encoded auxiliary model.
        terms: Checksums of the settings that both sides must share.
        participations: How often each client takes part in the whole run, by id.
    """

    parties: Sequence[str]
    handout: bytes
    terms: dict[str, str]
    participations: Mapping[int, int]


class RemoteExecutor(Executor):
    """Asks the parties of a live federation, whoever is there, and takes what comes in time."""

    def __init__(
        self,
        link: Link,
        deal: Deal,
        ledger: Ledger,
        patience: Patience,
        tell: Callable[[str], None],
    ) -> None:
        """Start with nobody asked.

        Args:
            link: Reaches the parties.
            deal: What every request says.
            ledger: Every payload is written down before it is handed on.
            patience: How long to wait.
            tell: Called with a line for the operator.
        """
        self.link, self.deal, self.ledger = link, deal, ledger
        self.patience, self.tell = patience, tell
        self._handout_digest = digest(deal.handout)
        self._handed_out: set[int] = set()
        # what was asked of whom since this process started: an answer may come rounds later
        self._asked: dict[str, tuple[int, int]] = {}
        self._counts = dict.fromkeys(("absent", "refused", "late"), 0)

    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        """Ask those of the cohort who are there, and who come while others work.

        A party that was asked and comes back is asked again: only its answer was lost.

        Raises:
            FederationError: If too few are there for a round.
        """
        self._counts = dict.fromkeys(self._counts, 0)
        self._wait_for_enough(round_idx, cohort)
        sessions: dict[int, str] = {}
        waiting, given_again = set(cohort), set[int]()
        described = digest(broadcast)
        deadline = time.monotonic() + self.patience.round_seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            for client_id, session in self._newly_there(waiting, sessions):
                if client_id not in sessions:
                    on_start(client_id)
                self._ask(round_idx, client_id, broadcast, described)
                sessions[client_id] = session
            if not waiting & sessions.keys():
                break  # all who were asked have answered; nobody waits for those who never came
            for party, record in self.link.receive(min(POLL_SECONDS, left)):
                answer, client_id = self._read(party, record, round_idx)
                if answer is None:
                    continue
                if answer.kind == "handout_missing" and client_id in waiting - given_again:
                    given_again.add(client_id)
                    self._handed_out.discard(client_id)
                    self._ask(round_idx, client_id, broadcast, described)
                elif answer.kind == "update":
                    waiting.discard(client_id)
                    yield Reply(client_id, answer.update, {})
                else:
                    waiting.discard(client_id)
                    self._counts["refused"] += 1
                    reason = answer.reason or answer.kind
                    self.tell(f"round {round_idx}: {party} does not take part: {reason}")
        self._counts["absent"] = len(waiting)
        for client_id in sorted(waiting):
            self.tell(f"round {round_idx}: no answer from {self.deal.parties[client_id]}")

    def finish(self, seconds: float = 30.0) -> None:
        """Tell the parties that are there that all is over, and wait a while for them to end."""
        waiting = set(self.link.present())
        for party in waiting:
            self.link.send(party, to_record(Request(uuid4().hex, "finish")))
        deadline = time.monotonic() + seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            for party, _ in self.link.receive(min(POLL_SECONDS, left)):
                waiting.discard(party)

    def _newly_there(self, waiting: set[int], sessions: dict[int, str]) -> list[tuple[int, str]]:
        """Return the clients that are there and were not asked in their present session."""
        present = self.link.present()
        named = {client_id: present.get(self.deal.parties[client_id]) for client_id in waiting}
        return [
            (client_id, session)
            for client_id, session in sorted(named.items())
            if session is not None and sessions.get(client_id) != session
        ]

    def _wait_for_enough(self, round_idx: int, cohort: Sequence[int]) -> None:
        wanted = {self.deal.parties[client_id] for client_id in cohort}
        enough = len(wanted) if self.patience.min_clients is None else self.patience.min_clients
        enough = min(enough, len(wanted))
        deadline = time.monotonic() + self.patience.join_seconds
        told: set[str] | None = None
        while len(there := wanted & self.link.present().keys()) < enough:
            if time.monotonic() > deadline:
                raise FederationError(
                    f"round {round_idx}: `min_clients` wants {enough} clients of the cohort, and "
                    f"after `join_seconds` {self.patience.join_seconds:g} there are {len(there)}; "
                    f"not there: {', '.join(sorted(wanted - there))}. Start the server again to go "
                    "on from its checkpoint"
                )
            if told != there:
                told = there
                self.tell(f"round {round_idx}: waits for {', '.join(sorted(wanted - there))}")
            for party, record in self.link.receive(POLL_SECONDS):
                self._read(party, record, round_idx)

    def _ask(
        self, round_idx: int, client_id: int, broadcast: bytes, described: tuple[Any, int, str]
    ) -> None:
        handout = b"" if client_id in self._handed_out else self.deal.handout
        request = Request(
            request_id=uuid4().hex,
            kind="round",
            round_idx=round_idx,
            client_id=client_id,
            participations=self.deal.participations[client_id],
            terms=self.deal.terms,
            handout_sha256=self._handout_digest[-1],
            handout=handout,
            broadcast=broadcast,
        )
        if handout:
            self.ledger.record_digest(round_idx, client_id, "down", *self._handout_digest)
        self.ledger.record_digest(round_idx, client_id, "down", *described)
        self._asked[request.request_id] = (round_idx, client_id)
        self.link.send(self.deal.parties[client_id], to_record(request))
        self._handed_out.add(client_id)

    def _read(self, party: str, record: Record, round_idx: int) -> tuple[Answer | None, int]:
        """Read an answer and note its payload; None where the round does not wait for it."""
        try:
            answer = read_answer(record)
        except MessageError as error:
            self.tell(f"{party}: {error}")
            return None, -1
        asked_round, client_id = self._asked.get(answer.request_id, (-1, -1))
        if client_id < 0 or self.deal.parties[client_id] != party:
            self.tell(f"{party}: an answer that nobody asked for: {answer.reason or answer.kind}")
            return None, -1
        if answer.kind == "update":
            # what is no message at all is rejected and counted by whoever reads the reply
            with suppress(MessageError):
                self.ledger.record(asked_round, client_id, "up", answer.update)
        if asked_round != round_idx:
            self._counts["late"] += 1
            self.tell(f"{party}: the answer to round {asked_round} came too late")
            return None, -1
        return answer, client_id

    def state_dict(self) -> dict[str, Any]:
        """Return who holds an auxiliary model."""
        return {"handed_out": sorted(self._handed_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a client that lost its copy says so."""
        self._handed_out = set(state["handed_out"])

    def commit(self) -> None:
        """Do nothing: clients keep their states themselves."""

    def most_answers(self) -> int:
        """Return how often the client that was asked most was asked, in all starts of the run.

        What a client was asked it may have answered, also where nothing came: each has its own
        count, and this one is never below it.
        """
        if self.ledger.path is None:
            return 0
        rows = read_ledger(self.ledger.path)
        asked = Counter(row["client"] for row in rows if row["kind"] == "server_broadcast")
        return max(asked.values(), default=0)

    def metrics(self) -> dict[str, float]:
        """Return how many did not answer in time, refused, and came too late in the last round."""
        return {f"round/{name}_clients": float(count) for name, count in self._counts.items()}
