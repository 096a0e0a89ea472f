"""One owner's share of the tokenised examples, cut to the length that the model takes.

Whose share it is, and what a row of it means, is decided elsewhere.
"""

import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from fedsp.examples import Example, TokenStore


@dataclass(frozen=True)
class Portion:
    """The examples of one owner, ready to be batched.

    Args:
        store: The examples as they are trained on or scored.
        rows: Row in the source of each example; None where examples were regrouped.
        num_cut: Examples whose prompt was cut.
        num_left_out: Examples that could not be used.
        origin: The whole source's examples, neither cut nor regrouped.
        origin_rows: Those of them that this owner has.
    """

    store: TokenStore
    rows: list[int] | None
    num_cut: int
    num_left_out: int
    origin: TokenStore
    origin_rows: list[int]

    def texts(self, ignored_ids: Container[int | None]) -> Iterator[tuple[int, ...]]:
        """Give the token ids of every row as it is in the source, prompt and right completion.

        Args:
            ignored_ids: Token ids to leave out, such as the start and end tokens.
        """
        for row in self.origin_rows:
            example = self.origin[row]
            ids = example.prompt_ids + example.completions[example.answer]
            yield tuple(token for token in ids if token not in ignored_ids)


@dataclass(frozen=True)
class Limit:
    """How long an example may be.

    Args:
        max_tokens: Most tokens of a prompt with a completion, None without limit.
        num_leading: Tokens at a prompt's start that are never cut (a start token).
    """

    max_tokens: int | None
    num_leading: int


def fit_portion(
    examples: Sequence[Example],
    origins: Sequence[int] | None,
    limit: Limit,
    *,
    origin: TokenStore,
    origin_rows: list[int],
) -> Portion:
    """Cut the examples to the limit and leave out what cannot be used.

    Args:
        examples: One owner's examples.
        origins: Index in `origin_rows` of each example's row; None where examples were regrouped.
        limit: How long an example may be.
        origin: The whole source's examples.
        origin_rows: Those of them that this owner has.
    """
    fitted = [ex.fit(limit.max_tokens, num_leading=limit.num_leading) for ex in examples]
    kept = [
        (idx, example)
        for idx, example in enumerate(fitted)
        if example is not None and example.is_predictable
    ]
    return Portion(
        store=TokenStore.from_examples(example for _, example in kept),
        rows=None if origins is None else [origin_rows[origins[idx]] for idx, _ in kept],
        num_cut=sum(example is not examples[idx] for idx, example in kept),
        num_left_out=len(examples) - len(kept),
        origin=origin,
        origin_rows=origin_rows,
    )


def pool(portions: Sequence[Portion]) -> Portion:
    """Put the examples of several owners together, in their order.

    Args:
        portions: At least one.
    """
    return Portion(
        store=TokenStore.from_examples(ex for portion in portions for ex in portion.store),
        rows=None,
        num_cut=sum(portion.num_cut for portion in portions),
        num_left_out=sum(portion.num_left_out for portion in portions),
        origin=portions[0].origin,
        origin_rows=[],
    )


def warn_of_losses(option: str, portions: Sequence[Portion], max_tokens: int | None) -> None:
    """Warn with the numbers of examples that were cut and of those that were left out, if any.

    Args:
        option: Name of the data as the user types it.
        portions: All owners of that data.
        max_tokens: The limit that was applied.
    """
    total = sum(len(portion.store) + portion.num_left_out for portion in portions)
    if num_cut := sum(portion.num_cut for portion in portions):
        warnings.warn(
            f"`{option}`: {num_cut} of {total} examples are longer than `data.max_tokens`="
            f"{max_tokens}; their prompts are cut on the left. Raise it as far as the model's "
            "positions allow, or shorten the prompts.",
            stacklevel=3,
        )
    if num_left_out := sum(portion.num_left_out for portion in portions):
        warnings.warn(
            f"`{option}`: {num_left_out} of {total} examples are left out: a completion is empty, "
            f"or leaves no room for any of its prompt in `data.max_tokens`={max_tokens}. "
            "Completions are never cut: raise the limit as far as the model's positions allow, or "
            "shorten them.",
            stacklevel=3,
        )


def check_filled(owner: str, portion: Portion, max_tokens: int | None) -> None:
    """Refuse a portion without a single usable example.

    Args:
        owner: Whose portion it is, as the message begins.
        portion: What it is left with.
        max_tokens: The limit that was applied.

    Raises:
        ValueError: If there is none.
    """
    if not len(portion.store):
        raise ValueError(
            f"{owner} has no example that can be used: all {portion.num_left_out} are left out, "
            f"since a completion is empty or too long for `data.max_tokens`={max_tokens}. Raise "
            "the limit or bring other data."
        )
