"""What a sender refuses to send."""

import math

import pytest
import torch

from fedsp.messages import (
    Contract,
    MessageError,
    ServerBroadcast,
    check_sent,
    encode,
    encode_handout,
)
from forged_messages import CONTRACT, SHAPE, forge, prompt, update

# --- the sender ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [update, lambda prefix: ServerBroadcast(0, {"soft_prompt": prefix})]
)
def test_values_beyond_float16_are_refused_at_the_sender(make):
    prefix = prompt()
    prefix[0, 0, 0, 0, 0] = 1e6
    with pytest.raises(
        MessageError, match=r"1 values beyond .*`trainer.communication.wire_dtype` float16.*1e\+06"
    ):
        encode(make(prefix), "float16")
    encode(make(prefix), "bfloat16")


def test_values_beyond_bfloat16_are_refused_at_the_sender():
    prefix = torch.full(SHAPE, torch.finfo(torch.float32).max)
    with pytest.raises(MessageError, match=r"`trainer.communication.wire_dtype` bfloat16"):
        encode(update(prefix), "bfloat16")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broadcast_that_is_not_finite_is_refused_at_the_sender(value):
    with pytest.raises(MessageError, match="NaN or infinity in round 2"):
        encode(ServerBroadcast(2, {"soft_prompt": torch.full(SHAPE, value)}), "float32")


@pytest.mark.parametrize("number", [0, -1, 2**53, 1.5, True])
def test_a_number_of_examples_out_of_range_is_refused_at_the_sender(number):
    with pytest.raises(
        MessageError, match=r"`num_examples` must be a whole number in \[1, 2\*\*53"
    ):
        encode(update(num_examples=number), "float32")


def test_an_unknown_wire_dtype_is_refused():
    wanted = (
        "`trainer.communication.wire_dtype` must be one of float32, float16, bfloat16, int8, "
        "got 'int4'"
    )
    with pytest.raises(ValueError, match=wanted):
        encode(update(), "int4")
    with pytest.raises(ValueError, match=wanted):
        Contract({"soft_prompt": SHAPE}, "int4", None)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_a_norm_bound_that_bounds_nothing_is_refused(norm):
    with pytest.raises(
        ValueError, match=r"`trainer.communication.max_update_norm` must be above 0 or null, got"
    ):
        Contract({"soft_prompt": SHAPE}, "float32", norm)


@pytest.mark.parametrize("shape", [(2, 2, 1, 3), (2, 3, 1, 3, 4), (2, 2, 1, -3, 4)])
def test_a_contract_of_another_shape_than_a_prompt_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(L, 2, K, P, D\)"):
        Contract({"soft_prompt": shape}, "float32", None)


# --- the sender's own look -------------------------------------------------------------------


def test_what_is_not_the_clients_payload_does_not_leave_it():
    check_sent(encode(update(), "float32"), CONTRACT, round_idx=5, client_id=3)
    # values are the receiver's to judge
    nothing = encode(update(torch.full(SHAPE, math.nan)), "float32")
    check_sent(nothing, CONTRACT, round_idx=5, client_id=3)
    for data in (
        forge({"soft_prompt": prompt(), "lm_head": torch.zeros(2)}),
        forge({"soft_prompt": prompt((2, 2, 1, 4, 3))}),
        forge(client_id="4"),
        forge(round_idx="6"),
        encode_handout({"soft_prompt": prompt()}),
    ):
        with pytest.raises(MessageError):
            check_sent(data, CONTRACT, round_idx=5, client_id=3)
