"""One safetensors container in memory: tensors and text to bytes and back, with no files.

The format is written here because the safetensors library orders metadata at random: the same
tensors would have other bytes, and another checksum in the ledger, in every process.
"""

import json
import math
import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Buffer = bytes | bytearray | memoryview | mmap.mmap

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_ELEMENTS = 2**62  # torch counts elements in an int64
_MAX_DIMENSIONS = 64
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library


class TensorEntry(NamedTuple):
    """A tensor as a file's header describes it; `start` and `stop` count from the first tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def fields(self) -> dict[str, Any]:
        """The entry as the header's JSON spells it."""
        span = [self.start, self.stop]
        return {"dtype": _CODES[self.dtype], "shape": list(self.shape), "data_offsets": span}


class Header(NamedTuple):
    """A checked header: every tensor lies inside the file, without gap or overlap."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    num_bytes: int


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Write tensors and text in safetensors format; equal input gives equal bytes.

    Args:
        tensors: Tensors on any device; views and shared storage are written out in full.
        metadata: Text that goes into the header.

    Returns:
        The file's bytes.

    Raises:
        TypeError: If a tensor is of a kind or dtype that the format cannot hold.
    """
    entries, buffers = lay_out(tensors)
    return assemble(metadata, entries, buffers)


def read_header(data: Buffer, max_bytes: int = _MAX_HEADER_BYTES) -> Header:
    """Read and check the header of bytes that may come from anywhere.

    Args:
        data: The whole file.
        max_bytes: Largest header that is parsed.

    Returns:
        Metadata, every tensor's dtype, shape and place, and the header's own size.

    Raises:
        ValueError: If the bytes are not exactly one well-formed safetensors file.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its {len(data)} bytes end before the header does: truncated or foreign")
    if size > max_bytes:
        raise ValueError(f"its header has {size} bytes, at most {max_bytes} are read")
    try:
        fields = json.loads(
            bytes(data[8 : 8 + size]).decode(), object_pairs_hook=_unique, parse_constant=_refuse
        )
    except (UnicodeDecodeError, RecursionError):
        raise ValueError("the header is not JSON, or nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("the header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the header's metadata is not a map from text to text")
    tensors = {name: _parse_entry(name, entry) for name, entry in fields.items()}
    try:
        "".join([*metadata, *metadata.values(), *tensors]).encode()
    except UnicodeEncodeError:
        raise ValueError("the header holds half of a surrogate pair, which is no text") from None
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != position:
            raise ValueError(f"tensor {name!r:.80} leaves a gap or overlaps another")
        position = entry.stop
    if 8 + size + position != len(data):
        raise ValueError(
            f"the header describes {8 + size + position} bytes, there are {len(data)}: truncated"
        )
    return Header(metadata, tensors, 8 + size)


def read_tensor(data: Buffer, header: Header, name: str) -> Tensor:
    """Copy one tensor out of a file.

    Args:
        data: The whole file.
        header: The header that `read_header` made of it.
        name: The tensor's name.

    Returns:
        A tensor on the CPU that owns its memory.
    """
    entry = header.tensors[name]
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=entry.dtype)
    span = slice(header.num_bytes + entry.start, header.num_bytes + entry.stop)
    with memoryview(data) as view, view[span] as part:
        raw = bytearray(part)
    return torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape)


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorEntry], list[memoryview]]:
    """Give every tensor its place in a container, for `assemble`.

    Args:
        tensors: As for `pack_tensors`.

    Returns:
        Every tensor's entry and, in the order of their places, the bytes of those that have any.

    Raises:
        TypeError: As `pack_tensors`.
    """
    plain = {name: plain_tensor(tensor, name) for name, tensor in tensors.items()}
    entries, buffers, position = {}, [], 0
    # Widest elements first: so every tensor is aligned to its element size, as readers may expect.
    for name in sorted(plain, key=lambda name: (-plain[name].element_size(), name)):
        tensor = plain[name]
        stop = position + tensor.numel() * tensor.element_size()
        entries[name] = TensorEntry(tensor.dtype, tuple(tensor.shape), position, stop)
        if stop > position:
            buffers.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        position = stop
    return entries, buffers


def assemble(
    metadata: Mapping[str, str], entries: dict[str, TensorEntry], buffers: list[memoryview]
) -> bytes:
    """Put a header and what `lay_out` made together.

    Args:
        metadata: Text that goes into the header.
        entries: Every tensor's entry.
        buffers: The tensors' bytes.

    Returns:
        The file's bytes.
    """
    tensors = {name: entry.fields() for name, entry in entries.items()}
    header = json.dumps({"__metadata__": dict(metadata)} | tensors, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *buffers])


def plain_tensor(tensor: Tensor, where: str) -> Tensor:
    """A tensor as the format can hold it: dense, contiguous, on the CPU, without gradient.

    Args:
        tensor: The tensor, on any device.
        where: What the error calls it.

    Returns:
        A plain tensor; it shares the given one's memory if that is like this already.

    Raises:
        TypeError: If it is of a kind or dtype that the format cannot hold.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TypeError(f"`{where}`: expected a plain tensor, got {type(tensor)}; gather it first")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _CODES:
        got = f"{tensor.layout}, {tensor.device}, {tensor.dtype}"
        raise TypeError(f"`{where}`: expected a dense real tensor with data, got {got}")
    return tensor.detach().resolve_neg().cpu().contiguous()


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as a configuration spells it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_bytes(name: str) -> int:
    """Return the bytes of one number of a dtype that `dtype_name` named.

    Raises:
        ValueError: If no file holds tensors of such a dtype.
    """
    sizes = {dtype_name(dtype): dtype.itemsize for dtype in _CODES}
    if name not in sizes:
        raise ValueError(f"a dtype must be one of {', '.join(sizes)}, got {name!r:.80}")
    return sizes[name]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("the header names something twice")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"the header holds {constant}, which is not JSON")


def _parse_entry(name: str, entry: Any) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.80} must have exactly dtype, shape and data_offsets")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"tensor {name!r:.80} has the unknown dtype {code!r:.80}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r:.80} has the impossible shape {shape!r:.80}")
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise ValueError(f"tensor {name!r:.80} has the impossible shape {shape!r:.80}")
    if not _are_sizes(span) or len(span) != 2:
        raise ValueError(f"tensor {name!r:.80} has the impossible offsets {span!r:.80}")
    if span[1] - span[0] != math.prod(shape) * _DTYPES[code].itemsize:
        raise ValueError(f"tensor {name!r:.80}: offsets {span!r:.80} do not fit {code} {shape}")
    return TensorEntry(_DTYPES[code], tuple(shape), span[0], span[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
