"""What travels between server and clients, and its bytes; nothing here holds a model.

A message is one safetensors file whose metadata names version, kind and round. Decoders trust
nothing: the size is checked before the header is parsed, the header before a tensor is built, and
whatever is not exactly the tensors that were asked for is refused.

Axis letters: L layers, K key/value heads, P virtual tokens, D head size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsp.message_sizes import describe_tensor, describe_tensors, size_limits
from fedsp.number_formats import WireDtype, from_wire, to_wire, wire_entries
from fedsp.payload import SOFT_PROMPT, Payload, Shapes, is_finite, norm, subtract
from fedsp.tensor_files import (
    Buffer,
    Header,
    dtype_name,
    pack_tensors,
    read_header,
    read_tensor,
)

MESSAGE_VERSION = "1"

_NUMBERS = {
    "server_broadcast": ("round_idx",),
    "client_update": ("round_idx", "client_id", "num_examples"),
    "auxiliary_handout": (),
}
_MAX_NUMBER = 2**53  # beyond it a float64 sum of examples is no longer exact
_MAX_HEADER_BYTES = 2**24  # parsed JSON takes up to 25 times its own bytes


class MessageError(ValueError):
    """A message that is malformed, foreign or not what was asked for.

    The side that made it has to stop; a server that received it leaves it out and goes on.
    """


class RejectedUpdate(ValueError):  # noqa: N818 - a verdict that the round survives, not an error
    """A well-formed update whose values must not enter the aggregate: counted, the run goes on."""


@dataclass(frozen=True, eq=False, slots=True)
class ServerBroadcast:
    """What the server tunes, for a round.

    Args:
        round_idx: The round, from 0.
        payload: Tensors by name: `soft_prompt` [L, 2, K, P, D], tuned weights, or both.
    """

    round_idx: int
    payload: Payload


@dataclass(frozen=True, eq=False, slots=True)
class ClientUpdate:
    """What a client made of the broadcast in its local steps.

    Args:
        round_idx: The round that it answers.
        client_id: Who sends it.
        payload: Tensors by name, those of the broadcast.
        num_examples: Number of examples it was tuned on, in [1, 2**53).
    """

    round_idx: int
    client_id: int
    payload: Payload
    num_examples: int


@dataclass(frozen=True, eq=False, slots=True)
class AuxiliaryHandout:
    """The auxiliary model that a client gets at its first participation.

    Args:
        tensors: The model's tensors by name, in their own dtypes.
    """

    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Contract:
    """What a payload has to be to pass: the tensors that a method declares, and nothing else.

    Args:
        shapes: Shape of every tensor by name; `soft_prompt` is (L, 2, K, P, D).
        wire_dtype: Number format in which payloads travel.
        max_update_norm: Largest accepted L2 norm of (update - reference); None accepts any.
    """

    shapes: Shapes
    wire_dtype: WireDtype
    max_update_norm: float | None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one of them is out of range.
        """
        wire_entries(self.shapes, self.wire_dtype)
        shape = self.shapes.get(SOFT_PROMPT, (0, 2, 0, 0, 0))
        if len(shape) != 5 or min(shape) < 0 or shape[1] != 2:
            raise ValueError(f"a soft prompt has the shape (L, 2, K, P, D), got {shape}")
        if self.max_update_norm is not None and not self.max_update_norm > 0:
            raise ValueError(
                "`trainer.communication.max_update_norm` must be above 0 or null, "
                f"got {self.max_update_norm}"
            )

    def describe(self) -> list[dict[str, Any]]:
        """Say of the payload's tensors what `describe` says of those in a message."""
        entries = wire_entries(self.shapes, self.wire_dtype)
        return [describe_tensor(name, *entry) for name, entry in sorted(entries.items())]


def encode(message: ServerBroadcast | ClientUpdate, wire_dtype: WireDtype) -> bytes:
    """Write a message as bytes; equal messages give equal bytes.

    Args:
        message: The message.
        wire_dtype: Number format in which the payload travels.

    Returns:
        The payload's bytes, and around them at most what `size_limits` allows.

    Raises:
        ValueError: If `wire_dtype` is unknown.
        MessageError: If the payload has values beyond `wire_dtype`'s range, a broadcast is not
            finite, or a number of the message is out of range. An update that is not finite
            passes: its receiver counts and rejects it.
    """
    wire_entries({}, wire_dtype)
    kind = "client_update" if isinstance(message, ClientUpdate) else "server_broadcast"
    numbers = {name: str(getattr(message, name)) for name in _NUMBERS[kind]}
    for name, text in numbers.items():
        _parse_number(text, name)
    if kind == "server_broadcast" and not is_finite(message.payload):
        raise MessageError(
            f"what the server tunes holds NaN or infinity in round {message.round_idx}; "
            "lower the learning rate or set `gradient_clip_norm`"
        )
    wire = to_wire(message.payload, wire_dtype)
    for name, tensor in message.payload.items():
        _check_range(name, tensor.detach(), wire[name], wire_dtype)
    return pack_tensors(wire, {"fedsp_version": MESSAGE_VERSION, "kind": kind, **numbers})


def decode_broadcast(
    data: Buffer, contract: Contract, *, round_idx: int | None = None
) -> ServerBroadcast:
    """Read a broadcast, trusting nothing.

    Args:
        data: The bytes that came.
        contract: What the payload has to be.
        round_idx: The round that it has to be for; None takes any.

    Returns:
        The message, its tensors as float32 on the CPU.

    Raises:
        MessageError: If the bytes are anything else than such a broadcast of finite values.
    """
    wanted = {} if round_idx is None else {"round_idx": round_idx}
    header, numbers = _check_payload(data, contract, "server_broadcast", wanted)
    payload = _read_payload(data, contract, header)
    for name, tensor in payload.items():
        if not is_finite({name: tensor}):
            raise MessageError(f"server_broadcast: `{name}` must be finite, got NaN or infinity")
    return ServerBroadcast(numbers["round_idx"], payload)


def decode_update(
    data: Buffer, contract: Contract, *, reference: Payload, round_idx: int, client_id: int
) -> ClientUpdate:
    """Read a client's update, trusting nothing.

    Args:
        data: The bytes that came.
        contract: What the payload has to be.
        reference: What the client started from.
        round_idx: The round that was asked for.
        client_id: The client that was asked.

    Returns:
        The message, its tensors as float32 on the CPU.

    Raises:
        MessageError: If the bytes are anything else than that client's payload for that round.
        RejectedUpdate: If its values are not finite or too far from `reference`.
    """
    wanted = {"round_idx": round_idx, "client_id": client_id}
    header, numbers = _check_payload(data, contract, "client_update", wanted)
    payload = _read_payload(data, contract, header)
    sender = f"the update of client {client_id} in round {round_idx}"
    if not is_finite(payload):
        raise RejectedUpdate(f"{sender} holds NaN or infinity")
    change, bound = norm(subtract(payload, reference)), contract.max_update_norm
    if bound is not None and not change <= bound:
        raise RejectedUpdate(
            f"{sender} moved the payload by a norm of {change:.4g}, "
            f"`trainer.communication.max_update_norm` is {bound:.4g}"
        )
    if not math.isfinite(change):
        raise RejectedUpdate(f"{sender} moved the payload further than float32 holds")
    return ClientUpdate(
        numbers["round_idx"], numbers["client_id"], payload, numbers["num_examples"]
    )


def check_sent(data: Buffer, contract: Contract, *, round_idx: int, client_id: int) -> None:
    """Look at a client's encoded update before it leaves: only the payload may.

    Args:
        data: The bytes about to be sent.
        contract: What the payload has to be.
        round_idx: The round that it answers.
        client_id: Who sends it.

    Raises:
        MessageError: If the bytes hold anything else; the client has to stop.
    """
    wanted = {"round_idx": round_idx, "client_id": client_id}
    _check_payload(data, contract, "client_update", wanted)


def encode_handout(tensors: Mapping[str, Tensor]) -> bytes:
    """Write the auxiliary model's tensors as bytes, every one in its own dtype.

    Args:
        tensors: The tensors by name.

    Returns:
        The bytes.

    Raises:
        TypeError: If a tensor is of a kind or dtype that cannot travel.
    """
    metadata = {"fedsp_version": MESSAGE_VERSION, "kind": "auxiliary_handout"}
    return pack_tensors(tensors, metadata)


def decode_handout(data: Buffer, like: Mapping[str, Tensor] | None = None) -> AuxiliaryHandout:
    """Read the auxiliary model's tensors, trusting nothing.

    Args:
        data: The bytes that came.
        like: Tensors with the names, shapes and dtypes wanted; meta tensors will do. None takes
            whatever well-formed tensors come.

    Returns:
        The message, its tensors on the CPU.

    Raises:
        MessageError: If the bytes are anything else than such a hand-out.
    """
    if like is not None:
        _check_size(data, *size_limits(describe_tensors(like)), "auxiliary_handout")
    header, _ = _read_fields(data, "auxiliary_handout")
    if like is not None:
        _check_names(header, like, "auxiliary_handout")
        for name, tensor in like.items():
            _check_entry(header, name, tuple(tensor.shape), tensor.dtype, "auxiliary_handout")
    return AuxiliaryHandout({name: read_tensor(data, header, name) for name in header.tensors})


def describe(data: Buffer) -> dict[str, Any]:
    """Say what a message's own header says, for the ledger.

    Args:
        data: The message's bytes.

    Returns:
        `kind`, the numbers of that kind (`round_idx`, `client_id`, `num_examples`) and `tensors`,
        a list of {"name", "shape", "dtype"} in the order of the names.

    Raises:
        MessageError: If the bytes are not a message.
    """
    header, numbers = _read_fields(data, None)
    tensors = [
        describe_tensor(name, entry.shape, entry.dtype)
        for name, entry in sorted(header.tensors.items())
    ]
    return {"kind": header.metadata["kind"], **numbers, "tensors": tensors}


def _check_range(name: str, tensor: Tensor, wire: Tensor, wire_dtype: WireDtype) -> None:
    overflown = torch.isinf(wire) & torch.isfinite(tensor).cpu()
    if overflown.any():
        largest = tensor.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
        raise MessageError(
            f"`{name}` has {int(overflown.sum())} values beyond what "
            f"`trainer.communication.wire_dtype` {wire_dtype} holds, up to {largest:.4g}; "
            "set `trainer.communication.wire_dtype` to bfloat16 or float32"
        )


def _check_payload(
    data: Buffer, contract: Contract, kind: str, wanted: Mapping[str, int]
) -> tuple[Header, dict[str, int]]:
    _check_size(data, *size_limits(contract.describe()), kind)
    header, numbers = _read_fields(data, kind)
    for name, number in wanted.items():
        if numbers[name] != number:
            raise MessageError(f"{kind}: expected {name} {number}, got {numbers[name]}")
    entries = wire_entries(contract.shapes, contract.wire_dtype)
    _check_names(header, entries, kind)
    for name, entry in entries.items():
        _check_entry(header, name, entry.shape, entry.dtype, kind)
    return header, numbers


def _read_payload(data: Buffer, contract: Contract, header: Header) -> Payload:
    names = wire_entries(contract.shapes, contract.wire_dtype)
    wire = {name: read_tensor(data, header, name) for name in names}
    return from_wire(wire, contract.wire_dtype)


def _check_size(data: Buffer, low: int, high: int, kind: str) -> None:
    if not low < len(data) <= high:
        raise MessageError(
            f"{kind}: expected {low} bytes of numbers and at most {high - low} around them, "
            f"got {len(data)} bytes in all"
        )


def _read_fields(data: Buffer, kind: str | None) -> tuple[Header, dict[str, int]]:
    try:
        header = read_header(data, _MAX_HEADER_BYTES)
    except ValueError as error:
        raise MessageError(f"{kind or 'message'}: not a well-formed message: {error}") from error
    metadata = header.metadata
    version, came = metadata.get("fedsp_version"), metadata.get("kind", "")
    if version != MESSAGE_VERSION:
        raise MessageError(
            f"{kind or 'message'}: expected message version {MESSAGE_VERSION}, "
            f"got {version!r:.80}; run the same fedsp release on both sides"
        )
    if came not in _NUMBERS or kind not in (None, came):
        raise MessageError(f"expected the kind {kind or ' or '.join(_NUMBERS)}, got {came!r:.80}")
    if set(metadata) != {"fedsp_version", "kind", *_NUMBERS[came]}:
        raise MessageError(f"{came}: missing or extra metadata, got {sorted(metadata)!r:.200}")
    return header, {name: _parse_number(metadata[name], name) for name in _NUMBERS[came]}


def _parse_number(text: str, name: str) -> int:
    low = 1 if name == "num_examples" else 0
    # isdecimal alone would let other scripts' digits pass; the length keeps int() cheap.
    if text.isascii() and text.isdecimal() and len(text) <= 16 and text == str(int(text)):
        number = int(text)
        if low <= number < _MAX_NUMBER:
            return number
    raise MessageError(f"`{name}` must be a whole number in [{low}, 2**53), got {text!r:.80}")


def _check_names(header: Header, wanted: Mapping[str, Any], kind: str) -> None:
    missing, extra = wanted.keys() - header.tensors.keys(), header.tensors.keys() - wanted.keys()
    if missing or extra:
        raise MessageError(
            f"{kind}: expected exactly the tensors {sorted(wanted)!r:.200}, "
            f"missing {sorted(missing)!r:.200}, foreign {sorted(extra)!r:.200}"
        )


def _check_entry(
    header: Header, name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> None:
    entry = header.tensors[name]
    if entry.shape != tuple(shape):
        raise MessageError(
            f"{kind}: `{name}` must have the shape {list(shape)}, got {list(entry.shape)!r:.80}"
        )
    if entry.dtype != dtype:
        wanted, came = dtype_name(dtype), dtype_name(entry.dtype)
        raise MessageError(f"{kind}: `{name}` must be {wanted}, got {came}")
