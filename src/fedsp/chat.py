"""A conversation with a run's global model, line by line; every line stands by itself.

Where lines come from is the caller's business; the model is loaded already.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from transformers import PreTrainedTokenizerBase, TextStreamer

from fedsp.generation import generate
from fedsp.prompts import check_length, room_for_prompt
from fedsp.seeding import isolated_rng, seed_for
from fedsp.server import ServerModule
from fedsp.tasks import Task
from fedsp.tokenization import leading_ids

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Manner:
    """How the model answers.

    Args:
        max_new_tokens: Longest answer in tokens, at least 1; None: `MAX_NEW_TOKENS`, or half of the
            room that the model has for text where that is less.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        without_prompt: Leave the soft prompt out.
        seed: Seed of sampling.
    """

    max_new_tokens: int | None
    temperature: float
    without_prompt: bool
    seed: int

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If a number is out of its range.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"`--max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"`--temperature` must be at least 0, got {self.temperature}.")

    def longest_answer(self, room: int | None) -> int:
        """Return the length of the longest answer in tokens.

        Args:
            room: Tokens of text that the model has room for; None has no limit.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return MAX_NEW_TOKENS if room is None else min(MAX_NEW_TOKENS, room // 2)


class Layout:
    """Makes token ids of what is typed."""

    def __init__(self, task: Task, raw: bool) -> None:
        """Find the field of the task's prompt that takes the text.

        Args:
            task: The run's task.
            raw: Leave the task out.

        Raises:
            ValueError: If the task's prompt has no field, or several, and `raw` is off.
        """
        fields = task.prompt_fields()
        if not raw and len(fields) != 1:
            named = ", ".join(fields) or "none"
            raise ValueError(
                "`fedsp chat` puts what is typed into the one field of the prompt of `data.task`, "
                f"whose fields are: {named}. Use `--raw true` to send it as it is typed."
            )
        self._task, self._field = task, None if raw else fields[0]

    def encode(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of a prompt around what was typed.

        Args:
            text: A line; backslash and n in it stand for the start of a new one.
            tokenizer: Tokenizer of the model.
        """
        text = text.replace("\\n", "\n")
        if self._field is not None:
            return self._task.encode_prompts([{self._field: text}], tokenizer)[0]
        return leading_ids(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]


def converse(
    fabric: Fabric,
    server: ServerModule,
    lines: Iterable[str],
    layout: Layout,
    manner: Manner,
) -> None:
    """Answer every line on stdout as it is generated; a line that is too long is told of on stderr.

    Args:
        fabric: Where to run.
        server: The global model with its soft prompt.
        lines: What is typed.
        layout: Makes prompts of it.
        manner: How the model answers.

    Raises:
        ValueError: If the model has no room for any answer of that length.
    """
    server.eval()
    max_new_tokens = manner.longest_answer(server.text_room())
    room = room_for_prompt(server.text_room(), max_new_tokens)
    for turn, line in enumerate(lines):
        ids = layout.encode(line, server.tokenizer)
        try:
            check_length(ids, room, "what was typed")
        except ValueError as error:
            print(f"fedsp: {error}", file=sys.stderr)
            continue
        with isolated_rng(seed_for(manner.seed, "chat", round_idx=turn)), fabric.autocast():
            _answer(server, ids, manner, max_new_tokens)


@torch.no_grad()
def _answer(server: ServerModule, ids: list[int], manner: Manner, max_new_tokens: int) -> None:
    text = torch.tensor([ids], device=server.device)
    streamer = TextStreamer(server.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False}
    if manner.temperature > 0:
        sampling = {"do_sample": True, "temperature": manner.temperature}
    options = {"max_new_tokens": max_new_tokens, "streamer": streamer, **sampling}
    mask = torch.ones_like(text)
    if manner.without_prompt:
        with server.as_delivered() as backbone:
            generate(backbone, text, mask, None, **options)
    else:
        generate(server.require_deployed(), text, mask, server.prefix(), **options)
