"""Epsilon against dp-accounting's own figures, against the exact Gaussian bound, and its search."""

from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import stats

from fedsp.accounting import Accountant, check_budget, require_accounting

RELATION = dp_accounting.NeighboringRelation


@pytest.mark.parametrize("releases", [1, 7, 50])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 5.0])
def test_epsilon_is_dp_accountings_own(noise_multiplier: float, releases: int) -> None:
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    by_hand = rdp.RdpAccountant(neighboring_relation=RELATION.ADD_OR_REMOVE_ONE)
    by_hand.compose(dp_accounting.SelfComposedDpEvent(event, releases))
    assert Accountant(noise_multiplier, 1e-3).epsilon(releases) == by_hand.get_epsilon(1e-3)


def test_epsilon_of_sampled_cohorts_is_dp_accountings_own() -> None:
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        100, 10, dp_accounting.GaussianDpEvent(1.0)
    )
    by_hand = rdp.RdpAccountant(neighboring_relation=RELATION.REPLACE_ONE).compose(event, 50)
    found = Accountant(1.0, 1e-3, sampled=(10, 100)).epsilon(50)
    assert found == by_hand.get_epsilon(1e-3)
    assert found == pytest.approx(7.125, abs=1e-3)


def test_epsilon_is_never_below_the_exact_figure() -> None:
    """Fifty releases with noise s are one with s / sqrt(50) (Balle and Wang 2018, theorem 8)."""
    exact = dp_accounting.get_epsilon_gaussian(1.0 / 50**0.5, 1e-3)
    found = Accountant(1.0, 1e-3).epsilon(50)
    assert exact < found < 1.1 * exact


@pytest.mark.parametrize(
    ("cohort", "population", "z", "times"), [(20, 1000, 1, 10), (50, 1000, 2, 26)]
)
def test_a_sample_that_is_released_again_is_no_fresh_one(
    cohort: int, population: int, z: float, times: int
) -> None:
    """Below every epsilon lies what a test of the mean of all releases finds out.

    Client X was in the sample with the change +1, or -1 in its place, with probability q = m / N.
    """
    q, spread, delta = cohort / population, z / times**0.5, 1e-4
    cuts = np.linspace(0.0, 5.0, 2001)
    there, instead = (
        (1 - q) * stats.norm.sf(cuts / spread) + q * stats.norm.sf((cuts - x) / spread)
        for x in (1, -1)
    )
    found_out = np.log(np.maximum(there - delta, 1e-300) / instead).max()
    accountant = Accountant(z / 2, delta, (cohort, population))
    assert accountant.epsilon_of({times: 1}) >= found_out > accountant.epsilon(times)
    event = dp_accounting.GaussianDpEvent(z / 2 / times**0.5)
    event = dp_accounting.SampledWithoutReplacementDpEvent(population, cohort, event)
    by_hand = rdp.RdpAccountant(neighboring_relation=RELATION.REPLACE_ONE).compose(event)
    assert accountant.epsilon_of({times: 1}) == pytest.approx(by_hand.get_epsilon(delta))


def test_nothing_released_costs_nothing() -> None:
    assert Accountant(1.0, 1e-5).epsilon(0) == 0.0


@pytest.mark.parametrize("max_epsilon", [0.1, 3.6, 12.0, 50.0])
def test_as_many_releases_as_the_budget_holds(max_epsilon: float) -> None:
    accountant = Accountant(1.0, 1e-3)
    counted = next(n for n in range(1000) if accountant.epsilon(n + 1) > max_epsilon)
    assert accountant.most_releases(max_epsilon) == counted


def test_without_a_budget_there_is_no_end() -> None:
    assert Accountant(1.0, 1e-3).most_releases(None) > 10**9


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.0, 1e-5, None), r"`client.privacy.noise_multiplier` must be above 0, got 0.0"),
        ((float("inf"), 1e-5, None), r"`client.privacy.noise_multiplier` must be above 0, got inf"),
        ((1.0, 0.0, None), r"`client.privacy.delta` must be above 0 and below 1, got 0.0"),
        ((1.0, 1.0, None), r"`client.privacy.delta` must be above 0 and below 1, got 1.0"),
        ((1.0, 1e-5, 0.0), r"`client.privacy.max_epsilon` must be above 0 or null, got 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_budget("client.privacy", *numbers)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_accounting("trainer.privacy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`trainer.privacy` needs dp-accounting.*\[priv"):
        require_accounting("trainer.privacy")
