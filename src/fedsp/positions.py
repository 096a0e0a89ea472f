"""Where tokens stand beside a soft prompt: positions, masks, padding. Pure functions.

Axis letters: B batch, T text tokens, P virtual tokens.
"""

import torch
from torch import Tensor


def text_positions(attention_mask: Tensor, start: int) -> Tensor:
    """Count real tokens, whichever side the padding is on.

    Args:
        attention_mask: [B, T] int64 or bool, 1 where a token is real.
        start: Position of the first real token.

    Returns:
        [B, T] int64 positions; `start` or the last one where a token is padding.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + start


def mask_with_prompt(attention_mask: Tensor, num_virtual_tokens: int) -> Tensor:
    """Put P virtual tokens, which all count, before the text.

    Args:
        attention_mask: [B, T] 1 where a token is real.
        num_virtual_tokens: P.

    Returns:
        [B, P + T] mask of the same dtype.
    """
    virtual = attention_mask.new_ones(len(attention_mask), num_virtual_tokens)
    return torch.cat([virtual, attention_mask], dim=1)


def padding_to_the_right(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find the order of tokens in which all padding is on the right.

    Args:
        attention_mask: [B, T] 1 where a token is real; every row's padding is on one side.

    Returns:
        [B, T] int64 indices that `gather` the tokens in that order, and [B, T] indices back.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    shift = attention_mask.long().argmax(dim=1, keepdim=True)
    return (places + shift) % len(places), (places - shift) % len(places)
