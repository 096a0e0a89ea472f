"""A run that is stopped at a chosen point, and what it left compared bit for bit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.callbacks import FederatedCallback
from fedsp.state_files import load_state


class Interrupt(FederatedCallback):
    """Raises KeyboardInterrupt at one point of one round, as Ctrl-C would."""

    def __init__(self, hook: str, round_idx: int) -> None:
        def raise_at(trainer: Any, *args: Any) -> None:
            if trainer.history.rounds_done == round_idx:
                raise KeyboardInterrupt

        setattr(self, hook, raise_at)


def checkpointed(run_dir: Path, rounds: int = 3) -> dict[str, Any]:
    state: dict[str, Any] = load_state(run_dir / "checkpoints" / f"round-{rounds:06d}.safetensors")
    return state


def equal(one: Any, other: Any) -> bool:
    """Bit-for-bit equality of nested state, wall-clock seconds aside."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        keys = {key for key in one if "second" not in str(key)}
        return keys == {key for key in other if "second" not in str(key)} and all(
            equal(one[key], other[key]) for key in keys
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
