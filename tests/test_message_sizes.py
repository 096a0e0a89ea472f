"""Sizes of messages against figures worked out by hand; test_messages.py holds them to messages."""

import pytest

from fedsp.message_sizes import size_limits


def test_the_limits_of_a_message_are_its_numbers_and_what_its_names_may_take():
    tensors = [
        {"name": "bb", "shape": [3, 4], "dtype": "float16"},
        {"name": "a", "shape": [], "dtype": "int64"},
    ]
    # 12 numbers of 2 bytes and one of 8; 1 KiB, and for the second name 6 bytes a letter and 256
    assert size_limits(tensors) == (32, 32 + 1024 + 2 * 6 + 256)
    with pytest.raises(ValueError, match=r"^a dtype must be one of float64, .*got 'text'$"):
        size_limits([{"name": "a", "shape": [1], "dtype": "text"}])
