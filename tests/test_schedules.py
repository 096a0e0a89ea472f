import pytest
import torch

from fedsp.schedules import LinearWarmup


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
