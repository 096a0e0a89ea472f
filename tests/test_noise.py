"""The noise: standard normal by the bounds of theory, fresh, repeatable only on demand."""

import math

import pytest
import torch

from fedsp.noise import NoiseSource

COUNT = 200_000
SIX_SIGMA = 6.0


def drawn(**options: int) -> torch.Tensor:
    return NoiseSource(seed=0).draw(COUNT, round_idx=0, **options)


def test_moments_are_those_of_a_standard_normal() -> None:
    """Each moment within six standard errors: of m-th powers sqrt((E x^2m - (E x^m)^2) / n)."""
    noise = drawn()
    moments = {1: (0, 1), 2: (1, 3 - 1), 3: (0, 15), 4: (3, 105 - 9)}
    for power, (expected, variance) in moments.items():
        found = float((noise**power).mean())
        assert abs(found - expected) <= SIX_SIGMA * math.sqrt(variance / COUNT), power


def test_the_distribution_is_that_of_a_standard_normal() -> None:
    """Kolmogorov-Smirnov; 2 exp(-2 x^2) is its tail, 1e-9 at x = 3.28 (Massart 1990)."""
    ordered = drawn().sort().values
    expected = torch.special.ndtr(ordered)
    places = torch.arange(1, COUNT + 1, dtype=torch.float64) / COUNT
    distance = torch.maximum((places - expected).abs(), (places - 1 / COUNT - expected).abs()).max()
    assert float(distance) <= 3.28 / math.sqrt(COUNT)


def test_both_halves_of_a_draw_are_independent() -> None:
    first, second = drawn().chunk(2)
    for one, other in ((first, second), (first.square() - 1, second.square() - 1)):
        correlation = float((one * other).mean() / (one.std() * other.std()))
        assert abs(correlation) <= SIX_SIGMA / math.sqrt(COUNT / 2)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_can_be_drawn(count: int) -> None:
    noise = NoiseSource().draw(count, round_idx=0)
    assert noise.shape == (count,)
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()


def test_noise_is_never_the_same_whatever_the_global_seed() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(NoiseSource().draw(8, round_idx=0))
    assert not (draws[0] == draws[1]).any()


def test_with_a_seed_it_depends_on_round_and_client_alone() -> None:
    assert torch.equal(drawn(), drawn())
    assert torch.equal(drawn(client_id=3), drawn(client_id=3))
    other_round = NoiseSource(seed=0).draw(COUNT, round_idx=1)
    other_seed = NoiseSource(seed=1).draw(COUNT, round_idx=0)
    for other in (drawn(client_id=3), other_round, other_seed):
        assert not (drawn() == other).any()
