"""Examples: cutting from the left, and the compact store."""

import numpy as np
import pytest

from fedsp.examples import Example, TokenStore

CHOICES = Example([1, 2, 3, 4], [[5], [6, 7, 8], [9, 10]], 2, [1, 3, 2])
COMPLETION = Example([1, 2, 3, 4], [[5, 6]], 0, [2])


def test_lengths_count_the_right_and_the_longest_completion() -> None:
    assert (CHOICES.num_tokens, CHOICES.longest) == (6, 7)


def test_an_example_that_fits_is_returned_itself() -> None:
    assert CHOICES.fit(7) is CHOICES
    assert CHOICES.fit(None) is CHOICES


def test_the_prompt_is_cut_on_the_left_until_the_longest_choice_fits() -> None:
    cut = CHOICES.fit(5)
    assert cut is not None
    assert cut.prompt_ids == [3, 4]
    assert cut.completions == CHOICES.completions
    assert cut.answer == 2


def test_the_start_token_outlives_the_cut() -> None:
    cut = COMPLETION.fit(4, num_leading=1)
    assert cut is not None
    assert cut.prompt_ids == [1, 4]


@pytest.mark.parametrize(("max_tokens", "num_leading"), [(2, 0), (3, 1), (1, 0)])
def test_a_completion_that_leaves_no_room_for_the_prompt_does_not_fit(
    max_tokens: int, num_leading: int
) -> None:
    assert COMPLETION.fit(max_tokens, num_leading=num_leading) is None


def test_a_completion_without_a_prompt_is_never_cut() -> None:
    assert Example([], [[1, 2, 3]], 0, [3]).fit(2) is None
    assert Example([], [[1, 2, 3]], 0, [3]).fit(3) is not None


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [([1], [2], True), ([], [2], False), ([], [2, 3], True), ([1], [], False)],
)
def test_a_token_is_predictable_only_behind_another(
    prompt: list[int], completion: list[int], expected: bool
) -> None:
    assert Example(prompt, [completion], 0, [1]).is_predictable is expected


def test_a_store_gives_back_the_very_examples() -> None:
    examples = [COMPLETION, CHOICES, Example([], [[3]], 0, [1]), CHOICES]
    store = TokenStore.from_examples(iter(examples))
    assert list(store) == examples
    assert store[-1] == CHOICES
    assert store[1:3] == examples[1:3]
    with pytest.raises(IndexError):
        store[4]


def test_a_stores_lengths_are_those_of_its_examples() -> None:
    store = TokenStore.from_examples([COMPLETION, CHOICES, Example([], [[3]], 0, [1])])
    np.testing.assert_array_equal(store.lengths(), [6, 6, 1])


def test_a_store_may_be_empty() -> None:
    store = TokenStore.from_examples([])
    assert list(store) == []
    assert store.lengths().tolist() == []


def test_head_joins_prompts_with_their_right_completions() -> None:
    store = TokenStore.from_examples([CHOICES, COMPLETION])
    assert store.head(8) == [1, 2, 3, 4, 9, 10, 1, 2]
    assert store.head(100) == [1, 2, 3, 4, 9, 10, 1, 2, 3, 4, 5, 6]


def test_a_digest_tells_borders_apart() -> None:
    one = TokenStore.from_examples([Example([1], [[2, 3]], 0, [2])])
    other = TokenStore.from_examples([Example([1, 2], [[3]], 0, [2])])
    again = TokenStore.from_examples([Example([1], [[2, 3]], 0, [2])])
    assert one.digest() == again.digest() != other.digest()
