"""Gaussian noise that nobody can draw again, from the operating system's randomness.

torch's CPU generator keeps 32 bits of its seed and NumPy's are not made against an adversary: who
knows part of a noised prompt could find the rest of its noise. What the last bits of such numbers
tell (Mironov 2012, "On significance of the least significant bits for differential privacy") is not
defended against.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedsp.seeding import numpy_stream

_UNIT = 2.0**-53


class NoiseSource:
    """Standard normal numbers, secret unless a seed was given."""

    def __init__(self, seed: int | None = None) -> None:
        """Choose where randomness comes from.

        Args:
            seed: None takes the operating system's. A number makes noise that everybody who knows
                it can subtract again, for tests only.
        """
        self._seed = seed

    def draw(self, count: int, *, round_idx: int, client_id: int = -1) -> Tensor:
        """Return fresh noise.

        Args:
            count: How many numbers.
            round_idx: 0-based communication round; counts only where there is a seed.
            client_id: The client that adds it; -1 for the server. Counts only with a seed.

        Returns:
            [count] float64, independent and standard normal.

        Source: Box and Muller 1958, on uniform numbers of 53 bits.
        """
        pairs = -(-count // 2)
        words = np.frombuffer(self._bytes(round_idx, client_id)(16 * pairs), np.uint64) >> 11
        first, second = words.reshape(2, pairs)
        radius = np.sqrt(-2 * np.log((first + 1) * _UNIT))  # of (0, 1]: never the logarithm of 0
        angle = 2 * np.pi * _UNIT * second
        numbers = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(numbers[:count])

    def _bytes(self, round_idx: int, client_id: int) -> Callable[[int], bytes]:
        if self._seed is None:
            return os.urandom
        where = {"round_idx": round_idx, "client_id": client_id}
        return numpy_stream(self._seed, "privacy_noise", **where).bytes
