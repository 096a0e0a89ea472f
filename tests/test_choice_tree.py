"""Who sees whom in a question with its choices, against figures written by hand."""

import torch

from fedsp.choice_tree import additive_mask, depths, predecessors, seen_text

# prompt a b, choices c d / e, one place of padding; a question without a prompt: f g / h
CHOICE = torch.tensor([[-1, -1, 0, 0, 1, -1], [2, 2, 3, -1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


def test_a_choice_sees_the_prompt_and_itself_and_no_other_choice() -> None:
    seen = seen_text(MASK, CHOICE)[:, :5]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert seen[0, :, :5].int().tolist() == expected
    assert not seen[0, :, 5].any(), "nobody sees the padding"
    assert seen[1, :3, :3].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_every_choice_stands_where_it_would_alone() -> None:
    depth = depths(seen_text(MASK, CHOICE))
    assert depth[0, :5].tolist() == [0, 1, 2, 3, 2]
    assert depth[1, :3].tolist() == [0, 1, 0]


def test_a_choices_first_token_is_predicted_by_the_prompts_last() -> None:
    before = predecessors(MASK, CHOICE)
    assert before[0, 2:5].tolist() == [1, 2, 1]
    assert before[1, :3].tolist() == [-1, 0, -1], "without a prompt nothing predicts it"


def test_a_window_counts_along_the_choice_and_the_virtual_tokens() -> None:
    mask = additive_mask(seen_text(MASK, CHOICE), 2, 3, torch.float32)[0, 0]
    # places of a question: virtual 0 1, prompt 2 3, choice c d 4 5, choice e 4
    assert (mask == 0)[:5].int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0, 1, 0],
    ]
    assert mask.min() == torch.finfo(torch.float32).min
