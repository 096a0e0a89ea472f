"""Messages as they should be, and bytes that look like them."""

import json

import safetensors.torch
import torch

from fedsp.messages import (
    ClientUpdate,
    Contract,
    decode_update,
    encode,
)

SHAPE = (2, 2, 1, 3, 4)
WIRE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONTRACT = Contract({"soft_prompt": SHAPE}, "float32", None)
METADATA = {
    "fedsp_version": "1",
    "kind": "client_update",
    "round_idx": "5",
    "client_id": "3",
    "num_examples": "17",
}


def prompt(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def update(prefix=None, **numbers):
    fields = {"round_idx": 5, "client_id": 3, "num_examples": 17} | numbers
    return ClientUpdate(payload={"soft_prompt": prompt() if prefix is None else prefix}, **fields)


def decode(data, contract=CONTRACT, reference=None, round_idx=5, client_id=3):
    start = torch.zeros(contract.shapes["soft_prompt"]) if reference is None else reference
    start = {"soft_prompt": start}
    return decode_update(data, contract, reference=start, round_idx=round_idx, client_id=client_id)


def forge(tensors=None, drop=(), **metadata):
    """A message by the safetensors library, so that what is refused does not come from us."""
    fields = {name: text for name, text in (METADATA | metadata).items() if name not in drop}
    return safetensors.torch.save({"soft_prompt": prompt()} if tensors is None else tensors, fields)


def frame(header, payload=bytes(48 * 4)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


ENTRY = {"dtype": "F32", "shape": list(SHAPE), "data_offsets": [0, 192]}
VALID = {name: encode(update(), name) for name in WIRE_DTYPES}
