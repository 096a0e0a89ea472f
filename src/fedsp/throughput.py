"""How fast clients, server and evaluation work, from what a run measures anyway.

A stage's seconds end where its loss is read from the device, so nothing here waits for a device.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsp.callbacks import FederatedCallback


@dataclass
class Work:
    """What was done in how long.

    Args:
        seconds: Wall time.
        num_tokens: Text tokens read, padding left out.
        num_examples: Examples read.
    """

    seconds: float = 0.0
    num_tokens: int = 0
    num_examples: int = 0

    def add(self, seconds: float, num_tokens: int, num_examples: int) -> None:
        """Count more of it."""
        self.seconds += seconds
        self.num_tokens += num_tokens
        self.num_examples += num_examples

    def metrics(self, name: str) -> dict[str, float]:
        """Return `NAMEtokens_per_second` and `NAMEexamples_per_second`; nothing without time."""
        if not self.seconds:
            return {}
        return {
            f"{name}tokens_per_second": self.num_tokens / self.seconds,
            f"{name}examples_per_second": self.num_examples / self.seconds,
        }


class Throughput(FederatedCallback):
    """Adds seconds, tokens a second and examples a second to every round's metrics.

    docs/metrics.md has their names. It must be called before callbacks that measure models of their
    own in `on_round_metrics`: those are not the run's work.
    """

    def __init__(self) -> None:
        """Start with nothing done."""
        self._stages: dict[str, Work] = defaultdict(Work)
        self._server, self._evaluation = Work(), Work()
        self._evaluation_started = 0.0

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Forget the round before, and what was measured after it."""
        self._stages.clear()
        self._server, self._evaluation = Work(), Work()

    def on_client_end(
        self, trainer: Any, round_idx: int, client_id: int, stages: dict[str, Any]
    ) -> None:
        """Count a client's stages."""
        for name, result in stages.items():
            self._stages[name].add(result.seconds, result.num_tokens, result.num_examples)

    def on_server_train_end(self, trainer: Any, round_idx: int, result: Any) -> None:
        """Count the server's steps."""
        self._server.add(result.seconds, result.num_tokens, result.num_examples)

    def on_evaluation_start(self, trainer: Any, split: str, num_batches: int) -> None:
        """Look at the clock."""
        self._evaluation_started = time.perf_counter()

    def on_evaluation_end(self, trainer: Any, split: str, metrics: dict[str, float]) -> None:
        """Count the split, which is always measured whole."""
        seconds = time.perf_counter() - self._evaluation_started
        examples = trainer.data.num_examples(split)
        self._evaluation.add(seconds, trainer.data.num_tokens(split), examples)

    def on_round_metrics(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Add the round's figures."""
        clients = Work()
        for name, work in self._stages.items():
            clients.add(work.seconds, work.num_tokens, work.num_examples)
            metrics[f"client/{name}_seconds"] = work.seconds
            metrics |= work.metrics(f"client/{name}_")
        metrics |= clients.metrics("client/")
        metrics |= self._server.metrics("server/")
        if self._evaluation.seconds:
            metrics["round/evaluation_seconds"] = self._evaluation.seconds
        metrics |= self._evaluation.metrics("evaluation/")
