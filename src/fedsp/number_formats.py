"""Number formats in which payloads travel: floating point, or 8-bit integers with a scale a row.

A row is what the last axis of a tensor holds: for a soft prompt, one key or value of one layer.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fedsp.payload import Payload, Shapes

WireDtype = Literal["float32", "float16", "bfloat16", "int8"]

_LARGEST = 127
# no name of a weight or of the prompt holds a slash
_SCALE = "{}/scale"
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class WireEntry(NamedTuple):
    """What a tensor has to be on the wire."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def wire_entries(shapes: Shapes, wire_dtype: str) -> dict[str, WireEntry]:
    """Return the tensors that stand for a payload on the wire, by name.

    Args:
        shapes: Shape of every tensor of the payload.
        wire_dtype: Number format.

    Raises:
        ValueError: If the format is unknown.
    """
    if wire_dtype not in _DTYPES:
        raise ValueError(
            "`trainer.communication.wire_dtype` must be one of "
            f"{', '.join(get_args(WireDtype))}, got {wire_dtype!r}"
        )
    entries = {name: WireEntry(tuple(shape), _DTYPES[wire_dtype]) for name, shape in shapes.items()}
    if wire_dtype == "int8":
        entries |= {
            _SCALE.format(name): WireEntry(tuple(shape[:-1]), torch.float32)
            for name, shape in shapes.items()
        }
    return entries


def to_wire(payload: Payload, wire_dtype: str) -> dict[str, Tensor]:
    """Return the tensors that stand for a payload on the wire, on the CPU.

    int8: every row divided by a scale that takes its largest number to 127, and rounded to the
    nearest. A row with NaN or infinity has a scale of that kind, and comes back as NaN.

    Args:
        payload: Tensors by name.
        wire_dtype: Number format, one that `wire_entries` knows.
    """
    dtype = _DTYPES[wire_dtype]
    if wire_dtype != "int8":
        return {name: tensor.detach().to("cpu", dtype) for name, tensor in payload.items()}
    wire = {}
    for name, tensor in payload.items():
        numbers = tensor.detach().to("cpu", torch.float32)
        rows = numbers if numbers.dim() else numbers[None]
        scale = rows.abs().amax(dim=-1) / _LARGEST
        # a row of zeros has a scale of 0, and what is divided by it
        steps = (rows / scale[..., None]).nan_to_num(nan=0.0).round().clamp(-_LARGEST, _LARGEST)
        wire[name] = steps.to(dtype).reshape(numbers.shape)
        wire[_SCALE.format(name)] = scale.reshape(numbers.shape[:-1])
    return wire


def from_wire(wire: dict[str, Tensor], wire_dtype: str) -> Payload:
    """Return the payload that tensors on the wire stand for, in float32.

    Args:
        wire: What `to_wire` returned.
        wire_dtype: Its number format.
    """
    if wire_dtype != "int8":
        return {name: tensor.float() for name, tensor in wire.items()}
    names = [name for name, tensor in wire.items() if _SCALE.format(name) in wire]
    payload = {}
    for name in names:
        steps, scale = wire[name].float(), wire[_SCALE.format(name)]
        payload[name] = steps * (scale[..., None] if steps.dim() else scale)
    return payload


def rounded(payload: Payload, wire_dtype: str) -> Payload:
    """Return a payload as it comes out of the wire."""
    return from_wire(to_wire(payload, wire_dtype), wire_dtype)
