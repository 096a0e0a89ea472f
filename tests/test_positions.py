"""Positions, masks and padding against values counted by hand."""

import torch

from fedsp.positions import mask_with_prompt, padding_to_the_right, text_positions

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])


def test_positions_count_real_tokens_from_the_start() -> None:
    got = text_positions(MASK, 10)
    assert got.tolist() == [[10, 11, 12, 13], [10, 11, 11, 11], [10, 10, 10, 11]]
    assert text_positions(MASK.bool(), 10).tolist() == got.tolist()


def test_virtual_tokens_count_in_the_mask() -> None:
    assert mask_with_prompt(MASK, 2)[1].tolist() == [1, 1, 1, 1, 0, 0]
    assert torch.equal(mask_with_prompt(MASK, 0), MASK)


def test_padding_moves_to_the_right_and_back() -> None:
    there, back = padding_to_the_right(MASK)
    moved = MASK.gather(1, there)
    assert moved.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert torch.equal(moved.gather(1, back), MASK)
