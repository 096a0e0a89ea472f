"""A live federation's server in several processes: the first one talks to the clients for all."""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedsp.executors import Executor, Reply
from fedsp.ranks import Ranks

# the others wait in a collective operation, which gloo and NCCL end after some minutes
TICK_SECONDS = 10.0
_STARTED, _ANSWERED, _TICK, _END = b"s", b"a", b".", b"e"


class RelayExecutor(Executor):
    """Gives every rank the answers of the first one, so that all aggregate the same bytes."""

    def __init__(self, first: Executor | None, ranks: Ranks) -> None:
        """Join the ranks.

        Args:
            first: What talks to the clients, on the first rank; None on the others.
            ranks: The processes of the server.
        """
        self._first, self._ranks = first, ranks

    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        """Hand on what happens on the first rank; see `Executor.run`."""
        events = self._events(round_idx, cohort, broadcast)
        while True:
            event = self._ranks.of_first(next(events, _TICK))
            kind, client, data = event[:1], event[1:9], event[9:]
            if kind == _END:
                return
            if kind == _STARTED:
                on_start(int.from_bytes(client, "big"))
            elif kind == _ANSWERED:
                yield Reply(int.from_bytes(client, "big"), data, {})

    def _events(self, round_idx: int, cohort: Sequence[int], broadcast: bytes) -> Iterator[bytes]:
        """Run the round in a thread and tell what happens as bytes; nothing on other ranks."""
        if self._first is None:
            return
        first, told = self._first, queue.Queue[bytes | BaseException]()

        def work() -> None:
            def started(client_id: int) -> None:
                told.put(_STARTED + client_id.to_bytes(8, "big"))

            try:
                for reply in first.run(round_idx, cohort, broadcast, started):
                    told.put(_ANSWERED + reply.client_id.to_bytes(8, "big") + reply.data)
                told.put(_END)
            except BaseException as error:
                told.put(error)

        threading.Thread(target=work, name="relay", daemon=True).start()
        while True:
            try:
                event = told.get(timeout=TICK_SECONDS)
            except queue.Empty:
                event = _TICK
            if isinstance(event, BaseException):
                raise event
            yield event

    def state_dict(self) -> dict[str, Any]:
        """Return the first rank's state; other ranks write no checkpoint."""
        return {} if self._first is None else self._first.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it on the first rank."""
        if self._first is not None:
            self._first.load_state_dict(state)

    def commit(self) -> None:
        """Let the first rank let go of what an older checkpoint would need."""
        if self._first is not None:
            self._first.commit()

    def metrics(self) -> dict[str, float]:
        """Return the first rank's metrics on every rank."""
        own = {} if self._first is None else self._first.metrics()
        metrics: dict[str, float] = json.loads(self._ranks.of_first(json.dumps(own).encode()))
        return metrics

    def most_answers(self) -> int:
        """Return the first rank's figure on every rank."""
        own = 0 if self._first is None else self._first.most_answers()
        return int(self._ranks.of_first(str(own).encode()))
