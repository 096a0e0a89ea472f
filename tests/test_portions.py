"""Portions: what is cut, what is left out, and that both are counted."""

import warnings

import pytest

from fedsp.examples import Example, TokenStore
from fedsp.portions import Limit, Portion, check_filled, fit_portion, warn_of_losses

SOURCE = [
    Example([1, 2], [[3]], 0, [1]),
    Example([1, 2, 3, 4], [[5, 6]], 0, [2]),
    Example([1], [[2, 3, 4, 5]], 0, [4]),
    Example([1, 2], [[]], 0, [1]),
]


def portion(max_tokens: int | None, rows: list[int]) -> Portion:
    examples = [SOURCE[row] for row in rows]
    return fit_portion(
        examples,
        list(range(len(rows))),
        Limit(max_tokens, num_leading=0),
        origin=TokenStore.from_examples(SOURCE),
        origin_rows=rows,
    )


def test_long_prompts_are_cut_and_long_or_empty_completions_left_out() -> None:
    fitted = portion(4, [3, 2, 1, 0])
    assert list(fitted.store) == [Example([3, 4], [[5, 6]], 0, [2]), SOURCE[0]]
    assert (fitted.num_cut, fitted.num_left_out) == (1, 2)
    assert fitted.rows == [1, 0]


def test_without_a_limit_nothing_is_cut() -> None:
    fitted = portion(None, [0, 1, 2])
    assert list(fitted.store) == SOURCE[:3]
    assert (fitted.num_cut, fitted.num_left_out) == (0, 0)


def test_texts_are_the_sources_whatever_was_cut() -> None:
    assert list(portion(4, [1, 2]).texts({1})) == [(2, 3, 4, 5, 6), (2, 3, 4, 5)]


def test_losses_are_warned_of_with_their_own_counts() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_losses("data.clients", [portion(4, [0, 1]), portion(4, [2, 3])], 4)
    texts = [str(warning.message) for warning in caught]
    assert texts[0].startswith(
        "`data.clients`: 1 of 4 examples are longer than `data.max_tokens`=4;"
    )
    assert texts[1].startswith(
        "`data.clients`: 2 of 4 examples are left out: a completion is empty"
    )
    assert len(texts) == 2


def test_no_losses_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_losses("data.clients", [portion(None, [0, 1])], None)


def test_an_owner_left_with_nothing_is_named() -> None:
    check_filled("Client 'a'", portion(4, [0]), 4)
    with pytest.raises(ValueError, match=r"^Client 'a' has no example .* all 2 are left out"):
        check_filled("Client 'a'", portion(4, [2, 3]), 4)
