"""What ledgers and plans say of a message's tensors, and how large it may be with them.

Nothing here reads or writes a message.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsp.tensor_files import dtype_bytes, dtype_name

MAX_OVERHEAD_BYTES = 1024
_ENTRY_BYTES = 256  # a tensor's entry in a header, without its name


def describe_tensor(name: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Return {"name", "shape", "dtype"} as plain data."""
    return {"name": name, "shape": list(shape), "dtype": dtype_name(dtype)}


def describe_tensors(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Say of tensors what `messages.describe` says of those in a message.

    Args:
        tensors: By name; meta tensors will do.

    Returns:
        A list of {"name", "shape", "dtype"} in the order of the names.
    """
    return [
        describe_tensor(name, tensor.shape, tensor.dtype)
        for name, tensor in sorted(tensors.items())
    ]


def size_limits(tensors: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Say how large a message may be.

    Args:
        tensors: What `describe_tensors` says of those in it.

    Returns:
        Bytes of the numbers, and the most bytes of the whole message: 1 KiB more for one tensor.

    Raises:
        ValueError: If a dtype is unknown.
    """
    low = sum(math.prod(it["shape"]) * dtype_bytes(it["dtype"]) for it in tensors)
    names = sorted(it["name"] for it in tensors)
    return low, low + MAX_OVERHEAD_BYTES + sum(map(_entry_bytes, names[1:]))


def _entry_bytes(name: str) -> int:
    return 6 * len(name) + _ENTRY_BYTES  # 6: a name may be all \uXXXX
