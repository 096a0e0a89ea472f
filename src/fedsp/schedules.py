"""Learning-rate schedules beside those of `torch.optim.lr_scheduler`."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearWarmup(LambdaLR):
    """Linear warm-up from above zero, then a linear decay to a fraction of the learning rate."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_training_steps: int,
        warmup_fraction: float = 0.1,
        final_fraction: float = 0.0,
    ) -> None:
        """Set up the schedule.

        The first step already has a rate above zero: step `t` (0-based) of `w` warm-up steps runs
        at `(t + 1) / w`.

        Args:
            optimizer: The optimizer whose learning rates are scaled.
            num_training_steps: Optimizer steps of the whole run, over all rounds.
            warmup_fraction: Share of the steps spent warming up, in [0, 1].
            final_fraction: Learning rate after the last step, as a share of the initial one, in [0,
                1].

        Raises:
            ValueError: If a fraction lies outside [0, 1].
        """
        for name, value in (
            ("warmup_fraction", warmup_fraction),
            ("final_fraction", final_fraction),
        ):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"`lr_scheduler.{name}` must be in [0, 1], got {value}.")
        self.num_training_steps = max(1, num_training_steps)
        self.warmup_steps = int(warmup_fraction * self.num_training_steps)
        self.final_fraction = final_fraction
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_steps = max(1, self.num_training_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        return 1.0 - (1.0 - self.final_fraction) * progress
