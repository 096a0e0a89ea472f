"""Positions, masks and padding against values counted by hand."""

import torch
from torch import Tensor, nn

from fedsp.positions import mask_with_prompt, padding_to_the_right, rotate, text_positions

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


class QuarterTurn(nn.Module):
    """A rotary embedding of two turning entries, a quarter turn a position, scaled by 2."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = (positions * torch.pi / 2)[..., None].expand(-1, -1, 2)
        return 2 * angle.cos(), 2 * angle.sin()


def test_keys_turn_and_values_do_not() -> None:
    prefix = torch.tensor([1.0, 2.0, 3.0]).expand(1, 2, 1, 1, 3)
    (keys, values) = rotate(prefix, QuarterTurn(), 1)[0, :, 0, 0]
    torch.testing.assert_close(keys, torch.tensor([-2.0, 1.0, 3.0]))
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert rotate(prefix.bfloat16(), QuarterTurn(), 1).dtype == torch.bfloat16
