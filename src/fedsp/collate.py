"""Examples to padded batches. Nothing here tokenises, sorts or shuffles.

Axis letters: B examples, C choices, T text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsp.choice_tree import OF_PROMPT
from fedsp.examples import Example
from fedsp.vocabulary import IGNORED_LABEL


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad the right completion of every example on the right.

    Args:
        examples: At least one.
        pad_id: Token id at padded places; masked, so any id does.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [B, T] int64. Labels are the token ids of
        the completion and -100 at the prompt and the padding; they are not shifted.
    """
    rows = [ex.prompt_ids + ex.completions[ex.answer] for ex in examples]
    input_ids, attention_mask = _pad_right(rows, pad_id)
    num_prompt = torch.tensor([len(ex.prompt_ids) for ex in examples])
    is_given = torch.arange(input_ids.shape[1]) < num_prompt[:, None]
    labels = input_ids.masked_fill(is_given | (attention_mask == 0), IGNORED_LABEL)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def collate_choices(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Put every example with all its choices into one row, padded on the right.

    Args:
        examples: At least one.
        pad_id: Token id at padded places.

    Returns:
        `input_ids` and `attention_mask` [B, T] int64; `choice` [B, T] int64, the index in the batch
        of the choice that a token belongs to, -1 at prompts and padding; and of each choice
        `question` [C] int64, the index of its example in `examples`, `is_answer` [C] bool and
        `num_chars` [C] int64.
    """
    rows = [ex.prompt_ids + [token for ids in ex.completions for token in ids] for ex in examples]
    input_ids, attention_mask = _pad_right(rows, pad_id)
    choice = torch.full_like(input_ids, OF_PROMPT)
    num_before = 0
    for idx, example in enumerate(examples):
        sizes = torch.tensor([len(ids) for ids in example.completions])
        choices = torch.arange(num_before, num_before + len(sizes))
        start = len(example.prompt_ids)
        choice[idx, start : start + int(sizes.sum())] = choices.repeat_interleave(sizes)
        num_before += len(sizes)
    counts = torch.tensor([len(ex.completions) for ex in examples])
    is_answer = [idx == ex.answer for ex in examples for idx in range(len(ex.completions))]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "choice": choice,
        "question": torch.arange(len(examples)).repeat_interleave(counts),
        "is_answer": torch.tensor(is_answer, dtype=torch.bool),
        "num_chars": torch.tensor([n for ex in examples for n in ex.num_chars]),
    }


def collate_prompts(
    examples: Sequence[Example], pad_id: int, rows: Sequence[int]
) -> dict[str, Tensor]:
    """Pad the prompts on the left, as generation needs them.

    Args:
        examples: At least one; every prompt holds a token.
        pad_id: Token id at padded places.
        rows: Index of each example's row in its source.

    Returns:
        `input_ids` and `attention_mask`, each [B, T] int64, and `row` [B] int64.
    """
    width = max(len(ex.prompt_ids) for ex in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for idx, example in enumerate(examples):
        start = width - len(example.prompt_ids)
        input_ids[idx, start:] = torch.tensor(example.prompt_ids, dtype=torch.long)
        attention_mask[idx, start:] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "row": torch.tensor(rows)}


def _pad_right(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, each [B, T] int64."""
    width = max(len(row) for row in rows)
    # one tensor of padded lists is several times faster to make than one tensor a row
    input_ids = torch.tensor(
        [row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long
    )
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, (torch.arange(width) < lengths[:, None]).long()
