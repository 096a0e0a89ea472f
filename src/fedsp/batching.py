"""Which examples form a batch at which step: pure functions of the seed, the owner and the step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fedsp.seeding import numpy_stream

# Groups of so many batches are sorted by length; an epoch has at least so many groups, since a
# single sorted group would put the same examples together in every epoch.
_BATCHES_PER_GROUP = 50
_GROUPS_PER_EPOCH = 4


@dataclass(frozen=True)
class Batching:
    """How examples are put together.

    Args:
        batch_size: Examples of a training batch, at least 1.
        eval_batch_size: Choices of an evaluation batch, at least 1; those of a question stay
            together behind one run of its prompt. A text without choices counts as one.
        length_grouping: Put examples of similar length together, which saves padding. Off: fully
            random.
    """

    batch_size: int = 8
    eval_batch_size: int = 32
    length_grouping: bool = True

    def __post_init__(self) -> None:
        for name, size in (
            ("batch_size", self.batch_size),
            ("eval_batch_size", self.eval_batch_size),
        ):
            if size < 1:
                raise ValueError(f"`data.batching.{name}` must be at least 1, got {size}.")


class StepBatches(Sampler[list[int]]):
    """Batches of the `num_steps` steps from `start_step` of an owner's endless stream.

    The stream is one epoch after the other, each in an order of its own. Every example comes once
    an epoch; the epoch's last batch may be smaller. A step's batch does not depend on where reading
    starts.

    Args:
        lengths: [examples] Tokens of every example; at least one.
        batching: How examples are put together.
        seed: The run's seed.
        owner: Whose stream, such as `"server"`.
        client_id: Index of the client, -1 for the other owners.
        start_step: First step, counted from 0.
        num_steps: Number of batches; None: one epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batching: Batching,
        *,
        seed: int,
        owner: str,
        client_id: int = -1,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        if start_step < 0 or (num_steps is not None and num_steps < 0):
            raise ValueError(
                f"`start_step` and `num_steps` must not be negative, got {start_step}, {num_steps}."
            )
        self._lengths = lengths
        self._batching = batching
        self._stream = (seed, f"batches/{owner}", client_id)
        self.batches_per_epoch = -(-len(lengths) // batching.batch_size)
        self._start = start_step
        self._num_steps = self.batches_per_epoch if num_steps is None else num_steps

    @property
    def sampler(self) -> "StepBatches":
        """The sampler itself: Lightning looks for `set_epoch` at a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start at an epoch, as Lightning asks for before each of its own."""
        self._start = epoch * self.batches_per_epoch

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch, skip = divmod(self._start, self.batches_per_epoch)
        left = self._num_steps
        while left > 0:
            batches = self._epoch(epoch)[skip : skip + left]
            yield from batches
            left -= len(batches)
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[list[int]]:
        seed, purpose, client_id = self._stream
        rng = numpy_stream(seed, purpose, round_idx=epoch, client_id=client_id)
        order = rng.permutation(len(self._lengths))
        size = self._batching.batch_size
        if not self._batching.length_grouping:
            return [order[start : start + size].tolist() for start in range(0, len(order), size)]
        per_group = self.batches_per_epoch // _GROUPS_PER_EPOCH
        group = size * max(1, min(per_group, _BATCHES_PER_GROUP))
        batches = []
        for start in range(0, len(order), group):
            rows = order[start : start + group]
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            batches += [rows[at : at + size].tolist() for at in range(0, len(rows), size)]
        return [batches[position] for position in rng.permutation(len(batches))]


def eval_batches(
    lengths: Sequence[int], num_choices: Sequence[int], eval_batch_size: int
) -> list[list[int]]:
    """Put examples together by length, the longest first, so that too little memory shows at once.

    Args:
        lengths: Tokens of every example's row.
        num_choices: Choices of every example.
        eval_batch_size: Choices of a batch; an example with more is a batch by itself.

    Returns:
        Indices of every example once.
    """
    batches: list[list[int]] = []
    room = 0
    for idx in sorted(range(len(lengths)), key=lambda idx: (-lengths[idx], idx)):
        if num_choices[idx] > room or not batches:
            batches.append([])
            room = eval_batch_size
        batches[-1].append(idx)
        room -= num_choices[idx]
    return batches


def make_loader(
    examples: Sequence[Any],
    batches: Iterable[list[int]],
    collate_fn: Callable[[list[Any]], dict[str, Tensor]],
) -> DataLoader[Any]:
    """Make a loader over given batches that leaves torch's global random stream alone.

    Args:
        examples: What the batches' indices point at.
        batches: Indices of each batch.
        collate_fn: Makes a batch of its examples.
    """
    return DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate_fn,
        # without one of its own every start of a loader draws from the global generator
        generator=torch.Generator(),
    )
