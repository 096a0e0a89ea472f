"""Tokenised examples in flat arrays, in memory and cached on disk: a text is tokenised once.

Nothing here knows tokenizers or tasks.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from fedsp.examples import Example
from fedsp.state_files import load_state, save_state

_FORMAT = 1
_ARRAYS = ("tokens", "ends", "num_choices", "answers", "num_chars")


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
    def pack(cls, examples: Iterable[Example]) -> "TokenStore":
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

    def digest(self) -> str:
        """Return a hash of all token ids, borders and answers."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            digest.update(self.arrays[name].tobytes())
        return digest.hexdigest()

    def _sequence(self, position: int) -> list[int]:
        return self.arrays["tokens"][self._starts[position] : self._starts[position + 1]].tolist()


def load_or_build(folder: Path, key: str, build: Callable[[], Iterable[Example]]) -> TokenStore:
    """Return the cached examples of a key, or build and cache them.

    Two processes may build the same key at once: each puts its own finished file in place. A file
    that is damaged is built anew. A folder that cannot be written costs the cache, not the run.

    Args:
        folder: Cache folder; made when missing.
        key: Names everything that shapes the examples.
        build: Makes the examples; called only when they are not cached.
    """
    name = hashlib.sha256(f"{_FORMAT}/{key}".encode()).hexdigest()[:32]
    path = folder / f"tokens-{name}.safetensors"
    store = _load(path)
    if store is not None:
        return store
    store = TokenStore.pack(build())
    state = {name: torch.from_numpy(array) for name, array in store.arrays.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_state(path, state)
    except OSError as error:
        warnings.warn(
            f"The tokenised data cannot be cached in {folder}: {error}. Every run tokenises anew "
            "until `data.cache_dir` names a folder that can be written.",
            stacklevel=2,
        )
    return store


def _load(path: Path) -> TokenStore | None:
    try:
        state = load_state(path)
        return TokenStore({name: state[name].numpy() for name in _ARRAYS})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"The token cache {path} is damaged and built anew: {error}.", stacklevel=3)
        return None
