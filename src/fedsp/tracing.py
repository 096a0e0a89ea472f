"""A trace of one round, for chrome://tracing or ui.perfetto.dev: which operation took how long.

The profiler slows its round down; nothing of the other rounds is touched.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fedsp.callbacks import FederatedCallback


class TraceRound(FederatedCallback):
    """Writes `trace-round-N.json` into the run folder.

    The spans `client N`, `server training` and `evaluation SPLIT` stand over the operations.
    """

    def __init__(self, round_idx: int = 1, record_shapes: bool = False) -> None:
        """Choose the round.

        Args:
            round_idx: 0-based round to trace. Round 0 also holds the hand-out and all that is done
                once.
            record_shapes: Note the shapes of every operation's inputs; makes the file larger.

        Raises:
            ValueError: If the round is negative.
        """
        if round_idx < 0:
            raise ValueError(
                "`trainer.callbacks`: TraceRound's `round_idx` must be at least 0, got "
                f"{round_idx}."
            )
        self.round_idx = round_idx
        self.record_shapes = record_shapes
        self._profiler: profile | None = None
        self._span = ExitStack()

    def on_setup_start(self, trainer: Any) -> None:
        """Refuse a round that the run does not have.

        Raises:
            ValueError: If there is no such round.
        """
        if self.round_idx >= trainer.num_rounds:
            raise ValueError(
                "`trainer.callbacks`: TraceRound's `round_idx` must be below `trainer.num_rounds`="
                f"{trainer.num_rounds}, got {self.round_idx}. Rounds are counted from 0."
            )

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Begin, if this is the round."""
        if round_idx != self.round_idx or not trainer.fabric.is_global_zero:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, record_shapes=self.record_shapes)
        self._profiler.start()

    def on_client_start(self, trainer: Any, round_idx: int, client_id: int) -> None:
        """Begin the client's span."""
        self._begin(f"client {client_id}")

    def on_client_end(
        self, trainer: Any, round_idx: int, client_id: int, stages: dict[str, Any]
    ) -> None:
        """End the client's span."""
        self._span.close()

    def on_server_train_start(self, trainer: Any, round_idx: int) -> None:
        """Begin the server's span."""
        self._begin("server training")

    def on_server_train_end(self, trainer: Any, round_idx: int, result: Any) -> None:
        """End the server's span."""
        self._span.close()

    def on_evaluation_start(self, trainer: Any, split: str, num_batches: int) -> None:
        """Begin the evaluation's span."""
        self._begin(f"evaluation {split}")

    def on_evaluation_end(self, trainer: Any, split: str, metrics: dict[str, float]) -> None:
        """End the evaluation's span."""
        self._span.close()

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Write the file."""
        if self._profiler is None:
            return
        profiler = self._stop(self._profiler)
        profiler.export_chrome_trace(str(trainer.folder.path / f"trace-round-{round_idx}.json"))

    def on_exception(self, trainer: Any, exception: BaseException) -> None:
        """Stop without a file: the round is not whole."""
        if self._profiler is not None:
            self._stop(self._profiler)

    def _begin(self, name: str) -> None:
        if self._profiler is not None:
            self._span.close()
            self._span.enter_context(record_function(name))

    def _stop(self, profiler: profile) -> profile:
        self._span.close()
        profiler.stop()
        self._profiler = None
        return profiler
