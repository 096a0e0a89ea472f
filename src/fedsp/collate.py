"""Examples to padded batches. Nothing here tokenises, sorts or shuffles.

Axis letters: B examples, R rows (one a choice), T text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsp.examples import Example

IGNORED_LABEL = -100


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad the right completion of every example on the right.

    Args:
        examples: At least one.
        pad_id: Token id at padded places; masked, so any id does.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [B, T] int64. Labels are the token ids of
        the completion and -100 at the prompt and the padding; they are not shifted.
    """
    return _pad_right([(ex.prompt_ids, ex.completions[ex.answer]) for ex in examples], pad_id)


def collate_choices(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Make every choice of every example a row, padded on the right.

    Args:
        examples: At least one.
        pad_id: Token id at padded places.

    Returns:
        As `collate` with [R, T], and of each row `question` [R] int64, the index of its example in
        `examples`, `is_answer` [R] bool and `num_chars` [R] int64.
    """
    rows = [(ex.prompt_ids, choice) for ex in examples for choice in ex.completions]
    batch = _pad_right(rows, pad_id)
    counts = torch.tensor([len(ex.completions) for ex in examples])
    batch["question"] = torch.repeat_interleave(torch.arange(len(examples)), counts)
    is_answer = [idx == ex.answer for ex in examples for idx in range(len(ex.completions))]
    batch["is_answer"] = torch.tensor(is_answer, dtype=torch.bool)
    batch["num_chars"] = torch.tensor([n for ex in examples for n in ex.num_chars])
    return batch


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


def _pad_right(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for idx, (prompt, completion) in enumerate(rows):
        ids = torch.tensor(prompt + completion, dtype=torch.long)
        input_ids[idx, : len(ids)] = ids
        attention_mask[idx, : len(ids)] = 1
        labels[idx, len(prompt) : len(ids)] = ids[len(prompt) :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
