"""A stage: what an inner training loop does, how long, and with which optimizer and schedule."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lightning.pytorch.cli import OptimizerCallable
from torch import zeros
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]


def adamw(parameters: Iterable[Parameter]) -> Optimizer:
    """Return the default optimizer of every stage: AdamW at 1e-3 without weight decay."""
    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


@dataclass(frozen=True)
class Stage:
    """How one part of the model is trained; zero steps switch the stage off.

    Args:
        steps: Optimizer steps each time the stage runs (each round for a client and the server).
        optimizer: Any `torch.optim` class. Its state lasts over the rounds.
        lr_scheduler: Any class called as `(optimizer, total_steps)` and stepped once an optimizer
            step, where `total_steps` counts all rounds. None keeps the learning rate.
        gradient_clip_norm: Largest total gradient norm; None does not clip.
        accumulate_grad_batches: Batches per optimizer step.
    """

    steps: int = 10
    optimizer: OptimizerCallable = adamw
    lr_scheduler: ScheduleCallable | None = None
    gradient_clip_norm: float | None = 1.0
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If a number is out of its range.
        """
        if self.steps < 0:
            raise ValueError(f"`steps` must be at least 0, got {self.steps}.")
        if self.accumulate_grad_batches < 1:
            raise ValueError(
                f"`accumulate_grad_batches` must be at least 1, got {self.accumulate_grad_batches}."
            )
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0:
            raise ValueError(
                f"`gradient_clip_norm` must be above 0 or null, got {self.gradient_clip_norm}."
            )

    @property
    def batches(self) -> int:
        """Batches that one run of the stage draws."""
        return self.steps * self.accumulate_grad_batches

    def build(
        self, parameters: Iterable[Parameter], total_steps: int
    ) -> tuple[Optimizer, LRScheduler | None]:
        """Create the optimizer and its schedule.

        Args:
            parameters: What the stage trains.
            total_steps: Optimizer steps of the whole run, over all rounds.

        Returns:
            The optimizer and its schedule, None without one.
        """
        optimizer = self.optimizer(parameters)
        scheduler = self.lr_scheduler(optimizer, total_steps) if self.lr_scheduler else None
        return optimizer, scheduler


def try_out(stages: Mapping[str, Stage | None]) -> None:
    """Build every stage's optimizer and schedule once, so that what cannot be built shows at once.

    Args:
        stages: Stages by the option that holds them.

    Raises:
        ValueError: If torch refuses their settings.
    """
    for option, stage in stages.items():
        if stage is None:
            continue
        optimizer = try_optimizer(f"{option}.optimizer", stage.optimizer)
        try:
            if stage.lr_scheduler is not None:
                stage.lr_scheduler(optimizer, max(1, stage.steps))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{option}.lr_scheduler` cannot be built: {error}") from error


def try_optimizer(option: str, make: OptimizerCallable) -> Optimizer:
    """Build an optimizer for one number and step it once.

    Args:
        option: Which one, as the user typed it.
        make: Called with a list of parameters.

    Raises:
        ValueError: If torch refuses its settings, or it needs more than a dense gradient to step.
    """
    parameter = Parameter(zeros(1, 1))
    try:
        optimizer = make([parameter])
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{option}` cannot be built: {error}") from error
    parameter.grad = zeros(1, 1)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"`{option}` must step on dense gradients and without a closure, got "
            f"{type(optimizer).__name__}: {error}"
        ) from error
    return make([parameter])
