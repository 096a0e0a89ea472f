"""The tokenised example that tasks produce and batches are made of, and a compact store of many.

No tokenizer and no file lives here.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

ARRAYS = ("tokens", "ends", "num_choices", "answers", "num_chars")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example; a prompt with its completion is a multiple choice of one.

    Args:
        prompt_ids: Token ids of what is given.
        completions: Token ids of every choice: one for prompt/completion and for raw text.
        answer: Index of the right choice, 0 for a single completion.
        num_chars: Characters of each choice's text, at least 1 (for length-normalised accuracy).
    """

    prompt_ids: list[int]
    completions: list[list[int]]
    answer: int
    num_chars: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the right completion together."""
        return len(self.prompt_ids) + len(self.completions[self.answer])

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest completion together."""
        return len(self.prompt_ids) + max(len(choice) for choice in self.completions)

    @property
    def num_packed_tokens(self) -> int:
        """Tokens of the prompt and all completions together."""
        return len(self.prompt_ids) + sum(len(choice) for choice in self.completions)

    def fit(self, max_tokens: int | None, *, num_leading: int = 0) -> "Example | None":
        """Cut the prompt on the left until every choice fits; a completion is never cut.

        Args:
            max_tokens: Most tokens of the prompt and a completion together, None without limit.
            num_leading: Tokens at the prompt's start that stay whatever is cut (a start token).

        Returns:
            The example itself if it fits, a shortened one, or None if the longest completion leaves
            no room for any of the prompt.
        """
        if max_tokens is None or self.longest <= max_tokens:
            return self
        room = max_tokens - (self.longest - len(self.prompt_ids))
        if room < min(len(self.prompt_ids), num_leading + 1):
            return None
        kept = self.prompt_ids[:num_leading] + self.prompt_ids[num_leading - room :]
        return Example(kept, self.completions, self.answer, self.num_chars)

    @property
    def is_predictable(self) -> bool:
        """Whether every choice has a token that another one comes before."""
        needed = 1 if self.prompt_ids else 2
        return all(len(choice) >= needed for choice in self.completions)


class TokenStore(Sequence[Example]):
    """Examples packed into a few int arrays: about 4 bytes a token instead of 36 in lists.

    Args:
        arrays: `tokens` [all tokens] int32; `ends` [sequences] int64, where each prompt and each
            choice ends in `tokens`; `num_choices`, `answers` [examples]; `num_chars` [choices].
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self._starts = np.concatenate([[0], arrays["ends"]])
        # sequences before each example: its own are one prompt and its choices
        self._first = np.concatenate([[0], np.cumsum(arrays["num_choices"] + 1)])

    @classmethod
    def from_examples(cls, examples: Iterable[Example]) -> "TokenStore":
        """Copy examples into arrays."""
        tokens: list[np.ndarray] = []
        num_choices, answers, num_chars = [], [], []
        for example in examples:
            tokens += [
                np.asarray(ids, np.int32) for ids in (example.prompt_ids, *example.completions)
            ]
            num_choices.append(len(example.completions))
            answers.append(example.answer)
            num_chars.extend(example.num_chars)
        return cls(
            {
                "tokens": np.concatenate([*tokens, np.empty(0, np.int32)]),
                "ends": np.cumsum([len(ids) for ids in tokens], dtype=np.int64),
                "num_choices": np.asarray(num_choices, np.int64),
                "answers": np.asarray(answers, np.int64),
                "num_chars": np.asarray(num_chars, np.int64),
            }
        )

    def __len__(self) -> int:
        return len(self.arrays["answers"])

    @overload
    def __getitem__(self, idx: int) -> Example: ...
    @overload
    def __getitem__(self, idx: slice) -> list[Example]: ...
    def __getitem__(self, idx: int | slice) -> Example | list[Example]:
        if isinstance(idx, slice):
            return [self[position] for position in range(*idx.indices(len(self)))]
        idx = range(len(self))[idx]
        first, last = int(self._first[idx]), int(self._first[idx + 1])
        prompt, *choices = (self._sequence(position) for position in range(first, last))
        # num_chars has an entry a choice and none for the prompts, of which `idx` came before
        chars = self.arrays["num_chars"][first - idx : last - idx - 1].tolist()
        return Example(prompt, choices, int(self.arrays["answers"][idx]), chars)

    def lengths(self) -> np.ndarray:
        """[examples] int64 Tokens of each prompt with its right completion."""
        sizes = np.diff(self._starts)
        prompts = self._first[:-1]
        return sizes[prompts] + sizes[prompts + 1 + self.arrays["answers"]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and all choices together."""
        return len(self.arrays["tokens"])

    def counts(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int64 How often each token occurs, in prompts and all choices."""
        return np.bincount(self.arrays["tokens"], minlength=vocab_size)

    def head(self, num_tokens: int) -> list[int]:
        """Return the first token ids of all prompts and right completions, joined in order.

        Args:
            num_tokens: At most so many.
        """
        ids: list[int] = []
        for example in self:
            if len(ids) >= num_tokens:
                break
            ids += example.prompt_ids + example.completions[example.answer]
        return ids[:num_tokens]

    def digest(self) -> str:
        """Return a hash of all token ids, borders and answers."""
        digest = hashlib.sha256()
        for name in ARRAYS:
            digest.update(self.arrays[name].tobytes())
        return digest.hexdigest()

    def _sequence(self, position: int) -> list[int]:
        return self.arrays["tokens"][self._starts[position] : self._starts[position + 1]].tolist()


def join_into_blocks(documents: Sequence[Example], size: int) -> list[Example]:
    """Join plain texts and cut them into blocks, of which the last is shorter.

    Args:
        documents: At least one, each with a single completion and the same prompt: a start token or
            nothing.
        size: Tokens of a block.
    """
    lead = documents[0].prompt_ids
    tokens = [token for document in documents for token in document.completions[0]]
    room = max(1, size - len(lead))
    chars = sum(document.num_chars[0] for document in documents) / max(1, len(tokens))
    pieces = [tokens[start : start + room] for start in range(0, len(tokens), room)]
    if len(pieces) > 1 and not lead and len(pieces[-1]) == 1:
        pieces.pop()  # nothing comes before a lone token: it could never be predicted
    return [Example(lead, [piece], 0, [max(1, round(chars * len(piece)))]) for piece in pieces]
