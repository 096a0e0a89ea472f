"""Nested state in one safetensors file, written atomically; nothing here knows what it means.

Tensors rest as safetensors, all around them as JSON in the file's header, and never as a pickle.
The format is written here because the safetensors library orders metadata at random: the same
state would have other bytes, and another checksum in the ledger, in every process.
"""

import errno
import json
import math
import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATE_VERSION = "1"

Tree = Any  # dict | list | tuple | str | int | float | bool | None | Tensor, nested
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


class TensorEntry(NamedTuple):
    """A tensor as a file's header describes it; `start` and `stop` count from the first tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


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
    entries, buffers = _lay_out(tensors)
    return _assemble(metadata, entries, buffers)


def read_header(data: Buffer) -> Header:
    """Read and check the header of bytes that may come from anywhere.

    Args:
        data: The whole file.

    Returns:
        Metadata, every tensor's dtype, shape and place, and the header's own size.

    Raises:
        ValueError: If the bytes are not exactly one well-formed safetensors file.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its {len(data)} bytes end before the header does: truncated or foreign")
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


def encode_state(tree: Tree) -> bytes:
    """Write nested state as the bytes of one safetensors file.

    Args:
        tree: Dicts, lists, tuples, text, numbers, None and tensors, nested. Subclasses come back
            as the plain kind (a `Counter` stays one), tensors as plain tensors on the CPU.

    Returns:
        Bytes; the same for the same state.

    Raises:
        TypeError: If something else is in the tree; the message says where.
        ValueError: If the tree refers to itself or is nested too deeply.
    """
    tensors: dict[str, Tensor] = {}
    try:
        plain = _to_plain(tree, "state", tensors)
        text = json.dumps(plain, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise ValueError("the state refers to itself or is nested too deeply") from None
    entries, buffers = _lay_out(tensors)
    checksum = _checksum(text, entries, buffers)
    metadata = {"fedsp_state": STATE_VERSION, "crc32": checksum, "tree": text}
    return _assemble(metadata, entries, buffers)


def decode_state(data: Buffer) -> Tree:
    """Read what `encode_state` wrote, bit for bit.

    Args:
        data: The bytes of the file.

    Returns:
        The state, with tensors on the CPU that own their memory.

    Raises:
        ValueError: If the bytes are damaged, foreign or of another version of the format.
    """
    header = _read_state_header(data)
    text = header.metadata["tree"]
    with memoryview(data) as view, view[header.num_bytes :] as payload:
        if _checksum(text, header.tensors, [payload]) != header.metadata["crc32"]:
            raise ValueError("the content does not match its checksum: damaged")
    try:
        tensors = {name: read_tensor(data, header, name) for name in header.tensors}
        return _from_plain(json.loads(text, parse_constant=_refuse), tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as e:
        raise ValueError(f"the state's description is malformed: {e!r}") from e


def save_state(path: Path, tree: Tree) -> int:
    """Write nested state to a file so that a crash leaves either the old file or the new one.

    Args:
        path: The file; its folder must exist.
        tree: As for `encode_state`.

    Returns:
        Number of bytes of the file.

    Raises:
        OSError: If it cannot be written, as on a full disk; the old file is left as it was.
    """
    data = encode_state(tree)
    write_bytes_atomically(path, data)
    return len(data)


def load_state(path: Path) -> Tree:
    """Read a file that `save_state` wrote.

    Args:
        path: The file.

    Returns:
        The state.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign or of another version; the message names it.
    """
    return _with_file(path, decode_state)


def check_state_file(path: Path) -> None:
    """Check a state file's header and size without reading its tensors.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is foreign or truncated. Flipped bits show only in `load_state`.
    """
    _with_file(path, _read_state_header)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a crash at any moment leaves the old content or the new one.

    Args:
        path: The file; its folder must exist.
        data: The new content.

    Raises:
        OSError: If it cannot be written; the old file is untouched, no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_and_sync(temporary, data)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"cannot write {path}: {error.strerror}; what was there before is unchanged"
            raise OSError(error.errno, reason) from error
        raise
    _sync_folder(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file, as UTF-8, in the way of `write_bytes_atomically`.

    Args:
        path: The file; its folder must exist.
        text: The new content.

    Raises:
        OSError: If it cannot be written; the old file is untouched.
    """
    write_bytes_atomically(path, text.encode())


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed writers left in a folder; call it only while nobody writes there.

    Args:
        folder: The folder; it may be missing.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as a configuration spells it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def _with_file(path: Path, read: Callable[[Buffer], Any]) -> Any:
    with path.open("rb") as file:
        try:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read(data)
        except ValueError as error:
            raise ValueError(f"{path} is not a readable fedsp state file: {error}") from error


def _read_state_header(data: Buffer) -> Header:
    header = read_header(data)
    version = header.metadata.get("fedsp_state")
    if version is None or not {"tree", "crc32"} <= set(header.metadata):
        raise ValueError("it is a safetensors file, but not one that holds fedsp state")
    if version != STATE_VERSION:
        raise ValueError(f"expected state format version {STATE_VERSION}, got {version!r:.80}")
    return header


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


def _lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, TensorEntry], list[memoryview]]:
    plain = {name: _plain_tensor(tensor, name) for name, tensor in tensors.items()}
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


def _plain_tensor(tensor: Tensor, where: str) -> Tensor:
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TypeError(f"`{where}`: expected a plain tensor, got {type(tensor)}; gather it first")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _CODES:
        got = f"{tensor.layout}, {tensor.device}, {tensor.dtype}"
        raise TypeError(f"`{where}`: expected a dense real tensor with data, got {got}")
    return tensor.detach().resolve_neg().cpu().contiguous()


def _fields(entry: TensorEntry) -> dict[str, Any]:
    span = [entry.start, entry.stop]
    return {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}


def _assemble(
    metadata: Mapping[str, str], entries: dict[str, TensorEntry], buffers: list[memoryview]
) -> bytes:
    tensors = {name: _fields(entry) for name, entry in entries.items()}
    header = json.dumps({"__metadata__": dict(metadata)} | tensors, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *buffers])


def _checksum(text: str, entries: dict[str, TensorEntry], buffers: list[memoryview]) -> str:
    tensors = {name: _fields(entry) for name, entry in entries.items()}
    value = zlib.crc32(json.dumps([text, tensors], sort_keys=True).encode())
    for buffer in buffers:
        value = zlib.crc32(buffer, value)
    return f"{value:08x}"


def _to_plain(node: Tree, where: str, tensors: dict[str, Tensor]) -> Any:
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        # JSON has no name for infinities and NaN, and NaN's bits have to survive.
        return float(node) if math.isfinite(node) else {"float": struct.pack(">d", node).hex()}
    if isinstance(node, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = _plain_tensor(node, where)
        return {"tensor": name}
    if isinstance(node, list | tuple):
        items = [_to_plain(item, f"{where}[{i}]", tensors) for i, item in enumerate(node)]
        return items if isinstance(node, list) else {"tuple": items}
    if isinstance(node, dict):
        tag = "counter" if isinstance(node, Counter) else "dict"
        pairs = [
            [_key(key, where), _to_plain(value, f"{where}.{key}", tensors)]
            for key, value in node.items()
        ]
        return {tag: pairs}
    raise TypeError(f"`{where}`: cannot save {type(node)}; convert it to a plain value first")


def _key(key: Any, where: str) -> Any:
    if not isinstance(key, str | int):
        raise TypeError(f"`{where}`: a dict key must be text or an int, got {type(key)}")
    return key


def _from_plain(node: Any, tensors: dict[str, Tensor]) -> Tree:
    if isinstance(node, list):
        return [_from_plain(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    readers: dict[str, Callable[[], Tree]] = {
        "float": lambda: struct.unpack(">d", bytes.fromhex(value))[0],
        "tensor": lambda: tensors[value],
        "tuple": lambda: tuple(_from_plain(value, tensors)),
        "counter": lambda: Counter({key: _from_plain(item, tensors) for key, item in value}),
        "dict": lambda: {key: _from_plain(item, tensors) for key, item in value},
    }
    return readers[tag]()


def _write_and_sync(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with memoryview(data) as view:
            written = 0
            while written < len(data):
                written += os.write(file, view[written:])
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    # Without it the new name may be lost in a power cut although the data is on disk.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
