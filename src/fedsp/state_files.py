"""Nested state in one safetensors file, written atomically; nothing here knows what it means.

Tensors rest as safetensors, all around them as JSON in the file's header, and never as a pickle.
The container itself is read and written in `tensor_files`.
"""

import errno
import json
import math
import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsp.tensor_files import (
    Buffer,
    Header,
    TensorEntry,
    assemble,
    lay_out,
    plain_tensor,
    read_header,
    read_tensor,
)

STATE_VERSION = "1"

Tree = Any  # dict | list | tuple | str | int | float | bool | None | Tensor, nested


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
    entries, buffers = lay_out(tensors)
    checksum = _checksum(text, entries, buffers)
    metadata = {"fedsp_state": STATE_VERSION, "crc32": checksum, "tree": text}
    return assemble(metadata, entries, buffers)


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


def _refuse(constant: str) -> None:
    raise ValueError(f"the header holds {constant}, which is not JSON")


def _checksum(text: str, entries: dict[str, TensorEntry], buffers: list[memoryview]) -> str:
    tensors = {name: entry.fields() for name, entry in entries.items()}
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
        tensors[name] = plain_tensor(node, where)
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
