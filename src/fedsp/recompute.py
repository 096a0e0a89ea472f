"""Gradient checkpointing that leaves a soft prompt where it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(layers: nn.ModuleList) -> Iterator[None]:
    """Recompute every layer in the backward pass of what is run inside.

    transformers' own switch takes the prompt away from the layers; see docs/footguns.md#22.
    `forward` is wrapped and not `__call__`, so that the hooks of sharding stay outside.
    """
    before = [(layer.__dict__, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for attributes, forward in before:
            attributes.pop("forward", None)
            if forward is not None:
                attributes["forward"] = forward
