"""What releases under Gaussian noise cost: epsilon and delta, by dp-accounting.

The only module that knows `dp_accounting`, an optional extra, which is slow to import: it comes in
with the first figure that is asked for.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_NEVER = 2**40  # releases that no run reaches: no bound


def check_budget(
    option: str, noise_multiplier: float, delta: float, max_epsilon: float | None
) -> None:
    """Refuse numbers that no budget is made of.

    Args:
        option: What the user set, such as `trainer.privacy`.
        noise_multiplier: Has to be above 0.
        delta: Has to be in (0, 1).
        max_epsilon: Has to be above 0, or None.

    Raises:
        ValueError: If one of them is out of its range.
    """
    if not 0 < noise_multiplier < float("inf"):
        raise ValueError(f"`{option}.noise_multiplier` must be above 0, got {noise_multiplier}.")
    if not 0 < delta < 1:
        raise ValueError(f"`{option}.delta` must be above 0 and below 1, got {delta}.")
    if max_epsilon is not None and not max_epsilon > 0:
        raise ValueError(f"`{option}.max_epsilon` must be above 0 or null, got {max_epsilon}.")


def require_accounting(option: str) -> None:
    """Make sure that dp-accounting is there; it is not imported.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise ModuleNotFoundError(
            f"`{option}` needs dp-accounting, which is not installed. Install it with "
            f'`pip install "fedsp[privacy]"`, or leave `{option}` out.'
        )


@dataclass(frozen=True)
class Accountant:
    """Epsilon of a Gaussian release that is repeated, by Renyi differential privacy.

    Args:
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity of what it hides.
        delta: The delta at which epsilon is told, in (0, 1).
        sampled: (size of a cohort, size of the population) where each release is of a fresh secret
            uniform sample without replacement, and the sensitivity that of replacing one record;
            None takes no advantage of sampling.

    Source: Mironov 2017, arXiv 1702.07476; with sampling Wang et al. 2019, arXiv 1808.00087,
    theorem 27.
    """

    noise_multiplier: float
    delta: float
    sampled: tuple[int, int] | None = None

    def epsilon(self, releases: int) -> float:
        """Return what so many releases cost together, at least 0."""
        return self.epsilon_of({1: releases})

    def epsilon_of(self, repeats: Mapping[int, int]) -> float:
        """Return what samples cost together of which some were released more than once.

        All that k releases of one sample tell is their mean, which has noise smaller by sqrt(k).
        Counted as so many samples they would look cheaper than they are.

        Args:
            repeats: How many samples were released so many times, by the number of times.
        """
        if not any(repeats.values()):
            return 0.0
        from dp_accounting import rdp

        costs = [(_one_sample(self, times), count) for times, count in repeats.items()]
        orders = costs[0][0][0]
        divergence = sum(count * divergence for (_, divergence), count in costs)
        return float(rdp.compute_epsilon(orders, divergence, self.delta)[0])

    def most_releases(self, max_epsilon: float | None) -> int:
        """Return the largest number of releases that costs at most `max_epsilon`."""
        return _NEVER if max_epsilon is None else _most_releases(self, max_epsilon)


@cache
def _one_sample(accountant: Accountant, times: int) -> tuple[Any, Any]:
    """Return orders and the Renyi divergence of one sample at each: they add up over samples."""
    import dp_accounting
    from dp_accounting import rdp

    relation = dp_accounting.NeighboringRelation
    event: Any = dp_accounting.GaussianDpEvent(accountant.noise_multiplier / math.sqrt(times))
    if accountant.sampled is None:
        spent = rdp.RdpAccountant(neighboring_relation=relation.REPLACE_SPECIAL)
    else:
        cohort_size, population = accountant.sampled
        event = dp_accounting.SampledWithoutReplacementDpEvent(population, cohort_size, event)
        spent = rdp.RdpAccountant(neighboring_relation=relation.REPLACE_ONE)
    spent.compose(event)
    return spent.orders, spent.rdp


@cache  # asked for every client in every round
def _most_releases(accountant: Accountant, max_epsilon: float) -> int:
    low, high = 0, 1
    while accountant.epsilon(high) <= max_epsilon and high < _NEVER:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        pays = accountant.epsilon(middle) <= max_epsilon
        low, high = (middle, high) if pays else (low, middle)
    return low
