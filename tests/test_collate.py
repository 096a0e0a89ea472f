"""Batches: padding, labels and the rows of choices, against figures written by hand."""

import torch

from fedsp.collate import collate, collate_choices, collate_prompts
from fedsp.examples import Example

PAD = 99
EXAMPLES = [Example([1, 2], [[3], [4, 5]], 1, [7, 8]), Example([6], [[7]], 0, [9])]


def test_labels_stand_only_at_the_right_completions_tokens() -> None:
    batch = collate(EXAMPLES, PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5], [6, 7, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 4, 5], [-100, 7, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_question_is_a_row_with_all_its_choices() -> None:
    batch = collate_choices(EXAMPLES, PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, PAD, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["choice"].tolist() == [[-1, -1, 0, 1, 1], [-1, 2, -1, -1, -1]]
    assert batch["question"].tolist() == [0, 0, 1]
    assert batch["is_answer"].tolist() == [False, True, True]
    assert batch["is_answer"].dtype == torch.bool
    assert batch["num_chars"].tolist() == [7, 8, 9]


def test_prompts_are_padded_on_the_left() -> None:
    batch = collate_prompts(EXAMPLES, PAD, [11, 4])
    assert batch["input_ids"].tolist() == [[1, 2], [PAD, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["row"].tolist() == [11, 4]


def test_an_empty_prompt_is_all_completion() -> None:
    batch = collate([Example([], [[3, 4]], 0, [2])], PAD)
    assert batch["labels"].tolist() == [[3, 4]]
