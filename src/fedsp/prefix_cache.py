"""A soft prompt in transformers' caches, and what a model has cached as a soft prompt.

The only file that knows transformers' cache classes.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

ModelCache = Cache  # for who passes one on


def check_prefix(prefix: Tensor, kv_shape: tuple[int, int, int]) -> None:
    """Refuse a prompt of another model.

    Args:
        prefix: A soft prompt.
        kv_shape: (L, K, D) of the model.

    Raises:
        ValueError: If the prompt is not [L, 2, K, P, D].
    """
    num_layers, num_kv_heads, head_dim = kv_shape
    expected = (num_layers, 2, num_kv_heads, head_dim)
    if prefix.dim() != 5 or (*prefix.shape[:3], prefix.shape[4]) != expected:
        raise ValueError(
            f"a soft prompt of shape [L, 2, K, P, D] = [{num_layers}, 2, {num_kv_heads}, P, "
            f"{head_dim}] was expected, got {list(prefix.shape)}."
        )


def read_only_cache(prefix: Tensor | None) -> ModelCache | None:
    """Put a prompt before texts that are read in one piece.

    Args:
        prefix: [L, 2, K, P, D] soft prompt or None.

    Returns:
        A cache that any number of rows share; None without virtual tokens.
    """
    if prefix is None or prefix.shape[3] == 0:
        return None
    # one step of the backward pass, not one a layer
    parts = iter(prefix.flatten(0, 1).unbind())
    return Cache(layers=[_PrefixLayer(*pair) for pair in zip(parts, parts, strict=True)])


def growing_cache(prefix: Tensor, rows: int) -> ModelCache:
    """Put a prompt before texts that grow token by token.

    Args:
        prefix: [L, 2, K, P, D] soft prompt in the dtype of the model's layers.
        rows: Number of texts.
    """
    # Without a config no layer is cut to its sliding window; the masks see to the windows.
    cache = DynamicCache()
    for index, (keys, values) in enumerate(prefix.unbind()):
        shape = (rows, -1, -1, -1)
        cache.update(keys.expand(shape), values.expand(shape), index)
    return cache


def new_cache() -> ModelCache:
    """Return a cache that keeps what a model computes, for `read_prefix`."""
    return DynamicCache()


def read_prefix(cache: ModelCache, kv_shape: tuple[int, int, int]) -> Tensor:
    """Return what a model has put into `new_cache`.

    Args:
        cache: After one row of P tokens.
        kv_shape: (L, K, D) that is expected.

    Returns:
        [L, 2, K, P, D] float32 soft prompt.

    Raises:
        ValueError: If the model keeps other keys and values than expected.
    """
    num_layers, num_kv_heads, head_dim = kv_shape
    expected = (num_kv_heads, head_dim, head_dim)
    layers: list[Any] = list(cache.layers)
    got = [(*layer.keys.shape[1::2], layer.values.shape[3]) for layer in layers]
    if got != [expected] * num_layers:
        raise ValueError(
            f"`model.backbone.name_or_path` must be a model whose {num_layers} layers all keep "
            f"keys and values of (heads, key size, value size) = {expected}, got {got}."
        )
    return torch.stack([torch.cat([layer.keys, layer.values]) for layer in layers]).float()


class _PrefixLayer(DynamicLayer):
    """Read-only keys and values of one layer.

    `update` returns prompt and new states and stores nothing, so that a layer that is recomputed
    (gradient checkpointing) sees what it saw before; see docs/footguns.md#21.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._prefix = (keys[None], values[None])
        self.keys, self.values = self._prefix
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return [B, K, P + T, D] keys and values in the dtype of the new ones."""
        keys, values = (
            torch.cat([prefix.to(new.dtype).expand(len(new), -1, -1, -1), new], dim=-2)
            for prefix, new in zip(self._prefix, (key_states, value_states), strict=True)
        )
        return keys, values
