"""A client of a live federation, at its own place: it answers what the server asks.

The server's model is never here. What is learned from the data leaves as an encoded `ClientUpdate`,
written into the client's own ledger before it goes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsp.client import ClientModule
from fedsp.client_state import ANSWERS, ClientStateStore
from fedsp.data import FederatedDataModule
from fedsp.executors import BudgetSpentError, InProcessExecutor, Simulation
from fedsp.handout import receive_handout
from fedsp.ledger import Ledger, next_attempt
from fedsp.messages import MessageError
from fedsp.opening import install, launch, set_up_data
from fedsp.privacy import LocalPrivacy
from fedsp.run_folder import RunFolder
from fedsp.server import ServerModule
from fedsp.stages import try_out
from fedsp.state_files import write_bytes_atomically, write_text_atomically
from fedsp.terms import differing, terms
from fedsp.wire import MAX_REASON, Answer, Record, Request, read_request, to_record

# a server that lost its newest checkpoint asks for a round again
STATES_KEPT = 3


class ClientSite:
    """Answers requests one after the other, with what it keeps in its run folder."""

    def __init__(
        self,
        trainer: Any,
        server: ServerModule,
        client: ClientModule,
        data: FederatedDataModule,
        client_id: int,
        tell: Callable[[str], None],
    ) -> None:
        """Read configuration, tokenizer and data; nothing is loaded of the global model's weights.

        Args:
            trainer: A `FederatedTrainer` that does not run: gives Fabric, rules, seed and folder.
            server: Names the global model, the prompt and the recipe of the auxiliary model.
            client: Will hold the auxiliary model.
            data: This client's, with a `fedsp.partition.Parties` partitioner.
            client_id: Its place in the cohorts.
            tell: Called with a line for whoever runs the client.

        Raises:
            ValueError: If a setting is wrong, or the data is not as it should be.
        """
        self.trainer, self.client, self.client_id, self.tell = trainer, client, client_id, tell
        self.folder: RunFolder = trainer.folder
        self.terms = terms(trainer.config)
        self.is_over = False
        self.failure: Exception | None = None
        if data.clients is None:
            raise ValueError(
                "`data.clients` is null. Name this party's data there: in config.yaml, or as an "
                "option such as `--data.clients=fedsp.sources.Files "
                "--data.clients.paths=FILE`."
            )
        launch(trainer.fabric)
        server.configure_outline()
        trainer.server, trainer.data = server, data
        set_up_data(trainer.fabric, server, data, "fit")
        try_out({f"client.{name}": stage for name, stage in client.stages.items()})
        if client.privacy is not None:
            client.privacy.check()
        self.num_examples = data.client_num_examples(client_id)
        self.folder.create(trainer.config_text)
        if client.privacy is not None:
            self._keep_price(client.privacy)
        self.ledger = Ledger(self.folder.ledger, next_attempt(self.folder.ledger))
        self.store = ClientStateStore(self.folder.clients, keep=STATES_KEPT)
        self._executor: InProcessExecutor | None = None
        self._handout_sha256 = ""

    def _keep_price(self, privacy: LocalPrivacy) -> None:
        """Refuse noise by which earlier answers would be counted at another price than they had."""
        path = self.folder.client_privacy
        price = {"noise_multiplier": privacy.noise_multiplier, "delta": privacy.delta}
        kept = json.loads(path.read_text()) if path.exists() else price
        if kept != price and any(self.folder.clients.glob(f"*/{ANSWERS}")):
            raise ValueError(
                f"`client.privacy` must have the `noise_multiplier` and `delta` {[*kept.values()]} "
                f"of this client's earlier answers, got {[*price.values()]}. Only `max_epsilon` "
                "may be changed."
            )
        write_text_atomically(path, json.dumps(price) + "\n")

    def answer(self, record: Record) -> Record:
        """Answer a request; whatever goes wrong here, the server gets an answer.

        Args:
            record: What came.
        """
        request_id = ""
        try:
            request = read_request(record)
            request_id = request.request_id
            answer = self._answer(request)
        except (MessageError, BudgetSpentError) as refusal:
            self.tell(str(refusal))
            answer = Answer(request_id, "refusal", reason=_line(str(refusal)))
        except Exception as failure:
            # what broke here may speak of the data: the server only learns that something did
            self.failure = failure
            answer = Answer(request_id, "refusal", reason="the client failed and has ended")
        return to_record(answer)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to be answered."""
        return self.is_over or self.failure is not None

    def close(self) -> None:
        """Bring the ledger to the disk."""
        self.ledger.close()

    def _answer(self, request: Request) -> Answer:
        if request.kind == "finish":
            self.is_over = True
            return Answer(request.request_id, "done")
        if others := differing(self.terms, request.terms):
            raise MessageError(
                "server and client must have the same settings, and these differ: "
                f"{', '.join(others)}"
            )
        if request.client_id != self.client_id:
            raise MessageError(
                f"the server takes this client for client {request.client_id}, its configuration "
                f"says {self.client_id}"
            )
        if request.handout:
            self._keep(request)
        executor = self._prepare(request)
        if executor is None:
            return Answer(request.request_id, "handout_missing")
        self.ledger.record(request.round_idx, self.client_id, "down", request.broadcast)
        self.tell(f"round {request.round_idx}: works on {self.num_examples} examples")
        self.store.restore_before(self.client_id, request.round_idx)
        reply = executor.turn(request.round_idx, self.client_id, request.broadcast)
        self.ledger.record(request.round_idx, self.client_id, "up", reply.data)
        return Answer(request.request_id, "update", update=reply.data)

    def _keep(self, request: Request) -> None:
        """Put the auxiliary model on the disk; it is read from there, now and after a restart."""
        if hashlib.sha256(request.handout).hexdigest() != request.handout_sha256:
            raise MessageError("the hand-out is not the one that the server speaks of")
        self.ledger.record(request.round_idx, self.client_id, "down", request.handout)
        if _read(self.folder.handout) != request.handout:
            # another model: what was learned in the one before is of no use; answers stay counted
            self.store.restore({})
        write_bytes_atomically(self.folder.handout, request.handout)

    def _prepare(self, request: Request) -> InProcessExecutor | None:
        """Load the auxiliary model that the server speaks of; None where it is not here."""
        if request.handout_sha256 != self._handout_sha256:
            data = _read(self.folder.handout)
            if hashlib.sha256(data).hexdigest() != request.handout_sha256:
                return None
            self._executor = self._load(data, request)
            self._handout_sha256 = request.handout_sha256
        executor = self._executor
        participations = {self.client_id: request.participations}
        if executor is not None and executor.simulation.participations != participations:
            # the server's operator has changed the number of rounds
            executor.simulation = replace(executor.simulation, participations=participations)
        return executor

    def _load(self, handout: bytes, request: Request) -> InProcessExecutor:
        trainer = self.trainer
        outline = trainer.server.require_model()[0]
        auxiliary = receive_handout(handout, trainer.server.auxiliary_recipe, outline)
        install(trainer, self.client, auxiliary)
        # the server's tuned weights are not here, the client's are of the same names and shapes
        payload = trainer.server.payload() | self.client.weights()
        contract = trainer.rules.contract(payload)
        self.ledger.declare(contract, auxiliary.handout_tensors(), self.client_id)
        simulation = Simulation(
            fabric=trainer.fabric,
            client=self.client,
            data=trainer.data,
            store=self.store,
            ledger=self.ledger,
            contract=contract,
            seed=trainer.seed,
            participations={self.client_id: request.participations},
        )
        return InProcessExecutor(simulation)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _line(text: str) -> str:
    """Return a text as `read_answer` takes it."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_REASON]
