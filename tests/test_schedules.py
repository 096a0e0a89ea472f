from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from fedsp.phases import Optimization
from fedsp.schedules import LinearWarmup
from fedsp.stages import Stage
from tiny import adamw


def _rates(steps: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = LinearWarmup(optimizer, steps, **options)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*rates, scheduler.get_last_lr()[0]]


def test_warmup_starts_above_zero_and_decays_to_the_final_fraction() -> None:
    # 10 steps, 2 of them warm-up: 1/2, 1, then from 1 down to 0.5 over 8 steps
    rates = _rates(10, warmup_fraction=0.2, final_fraction=0.5)
    assert rates[0] == 1.0
    assert rates[1] == 2.0
    assert rates[2:] == pytest.approx([2.0 * (1 - 0.5 * i / 8) for i in range(9)])


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert _rates(4, warmup_fraction=0.0)[0] == 2.0


def test_fractions_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`lr_scheduler.warmup_fraction` must be in \[0, 1\], got 2"
    ):
        _rates(4, warmup_fraction=2.0)


def test_a_resumed_schedule_goes_on_where_it_stopped() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LinearWarmup(optimizer, 10)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    resumed = LinearWarmup(other, 10)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(4):
        for o, s in ((optimizer, scheduler), (other, resumed)):
            o.step()
            s.step()
        assert scheduler.get_last_lr() == resumed.get_last_lr()


@pytest.mark.parametrize("length", [16, 4])
@pytest.mark.parametrize(
    "schedule",
    [
        LinearWarmup,
        lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
        lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=steps),
    ],
)
def test_a_run_of_another_length_has_the_rates_as_if_it_had_it_from_the_start(
    schedule: Any, length: int
) -> None:
    """torch's own schedule of that length, stepped as often, is the oracle."""
    stage = Stage(1, adamw(0.05), schedule)

    def begun(total_steps: int, steps: int) -> Any:
        begun: Any = Optimization.of(stage, [nn.Parameter(torch.ones(2))], total_steps)
        for _ in range(steps):
            begun.optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
            begun.optimizer.step()
            begun.scheduler.step()
        return begun

    stopped, whole = begun(8, steps=3), begun(length, steps=3)
    resumed = begun(length, steps=0)
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(length - 3):
        found, expected = resumed.optimizer.param_groups[0], whole.optimizer.param_groups[0]
        assert found["lr"] == pytest.approx(expected["lr"], rel=1e-9)
        assert found["betas"] == pytest.approx(expected["betas"])
        for optimization in (resumed, whole):
            optimization.optimizer.step()
            optimization.scheduler.step()
    moments = resumed.optimizer.state_dict()["state"][0]
    assert moments["step"] == 3, "the moments are kept"
