"""Rotated prompts against the other convention of positions, and against turns by hand."""

import pytest
import torch
from torch import Tensor, nn

from families import (
    LEARNED_POSITIONS,
    ROTARY,
    at_offset,
    logits_of,
    random_prefix,
    random_text,
    tiny_backbone,
    tiny_config,
)
from fedsp.rotation import rotate, rotate_keys

P = 5


@pytest.mark.parametrize("family", ROTARY)
def test_rotated_keys_give_the_logits_of_the_other_position_convention(family: str) -> None:
    backbone = tiny_backbone(family)
    ids, mask = random_text()
    valid = mask.bool()
    prefix = random_prefix(backbone, P)
    from_zero = logits_of(at_offset(backbone, 0), ids, mask, prefix)[valid]
    from_p = logits_of(backbone, ids, mask, prefix)[valid]
    rotated = rotate_keys(backbone, prefix, P)
    assert (from_zero - from_p).abs().max() > 1e-3, "the conventions differ"
    assert (logits_of(backbone, ids, mask, rotated)[valid] - from_zero).abs().max() < 1e-5
    assert (rotate_keys(backbone, rotated, -P) - prefix).abs().max() < 1e-5
    assert torch.equal(rotated[:, 1], prefix[:, 1]), "values carry no position"


def test_keys_of_scaled_rotary_positions_are_rotated_without_the_scale() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    }
    backbone = tiny_backbone("llama", config=tiny_config("llama", rope_parameters=scaling))
    ids, mask = random_text()
    prefix = random_prefix(backbone, P)
    expected = logits_of(at_offset(backbone, 0), ids, mask, prefix)[mask.bool()]
    got = logits_of(backbone, ids, mask, rotate_keys(backbone, prefix, P))[mask.bool()]
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", LEARNED_POSITIONS)
def test_keys_of_learned_positions_cannot_be_rotated(family: str) -> None:
    backbone = tiny_backbone(family)
    with pytest.raises(ValueError, match=f"{family} has learned ones"):
        rotate_keys(backbone, random_prefix(backbone), P)


def test_a_rotation_of_another_kind_is_refused() -> None:
    # Cohere turns neighbouring entries of a head, not its halves.
    config = tiny_config("llama", model_type="cohere", logit_scale=1.0)
    backbone = tiny_backbone("llama", config=config)
    with pytest.raises(ValueError, match="and cohere does otherwise"):
        rotate_keys(backbone, random_prefix(backbone), P)


def test_a_prompt_of_another_model_is_not_rotated() -> None:
    with pytest.raises(ValueError, match="was expected"):
        rotate_keys(tiny_backbone("llama"), torch.zeros(4, 2, 4, P, 8), 1)


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
