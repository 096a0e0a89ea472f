"""A round between server and cohort: broadcast, checked answers, aggregate, server training."""

import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.fabric import Fabric

from fedsp.acceptance import Acceptance
from fedsp.aggregation import Aggregator, ServerOptimizer
from fedsp.data import FederatedDataModule
from fedsp.executors import Executor, Reply
from fedsp.messages import (
    Contract,
    MessageError,
    RejectedUpdate,
    ServerBroadcast,
    decode_broadcast,
    decode_update,
    encode,
)
from fedsp.number_formats import WireDtype
from fedsp.payload import Payload, add, shapes_of, subtract
from fedsp.phases import Optimization, StageResult, train_server
from fedsp.privacy import CentralPrivacy
from fedsp.server import ServerModule


@dataclass(frozen=True)
class Communication:
    """What travels, and what is done with it."""

    wire_dtype: WireDtype = "float32"
    """Number format of a prompt on its way, in both directions. int8 has a scale a row, and a
    client adds to each update what rounding took off its last one."""
    max_update_norm: float | None = None
    """Largest L2 norm of (update - broadcast); larger updates are rejected. null takes any."""
    min_updates: int = 1
    """Accepted updates below which a round keeps the server's prompt."""
    broadcast_average: bool = False
    """Broadcast the plain aggregate, not the prompt that the server trained from it."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If a number is out of its range.
        """
        if self.max_update_norm is not None and not self.max_update_norm > 0:
            raise ValueError(
                "`trainer.communication.max_update_norm` must be above 0 or null, got "
                f"{self.max_update_norm}."
            )
        if self.min_updates < 1:
            raise ValueError(
                f"`trainer.communication.min_updates` must be at least 1, got {self.min_updates}."
            )


@dataclass(frozen=True)
class Rules:
    """How a federation turns answers into the next prompt.

    Args:
        communication: What travels.
        aggregator: Combines the updates.
        server_optimizer: Steps the server's prompt towards the aggregate.
        acceptance: Decides how far the server goes along that step; None goes all the way.
        privacy: Combines the updates in the aggregator's place, under noise; None adds none.
    """

    communication: Communication
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    acceptance: Acceptance | None = None
    privacy: CentralPrivacy | None = None

    def contract(self, payload: Payload) -> Contract:
        """Return what a message that holds such a payload has to be."""
        communication = self.communication
        return Contract(shapes_of(payload), communication.wire_dtype, communication.max_update_norm)

    def combining(self, round_idx: int, cohort: Sequence[int]) -> Aggregator:
        """Return what combines a round's updates."""
        if self.privacy is not None:
            return self.privacy.begin(round_idx, cohort)
        return self.aggregator

    @property
    def training_search(self) -> Acceptance | None:
        """What searches along the server's own steps, too; None takes all that they did."""
        acceptance = self.acceptance
        return acceptance if acceptance is not None and acceptance.server_training else None

    @property
    def fewest_updates(self) -> int:
        """Updates below which a round keeps its prompt; under noise it never does."""
        if self.privacy is not None:
            return 0
        return max(self.communication.min_updates, self.aggregator.min_updates)


class Federation:
    """The server's side of a running federation, whoever carries out the clients' work."""

    def __init__(
        self,
        fabric: Fabric,
        server: ServerModule,
        data: FederatedDataModule,
        executor: Executor,
        rules: Rules,
        *,
        num_rounds: int,
        seed: int,
    ) -> None:
        """Start from the server's present prompt.

        Args:
            fabric: Where the server trains.
            server: With its model loaded.
            data: Gives the server's batches.
            executor: Carries out the clients' work.
            rules: How answers become the next prompt.
            num_rounds: Rounds of the whole run, for the length of the server's schedule.
            seed: The run's seed.
        """
        self.fabric, self.server, self.data = fabric, server, data
        self.executor, self.rules, self.seed = executor, rules, seed
        self.num_rounds = num_rounds
        self.optimization = self.optimization_for(server)
        self.broadcast = server.payload()
        self.contract = rules.contract(self.broadcast)

    def optimization_for(self, server: ServerModule) -> Optimization:
        """Return a fresh optimizer and schedule for a server's own steps over the whole run."""
        stage = server.training_stage
        total_steps = stage.steps * self.num_rounds
        return Optimization.of(stage, server.tuned_parameters(), total_steps)

    def collect(
        self, round_idx: int, cohort: Sequence[int], call: Callable[..., None]
    ) -> dict[str, float]:
        """Broadcast, let the cohort work, check what comes back and aggregate it.

        Whatever clients answer, the round goes on: an answer that is not that client's payload, not
        finite, too far away, not asked for or a second one is left out, told of and counted.

        Args:
            round_idx: 0-based communication round.
            cohort: Client ids.
            call: Calls a hook of every callback.

        Returns:
            The round's metrics of the clients.
        """
        started = time.perf_counter()
        wire_dtype = self.rules.communication.wire_dtype
        data = encode(ServerBroadcast(round_idx, self.broadcast), wire_dtype)
        reference = decode_broadcast(data, self.contract).payload
        aggregator = self.rules.combining(round_idx, cohort)
        aggregator.reset(reference)
        replies: dict[int, Reply] = {}
        answers = rejected = 0
        on_start = partial(call, "on_client_start", round_idx)
        for reply in self.executor.run(round_idx, cohort, data, on_start):
            answers += 1
            objection = _objection(reply.client_id, round_idx, cohort, replies)
            if not objection:
                call("on_client_end", round_idx, reply.client_id, reply.stages)
                replies[reply.client_id] = Reply(reply.client_id, b"", reply.stages)
            try:
                if objection:
                    raise RejectedUpdate(objection)
                update = decode_update(
                    reply.data,
                    self.contract,
                    reference=reference,
                    round_idx=round_idx,
                    client_id=reply.client_id,
                )
            except (MessageError, RejectedUpdate) as reason:
                rejected += 1
                call("on_update_rejected", round_idx, reply.client_id, str(reason))
            else:
                aggregator.add(update)
                call("on_update_accepted", round_idx, reply.client_id, update.payload, reference)
        seconds = time.perf_counter() - started
        accepted: dict[str, float] = {}
        if answers - rejected >= self.rules.fewest_updates:
            # what rounding for the wire took off the payload is no client's doing: it stays
            aggregate = add(aggregator.result(), subtract(self.broadcast, reference))
            payload = self.rules.server_optimizer.step(self.broadcast, aggregate)
            if self.rules.acceptance is not None:
                payload, fraction = self.rules.acceptance.choose(
                    self.fabric, self.server, self.data, self.broadcast, payload
                )
                accepted = {"server/accepted_fraction": fraction}
            self._adopt(payload)
            call("on_aggregate_end", round_idx, self.broadcast)
        return {
            "round/clients": float(len(replies)),
            "round/rejected_updates": float(rejected),
            "round/client_seconds": seconds,
            **accepted,
            **self.executor.metrics(),
            **(self.rules.privacy.metrics() if self.rules.privacy is not None else {}),
            **_client_losses(list(replies.values())),
        }

    def train_server(self, round_idx: int, call: Callable[..., None]) -> dict[str, float]:
        """Run the server's own steps on the aggregate, if it has steps and data.

        Args:
            round_idx: 0-based communication round.
            call: Calls a hook of every callback.

        Returns:
            The round's metrics of the server's training.
        """
        if not self.server.training_stage.steps or not self.data.num_examples("server"):
            return {}
        call("on_server_train_start", round_idx)
        result, accepted = self.train(self.server, self.optimization, round_idx)
        call("on_server_train_end", round_idx, result)
        if not self.rules.communication.broadcast_average:
            self.broadcast = self.server.payload()
        metrics = {"server/train_loss": result.loss, "round/server_seconds": result.seconds}
        return metrics | accepted

    def train(
        self, server: ServerModule, optimization: Optimization, round_idx: int
    ) -> tuple[StageResult, dict[str, float]]:
        """Run the server's steps of a round on any server's prompt, with that round's batches.

        Returns:
            The result of the stage, and how much of what it did was taken, if that was asked.
        """
        stage, search = server.training_stage, self.rules.training_search
        # a payload may be all of the model's weights: not copied for nothing
        before = server.payload() if search is not None else {}
        batches = self.data.server_dataloader(
            start_step=optimization.batches, num_steps=stage.batches
        )
        result = train_server(
            self.fabric, server, optimization, batches, seed=self.seed, round_idx=round_idx
        )
        if search is None:
            return result, {}
        payload, fraction = search.choose(self.fabric, server, self.data, before, server.payload())
        server.load_payload(payload)
        return result, {"server/accepted_training": fraction}

    def _adopt(self, payload: Payload) -> None:
        self.broadcast = payload
        self.server.load_payload(payload)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on; `payload` is what the server tunes itself."""
        prompt = self.server.require_model()[1]
        return {
            "payload": self.server.payload(),
            "soft_prompt": {name: value.cpu() for name, value in prompt.state_dict().items()},
            "broadcast": self.broadcast,
            "optimization": self.optimization.state_dict(),
            "server_optimizer": self.rules.server_optimizer.state_dict(),
            "executor": self.executor.state_dict(),
            "privacy": {} if self.rules.privacy is None else self.rules.privacy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.server.load_payload(state["payload"])
        self.server.require_model()[1].load_state_dict(state["soft_prompt"])
        self.broadcast = state["broadcast"]
        self.optimization.load_state_dict(state["optimization"])
        self.rules.server_optimizer.load_state_dict(state["server_optimizer"], self.contract.shapes)
        self.executor.load_state_dict(state["executor"])
        if self.rules.privacy is not None:
            self.rules.privacy.load_state_dict(state["privacy"])


def _objection(
    client_id: int, round_idx: int, cohort: Sequence[int], answered: Container[int]
) -> str:
    """Say why nobody waits for this client's answer; the first one that is asked for counts."""
    if client_id not in cohort:
        return f"client {client_id} was not asked in round {round_idx}"
    if client_id in answered:
        return f"client {client_id} has answered round {round_idx} already"
    return ""


def _client_losses(replies: Sequence[Reply]) -> dict[str, float]:
    """Means over the clients that told their losses, as simulated ones do."""
    metrics: dict[str, float] = {}
    for stage, name in (
        ("soft_prompt", "client/train_loss"),
        ("auxiliary", "client/auxiliary_loss"),
    ):
        results = [reply.stages[stage] for reply in replies if stage in reply.stages]
        losses = [result.loss for result in results if math.isfinite(result.loss)]
        if losses:
            mean = sum(losses) / len(losses)
            metrics[name] = mean
            spread = sum((loss - mean) ** 2 for loss in losses) / len(losses)
            metrics[f"{name}_std"] = math.sqrt(spread)
    return metrics
