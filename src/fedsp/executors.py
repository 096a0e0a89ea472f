"""How a cohort's work is carried out; here one client after the other in this process."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor

from fedsp.client import ClientModule
from fedsp.client_state import ClientStateStore
from fedsp.data import FederatedDataModule
from fedsp.ledger import Ledger, digest
from fedsp.messages import (
    ClientUpdate,
    Contract,
    check_sent,
    decode_broadcast,
    encode,
    encode_handout,
)
from fedsp.number_formats import rounded
from fedsp.payload import Payload, add, subtract
from fedsp.phases import Batches, ClientTurn, StageResult, train_client


class BudgetSpentError(RuntimeError):
    """A client cannot answer within its `client.privacy.max_epsilon` any more."""


@dataclass(frozen=True)
class Reply:
    """A client's answer.

    Args:
        client_id: Who answers.
        data: The encoded `ClientUpdate`, unchecked.
        stages: What the client's stages did, for the simulation's own display; it never travels.
    """

    client_id: int
    data: bytes
    stages: dict[str, StageResult]


class Executor(ABC):
    """Carries out a cohort's work, wherever the clients are."""

    @abstractmethod
    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        """Let every client of the cohort work through one round.

        Args:
            round_idx: 0-based communication round.
            cohort: Client ids.
            broadcast: The encoded `ServerBroadcast`.
            on_start: Called with a client's id before it works.

        Yields:
            One reply a client, as they come.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what the next round needs to know of the last ones."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    @abstractmethod
    def commit(self) -> None:
        """Let go of what an older checkpoint would need; called when a newer one is safe."""

    def metrics(self) -> dict[str, float]:
        """Return what only the executor knows of the last round."""
        return {}

    def most_answers(self) -> int:
        """Return how often the client with the most answers has answered, where that is known."""
        return 0


@dataclass(frozen=True)
class Simulation:
    """What the simulated clients share.

    Args:
        fabric: Where to run.
        client: The module that plays every client, with its auxiliary model installed.
        data: Gives each client's batches.
        store: What clients keep between rounds.
        ledger: Every payload is written down before it is handed on.
        contract: What a payload looks like on the wire.
        seed: The run's seed.
        participations: How often each client takes part in the whole run, by id.
    """

    fabric: Fabric
    client: ClientModule
    data: FederatedDataModule
    store: ClientStateStore
    ledger: Ledger
    contract: Contract
    seed: int
    participations: Mapping[int, int]


class InProcessExecutor(Executor):
    """Simulates every client in this process, with one module whose private state is swapped.

    Frozen weights are shared by all clients; a client that is away costs disk only.
    """

    def __init__(self, simulation: Simulation) -> None:
        """Keep the auxiliary model as handed out, for clients that have not taken part yet.

        Args:
            simulation: What the clients share.
        """
        self.simulation = simulation
        self._initial = simulation.client.private_state()
        self._handed_out: set[int] = set()
        self._handout: tuple[dict[str, Any], int, str] | None = None
        self._sat_out = 0

    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        """Let every client of the cohort work through one round; see `Executor.run`."""
        described = digest(broadcast)
        for client_id in self.within_budget(cohort):
            on_start(client_id)
            self.record_down(round_idx, client_id, described)
            reply = self.turn(round_idx, client_id, broadcast)
            self.simulation.ledger.record(round_idx, client_id, "up", reply.data)
            yield reply

    def turn(self, round_idx: int, client_id: int, broadcast: bytes) -> Reply:
        """Let one client work through a round; nothing is written into the ledger.

        Raises:
            BudgetSpentError: If its answer would cost more than `client.privacy.max_epsilon`.
            MessageError: If the broadcast, or what the client would send, is not what it has to be.
        """
        shared, client = self.simulation, self.simulation.client
        if not self._may_answer(client_id):
            raise BudgetSpentError(
                f"client {client_id} has spent its `client.privacy.max_epsilon`: it answers no more"
            )
        kept = shared.store.get(client_id) or {"model": self._initial, "training": {}}
        # not held while the client trains: it may be as large as all that is trained
        client.load_private_state(kept.pop("model"))
        client.receive(decode_broadcast(broadcast, shared.contract, round_idx=round_idx))

        def loader(start: int, num_batches: int) -> Batches:
            return shared.data.client_dataloader(client_id, start_step=start, num_steps=num_batches)

        turn = ClientTurn(
            client_id, round_idx, shared.seed, shared.participations[client_id], loader
        )
        results, training = train_client(shared.fabric, client, kept["training"], turn)
        if client.privacy is not None:
            # before any noise is drawn: what a kill keeps from being sent is paid for all the same
            shared.store.count_answer(client_id)
        update = client.update(client_id, shared.data.client_num_examples(client_id))
        update, residual = self._compensated(update, kept.get("residual", {}))
        state = {"model": client.private_state(), "training": training}
        state |= {"residual": residual} if residual else {}
        losses = [result.loss for result in results.values()]
        # a client that diverged starts its next turn from where it was; the last step may diverge
        # after the last loss
        if results and _is_finite([losses, state]):
            shared.store.put(client_id, round_idx, state)
        data = encode(update, shared.contract.wire_dtype)
        check_sent(data, shared.contract, round_idx=round_idx, client_id=client_id)
        return Reply(client_id, data, results)

    def _compensated(self, update: ClientUpdate, residual: Payload) -> tuple[ClientUpdate, Payload]:
        """Add to an update what rounding took off the last one; return what it will take off now.

        Source: Seide et al. 2014 (error feedback for 1-bit SGD). Only int8 rounds coarsely enough.
        """
        wire_dtype = self.simulation.contract.wire_dtype
        if wire_dtype != "int8":
            return update, {}
        payload = add(update.payload, residual) if residual else update.payload
        return replace(update, payload=payload), subtract(payload, rounded(payload, wire_dtype))

    def within_budget(self, cohort: Sequence[int]) -> list[int]:
        """Return the clients that may still answer; the others sit the round out."""
        able = [client_id for client_id in cohort if self._may_answer(client_id)]
        self._sat_out = len(cohort) - len(able)
        return able

    def _may_answer(self, client_id: int) -> bool:
        privacy = self.simulation.client.privacy
        answers = self.simulation.store.answers().get(client_id, 0)
        return privacy is None or privacy.affords(answers)

    def record_down(
        self, round_idx: int, client_id: int, broadcast: tuple[dict[str, Any], int, str]
    ) -> None:
        """Write down what a client gets: the auxiliary model, if it has none, and the broadcast.

        Args:
            round_idx: 0-based communication round.
            client_id: Who gets it.
            broadcast: What `fedsp.ledger.digest` says of it.
        """
        ledger = self.simulation.ledger
        if client_id not in self._handed_out:
            ledger.record_digest(round_idx, client_id, "down", *self._describe_handout())
            self._handed_out.add(client_id)
        ledger.record_digest(round_idx, client_id, "down", *broadcast)

    def _describe_handout(self) -> tuple[dict[str, Any], int, str]:
        if self._handout is None:
            client = self.simulation.client
            # after a resume another client's model may be in there
            client.load_private_state(self._initial)
            self._handout = digest(encode_handout(client.require_model()[0].handout()))
        return self._handout

    def state_dict(self) -> dict[str, Any]:
        """Return who holds an auxiliary model, and which private states are valid."""
        store = self.simulation.store
        return {
            "handed_out": sorted(self._handed_out),
            "versions": store.versions(),
            "answers": store.answers(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; private states of a round in flight are dropped."""
        self._handed_out = set(state["handed_out"])
        self.simulation.store.restore(state["versions"])
        self.simulation.store.adopt_answers(state["answers"])

    def commit(self) -> None:
        """Delete private states that only an older checkpoint names."""
        self.simulation.store.commit()

    def metrics(self) -> dict[str, float]:
        """Return the largest epsilon of a client, and how many sat the round out."""
        privacy = self.simulation.client.privacy
        if privacy is None:
            return {}
        return {
            "privacy/client_epsilon": privacy.epsilon(self.most_answers()),
            "privacy/sat_out": float(self._sat_out),
        }

    def most_answers(self) -> int:
        """Return how often the client with the most answers has answered; 0 without noise."""
        return max(self.simulation.store.answers().values(), default=0)


def _is_finite(tree: Any) -> bool:
    """Whether nested state holds neither NaN nor infinity."""
    if isinstance(tree, Tensor):
        return bool(tree.isfinite().all())
    if isinstance(tree, dict):
        return all(map(_is_finite, tree.values()))
    if isinstance(tree, list | tuple):
        return all(map(_is_finite, tree))
    return not isinstance(tree, float) or math.isfinite(tree)
