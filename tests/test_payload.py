"""Payloads are laid out as vectors and back, and measured."""

import torch

from fedsp.payload import add, flatten, norm, shapes_of, subtract, unflatten

PAYLOAD = {"b": torch.tensor([3.0, 4.0]), "a": torch.tensor([[12.0]])}


def test_a_payload_becomes_a_vector_in_the_order_of_the_names_and_comes_back() -> None:
    vector = flatten(PAYLOAD)
    assert vector.tolist() == [12.0, 3.0, 4.0]
    back = unflatten(vector, shapes_of(PAYLOAD))
    assert back.keys() == PAYLOAD.keys()
    assert all(torch.equal(back[name], PAYLOAD[name]) for name in PAYLOAD)


def test_an_empty_payload_is_an_empty_vector() -> None:
    assert flatten({}).shape == (0,)


def test_the_norm_is_that_of_all_numbers_together() -> None:
    assert norm(PAYLOAD) == 13.0  # 12, 3 and 4


def test_differences_and_sums_are_taken_by_name() -> None:
    ones = {name: torch.ones_like(tensor) for name, tensor in PAYLOAD.items()}
    assert flatten(subtract(PAYLOAD, ones)).tolist() == [11.0, 2.0, 3.0]
    assert flatten(add(PAYLOAD, ones)).tolist() == [13.0, 4.0, 5.0]
