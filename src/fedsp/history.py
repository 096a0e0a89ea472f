"""The rounds so far: their metrics, which one was best, and whether to stop early."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from fedsp.payload import Payload

# what `fedsp.phases` measures; accuracies only where questions have several choices, the last two
# only where completions are written
_WRITTEN = ("server/val_exact_match", "server/val_f1")
METRICS = (
    *(f"server/val_{name}" for name in ("loss", "perplexity", "accuracy", "accuracy_norm")),
    *_WRITTEN,
)


@dataclass(frozen=True)
class Evaluation:
    """When the server's prompt is measured on the selection split, and what that decides.

    Args:
        every_n_rounds: Rounds between evaluations, at least 1; the last round is always evaluated.
        monitor: Metric that picks the best round, such as `server/val_loss` or
            `server/val_accuracy`.
        mode: `min` where lower is better, `max` where higher is; null takes what suits the metric.
        patience: Evaluations without a better value before the run stops; null never stops early.
        generate_tokens: Longest completion, in tokens, that is written after each prompt of the
            selection and the test split for exact match and F1; 0 leaves both out.
    """

    every_n_rounds: int = 1
    monitor: str = "server/val_loss"
    mode: Literal["min", "max"] | None = None
    patience: int | None = None
    generate_tokens: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a value is out of its range.
        """
        if self.every_n_rounds < 1:
            raise ValueError(
                "`trainer.evaluation.every_n_rounds` must be at least 1, got "
                f"{self.every_n_rounds}."
            )
        if self.monitor not in METRICS:
            raise ValueError(
                f"`trainer.evaluation.monitor` must be one of {list(METRICS)}, "
                f"got {self.monitor!r}."
            )
        if self.generate_tokens < 0:
            raise ValueError(
                "`trainer.evaluation.generate_tokens` must be at least 0, got "
                f"{self.generate_tokens}."
            )
        if self.monitor in _WRITTEN and not self.generate_tokens:
            raise ValueError(
                f"`trainer.evaluation.monitor` {self.monitor!r} needs completions to be written: "
                "set `trainer.evaluation.generate_tokens` to the longest answer's tokens, got 0."
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"`trainer.evaluation.patience` must be at least 1 or null, got {self.patience}."
            )

    @property
    def lower_is_better(self) -> bool:
        """Which of two values of the monitored metric is the better one."""
        if self.mode is not None:
            return self.mode == "min"
        return self.monitor in ("server/val_loss", "server/val_perplexity")


@dataclass(frozen=True)
class Best:
    """The best round: its index (-1 before the first round), its monitored value, its payload."""

    round_idx: int
    value: float
    payload: Payload


class History:
    """Metrics of every finished round and the choice among them."""

    def __init__(self, evaluation: Evaluation) -> None:
        """Start empty.

        Args:
            evaluation: What to monitor.
        """
        self.evaluation = evaluation
        self.rounds: list[dict[str, float]] = []
        self.zero_shot: dict[str, float] = {}
        self.best: Best | None = None
        self.stale_evaluations = 0

    @property
    def rounds_done(self) -> int:
        """Number of finished rounds."""
        return len(self.rounds)

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        patience = self.evaluation.patience
        return patience is not None and self.stale_evaluations >= patience

    def is_due(self, round_idx: int, num_rounds: int) -> bool:
        """Whether a round is followed by an evaluation."""
        every = self.evaluation.every_n_rounds
        return (round_idx + 1) % every == 0 or round_idx + 1 == num_rounds

    def add(self, metrics: dict[str, float]) -> None:
        """Append a finished round."""
        self.rounds.append(metrics)

    def offer(self, round_idx: int, metrics: dict[str, float], payload: Payload) -> bool:
        """Compare an evaluation with the best one.

        Args:
            round_idx: 0-based communication round.
            metrics: Holds the monitored metric.
            payload: What was measured.

        Returns:
            Whether it is the new best.

        Raises:
            ValueError: If the monitored metric is not among the metrics.
        """
        monitor = self.evaluation.monitor
        if monitor not in metrics:
            raise ValueError(
                f"`trainer.evaluation.monitor` must be one of {sorted(metrics)}, got {monitor!r}."
            )
        value = metrics[monitor]
        sign = -1.0 if self.evaluation.lower_is_better else 1.0
        better = self.best is None or sign * value > sign * self.best.value
        if math.isfinite(value) and better:
            self.best = Best(round_idx, value, payload)
            self.stale_evaluations = 0
            return True
        self.stale_evaluations += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain data and tensors."""
        best = self.best
        return {
            "rounds": self.rounds,
            "zero_shot": self.zero_shot,
            "best": None if best is None else [best.round_idx, best.value, best.payload],
            "stale_evaluations": self.stale_evaluations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rounds = [dict(metrics) for metrics in state["rounds"]]
        self.zero_shot = dict(state["zero_shot"])
        self.best = None if state["best"] is None else Best(*state["best"])
        self.stale_evaluations = state["stale_evaluations"]
