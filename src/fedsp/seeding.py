"""Independent random streams, each named by what it is for; the global generators stay untouched.

A stream is a pure function of `(seed, purpose, round_idx, client_id)`, so that a resumed run,
another order of clients or another number of processes draws the same numbers.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_for(seed: int, purpose: str, *, round_idx: int = -1, client_id: int = -1) -> int:
    """Derive the seed of one stream.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, such as `"sampling"` or `"dropout"`.
        round_idx: 0-based communication round; -1 where rounds play no part.
        client_id: Index of the client; -1 where clients play no part.

    Returns:
        An integer in [0, 2**63).
    """
    name = f"{seed}/{purpose}/{round_idx}/{client_id}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def stream(seed: int, purpose: str, *, round_idx: int = -1, client_id: int = -1) -> torch.Generator:
    """Return a CPU generator of its own for one purpose; see `seed_for`."""
    generator = torch.Generator()
    generator.manual_seed(seed_for(seed, purpose, round_idx=round_idx, client_id=client_id))
    return generator


def numpy_stream(
    seed: int, purpose: str, *, round_idx: int = -1, client_id: int = -1
) -> np.random.Generator:
    """Return a NumPy generator of its own for one purpose; see `seed_for`."""
    return np.random.default_rng(seed_for(seed, purpose, round_idx=round_idx, client_id=client_id))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Run a block under torch's global generators seeded with `seed`, then put their state back.

    Dropout inside third-party models draws from the global generators and takes no generator of its
    own.

    Args:
        seed: Seed within the block, for the CPU and every visible accelerator.
    """
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:
            # without one, torch keeps a stack trace of every `manual_seed` for devices to come
            torch.default_generator.manual_seed(seed)
        yield
