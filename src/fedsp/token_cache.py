"""Tokenised examples cached on disk: a text is tokenised once.

Nothing here knows tokenizers or tasks.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fedsp.examples import ARRAYS, Example, TokenStore
from fedsp.state_files import load_state, save_state

_FORMAT = 1


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
    store = TokenStore.from_examples(build())
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
        return TokenStore({name: state[name].numpy() for name in ARRAYS})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"The token cache {path} is unusable and built anew: {error}.", stacklevel=3)
        return None
