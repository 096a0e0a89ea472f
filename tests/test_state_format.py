"""The format of a state file: what it holds, what is refused."""

import json
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsp.state_files import (
    check_state_file,
    decode_state,
    encode_state,
    load_state,
)
from fedsp.tensor_files import pack_tensors


def test_equal_state_gives_equal_bytes():
    tree = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int8), "c": 1.0}
    assert encode_state(tree) == encode_state(tree)


def flip(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_flipped_bit_is_noticed():
    tree = {"a": [1, 2.5, (None, "text")], 3: torch.arange(5.0), "b": torch.ones(3).bfloat16()}
    data = encode_state(tree)
    for bit in range(8 * len(data)):
        with pytest.raises(ValueError, match=r"."):
            decode_state(flip(data, bit))


def test_any_truncation_or_extension_is_noticed():
    data = encode_state({"a": 1, "t": torch.arange(5.0)})
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            decode_state(data[:length])
    with pytest.raises(ValueError, match="describes"):
        decode_state(data + b"\0")


def frame(header):
    return len(header).to_bytes(8, "little") + header


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(frame))
def test_random_bytes_end_in_a_value_error(data):
    with pytest.raises(ValueError, match=r"."):
        decode_state(data)


def test_a_foreign_file_is_named_as_such(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    for read in (load_state, check_state_file):
        with pytest.raises(ValueError, match=r"model.safetensors is not .* holds fedsp state"):
            read(path)


def test_another_version_of_the_format_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(pack_tensors({}, {"fedsp_state": "99", "tree": "1", "crc32": "0"}))
    with pytest.raises(ValueError, match="expected state format version 1, got '99'"):
        load_state(path)


@pytest.mark.parametrize(
    "tree",
    [
        '{"dict":1}',
        '{"float":"0"}',
        '{"float":"00"}',
        '{"a":1,"b":2}',
        '{"tensor":"9"}',
        "[",
        "NaN",
    ],
)
def test_a_description_that_no_state_has_is_refused(tree):
    checksum = f"{zlib.crc32(json.dumps([tree, {}]).encode()):08x}"
    data = pack_tensors({}, {"fedsp_state": "1", "tree": tree, "crc32": checksum})
    with pytest.raises(ValueError, match=r"description is malformed"):
        decode_state(data)
