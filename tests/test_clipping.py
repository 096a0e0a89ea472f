"""Clipping against torch, and the norm that follows a quantile against the paper."""

import math
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from fedsp.clipping import AdaptiveClipping, FixedClipping, noised_change
from fedsp.payload import Payload

REFERENCE = {"soft_prompt": torch.randn(2, 2, 1, 3, 4), "weights/a": torch.randn(5)}


def moved(scale: float) -> Payload:
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + scale * torch.randn(value.shape, generator=generator)
        for name, value in REFERENCE.items()
    }


def size() -> int:
    return sum(tensor.numel() for tensor in REFERENCE.values())


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("max_norm", [0.5, 3.0])
def test_a_change_is_shortened_over_all_tensors_as_torch_clips_gradients(
    scale: float, max_norm: float
) -> None:
    payload = moved(scale)
    clipped = noised_change(payload, REFERENCE, max_norm, torch.zeros(size(), dtype=torch.float64))
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in REFERENCE.items()}
    for name, parameter in parameters.items():
        parameter.grad = payload[name] - REFERENCE[name]
    clip_grad_norm_(parameters.values(), max_norm)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        expected = REFERENCE[name] + parameter.grad
        assert torch.allclose(clipped[name], expected, atol=1e-6 * max(1, max_norm))
        assert clipped[name].dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_counts_as_no_change(value: float) -> None:
    payload = moved(1.0)
    payload["weights/a"][2] = value
    noise = torch.arange(size(), dtype=torch.float64)
    found = noised_change(payload, REFERENCE, 1.0, noise)
    expected = noised_change(REFERENCE, REFERENCE, 1.0, noise)
    assert all(torch.equal(found[name], expected[name]) for name in REFERENCE)
    assert torch.allclose(
        found["soft_prompt"].flatten(), REFERENCE["soft_prompt"].flatten() + torch.arange(48.0)
    )


def test_noise_is_laid_out_in_the_order_of_the_names() -> None:
    noise = torch.zeros(size(), dtype=torch.float64)
    noise[-1] = 7
    found = noised_change(REFERENCE, REFERENCE, 1.0, noise)
    assert torch.equal(found["soft_prompt"], REFERENCE["soft_prompt"])
    assert float((found["weights/a"] - REFERENCE["weights/a"])[-1]) == pytest.approx(7)


def test_a_fixed_norm_stays_and_costs_no_noise() -> None:
    clipping = FixedClipping(0.5)
    clipping.check(100.0, 1)
    clipping.adapt(3.0, 2.0, 10)
    assert clipping.norm == 0.5
    assert clipping.sum_multiplier(1.25, 10) == 1.25


def test_both_releases_together_cost_what_the_noise_multiplier_says() -> None:
    """z^-2 = z_delta^-2 + (2 sigma_b)^-2: theorem 1; e.g. 1 = 0.64 + 0.36 for 1.25 and 5/6."""
    clipping = AdaptiveClipping(count_noise=5 / 6)
    assert clipping.sum_multiplier(1.0, 10) == pytest.approx(1.25)
    # the default is a twentieth of the cohort: with 100 clients 5, that is z_b = 10
    found = AdaptiveClipping().sum_multiplier(1.0, 100)
    assert found**-2 + 10**-2 == pytest.approx(1.0)


def test_the_norm_steps_as_in_the_paper() -> None:
    """Algorithm 1: C exp(-eta (b - gamma)), b = 7 of 10 within the norm, noise 2 on the count."""
    clipping = AdaptiveClipping(0.1, target_quantile=0.5, learning_rate=0.2, count_noise=1.0)
    clipping.adapt(centred_count=7 / 2 - 3 / 2, normal=2.0, cohort_size=10)
    assert clipping.norm == pytest.approx(0.1 * math.exp(-0.2 * (0.9 - 0.5)))
    # nobody answered: the share is a half, and only noise moves the norm
    before = clipping.norm
    clipping.adapt(centred_count=0.0, normal=0.0, cohort_size=10)
    assert clipping.norm == before


def test_the_norm_finds_the_quantile() -> None:
    clipping = AdaptiveClipping(0.1, target_quantile=0.75, learning_rate=0.2, count_noise=0.01)
    norms = torch.arange(1, 101) / 10
    for _ in range(300):
        within = int((norms <= clipping.norm).sum())
        clipping.adapt(within - len(norms) / 2, 0.0, len(norms))
    assert clipping.norm == pytest.approx(7.5, rel=0.05)


def test_the_norm_outlasts_a_kill() -> None:
    clipping = AdaptiveClipping()
    clipping.adapt(3.0, 0.0, 10)
    other = AdaptiveClipping()
    other.load_state_dict(clipping.state_dict())
    assert other.norm == clipping.norm != AdaptiveClipping().norm


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"initial_norm": 0.0}, r"`initial_norm` must be above 0, got 0.0"),
        ({"learning_rate": -1.0}, r"`learning_rate` must be above 0, got -1.0"),
        ({"count_noise": 0.0}, r"`count_noise` must be above 0, got 0.0"),
        ({"target_quantile": 1.5}, r"`target_quantile` must be in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AdaptiveClipping(**options)
    for norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`norm` must be above 0"):
            FixedClipping(norm)


def test_a_count_with_too_little_noise_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must be above half of .* 1.0, got 0.5 \(a twentieth of "
    ):
        AdaptiveClipping().check(1.0, 10)
    with pytest.raises(ValueError, match=r"`trainer.privacy.clipping.count_noise` must be above"):
        AdaptiveClipping(count_noise=0.4).check(1.0, 10)
    AdaptiveClipping(count_noise=0.6).check(1.0, 10)
