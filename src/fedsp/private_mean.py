"""The mean of a cohort's clipped changes under Gaussian noise; what it costs is not known here."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedsp.aggregation import Aggregator
from fedsp.clipping import Clipping
from fedsp.messages import ClientUpdate
from fedsp.payload import Payload, Shapes, flatten, shapes_of, unflatten
from fedsp.robust import clip_change


class PrivateMean(Aggregator):
    """Mean of the clipped changes with noise, over the expected number of clients.

    Who does not answer, or is rejected, adds nothing: the divisor never depends on the data.
    """

    min_updates = 0

    def __init__(
        self,
        clipping: Clipping,
        noise_multiplier: float,
        cohort_size: int,
        draw: Callable[[int], Tensor],
    ) -> None:
        """Choose bound and noise.

        Args:
            clipping: Bounds the changes, and follows their norms if it likes.
            noise_multiplier: Of all that a round releases, in units of the clipping norm.
            cohort_size: m, the expected number of clients of a round.
            draw: From a count to as many standard normal numbers, float64 and the same on all
                ranks; called once a round, when the mean is asked for.

        Attributes:
            used_norm: The norm of the last round.
            clipped_fraction: Share of the last round's updates that were shortened; NaN for none.
        """
        self.clipping, self.cohort_size = clipping, cohort_size
        self._multiplier = clipping.sum_multiplier(noise_multiplier, cohort_size)
        self._draw = draw
        self._start = self._sum = torch.empty(0, dtype=torch.float64)
        self._shapes: Shapes = {}
        self._within: list[bool] = []
        self.clipped_fraction = math.nan
        self.used_norm = clipping.norm

    def reset(self, reference: Payload) -> None:
        """Forget everything of the last round and keep what changes are measured from."""
        self._start, self._shapes = flatten(reference).double(), shapes_of(reference)
        self._sum, self._within = torch.zeros_like(self._start), []
        self.clipped_fraction = math.nan

    def add(self, update: ClientUpdate) -> None:
        """Take one checked update's clipped change in."""
        end, max_norm = flatten(update.payload), self.clipping.norm
        self._within.append(bool(torch.linalg.vector_norm(end - self._start) <= max_norm))
        self._sum += clip_change(end, self._start, max_norm) - self._start

    def result(self) -> Payload:
        """Return the noised mean in fp32, of any number of updates, and adapt the norm."""
        noise = self._draw(len(self._start) + 1)
        self.used_norm, size = self.clipping.norm, self.cohort_size
        noised = self._sum + self._multiplier * self.used_norm * noise[:-1]
        centred_count = sum(self._within) - len(self._within) / 2
        self.clipping.adapt(centred_count, float(noise[-1]), size)
        if self._within:
            self.clipped_fraction = 1 - sum(self._within) / len(self._within)
        return unflatten((self._start + noised / size).float(), self._shapes)
