"""A model whose parameters are divided among processes (FSDP2): run through its root, read whole.

Only plain torch lives here; transformers divides the model while it loads it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

Result = TypeVar("Result")
_RUN = "fedsp_run"


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are divided among processes."""
    return isinstance(model, FSDPModule)


def prepare(model: nn.Module) -> None:
    """Make a sharded model's parts callable by themselves, inside `run_parts`."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    setattr(model, _RUN, call)
    register_fsdp_forward_method(model, _RUN)


def run_parts(model: nn.Module, function: Callable[..., Result], *args: Any) -> Result:
    """Call what runs parts of a model such as its decoder or its head.

    FSDP gathers a layer when it is called, but what belongs to no layer only while the root module
    runs. Every process has to call it, whatever rows it has.

    Args:
        model: Sharded and prepared, or whole.
        function: What runs its parts.
        args: Its arguments.
    """
    if not is_sharded(model):
        return function(*args)
    result: Result = getattr(model, _RUN)(function, *args)
    if not torch.is_grad_enabled():
        # a backward pass lets go of all that was gathered; without one some modules keep it
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return result


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or all of one that is divided; then every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or this process' part of one that is divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered_bytes(model: nn.Module, layers: nn.ModuleList) -> int:
    """Estimate what a step gathers at once: all that is in no layer, and two layers.

    A layer is gathered while the one before it is still there; embeddings that are tied to the head
    are gathered for either.

    Args:
        model: Sharded or whole.
        layers: Its layers.

    Returns:
        Bytes; 0 for a model that is whole.
    """
    if not is_sharded(model):
        return 0
    in_layers = set(layers.parameters())
    named = model.named_parameters(remove_duplicate=False)
    outside = sum(parameter.nbytes for _, parameter in named if parameter not in in_layers)
    return outside + 2 * max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
