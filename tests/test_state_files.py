import errno
import math
import os
import struct
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fedsp.state_files import (
    check_state_file,
    decode_state,
    encode_state,
    load_state,
    remove_temporary_files,
    save_state,
    write_text_atomically,
)

FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


INT_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]


def bits(node):
    """A state as plain values in which equality means equal bits."""
    if isinstance(node, torch.Tensor):
        raw = node.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return ("tensor", node.dtype, tuple(node.shape), raw)
    if isinstance(node, float):
        return ("float", struct.pack(">d", node))
    if isinstance(node, dict):
        return (type(node), [(type(key), key, bits(value)) for key, value in node.items()])
    if isinstance(node, list | tuple):
        return (type(node), [bits(item) for item in node])
    return (type(node), node)


def assert_round_trips(tree):
    assert bits(decode_state(encode_state(tree))) == bits(tree)


# --- nested values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        (),
        {},
        "",
        'naïve \U0001f642 \x00 \ud800 " \\',
        True,
        [True, 1, 1.0, False, 0, 0.0, -0.0],
        2**200,
        -(2**63),
        [5e-324, 1.7976931348623157e308, 0.1, 1 / 3],
        [math.inf, -math.inf, math.nan, struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]],
        {0: "int", "0": "text", 1: {2: (3, [4, (5,)])}},
        {"tensor": "000000", "dict": [], "float": "00", "tuple": {"items": ()}},
        {True: 1, -7: 2, "True": 3},
        Counter({3: 1, 5: 2}),
        [[], [()], {"a": {}}],
    ],
)
def test_plain_values_come_back_bit_for_bit_and_of_the_same_type(tree):
    assert_round_trips(tree)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_special_floats_in_tensors_keep_their_bits(dtype):
    tensor = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-30], dtype=dtype)
    assert_round_trips({"tensor": tensor})


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, *INT_DTYPES, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (2, 1, 3)])
def test_every_dtype_and_shape_comes_back(dtype, shape):
    assert_round_trips([(torch.rand(shape) * 100).to(dtype), torch.ones(3, dtype=torch.uint8)])


def test_views_and_shared_storage_are_written_as_what_they_show():
    base = torch.arange(24.0)
    tree = {
        "base": base,
        "same": base,
        "slice": base[3:7],
        "strided": base[::5],
        "transposed": base.view(4, 6).T,
        "expanded": base[:2].expand(3, 2),
        "permuted": base.view(2, 3, 4).permute(2, 0, 1),
    }
    assert_round_trips(tree)
    assert len(encode_state(base[3:7])) < len(encode_state(base))


def test_loaded_tensors_share_no_memory_and_can_be_written_to():
    base = torch.zeros(4)
    first, second = decode_state(encode_state([base, base]))
    first += 1
    assert second.tolist() == [0.0] * 4


def test_parameters_come_back_as_plain_tensors_without_gradient():
    loaded = decode_state(encode_state(torch.nn.Parameter(torch.ones(2))))
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad


def test_subclasses_come_back_as_the_plain_kind():
    tree = [OrderedDict(b=1, a=2), torch.Size([2, 3])]
    assert bits(decode_state(encode_state(tree))) == bits([{"b": 1, "a": 2}, (2, 3)])


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


trees = st.recursive(
    plain | st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(trees)
def test_any_tree_comes_back_bit_for_bit(tree):
    assert_round_trips(tree)


@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes", 1j, torch.float32, print])
def test_a_value_that_is_no_state_is_refused_with_its_place(bad):
    with pytest.raises(TypeError, match=r"`state.metrics\[1\]`: cannot save"):
        encode_state({"metrics": [0, bad]})


@pytest.mark.parametrize("key", [(1, 2), 1.5, None])
def test_a_dict_key_that_is_neither_text_nor_int_is_refused(key):
    with pytest.raises(TypeError, match=r"`state.a`: a dict key must be text or an int"):
        encode_state({"a": {key: 1}})


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.zeros(2).cfloat()]
)
def test_a_tensor_that_the_format_cannot_hold_is_refused(tensor):
    with pytest.raises(TypeError, match=r"`state\[0\]`: expected a dense real tensor"):
        encode_state([tensor])


def test_a_tree_that_contains_itself_is_refused():
    tree: list = []
    tree.append(tree)
    with pytest.raises(ValueError, match="refers to itself"):
        encode_state(tree)


# --- optimizers and schedules ----------------------------------------------------------------


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "AdamW with a tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1),
} | {
    name: lambda p, name=name: getattr(torch.optim, name)(p, lr=0.1)
    for name in ("Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
}


def train(parameters, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = sum(((p - 0.5) ** 4).sum() for p in parameters)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_saved_state_as_if_never_stopped(name):
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = OPTIMIZERS[name](parameters)
    train(parameters, optimizer, 3)
    saved = {"parameters": parameters, "optimizer": optimizer.state_dict()}
    data = encode_state(saved)
    assert bits(decode_state(data)["optimizer"]) == bits(optimizer.state_dict())

    loaded = decode_state(data)
    copies = [torch.nn.Parameter(p) for p in loaded["parameters"]]
    resumed = OPTIMIZERS[name](copies)
    resumed.load_state_dict(loaded["optimizer"])
    train(parameters, optimizer, 3)
    train(copies, resumed, 3)
    assert bits(copies) == bits(parameters)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_from_its_saved_state_as_if_never_stopped(name):
    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates(optimizer, scheduler, steps):
        values = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            values.append(scheduler.get_last_lr()[0])
        return values

    straight = rates(*build(), 6)
    optimizer, scheduler = build()
    rates(optimizer, scheduler, 3)
    tree = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    loaded = decode_state(encode_state(tree))
    assert bits(loaded["scheduler"]) == bits(tree["scheduler"])
    optimizer, scheduler = build()
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    assert rates(optimizer, scheduler, 3) == straight[3:]


def test_a_random_stream_goes_on_from_its_saved_state():
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    data = encode_state(generator.get_state())
    expected = torch.rand(5, generator=generator)
    resumed = torch.Generator()
    resumed.set_state(decode_state(data))
    assert torch.equal(torch.rand(5, generator=resumed), expected)


# --- files -----------------------------------------------------------------------------------


def test_a_saved_file_holds_the_state_and_reports_its_size(tmp_path):
    path = tmp_path / "state.safetensors"
    tree = {1: torch.randn(3), "x": (None, 2.0)}
    assert save_state(path, tree) == path.stat().st_size
    check_state_file(path)
    assert bits(load_state(path)) == bits(tree)
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_a_truncated_file_shows_without_reading_its_tensors(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, torch.zeros(1000))
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match=r"state.safetensors is not a readable fedsp state file"):
        check_state_file(path)
    os.truncate(path, 0)
    with pytest.raises(ValueError, match="it is empty"):
        load_state(path)


def fail_after(function, number, error):
    calls = iter(range(number))

    def failing(*args, **kwargs):
        if next(calls, None) is None:
            raise error
        return function(*args, **kwargs)

    return failing


def test_a_file_system_that_cannot_sync_folders_is_accepted(tmp_path, monkeypatch):
    fsync, unable = os.fsync, OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fsync", fail_after(fsync, 1, unable))
    save_state(tmp_path / "a", 1)
    assert load_state(tmp_path / "a") == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["open", "write", "fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, function, error
):
    path = tmp_path / "state.safetensors"
    save_state(path, "old")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_after(getattr(os, function), 0, error))
        with pytest.raises(type(error)):
            save_state(path, "new")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_a_disk_that_fills_up_half_way_is_reported_with_the_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(path, "old")
    write = os.write
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(
        os, "write", fail_after(lambda file, data: write(file, data[:100]), 3, full)
    )
    with pytest.raises(
        OSError, match=r"cannot write .*state.safetensors: No space.*unchanged"
    ) as e:
        save_state(path, torch.zeros(500))
    assert e.value.errno == errno.ENOSPC
    assert load_state(path) == "old"
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    save_state(tmp_path / "a", torch.arange(100))
    assert torch.equal(load_state(tmp_path / "a"), torch.arange(100))


def test_a_file_may_be_replaced_while_its_loaded_state_is_in_use(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, torch.ones(10_000))
    loaded = load_state(path)
    save_state(path, torch.zeros(10))
    assert loaded.sum() == 10_000


def test_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "note.txt"
    write_text_atomically(path, "first\n")
    write_text_atomically(path, "zweitens ü\n")
    assert path.read_text(encoding="utf-8") == "zweitens ü\n"


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write .*absent/a"):
        save_state(tmp_path / "absent" / "a", 1)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".state.safetensors.123.tmp").touch()
    (tmp_path / "mine.tmp").touch()
    remove_temporary_files(tmp_path)
    remove_temporary_files(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["mine.tmp"]
