"""Measure which share of a round prefetching batches, or saving beside the work, could save.

Run: OMP_NUM_THREADS=1 python benchmarks/round_shares.py [--rounds 5]

`FederatedTrainer.fit` on the embedded model with 4 clients, as `round_overhead.py` runs it. The
clock is stopped around three things: making batches of tokenised examples, writing clients' states,
and writing checkpoints. All of it hidden behind the arithmetic is the most that could be gained.
Prints the medians over the rounds, after one that warms up.
"""

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from figure import Figure
from round_overhead import CASES, fit
from torch.utils.data.dataloader import _BaseDataLoaderIter

from fedsp.callbacks import FederatedCallback
from fedsp.checkpoint import Checkpoints
from fedsp.client_state import ClientStateStore

PARTS = {
    "making batches": (_BaseDataLoaderIter, "__next__"),
    "writing client states": (ClientStateStore, "put"),
    "writing checkpoints": (Checkpoints, "save"),
}


class Shares(FederatedCallback):
    """Notes what share of every round's wall time each part took.

    Attributes:
        rounds: Share by part, a round each.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.rounds: list[dict[str, float]] = []
        self._seconds: Counter[str] = Counter()
        self._started: float | None = None

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and adds its time to a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - started

        return run

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Start the clock."""
        self._seconds.clear()
        self._started = time.perf_counter()

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        """Stop the clock: the round is safe."""
        if self._started is not None:  # not the checkpoint before the first round
            whole = time.perf_counter() - self._started
            self.rounds.append({part: self._seconds[part] / whole for part in PARTS})


def measure(case: str, rounds: int) -> dict[str, float]:
    """Return the median share of each part in a round of a case."""
    shares = Shares()
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            timed = shares.timed(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        fit(CASES[case], shares, rounds + 1)
    timed_rounds = shares.rounds[1:]
    return {part: statistics.median(row[part] for row in timed_rounds) for part in PARTS}


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for case in ("nano", "nano, auxiliary stage"):
        for part, share in measure(case, args.rounds).items():
            print(Figure(f"share of a round, {case}: {part}", share).line())


if __name__ == "__main__":
    main()
