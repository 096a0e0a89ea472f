"""Messages there and back, and what a receiver refuses or rejects."""

import json
import math
import struct

import pytest
import safetensors.torch
import torch

from fedsp.message_sizes import MAX_OVERHEAD_BYTES, describe_tensors, size_limits
from fedsp.messages import (
    AuxiliaryHandout,
    Contract,
    MessageError,
    RejectedUpdate,
    ServerBroadcast,
    decode_broadcast,
    decode_handout,
    describe,
    encode,
    encode_handout,
)
from forged_messages import (
    CONTRACT,
    ENTRY,
    METADATA,
    SHAPE,
    VALID,
    WIRE_DTYPES,
    decode,
    forge,
    frame,
    prompt,
    update,
)

# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("num_virtual_tokens", [0, 1, 40])
def test_an_update_comes_back_as_float32_rounded_to_the_wire_dtype(wire_dtype, num_virtual_tokens):
    shape = (3, 2, 2, num_virtual_tokens, 5)
    contract = Contract({"soft_prompt": shape}, wire_dtype, None)
    came = decode(encode(update(prompt(shape)), wire_dtype), contract)
    assert (came.round_idx, came.client_id, came.num_examples) == (5, 3, 17)
    assert came.payload["soft_prompt"].dtype == torch.float32
    assert torch.equal(
        came.payload["soft_prompt"], prompt(shape).to(WIRE_DTYPES[wire_dtype]).float()
    )


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_broadcast_comes_back(wire_dtype):
    data = encode(ServerBroadcast(7, {"soft_prompt": prompt()}), wire_dtype)
    came = decode_broadcast(data, Contract({"soft_prompt": SHAPE}, wire_dtype, None))
    assert came.round_idx == 7
    assert torch.equal(came.payload["soft_prompt"], prompt().to(WIRE_DTYPES[wire_dtype]).float())


def test_a_handout_comes_back_with_every_tensor_in_its_own_dtype():
    tensors = {
        "layers.0.weight": torch.randn(3, 4).bfloat16(),
        "embeddings": torch.randn(5, 4),
        "transposed": torch.randn(4, 2).T,
        "ids": torch.arange(3),
        "é\n": torch.tensor(1.5),
    }
    data = encode_handout(tensors)
    for like in (None, {name: t.to("meta") for name, t in tensors.items()}):
        came = decode_handout(data, like)
        assert isinstance(came, AuxiliaryHandout)
        assert came.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert came.tensors[name].dtype == tensor.dtype
            assert torch.equal(came.tensors[name], tensor)


def test_the_safetensors_library_reads_a_message():
    data = encode(update(), "float32")
    loaded = safetensors.torch.load(data)
    assert loaded.keys() == {"soft_prompt"}
    assert torch.equal(loaded["soft_prompt"], prompt())


def test_a_message_by_the_safetensors_library_is_read():
    assert torch.equal(decode(forge()).payload["soft_prompt"], prompt())


def test_equal_messages_give_equal_bytes():
    assert len({encode(update(), "float32") for _ in range(20)}) == 1


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_message_weighs_its_numbers_and_at_most_one_kibibyte(wire_dtype):
    shape = (80, 2, 128, 9, 256)
    largest = 2**53 - 1
    message = update(
        torch.zeros(1).expand(shape), round_idx=largest, client_id=largest, num_examples=largest
    )
    numbers = 80 * 2 * 128 * 9 * 256 * WIRE_DTYPES[wire_dtype].itemsize
    assert size_limits(Contract({"soft_prompt": shape}, wire_dtype, None).describe())[0] == numbers
    assert numbers < len(encode(message, wire_dtype)) <= numbers + 1024


def test_a_message_detaches_and_leaves_the_sender_its_tensor():
    prefix = torch.nn.Parameter(prompt())
    encode(update(prefix), "float16")
    assert torch.equal(prefix, prompt())
    assert decode(encode(update(prefix), "float32")).payload["soft_prompt"].requires_grad is False


# --- what is refused -------------------------------------------------------------------------


def test_a_foreign_tensor_beside_the_prompt_is_refused_by_name():
    data = forge({"soft_prompt": prompt(), "lm_head": torch.zeros(2)})
    with pytest.raises(MessageError, match=r"exactly the tensors \['soft_prompt'\].*\['lm_head'\]"):
        decode(data)


def test_a_foreign_tensor_without_values_is_refused_too():
    data = forge({"soft_prompt": prompt(), "x": torch.zeros(0)})
    with pytest.raises(MessageError, match=r"foreign \['x'\]"):
        decode(data)


def test_a_foreign_tensor_in_place_of_the_prompt_is_refused_by_name():
    with pytest.raises(MessageError, match=r"missing \['soft_prompt'\], foreign \['weight'\]"):
        decode(forge({"weight": prompt()}))


def test_a_prompt_of_another_shape_is_refused_with_both_shapes():
    wanted = r"`soft_prompt` must have the shape \[2, 2, 1, 3, 4\], got \[2, 2, 1, 4, 3\]"
    with pytest.raises(MessageError, match=wanted):
        decode(forge({"soft_prompt": prompt((2, 2, 1, 4, 3))}))


def test_a_prompt_of_another_dtype_is_refused_with_both_dtypes():
    data = forge({"soft_prompt": prompt().to(torch.int32)})
    with pytest.raises(MessageError, match="`soft_prompt` must be float32, got int32"):
        decode(data)


@pytest.mark.parametrize("size", [0, 7, 48 * 4, 48 * 4 + MAX_OVERHEAD_BYTES + 1, 10**6])
def test_a_message_of_impossible_size_is_refused_before_it_is_parsed(size):
    wanted = f"expected 192 bytes of numbers and at most 1024 around them, got {size} bytes"
    with pytest.raises(MessageError, match=wanted):
        decode(bytes(size))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"fedsp_version": "2"}, "expected message version 1, got '2'; run the same fedsp"),
        ({"kind": "server_broadcast"}, "expected the kind client_update, got 'server_broadcast'"),
        ({"kind": "gradient"}, "expected the kind client_update, got 'gradient'"),
        ({"smuggled": "x" * 900}, "at most 1024 around them"),
        ({"secret": "text"}, r"missing or extra metadata, got \[.*'secret'"),
        ({"drop": ["num_examples"]}, "missing or extra metadata"),
        ({"drop": ["fedsp_version"]}, "expected message version 1, got None"),
        ({"round_idx": "6"}, "expected round_idx 5, got 6"),
        ({"client_id": "4"}, "expected client_id 3, got 4"),
        (
            {"num_examples": "0"},
            r"`num_examples` must be a whole number in \[1, 2\*\*53\), got '0'",
        ),
        ({"num_examples": "-1"}, "`num_examples` must"),
        ({"num_examples": "9007199254740992"}, "`num_examples` must"),
        ({"num_examples": "1" * 600}, "`num_examples` must"),
        ({"num_examples": "1e3"}, "`num_examples` must"),
        ({"num_examples": " 1"}, "`num_examples` must"),
        ({"num_examples": "007"}, "`num_examples` must"),
        ({"num_examples": "٣"}, "`num_examples` must"),
        ({"num_examples": ""}, "`num_examples` must"),
        ({"num_examples": "NaN"}, "`num_examples` must"),
    ],
)
def test_metadata_that_was_not_asked_for_is_refused(metadata, reason):
    with pytest.raises(MessageError, match=reason):
        decode(forge(**metadata))


@pytest.mark.parametrize(
    "data",
    [
        bytes(300),
        b"\xff" * 300,
        struct.pack("<Q", 2**63) + bytes(250),
        frame(b"[" * 1000),
        frame(b"{"),
        frame(b"null"),
        frame({"soft_prompt": ENTRY}),
        frame({"__metadata__": METADATA, "soft_prompt": ENTRY}, bytes(200)),
        frame({"__metadata__": METADATA, "soft_prompt": ENTRY | {"data_offsets": [8, 200]}}),
        frame({"__metadata__": METADATA, "soft_prompt": ENTRY | {"data_offsets": [-8, 184]}}),
        frame({"__metadata__": METADATA, "soft_prompt": ENTRY | {"shape": [2.0, 2, 1, 3, 4]}}),
        frame({"__metadata__": METADATA, "soft_prompt": ENTRY | {"extra": 1}}),
        frame({"__metadata__": METADATA | {"round_idx": 5}, "soft_prompt": ENTRY}),
        frame({"__metadata__": [], "soft_prompt": ENTRY}),
        frame(
            b'{"__metadata__":'
            + json.dumps(METADATA).encode()
            + b',"soft_prompt":%b,"soft_prompt":%b}' % ((json.dumps(ENTRY).encode(),) * 2)
        ),
    ],
)
def test_a_malformed_message_is_refused(data):
    with pytest.raises(MessageError):
        decode(data)
    with pytest.raises(MessageError):
        decode_broadcast(data, CONTRACT)


def test_the_frame_of_the_malformed_messages_is_itself_sound():
    assert (
        decode(frame({"__metadata__": METADATA, "soft_prompt": ENTRY}))
        .payload["soft_prompt"]
        .abs()
        .sum()
        == 0
    )


def test_a_broadcast_that_is_not_finite_is_refused_at_the_receiver():
    data = encode(update(torch.full(SHAPE, math.nan)), "float32")
    forged = safetensors.torch.save(
        {"soft_prompt": safetensors.torch.load(data)["soft_prompt"]},
        {"fedsp_version": "1", "kind": "server_broadcast", "round_idx": "0"},
    )
    with pytest.raises(MessageError, match="`soft_prompt` must be finite, got NaN or infinity"):
        decode_broadcast(forged, CONTRACT)


def test_an_update_is_no_broadcast():
    with pytest.raises(
        MessageError, match="expected the kind server_broadcast, got 'client_update'"
    ):
        decode_broadcast(encode(update(), "float32"), CONTRACT)


# --- what is rejected and counted ------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_travels_and_is_rejected(wire_dtype, value):
    prefix = prompt()
    prefix[1, 1, 0, 2, 3] = value
    data = encode(update(prefix), wire_dtype)
    with pytest.raises(RejectedUpdate, match="update of client 3 in round 5 holds NaN or infinity"):
        decode(data, Contract({"soft_prompt": SHAPE}, wire_dtype, 1e30))


def test_an_update_is_measured_from_the_reference_it_started_from():
    # 48 values, each 0.5 away: the norm is 0.5 * sqrt(48) = 3.4641.
    reference = prompt()
    data = encode(update(reference + 0.5), "float32")
    decode(data, Contract({"soft_prompt": SHAPE}, "float32", 3.465), reference)
    wanted = r"by a norm of 3.464, `trainer.communication.max_update_norm` is 3.46$"
    with pytest.raises(RejectedUpdate, match=wanted):
        decode(data, Contract({"soft_prompt": SHAPE}, "float32", 3.46), reference)


def test_an_update_whose_norm_overflows_float32_is_rejected():
    largest = torch.finfo(torch.float32).max
    data = encode(update(torch.full(SHAPE, largest)), "float32")
    with pytest.raises(RejectedUpdate, match="moved the payload"):
        decode(data, Contract({"soft_prompt": SHAPE}, "float32", 1e38), torch.full(SHAPE, -largest))


@pytest.mark.parametrize("bound", [None, 1e38])
def test_a_change_that_float32_cannot_hold_is_rejected_with_and_without_a_bound(bound):
    largest = torch.finfo(torch.float32).max
    data = encode(update(torch.full(SHAPE, largest)), "float32")
    contract = Contract({"soft_prompt": SHAPE}, "float32", bound)
    with pytest.raises(RejectedUpdate, match="moved the payload"):
        decode(data, contract, torch.full(SHAPE, -largest))


def test_a_broadcast_of_another_round_is_refused_where_the_round_is_known():
    data = encode(ServerBroadcast(7, {"soft_prompt": prompt()}), "float32")
    assert decode_broadcast(data, CONTRACT, round_idx=7).round_idx == 7
    with pytest.raises(MessageError, match="server_broadcast: expected round_idx 8, got 7"):
        decode_broadcast(data, CONTRACT, round_idx=8)


# --- hand-out and description ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": torch.zeros(2, 3)}, r"missing \['b'\]"),
        ({"a": torch.zeros(2, 3), "b": torch.ones(1), "c": torch.ones(0)}, r"foreign \['c'\]"),
        (
            {"a": torch.zeros(3, 2), "b": torch.ones(1)},
            r"`a` must have the shape \[2, 3\], got \[3",
        ),
        ({"a": torch.zeros(2, 3).int(), "b": torch.ones(1)}, "`a` must be float32, got int32"),
        ({"a": torch.zeros(2000), "b": torch.ones(1)}, "expected 28 bytes of numbers"),
    ],
)
def test_a_handout_other_than_the_one_expected_is_refused(tensors, reason):
    like = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    with pytest.raises(MessageError, match=reason):
        decode_handout(encode_handout(tensors), like)


def test_an_update_is_no_handout():
    with pytest.raises(
        MessageError, match="expected the kind auxiliary_handout, got 'client_update'"
    ):
        decode_handout(VALID["float32"])


def test_a_message_describes_itself():
    assert describe(VALID["bfloat16"]) == {
        "kind": "client_update",
        "round_idx": 5,
        "client_id": 3,
        "num_examples": 17,
        "tensors": [{"name": "soft_prompt", "shape": [2, 2, 1, 3, 4], "dtype": "bfloat16"}],
    }
    assert describe(encode_handout({"b": torch.zeros(2).half(), "a": torch.tensor(1)})) == {
        "kind": "auxiliary_handout",
        "tensors": [
            {"name": "a", "shape": [], "dtype": "int64"},
            {"name": "b", "shape": [2], "dtype": "float16"},
        ],
    }


def test_what_is_no_message_is_not_described():
    with pytest.raises(MessageError, match="expected message version 1"):
        describe(safetensors.torch.save({"weight": torch.zeros(2)}))


# --- what an audit knows of sizes ---------------------------------------------------------------


def test_messages_keep_within_the_limits_of_what_they_say_of_themselves():
    named = {f"layer.{idx}": torch.zeros(idx, dtype=torch.int8) for idx in range(50)}
    for data in (encode_handout({}), encode_handout(named)):
        low, high = size_limits(describe(data)["tensors"])
        assert low < len(data) <= high
    assert describe(data)["tensors"] == describe_tensors(named)


def test_a_contract_describes_its_payload_as_a_message_does():
    data = encode(ServerBroadcast(0, {"soft_prompt": torch.zeros(2, 2, 1, 3, 4)}), "bfloat16")
    contract = Contract({"soft_prompt": (2, 2, 1, 3, 4)}, "bfloat16", None)
    assert contract.describe() == describe(data)["tensors"]
