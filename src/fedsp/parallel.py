"""A cohort's work shared among processes: each simulates some of its clients, all know all answers.

How one client is simulated is `fedsp.executors`' affair.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fedsp.executors import Executor, InProcessExecutor, Reply
from fedsp.ledger import digest
from fedsp.phases import StageResult
from fedsp.ranks import Ranks
from fedsp.state_files import decode_state, encode_state


class ParallelExecutor(Executor):
    """Simulates each rank's share of the cohort there, and gathers the encoded updates everywhere.

    A client's turn depends on nothing but its own state, the broadcast and named random streams, so
    that it does not matter which rank plays it. The answers come in the cohort's order, as from one
    process, and every rank aggregates the same bytes.
    """

    def __init__(self, local: InProcessExecutor, ranks: Ranks) -> None:
        """Share the work of one process.

        Args:
            local: Simulates clients in this process; all ranks see its clients' state folder.
            ranks: Who takes part.
        """
        self._local = local
        self._ranks = ranks

    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        """Let every client of the cohort work through one round; see `Executor.run`."""
        shared = self._local.simulation
        cohort, described = self._local.within_budget(cohort), digest(broadcast)
        for client_id in cohort:
            self._local.record_down(round_idx, client_id, described)
        work = {client_id: shared.data.client_tokens_a_batch(client_id) for client_id in cohort}
        own = divide(work, self._ranks.size)[self._ranks.rank]
        replies = []
        for client_id in own:
            on_start(client_id)
            replies.append(self._local.turn(round_idx, client_id, broadcast))
        gathered = self._exchange(replies)
        for client_id in cohort:
            reply = gathered[client_id]
            if client_id not in own:
                on_start(client_id)
            shared.ledger.record(round_idx, client_id, "up", reply.data)
            yield reply

    def _exchange(self, replies: Sequence[Reply]) -> dict[int, Reply]:
        """Return all ranks' replies by client, and learn where the clients' states are."""
        store, precision = self._local.simulation.store, self._precision()
        versions = store.versions()
        own = {
            "replies": [_as_tree(reply) for reply in replies],
            "versions": {
                r.client_id: v for r in replies if (v := versions.get(r.client_id, -1)) >= 0
            },
            "answers": store.answers(),
            "precision": precision.state_dict(),
        }
        trees: list[Any] = [decode_state(data) for data in self._ranks.gather(encode_state(own))]
        for tree in trees:
            store.adopt(tree["versions"])
            store.adopt_answers(tree["answers"])
        # a loss scale moves with the batches that a rank has seen: from here on it is one again
        precision.load_state_dict(trees[0]["precision"])
        all_replies = [_as_reply(tree) for part in trees for tree in part["replies"]]
        return {reply.client_id: reply for reply in all_replies}

    def _precision(self) -> Any:
        return self._local.simulation.fabric.strategy.precision

    def state_dict(self) -> dict[str, Any]:
        """Return the same as one process would: the number of ranks may change with a resume."""
        return self._local.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, and wait until the first rank has cleared up."""
        self._local.load_state_dict(state)
        self._ranks.barrier()

    def commit(self) -> None:
        """Let go of private states that only an older checkpoint names."""
        self._local.commit()

    def metrics(self) -> dict[str, float]:
        """Return what is known of the last round on all ranks; see `InProcessExecutor.metrics`."""
        return self._local.metrics()

    def most_answers(self) -> int:
        """Return the same as one process would; see `InProcessExecutor.most_answers`."""
        return self._local.most_answers()


def divide(work: Mapping[int, float], num_shares: int) -> list[list[int]]:
    """Divide clients so that the shares' work is alike: the longest first, to who has least so far.

    Args:
        work: By client, in any unit.
        num_shares: At least 1.

    Returns:
        Clients of each share in the order of `work`; a share may be empty.

    Source: Graham 1969, Bounds on multiprocessing timing anomalies (LPT).
    """
    loads = [0.0] * num_shares
    place: dict[int, int] = {}
    for client_id in sorted(work, key=lambda client_id: -work[client_id]):
        place[client_id] = loads.index(min(loads))
        loads[place[client_id]] += work[client_id]
    return [[client for client in work if place[client] == share] for share in range(num_shares)]


def _as_tree(reply: Reply) -> dict[str, Any]:
    return {
        "client_id": reply.client_id,
        "data": torch.frombuffer(bytearray(reply.data), dtype=torch.uint8),
        "stages": {name: asdict(result) for name, result in reply.stages.items()},
    }


def _as_reply(tree: dict[str, Any]) -> Reply:
    stages = {name: StageResult(**result) for name, result in tree["stages"].items()}
    return Reply(tree["client_id"], tree["data"].numpy().tobytes(), stages)
