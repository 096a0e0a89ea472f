"""Prompts that a user brings: read, laid out by a run's task, checked, batched.

Nothing is generated here, and no completion is asked for.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fedsp.batching import eval_batches, make_loader
from fedsp.collate import collate_prompts
from fedsp.examples import Example
from fedsp.sources import Files
from fedsp.tasks import Task


class Prompts:
    """The prompts of a file's rows."""

    def __init__(self, path: str, task: Task) -> None:
        """Read the file and make sure that every row gives a prompt; no tokenizer is needed yet.

        Args:
            path: File as `fedsp.sources.Files` reads it.
            task: Lays out the rows.

        Raises:
            ValueError: If the file is missing or malformed, or a row lacks a field of the prompt or
                has nothing to continue.
        """
        try:
            self._rows: list[Mapping[str, Any]] = list(Files(path).load())
            for row_idx, row in enumerate(self._rows):
                if not task.render_prompt(row, row_idx):
                    raise ValueError(f"row {row_idx} gives no prompt, and nothing to continue.")
        except ValueError as error:
            raise ValueError(f"`--input`: {error}") from error
        self._task = task

    def loader(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        *,
        text_room: int | None,
        max_new_tokens: int,
    ) -> DataLoader[Any]:
        """Return the prompts once, padded on the left, each with the index of its row.

        Args:
            tokenizer: Tokenizer of the model.
            batch_size: Prompts of a batch, at least 1.
            text_room: Positions for a prompt and its completion, None without limit.
            max_new_tokens: Longest completion in tokens, at least 1.

        Raises:
            ValueError: If `max_new_tokens` is out of its range, or a prompt leaves too little room.
        """
        room = room_for_prompt(text_room, max_new_tokens)
        encoded = self._task.encode_prompts(self._rows, tokenizer)
        for row_idx, ids in enumerate(encoded):
            check_length(ids, room, f"`--input`: the prompt of row {row_idx}")
        pad_id = int(tokenizer.pad_token_id)
        batches = eval_batches([len(ids) for ids in encoded], [1] * len(encoded), batch_size)
        return make_loader(range(len(encoded)), batches, partial(_collate, encoded, pad_id))


def check_length(ids: Sequence[int], room: int | None, what: str) -> None:
    """Refuse a prompt that leaves no room for its completion.

    Args:
        ids: Its tokens.
        room: Most tokens of a prompt, None without limit.
        what: The prompt, as the message begins.

    Raises:
        ValueError: If it is longer.
    """
    if room is not None and len(ids) > room:
        raise ValueError(
            f"{what} has {len(ids)} tokens, the model's positions leave {room} beside the virtual "
            "tokens and `--max_new_tokens`. Shorten it, or lower `--max_new_tokens`."
        )


def room_for_prompt(text_room: int | None, max_new_tokens: int) -> int | None:
    """Return the most tokens that a prompt may have.

    Args:
        text_room: Positions for text, None without limit.
        max_new_tokens: Positions kept for the completion.

    Raises:
        ValueError: If `max_new_tokens` is below 1, or leaves no room.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`--max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if text_room is not None and max_new_tokens >= text_room:
        raise ValueError(
            f"`--max_new_tokens` must be below {text_room}, the model's positions less its virtual "
            f"tokens, got {max_new_tokens}."
        )
    return None if text_room is None else text_room - max_new_tokens


def _collate(encoded: Sequence[list[int]], pad_id: int, rows: list[int]) -> dict[str, Tensor]:
    examples = [Example(encoded[row], [], 0, []) for row in rows]
    return collate_prompts(examples, pad_id, rows)
