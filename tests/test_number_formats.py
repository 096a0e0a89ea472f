"""Payloads in 8 bits: as torch quantises, refused as everything else, nothing lost over rounds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsp.callbacks import FederatedCallback
from fedsp.federation import Communication
from fedsp.message_sizes import size_limits
from fedsp.messages import (
    ClientUpdate,
    Contract,
    MessageError,
    RejectedUpdate,
    ServerBroadcast,
    decode_broadcast,
    decode_update,
    encode,
)
from fedsp.number_formats import from_wire, rounded, to_wire, wire_entries
from fedsp.payload import shapes_of
from fedsp.state_files import load_state
from fedsp.tensor_files import pack_tensors
from tiny import fit, make_client

SHAPE = (2, 2, 3, 4, 8)


def prompt(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def contract(payload: dict[str, torch.Tensor], dtype: Any = "int8") -> Contract:
    return Contract(shapes_of(payload), dtype, None)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize:UserWarning")
def test_the_integers_are_those_of_torch() -> None:
    payload = {"soft_prompt": prompt()}
    wire = to_wire(payload, "int8")
    rows, scales = prompt().reshape(-1, SHAPE[-1]), wire["soft_prompt/scale"].flatten()
    zeros = torch.zeros_like(scales, dtype=torch.int64)
    expected = torch.quantize_per_channel(rows, scales.double(), zeros, axis=0, dtype=torch.qint8)
    assert torch.equal(wire["soft_prompt"].reshape(rows.shape), expected.int_repr())
    got = from_wire(wire, "int8")["soft_prompt"].reshape(rows.shape)
    assert torch.allclose(got, expected.dequantize(), rtol=1e-6, atol=0)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.sampled_from([1, 2]),
)
def test_no_number_is_off_by_more_than_half_a_step(numbers: list[float], axes: int) -> None:
    tensor = torch.tensor(numbers).reshape((1,) * (axes - 1) + (-1,))
    back = rounded({"weight": tensor}, "int8")["weight"]
    step = float(tensor.abs().max()) / 127
    # a step that is no normal number is not exact
    tiny = torch.finfo(torch.float32).tiny
    assert float((back - tensor).abs().max()) <= step * 0.5001 + tiny
    assert torch.equal(rounded({"weight": back}, "int8")["weight"] == 0, back == 0)


def test_odd_shapes_and_values() -> None:
    payload = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(2, 0),
        "zeros": torch.zeros(3, 4),
        "bad": torch.tensor([[1.0, math.nan], [math.inf, 1.0], [1.0, -2.0]]),
    }
    del payload["empty"]  # the largest of no numbers does not exist; no payload has such a row
    back = rounded(payload, "int8")
    assert float(back["scalar"]) == 2.5
    assert torch.equal(back["zeros"], payload["zeros"])
    assert back["bad"][:2].isnan().all()
    assert torch.equal(back["bad"][2], payload["bad"][2].div(2 / 127).round() * (2 / 127))


def test_a_message_is_a_quarter_and_a_scale_a_row() -> None:
    payload = {"soft_prompt": prompt()}
    data = encode(ServerBroadcast(0, payload), "int8")
    count, rows = prompt().numel(), prompt()[..., 0].numel()
    agreed = contract(payload)
    low, high = size_limits(agreed.describe())
    assert low == count + 4 * rows
    assert low < len(data) <= high
    got = decode_broadcast(data, agreed).payload["soft_prompt"]
    assert torch.equal(got, rounded(payload, "int8")["soft_prompt"])


def forged(change: dict[str, torch.Tensor | None]) -> bytes:
    wire = to_wire({"soft_prompt": prompt()}, "int8") | change
    metadata = {"fedsp_version": "1", "kind": "client_update"}
    metadata |= {"round_idx": "0", "client_id": "0", "num_examples": "1"}
    return pack_tensors({k: v for k, v in wire.items() if v is not None}, metadata)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"soft_prompt/scale": None}, MessageError),
        ({"soft_prompt": prompt()}, MessageError),
        ({"soft_prompt/scale": torch.zeros(2, 2, 3, 4, dtype=torch.float16)}, MessageError),
        ({"soft_prompt/scale": torch.zeros(2, 2, 3, 4, 1)}, MessageError),
        ({"other/scale": torch.zeros(2)}, MessageError),
        ({"soft_prompt/scale": torch.full((2, 2, 3, 4), math.nan)}, RejectedUpdate),
        ({"soft_prompt/scale": torch.full((2, 2, 3, 4), math.inf)}, RejectedUpdate),
        ({"soft_prompt/scale": torch.full((2, 2, 3, 4), 3e38)}, RejectedUpdate),
    ],
)
def test_forged_scales_do_not_pass(
    change: dict[str, torch.Tensor | None], error: type[Exception]
) -> None:
    payload = {"soft_prompt": prompt()}
    with pytest.raises(error):
        decode_update(
            forged(change), contract(payload), reference=payload, round_idx=0, client_id=0
        )


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be one of float32, .*int8, got 'int4'"):
        wire_entries({}, "int4")


def test_what_rounding_took_is_sent_with_the_next_update(tmp_path: Path) -> None:
    """All that a client ever sent is all that it learned, but for its last residual."""
    learned: list[torch.Tensor] = []
    sent: list[torch.Tensor] = []
    client = make_client()
    original = client.update

    def update(client_id: int, num_examples: int) -> ClientUpdate:
        made = original(client_id, num_examples)
        if client_id == 1:
            learned.append(made.payload["soft_prompt"].clone())
        return made

    client.update = update  # type: ignore[method-assign]
    trainer = fit(
        tmp_path / "tiny",
        tmp_path / "run",
        client=client,
        communication=Communication(wire_dtype="int8"),
        callbacks=[_Catch(sent)],
        num_rounds=3,
    )
    state: Any = load_state(trainer.folder.clients / "000001" / "round-000002.safetensors")
    residual = state["residual"]["soft_prompt"]
    assert residual.abs().max() > 0
    total = torch.stack(sent).sum(dim=0) + residual
    assert torch.allclose(total, torch.stack(learned).sum(dim=0), atol=1e-5)


class _Catch(FederatedCallback):
    """Keeps what the server accepted of client 1."""

    def __init__(self, sent: list[torch.Tensor]) -> None:
        self.sent = sent

    def on_update_accepted(
        self, trainer: Any, round_idx: int, client_id: int, payload: Any, reference: Any
    ) -> None:
        if client_id == 1:
            self.sent.append(payload["soft_prompt"].clone())


def test_float_formats_keep_no_residual(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path / "tiny", tmp_path / "run", communication=Communication(wire_dtype="bfloat16")
    )
    state: Any = load_state(trainer.folder.clients / "000001" / "round-000002.safetensors")
    assert "residual" not in state
