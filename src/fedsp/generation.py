"""Texts continued by a model behind a soft prompt.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K key/value heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsp.backbone import Backbone
from fedsp.positions import mask_with_prompt, text_positions
from fedsp.prefix_cache import growing_cache
from fedsp.shards import is_sharded


@torch.no_grad()
def generate(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    prefix: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Continue texts.

    Args:
        backbone: The model that writes.
        input_ids: [B, T] int64 token ids, padded on the left.
        attention_mask: [B, T] int64, 1 where a token is real.
        prefix: [L, 2, K, P, D] soft prompt or None.
        **kwargs: Options of transformers' `generate`, such as `max_new_tokens`.

    Returns:
        [B, T + new] int64 token ids, the given ones included.

    Raises:
        ValueError: If the padding is on the right, the prompt's shape is not the model's, or there
            are too few positions.
        RuntimeError: If embeddings and layers differ in dtype, as in an auxiliary model whose
            embeddings are a bfloat16 backbone's, its vocabulary is trimmed, or it is sharded.
    """
    model = backbone.model
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("`generate` needs texts padded on the left, got padding on the right.")
    if model.get_input_embeddings().weight.dtype != backbone.dtype:
        raise RuntimeError("`generate` needs embeddings and layers of one dtype.")
    if is_sharded(model):
        raise RuntimeError("`generate` needs a model that is not sharded.")
    if backbone.vocabulary is not None:
        raise RuntimeError("`generate` needs a full vocabulary; this model's is trimmed.")
    start = backbone.text_start(prefix)
    length = start + input_ids.shape[1] + (kwargs.get("max_new_tokens") or 0)
    backbone.check_length(length)
    positions = text_positions(attention_mask, start)
    if prefix is not None and prefix.shape[3] > 0:
        if backbone.slides(length + prefix.shape[3]) and not bool(attention_mask.all()):
            return _generate_by_row(backbone, input_ids, attention_mask, prefix, kwargs)
        beams = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
        rows = len(input_ids) * beams
        kwargs["past_key_values"] = growing_cache(prefix.to(backbone.dtype), rows)
        attention_mask = mask_with_prompt(attention_mask, prefix.shape[3])
    run: Any = model.generate
    return run(input_ids, attention_mask=attention_mask, position_ids=positions, **kwargs)


def _generate_by_row(
    backbone: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    prefix: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Generate without padding, which would push the prompt out of the sliding windows."""
    rows = []
    for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
        new = generate(backbone, ids[mask][None], mask[mask][None].long(), prefix, **kwargs)
        rows.append(torch.cat([ids[~mask].expand(len(new), -1), new], dim=1))
    pad = input_ids[attention_mask == 0][0].item()
    length = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, length - row.shape[1]), value=pad) for row in rows])
