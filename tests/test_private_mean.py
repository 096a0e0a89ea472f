"""The noised mean: its divisor, its noise and its clipping against figures worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from fedsp.clipping import AdaptiveClipping, FixedClipping
from fedsp.messages import ClientUpdate
from fedsp.noise import NoiseSource
from fedsp.private_mean import PrivateMean

START = {"soft_prompt": torch.tensor([1.0, 2.0]), "weights/a": torch.tensor([3.0])}


def update(client_id: int, *change: float) -> ClientUpdate:
    first, second, third = change
    payload = {
        "soft_prompt": START["soft_prompt"] + torch.tensor([first, second]),
        "weights/a": START["weights/a"] + third,
    }
    return ClientUpdate(0, client_id, payload, 10**client_id)


def silent(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def mean_of(mean: PrivateMean, *updates: ClientUpdate) -> list[float]:
    mean.reset(START)
    for one in updates:
        mean.add(one)
    result = mean.result()
    assert result.keys() == START.keys()
    assert all(tensor.dtype == torch.float32 for tensor in result.values())
    return [*result["soft_prompt"].tolist(), *result["weights/a"].tolist()]


def test_clipped_changes_are_divided_by_the_expected_number_of_clients() -> None:
    """(3, 0, 4) of norm 5 becomes (0.6, 0, 0.8), (0, 0.5, 0) stays; two of four answered."""
    mean = PrivateMean(FixedClipping(1.0), 1.0, 4, silent)
    found = mean_of(mean, update(0, 3, 0, 4), update(1, 0, 0.5, 0))
    assert found == pytest.approx([1 + 0.6 / 4, 2 + 0.5 / 4, 3 + 0.8 / 4])
    assert mean.clipped_fraction == 0.5


def test_one_client_moves_the_mean_by_no_more_than_the_norm_over_the_cohort() -> None:
    mean = PrivateMean(FixedClipping(0.3), 1.0, 5, silent)
    others = [update(0, 0.1, 0, 0), update(1, 0, 9, 9)]
    without = torch.tensor(mean_of(mean, *others))
    for change in ((1e6, -1e6, 1e6), (1e-3, 0.0, 0.0), (0.3, 0.3, 0.3)):
        distance = (torch.tensor(mean_of(mean, *others, update(2, *change))) - without).norm()
        assert float(distance) <= 0.3 / 5 * (1 + 1e-5)


def test_nobody_answers_and_the_noise_is_there_all_the_same() -> None:
    draws: list[int] = []

    def ones(count: int) -> Tensor:
        draws.append(count)
        return torch.ones(count, dtype=torch.float64)

    mean = PrivateMean(FixedClipping(0.5), 2.0, 4, ones)
    assert mean_of(mean) == pytest.approx([1.25, 2.25, 3.25])
    assert draws == [4]
    assert math.isnan(mean.clipped_fraction)


@pytest.mark.parametrize("cohort_size", [1, 10])
def test_the_noise_has_the_promised_size(cohort_size: int) -> None:
    """Standard deviation z C / m; six standard errors of it are 6 / sqrt(2 n)."""
    count, noise_multiplier, norm = 100_000, 1.5, 0.2
    source = NoiseSource(seed=0)
    mean = PrivateMean(
        FixedClipping(norm), noise_multiplier, cohort_size, lambda n: source.draw(n, round_idx=0)
    )
    mean.reset({"soft_prompt": torch.zeros(count)})
    noise = mean.result()["soft_prompt"]
    expected = noise_multiplier * norm / cohort_size
    assert float(noise.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * count))
    assert abs(float(noise.mean())) <= 6 * expected / math.sqrt(count)


def test_an_adaptive_norm_gets_the_last_number_and_the_sum_more_noise() -> None:
    """z = 1 and count noise 5/6 give the sum 1.25; three of four within: 0.75, with noise more."""

    def draw(count: int) -> Tensor:
        return torch.tensor([*[1.0] * (count - 1), 2.0], dtype=torch.float64)

    clipping = AdaptiveClipping(1.0, target_quantile=0.5, learning_rate=0.1, count_noise=5 / 6)
    mean = PrivateMean(clipping, 1.0, 4, draw)
    small = [update(i, 0.1, 0, 0) for i in range(3)]
    found = mean_of(mean, *small, update(3, 0, 0, 2))
    assert found == pytest.approx([1 + (0.3 + 1.25) / 4, 2 + 1.25 / 4, 3 + (1 + 1.25) / 4])
    share = 0.5 + (1.0 + 2 * 5 / 6) / 4
    assert mean.used_norm == 1.0
    assert clipping.norm == pytest.approx(math.exp(-0.1 * (share - 0.5)))
    assert mean.clipped_fraction == 0.25
