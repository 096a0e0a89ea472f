"""The processes ("ranks") of a run: which one this is, its part of the work, what all of them have.

A run of one process has one rank, for which everything here does nothing. No model and no file
lives here.

Axes: B rows of a batch, T text tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from fedsp.vocabulary import IGNORED_LABEL

Batch = dict[str, Tensor]
Loss = Callable[[Batch, int], Tensor]


def check_processes(fabric: Fabric) -> None:
    """Refuse several processes that cannot work together here.

    Raises:
        ValueError: If the strategy is another one than `ddp`.
    """
    if fabric.world_size > 1 and not isinstance(fabric.strategy, DDPStrategy):
        raise ValueError(
            f"`trainer.strategy` must be ddp or auto with {fabric.world_size} processes, got "
            f"{type(fabric.strategy).__name__}."
        )


class Ranks:
    """The ranks of a run, as one of them sees them.

    All of them read the same batches and each works on its own rows, so that what a loss or a
    gradient is made of is known everywhere without asking.

    Attributes:
        rank: This one, from 0.
        size: How many there are.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        """Look at the processes.

        Args:
            fabric: Launched; None is for work that a rank does by itself, such as a client's.
        """
        self._fabric = fabric
        self.rank = fabric.global_rank if fabric is not None else 0
        self.size = fabric.world_size if fabric is not None else 1

    # --- who does what ----------------------------------------------------------------------------

    def owns_rows(self, num_rows: int) -> bool:
        """Whether a batch of so many rows has one for this rank."""
        return self.rank < num_rows

    def rows(self, batch: Batch) -> Batch:
        """Return this rank's rows of a training batch: every `size`-th, beginning with `rank`.

        A rank without any gets the first row: it takes part in what all have to do together, and
        `share` gives it no weight.

        Args:
            batch: [B, ...] tensors.
        """
        if self.size == 1:
            return batch
        num_rows = len(batch["input_ids"])
        own = slice(self.rank, None, self.size) if self.owns_rows(num_rows) else slice(1)
        return {name: tensor[own] for name, tensor in batch.items()}

    def share(self, counts: Tensor) -> Tensor:
        """Return this rank's share of what a whole batch counts.

        Args:
            counts: [B] What each row counts, such as its number of label tokens.

        Returns:
            [] in [0, 1]; the ranks' shares add up to 1 (to 0 where nothing counts).
        """
        if self.size == 1:
            return counts.new_ones((), dtype=torch.float32)
        return counts[self.rank :: self.size].sum() / counts.sum().clamp_min(1)

    def split(self, loss_of: Loss) -> Loss:
        """Return the part of a loss that this rank's rows make up; the parts add up to the loss.

        Args:
            loss_of: From a batch with `labels` [B, T] and its index to the mean over its label
                tokens.
        """
        if self.size == 1:
            return loss_of

        def part_of(batch: Batch, batch_idx: int) -> Tensor:
            return loss_of(self.rows(batch), batch_idx) * self.share(num_labels(batch["labels"]))

        return part_of

    def turns(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch, bool]]:
        """Deal whole batches out, one to each rank a turn.

        Args:
            batches: The same on every rank.

        Yields:
            Number of batches that are done after the turn, this rank's batch, and whether it
            counts: in a last turn with fewer batches than ranks some ranks repeat its first one.
        """
        done = 0
        turn: list[Batch] = []
        for batch in batches:
            turn.append(batch)
            if len(turn) == self.size:
                done += len(turn)
                yield done, turn[self.rank], True
                turn = []
        if turn:
            is_own = self.owns_rows(len(turn))
            yield done + len(turn), turn[self.rank if is_own else 0], is_own

    # --- what comes together ----------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, without a gradient and on the tensor's own device."""
        if self._fabric is None or self.size == 1:
            return tensor
        moved = self._fabric.to_device(tensor.detach().clone())
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; the gradient flows into this rank's part of it."""
        if self.size == 1:
            return tensor
        return tensor + (self.sum(tensor) - tensor.detach())

    def once(self, loss: Tensor) -> Tensor:
        """Return a loss that every rank knows whole, so that the ranks' values add up to it.

        Its gradient stays: each rank's is that of its own part already.
        """
        return loss if self.size == 1 else loss - loss.detach() * (1 - 1 / self.size)

    def reduce_gradients(self, parameters: Sequence[nn.Parameter], losses: list[Tensor]) -> None:
        """Add up gradients and losses over the ranks, in place and in one piece.

        Args:
            parameters: The same on every rank. One without a gradient on every rank keeps none.
            losses: [] each; replaced by the ranks' sums.
        """
        if self.size == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        is_there = torch.tensor([float(p.grad is not None) for p in parameters])
        pieces = [*(grad.flatten().float() for grad in grads), is_there.to(grads[0].device)]
        flat = self.sum(torch.cat([*pieces, *(loss.reshape(1).float() for loss in losses)]))
        sizes = [grad.numel() for grad in grads]
        *reduced, counts, summed = flat.split([*sizes, len(sizes), len(losses)])
        for idx, (parameter, value) in enumerate(zip(parameters, reduced, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(value.view_as(parameter))
            elif counts[idx] > 0:
                parameter.grad = value.view_as(parameter).to(parameter.dtype, copy=True)
        losses[:] = summed.unbind()

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes, in the order of the ranks."""
        if self._fabric is None or self.size == 1:
            return [data]
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        sizes = self.sum(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(data)] = _as_tensor(data)
        own = self._fabric.to_device(padded)
        pieces = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(pieces, own)
        named = zip(pieces, sizes.tolist(), strict=True)
        return [piece[:size].cpu().numpy().tobytes() for piece, size in named]

    def of_first(self, data: bytes) -> bytes:
        """Return the first rank's bytes on every rank."""
        if self._fabric is None or self.size == 1:
            return data
        size = self._fabric.to_device(torch.tensor([len(data)]))
        dist.broadcast(size, src=0)
        content = _as_tensor(data) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        content = self._fabric.to_device(content)
        dist.broadcast(content, src=0)
        return content.cpu().numpy().tobytes()

    def on_first(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Call what writes files: only the first rank does, all have the same to write.

        Args:
            function: Starts nothing that the other ranks would have to take part in.
            args: Its arguments.
            kwargs: Its keyword arguments.
        """
        if self.rank == 0:
            function(*args, **kwargs)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._fabric is not None and self.size > 1:
            self._fabric.barrier()

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first rank run a block before all others, which find what it left behind."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()


def num_labels(labels: Tensor) -> Tensor:
    """Return how many tokens of each row are predicted.

    Args:
        labels: [B, T] int64, -100 where nothing is to be predicted; not shifted.

    Returns:
        [B] int64.
    """
    return (labels[:, 1:] != IGNORED_LABEL).sum(dim=1)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
