"""How long a client's change may be where noise hides it: a norm that is fixed or follows others.

Axes: N numbers of a payload.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from fedsp.payload import Payload, flatten, shapes_of, unflatten
from fedsp.robust import clip_change


class Clipping(ABC):
    """Bounds the L2 norm of a change over all its tensors together.

    Attributes:
        norm: The bound of the present round, above 0.
    """

    norm: float

    @abstractmethod
    def check(self, noise_multiplier: float, cohort_size: int) -> None:
        """Refuse what cannot keep the noise multiplier's promise, before any work.

        Raises:
            ValueError: If it cannot.
        """

    @abstractmethod
    def sum_multiplier(self, noise_multiplier: float, cohort_size: int) -> float:
        """Return the noise multiplier of the sum of changes, so that all releases keep the whole.

        Args:
            noise_multiplier: Of all that a round releases together.
            cohort_size: m, the expected number of clients of a round.
        """

    @abstractmethod
    def adapt(self, centred_count: float, normal: float, cohort_size: int) -> None:
        """Choose the next round's norm.

        Args:
            centred_count: Over the round's updates, 1/2 for each within the norm and -1/2 for each
                beyond it.
            normal: A standard normal number for the noise of this count.
            cohort_size: m, the expected number of clients of a round.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what must outlast a kill."""
        return {"norm": self.norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.norm = state["norm"]


class FixedClipping(Clipping):
    """The same norm in every round."""

    def __init__(self, norm: float) -> None:
        """Choose it.

        Args:
            norm: Largest L2 norm of (update - broadcast) over all tensors, above 0; longer changes
                are shortened to it.

        Raises:
            ValueError: If it is not above 0.
        """
        if not 0 < norm < math.inf:
            raise ValueError(f"`norm` must be above 0, got {norm}.")
        self.norm = norm

    def check(self, noise_multiplier: float, cohort_size: int) -> None:
        """Take any noise."""

    def sum_multiplier(self, noise_multiplier: float, cohort_size: int) -> float:
        """Return the noise multiplier itself: nothing else is released."""
        return noise_multiplier

    def adapt(self, centred_count: float, normal: float, cohort_size: int) -> None:
        """Keep the norm."""


class AdaptiveClipping(Clipping):
    """A norm that follows a quantile of the clients' norms, which noise hides as well.

    The count of the updates within the norm is released beside the sum of changes; both together
    cost what the noise multiplier says, so that the sum gets a little more noise.

    Source: Andrew et al. 2021, arXiv 1905.03871, algorithm 1 and theorem 1.
    """

    def __init__(
        self,
        initial_norm: float = 0.1,
        target_quantile: float = 0.5,
        learning_rate: float = 0.2,
        count_noise: float | None = None,
    ) -> None:
        """Choose where the norm starts and what it follows.

        Args:
            initial_norm: Norm of the first round, above 0.
            target_quantile: Share of the updates that shall lie within the norm, in [0, 1].
            learning_rate: Of the norm's geometric steps, above 0.
            count_noise: Standard deviation of the noise on the count; null takes a twentieth of the
                cohort. Twice of it must be above the noise multiplier.

        Raises:
            ValueError: If a number is out of its range.
        """
        for name, number in (
            ("initial_norm", initial_norm),
            ("learning_rate", learning_rate),
            ("count_noise", count_noise),
        ):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"`{name}` must be above 0, got {number}.")
        if not 0 <= target_quantile <= 1:
            raise ValueError(f"`target_quantile` must be in [0, 1], got {target_quantile}.")
        self.norm = initial_norm
        self.target_quantile, self.learning_rate = target_quantile, learning_rate
        self.count_noise = count_noise

    def check(self, noise_multiplier: float, cohort_size: int) -> None:
        """Refuse a count whose noise alone would break the promise; see `Clipping.check`."""
        count_noise = self._count_noise(cohort_size)
        if not 2 * count_noise > noise_multiplier:
            raise ValueError(
                "`trainer.privacy.clipping.count_noise` must be above half of "
                f"`trainer.privacy.noise_multiplier` {noise_multiplier}, got {count_noise}"
                f"{'' if self.count_noise else f' (a twentieth of {cohort_size} clients)'}. "
                "Raise it, or take fedsp.clipping.FixedClipping."
            )

    def sum_multiplier(self, noise_multiplier: float, cohort_size: int) -> float:
        """Return (z^-2 - (2 b)^-2)^(-1/2) for the count's noise b; see `Clipping`."""
        count_multiplier = 2 * self._count_noise(cohort_size)
        return float((noise_multiplier**-2 - count_multiplier**-2) ** -0.5)

    def adapt(self, centred_count: float, normal: float, cohort_size: int) -> None:
        """Step the norm against the noised share's distance from the quantile; see `Clipping`."""
        noised = centred_count + self._count_noise(cohort_size) * normal
        share = 0.5 + noised / cohort_size
        self.norm *= math.exp(-self.learning_rate * (share - self.target_quantile))

    def _count_noise(self, cohort_size: int) -> float:
        return cohort_size / 20 if self.count_noise is None else self.count_noise


def noised_change(payload: Payload, reference: Payload, max_norm: float, noise: Tensor) -> Payload:
    """Shorten a payload's change to a norm and add noise to it.

    Args:
        payload: What came of the reference; one that is not finite counts as no change.
        reference: What it started from.
        max_norm: Largest L2 norm of the change, above 0.
        noise: [N] float64 in the order of the names.

    Returns:
        float32 tensors.
    """
    start, end = flatten(reference), flatten(payload)
    clipped = clip_change(end if end.isfinite().all() else start, start, max_norm)
    return unflatten((clipped + noise).float(), shapes_of(payload))
