"""What is tuned and travels, as named tensors; how they are compared and laid out as one vector."""

from collections.abc import Mapping

import torch
from torch import Tensor

Payload = dict[str, Tensor]
SOFT_PROMPT = "soft_prompt"
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(payload: Payload) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape by name."""
    return {name: tuple(tensor.shape) for name, tensor in payload.items()}


def is_finite(payload: Payload) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in payload.values())


def subtract(payload: Payload, other: Payload) -> Payload:
    """Return the difference of two payloads of the same names, as float32 on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.float32) - other[name].detach().float().cpu()
        for name, tensor in payload.items()
    }


def add(payload: Payload, other: Payload) -> Payload:
    """Return the sum of two payloads of the same names."""
    return {name: tensor + other[name] for name, tensor in payload.items()}


def flatten(payload: Payload) -> Tensor:
    """Lay all numbers out as one vector, in the order of the names.

    Args:
        payload: Tensors of any shape.

    Returns:
        [n] float32 on the CPU.
    """
    parts = [payload[name].detach().flatten().float().cpu() for name in sorted(payload)]
    return torch.cat([*parts, torch.empty(0)])


def unflatten(vector: Tensor, shapes: Shapes) -> Payload:
    """Undo `flatten`.

    Args:
        vector: [n] numbers in the order of the names.
        shapes: Each tensor's shape by name.

    Returns:
        Views into `vector`.
    """
    names = sorted(shapes)
    sizes = [torch.Size(shapes[name]).numel() for name in names]
    parts = zip(names, vector.split(sizes), strict=True)
    return {name: part.view(shapes[name]) for name, part in parts}


def norm(payload: Payload) -> float:
    """Return the L2 norm over all numbers, summed in float64."""
    return float(torch.linalg.vector_norm(flatten(payload), dtype=torch.float64))
