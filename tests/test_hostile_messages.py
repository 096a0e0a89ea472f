"""Bytes that somebody made to look like a message, and what a message claims of itself."""

import contextlib
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsp.memory_probe import LiveTensors
from fedsp.messages import (
    Contract,
    MessageError,
    RejectedUpdate,
    decode_broadcast,
    decode_handout,
    describe,
)
from forged_messages import (
    CONTRACT,
    ENTRY,
    METADATA,
    SHAPE,
    VALID,
    WIRE_DTYPES,
    decode,
    frame,
    prompt,
)

# --- hostile bytes ---------------------------------------------------------------------------

FUZZ = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def assert_refused_or_sound(data, wire_dtype):
    contract = Contract({"soft_prompt": SHAPE}, wire_dtype, 1e4)
    try:
        came = decode(data, contract)
    except (MessageError, RejectedUpdate):
        return
    assert (came.round_idx, came.client_id) == (5, 3)
    assert 1 <= came.num_examples < 2**53
    assert came.payload["soft_prompt"].shape == SHAPE
    assert came.payload["soft_prompt"].dtype == torch.float32
    assert torch.isfinite(came.payload["soft_prompt"]).all()
    assert torch.linalg.vector_norm(came.payload["soft_prompt"].double()) <= 1e4


@FUZZ
@given(st.binary(max_size=2000), st.sampled_from(list(WIRE_DTYPES)))
def test_random_bytes_never_crash_the_receiver(data, wire_dtype):
    for read in (decode, decode_broadcast, lambda data, _: describe(data)):
        with pytest.raises(MessageError):
            read(data, Contract({"soft_prompt": SHAPE}, wire_dtype, None))
    for like in (None, {"a": torch.zeros(2)}):
        with pytest.raises(MessageError):
            decode_handout(data, like)


@FUZZ
@given(st.data(), st.sampled_from(list(WIRE_DTYPES)))
def test_flipped_bits_and_cuts_never_crash_the_receiver(data, wire_dtype):
    message = bytearray(VALID[wire_dtype])
    for bit in data.draw(st.lists(st.integers(0, 8 * len(message) - 1), min_size=1, max_size=4)):
        message[bit // 8] ^= 1 << bit % 8
    start = data.draw(st.integers(0, 16))
    stop = data.draw(st.integers(len(message) - 16, len(message)))
    assert_refused_or_sound(bytes(message), wire_dtype)
    assert_refused_or_sound(bytes(message[start:stop]), wire_dtype)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_every_single_flipped_bit_is_refused_or_leaves_a_sound_message(wire_dtype):
    message = VALID[wire_dtype]
    for bit in range(8 * len(message)):
        changed = bytearray(message)
        changed[bit // 8] ^= 1 << bit % 8
        assert_refused_or_sound(bytes(changed), wire_dtype)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_every_truncation_is_refused(wire_dtype):
    message = VALID[wire_dtype]
    for length in range(len(message)):
        with pytest.raises(MessageError):
            decode(message[:length], Contract({"soft_prompt": SHAPE}, wire_dtype, None))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


values = st.recursive(scalars, lambda v: st.lists(v, max_size=3), max_leaves=5)


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "U8"]) | values,
        "shape": st.just(list(SHAPE)) | st.lists(st.integers(-1, 2**70), max_size=6) | values,
        "data_offsets": st.just([0, 192]) | st.lists(st.integers(-9, 300), max_size=3) | values,
    }
)


headers = st.fixed_dictionaries(
    {},
    optional={
        "__metadata__": st.just(METADATA) | st.dictionaries(st.sampled_from([*METADATA]), values),
        "soft_prompt": st.just(ENTRY) | entries | values,
        "other": entries,
    },
)


@FUZZ
@given(headers, st.sampled_from([0, 96, 192]))
def test_headers_that_look_right_never_crash_the_receiver(header, size):
    data = frame(header, bytes(size))
    assert_refused_or_sound(data, "float32")
    for read in (describe, decode_handout):
        with contextlib.suppress(MessageError):
            read(data)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_buffer_is_read(kind):
    assert torch.equal(decode(kind(VALID["float32"])).payload["soft_prompt"], prompt())


# --- claims --------------------------------------------------------------------------------------


def claiming(shape, span):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": span}
    return frame({"__metadata__": METADATA, "soft_prompt": entry}, bytes(192))


CLAIMS = {
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + bytes(400),
    "a header of 4 GB": (2**32).to_bytes(8, "little") + bytes(400),
    "a tensor of 4 TB": claiming([2**40], [0, 2**42]),
    "a tensor of 2**62 numbers": claiming([2**31, 2**31], [0, 2**64]),
    "no numbers in 2**60 rows": claiming([2**60, 0], [0, 0]),
    "numbers of 4,000 digits": claiming([10**4000], [0, 4 * 10**4000]),
    "lists in lists": frame(b"[" * 1000),
}


def peak_bytes(work):
    """Most bytes that Python and torch hold at once beyond what was there before."""
    with LiveTensors() as tensors:
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak + tensors.peak_bytes


def test_the_measure_of_memory_sees_both_kinds():
    assert peak_bytes(lambda: bytes(10**6)) > 10**6
    assert peak_bytes(lambda: torch.zeros(10**6)) > 4 * 10**6


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_of_huge_sizes_allocate_nothing(claim):
    data = CLAIMS[claim]

    def read_all():
        for read in (decode, describe, decode_handout, lambda d: decode_broadcast(d, CONTRACT)):
            with pytest.raises(MessageError):
                read(data)

    read_all()  # what is imported on the way
    assert peak_bytes(read_all) < 400_000


def test_a_header_of_many_megabytes_is_not_parsed():
    data = frame(b"[" + b"[]," * 2**23 + b"[]]", b"")

    def read():
        for read in (describe, decode_handout):
            with pytest.raises(MessageError, match="its header has 25165828 bytes, at most"):
                read(data)

    assert peak_bytes(read) < 400_000
