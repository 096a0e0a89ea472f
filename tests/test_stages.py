from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fedsp.schedules import LinearWarmup
from fedsp.stages import Stage, adamw


def parameters() -> list[Parameter]:
    return [Parameter(torch.zeros(2)), Parameter(torch.zeros(3))]


def test_the_default_optimizer_is_adamw_without_decay() -> None:
    optimizer, scheduler = Stage().build(parameters(), 100)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.defaults["weight_decay"] == 0.0
    assert scheduler is None
    assert type(adamw(parameters())) is torch.optim.AdamW


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.SGD, lr=0.5), partial(torch.optim.Adagrad, lr=0.1), torch.optim.Adam],
)
def test_any_torch_optimizer_takes_exactly_the_given_parameters(optimizer: Any) -> None:
    given = parameters()
    built, _ = Stage(optimizer=optimizer).build(given, 10)
    assert [p for group in built.param_groups for p in group["params"]] == given


@pytest.mark.parametrize(
    "schedule",
    [
        LinearWarmup,
        torch.optim.lr_scheduler.CosineAnnealingLR,
        torch.optim.lr_scheduler.PolynomialLR,
    ],
)
def test_any_schedule_called_with_the_number_of_steps_is_built(schedule: Any) -> None:
    optimizer, scheduler = Stage(lr_scheduler=schedule).build(parameters(), 10)
    assert type(scheduler) is schedule
    assert scheduler.optimizer is optimizer


def test_the_schedule_learns_the_steps_of_the_whole_run() -> None:
    _, scheduler = Stage(steps=3, lr_scheduler=LinearWarmup).build(parameters(), 70)
    assert isinstance(scheduler, LinearWarmup)
    assert scheduler.num_training_steps == 70


@pytest.mark.parametrize(("steps", "accumulate", "batches"), [(0, 4, 0), (5, 1, 5), (5, 3, 15)])
def test_a_stage_draws_a_batch_for_every_accumulation(
    steps: int, accumulate: int, batches: int
) -> None:
    assert Stage(steps, accumulate_grad_batches=accumulate).batches == batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "`steps` must be at least 0, got -1"),
        ({"accumulate_grad_batches": 0}, "`accumulate_grad_batches` must be at least 1, got 0"),
        ({"gradient_clip_norm": 0.0}, "`gradient_clip_norm` must be above 0 or null, got 0.0"),
        ({"gradient_clip_norm": float("nan")}, "`gradient_clip_norm` must be above 0 or null"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**options)
