"""Where tokens stand beside a soft prompt: positions, masks, padding, rotated keys. Pure functions.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K key/value heads, D head size.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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


def rotate(
    prefix: Tensor, rotary: nn.Module, by: int, layer_types: Sequence[str] | None = None
) -> Tensor:
    """Turn a prompt's keys by a number of rotary positions; values carry no position.

    Args:
        prefix: [L, 2, K, P, D] keys and values; where only a part of each key turns, the first.
        rotary: The model's rotary embedding, on the prompt's device.
        by: Number of positions, negative for backwards.
        layer_types: Kind of each layer, for models that turn some layers faster than others.

    Returns:
        [L, 2, K, P, D] prompt in the same dtype.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.2.2; halves instead of neighbours, as in
        transformers' Llama.
    """
    positions = torch.tensor([[0, by]], device=prefix.device)
    per_layer = "layer_type" in inspect.signature(rotary.forward).parameters
    rotated = []
    for index, (keys, values) in enumerate(prefix.float().unbind()):
        kind = (layer_types[index],) if per_layer and layer_types is not None else ()
        cosine, sine = rotary(keys, positions, *kind)
        turning, fixed = keys.tensor_split([cosine.shape[-1]], dim=-1)
        first, second = turning.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
        # Some models scale cosine and sine; the keys carry that factor already, cos 0 tells it.
        turned = (turning * cosine[0, 1] + across * sine[0, 1]) / cosine[0, 0]
        rotated.append(torch.stack([torch.cat([turned, fixed], dim=-1), values]))
    return torch.stack(rotated).to(prefix.dtype)
