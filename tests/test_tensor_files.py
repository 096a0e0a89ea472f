import json

import pytest
import safetensors.torch
import torch

from fedsp.tensor_files import pack_tensors, read_header

FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INT_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]


def bits(tensor):
    """A tensor as plain values in which equality means equal bits."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return (type(tensor), tensor.dtype, tuple(tensor.shape), raw)


def test_the_safetensors_library_reads_what_is_written():
    tensors = {
        f"{dtype}-{shape}": (torch.rand(shape) * 9).to(dtype)
        for dtype in [*FLOAT_DTYPES, *INT_DTYPES, torch.bool]
        for shape in [(), (0,), (3,), (2, 5)]
    }
    loaded = safetensors.torch.load(pack_tensors(tensors, {"a": 'ü " \\'}))
    assert {name: bits(t) for name, t in loaded.items()} == {n: bits(t) for n, t in tensors.items()}


def test_equal_tensors_and_text_give_equal_bytes():
    metadata = dict.fromkeys("abcdefgh", "x")
    assert len({pack_tensors({"t": torch.ones(1)}, metadata) for _ in range(20)}) == 1


def test_every_tensor_is_aligned_to_its_elements():
    data = pack_tensors(
        {"a": torch.ones(1).bool(), "b": torch.ones(1), "c": torch.ones(1).half()}, {}
    )
    header = read_header(data)
    for entry in header.tensors.values():
        assert (header.num_bytes + entry.start) % entry.dtype.itemsize == 0


def frame(header):
    return len(header).to_bytes(8, "little") + header


def framed(payload=b"", dtype="U8", shape=(1,), **spans):
    """A file whose tensors have one dtype and shape, and the given offsets."""
    fields = {"dtype": dtype, "shape": shape}
    entries = {name: fields | {"data_offsets": span} for name, span in spans.items()}
    return frame(json.dumps(entries).encode()) + payload


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "end before the header does"),
        (b"\xff" * 64, "end before the header does"),
        (frame(b"\xff\xfe"), "not JSON"),
        (frame(b"[" * 100_000), "nested too deeply"),
        (frame(b"[]"), "not a JSON object"),
        (frame(b'{"a":1,"a":2}'), "names something twice"),
        (frame(b'{"a":NaN}'), "which is not JSON"),
        (frame(b'{"__metadata__":{"a":1}}'), "not a map from text to text"),
        (frame(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "surrogate pair"),
        (frame(b'{"__metadata__":{"a":"\\udfff"}}'), "surrogate pair"),
        (frame(b'{"a":{}}'), "must have exactly dtype, shape and data_offsets"),
        (framed(dtype="F7", a=(0, 0)), "unknown dtype"),
        (framed(dtype=["F32"], a=(0, 0)), "unknown dtype"),
        (framed(shape=[-1], a=(0, 0)), "impossible shape"),
        (framed(b"1", shape=[True], a=(0, 1)), "impossible shape"),
        (framed(shape=[0, 10**10, 10**10], a=(0, 0)), "impossible shape"),
        (framed(shape=[1] * 65, a=(0, 1)), "impossible shape"),
        (framed(a=(0,)), "impossible offsets"),
        (framed(b"12", a=(0, 2)), "do not fit"),
        (framed(b"12", a=(1, 2)), "leaves a gap or overlaps"),
        (framed(b"123", shape=[2], a=(0, 2), b=(1, 3)), "leaves a gap or overlaps"),
        (framed(b"12", a=(0, 1)), "describes"),
    ],
)
def test_a_malformed_header_is_refused_with_its_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_header(data)


def test_a_header_beyond_the_limit_is_not_parsed():
    data = frame(b"not JSON at all")
    with pytest.raises(ValueError, match="its header has 15 bytes, at most 14 are read"):
        read_header(data, 14)
    with pytest.raises(ValueError, match="Expecting value"):
        read_header(data, 15)
