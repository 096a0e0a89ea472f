"""A soft prompt moved along rotary positions, so that the text behind it may start elsewhere.

Axis letters: L layers, K key/value heads, P virtual tokens, D head size.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsp.backbone import Backbone, is_close
from fedsp.prefix_cache import check_prefix
from fedsp.pretrained import text_option


@torch.no_grad()
def rotate_keys(backbone: Backbone, prefix: Tensor, by: int) -> Tensor:
    """Move a prompt's keys along the positions, so that a text `by` later has the same logits.

    Args:
        backbone: The model that reads the prompt.
        prefix: [L, 2, K, P, D] soft prompt.
        by: Number of positions; P turns a prompt of `position_offset: 0` into a default one.

    Returns:
        [L, 2, K, P, D] prompt in the same dtype.

    Raises:
        ValueError: If the prompt's shape is not the model's, it has learned positions, or its
            rotation is not the usual one.
    """
    check_prefix(prefix, backbone.kv_shape)
    model, rotary = backbone.model, backbone.rotary
    kind = model.config.model_type
    if rotary is None:
        raise ValueError(
            f"a prompt can only be moved along rotary positions, and {kind} has learned ones: "
            "trained with `model.backbone.position_offset: 0`, it fits no other offset."
        )
    ids = torch.arange(4, device=model.device)[None] % backbone.vocab_size
    here, there = (backbone.keys_values(ids, start) for start in (0, by))
    layer_types = text_option(model, "layer_types")
    if not is_close(rotate(here, rotary, by, layer_types), there, backbone.dtype):
        raise ValueError(
            "a prompt can only be moved where half of each head is turned against the other "
            f"at fixed frequencies, and {kind} does otherwise. Keep `position_offset` as it is."
        )
    return rotate(prefix.to(model.device), rotary, by, layer_types).to(prefix.device)


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
