"""All choices of a question behind one run of its prompt: who sees whom, and from where. Pure.

A question is one row, `prompt, choice, choice, ...`. A choice sees the prompt and itself and no
other choice, and stands at the positions that it would have alone: the row is a tree whose
branches are the choices, and every token is computed as if its choice were the only one.

Axis letters: B questions, T text tokens, P virtual tokens, S = P + T.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OF_PROMPT = -1


def seen_text(attention_mask: Tensor, choice: Tensor) -> Tensor:
    """Say which tokens of its row each token sees.

    Args:
        attention_mask: [B, T] 1 where a token is real; padded on the right.
        choice: [B, T] int64 Which choice a token belongs to, -1 for the prompt and the padding.

    Returns:
        [B, T, T] bool, the seeing tokens along the second axis.
    """
    places = torch.arange(choice.shape[1], device=choice.device)
    shared = (choice[:, None, :] == OF_PROMPT) | (choice[:, None, :] == choice[:, :, None])
    seen = shared & (places <= places[:, None]) & attention_mask.bool()[:, None, :]
    # padding has to see something too: a softmax over nothing is NaN
    return seen | (places == places[:, None])


def depths(seen: Tensor) -> Tensor:
    """Count the tokens before each one in the text of its own choice.

    Args:
        seen: [B, T, T] bool, as `seen_text` returns it.

    Returns:
        [B, T] int64, 0 for the first token of a row.
    """
    return seen.sum(dim=-1) - 1


def predecessors(attention_mask: Tensor, choice: Tensor) -> Tensor:
    """Find the token that predicts each one: a choice's first is predicted by the prompt's last.

    Args:
        attention_mask: [B, T] 1 where a token is real; padded on the right.
        choice: [B, T] int64 Which choice a token belongs to, -1 for the prompt and the padding.

    Returns:
        [B, T] int64 places in the row, -1 where nothing comes before.
    """
    is_prompt = attention_mask.bool() & (choice == OF_PROMPT)
    before = torch.arange(-1, choice.shape[1] - 1, device=choice.device).expand_as(choice)
    begins = torch.ones_like(is_prompt)
    begins[:, 1:] = choice[:, 1:] != choice[:, :-1]
    return torch.where(begins, is_prompt.sum(dim=1, keepdim=True) - 1, before)


def additive_mask(
    seen: Tensor, num_virtual_tokens: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """Make the mask that attention adds to its scores.

    Args:
        seen: [B, T, T] bool, as `seen_text` returns it.
        num_virtual_tokens: P, all of them before every token.
        window: A token sees so many, itself included, counted along its own choice's text and the
            virtual tokens; None: all.
        dtype: That of the scores.

    Returns:
        [B, 1, T, S], 0 where a token sees another and the lowest number elsewhere.
    """
    text = depths(seen) + num_virtual_tokens
    virtual = torch.arange(num_virtual_tokens, device=seen.device).expand(len(seen), -1)
    allowed = torch.cat([seen.new_ones(*text.shape, num_virtual_tokens), seen], dim=2)
    if window is not None:
        places = torch.cat([virtual, text], dim=1)
        allowed &= text[:, :, None] - places[:, None, :] < window
    mask = torch.zeros(allowed.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def tree_masks(
    seen: Tensor,
    num_virtual_tokens: int,
    *,
    layer_types: Sequence[str] | None,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """Make the masks of all layers, as transformers' decoders take them.

    Args:
        seen: [B, T, T] bool, as `seen_text` returns it.
        num_virtual_tokens: P.
        layer_types: Kind of each layer; None where all are alike.
        window: Sliding window of the layers that have one; None: no layer has.
        dtype: That of the scores.

    Returns:
        A mask [B, 1, T, S] where all layers are alike, else one for each kind of layer.
    """
    windows = {"full_attention": None, "sliding_attention": window}
    kinds = set(layer_types or ["sliding_attention"])
    masks = {kind: additive_mask(seen, num_virtual_tokens, windows[kind], dtype) for kind in kinds}
    return masks if len(masks) > 1 else masks.popitem()[1]
