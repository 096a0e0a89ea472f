"""Clients that answer what a test wants, and a federation around them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.aggregation import (
    Aggregator,
    ServerOptimizer,
    StreamingMean,
)
from fedsp.executors import Executor, Reply
from fedsp.federation import Communication, Federation, Rules
from fedsp.messages import (
    ClientUpdate,
    decode_broadcast,
    encode,
)
from fedsp.phases import StageResult
from fedsp.stages import Stage
from tiny import make_data, make_server

Change = Callable[[Tensor, int, int], Tensor]
NUM_EXAMPLES = {0: 1, 1: 2, 2: 5}


class Scripted(Executor):
    """Clients that answer with a given function of what they received."""

    def __init__(self, change: Change, wire_dtype: Any = "float32") -> None:
        self.change, self.wire_dtype = change, wire_dtype
        self.received: list[bytes] = []
        self.contract: Any = None
        self.losses: dict[int, float] = {}

    def run(
        self,
        round_idx: int,
        cohort: Sequence[int],
        broadcast: bytes,
        on_start: Callable[[int], None],
    ) -> Iterator[Reply]:
        self.received.append(broadcast)
        prefix = decode_broadcast(broadcast, self.contract).payload["soft_prompt"]
        for client_id in cohort:
            on_start(client_id)
            own = self.change(prefix.clone(), round_idx, client_id)
            update = ClientUpdate(
                round_idx, client_id, {"soft_prompt": own}, NUM_EXAMPLES[client_id]
            )
            stages = {}
            if client_id in self.losses:
                stages["soft_prompt"] = StageResult(self.losses[client_id], 1, 1, 0.1, 1)
            yield Reply(client_id, encode(update, self.wire_dtype), stages)

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": len(self.received)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def commit(self) -> None:
        pass


def noise(round_idx: int, client_id: int) -> int:
    return 1000 * round_idx + client_id


def wander(prefix: Tensor, round_idx: int, client_id: int) -> Tensor:
    """Each client adds noise of its own."""
    generator = torch.Generator().manual_seed(noise(round_idx, client_id))
    return prefix + 0.1 * torch.randn(prefix.shape, generator=generator)


def make_federation(
    folder: Path,
    change: Change = wander,
    *,
    communication: Communication | None = None,
    weighted: bool = False,
    aggregator: Aggregator | None = None,
    optimizer: Any = None,
    training: Stage | None = None,
) -> Federation:
    communication = communication or Communication()
    server = make_server(folder, training=training or Stage(0))
    server.configure_model()
    data = make_data(folder)
    data.limit_tokens(60)
    data.setup("fit")
    executor = Scripted(change, communication.wire_dtype)
    rule = aggregator or StreamingMean(weighted)
    rules = Rules(communication, rule, ServerOptimizer(optimizer))
    federation = Federation(
        Fabric(accelerator="cpu", devices=1), server, data, executor, rules, num_rounds=2, seed=0
    )
    executor.contract = federation.contract
    return federation


class Calls:
    """Notes the hooks that are called."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __call__(self, hook: str, *args: Any) -> None:
        self.made.append((hook, *args))

    def names(self) -> list[str]:
        return [hook for hook, *_ in self.made]
