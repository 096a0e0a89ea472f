"""Send a round's metrics to Lightning's loggers, with the round as the x-axis."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import Logger
from lightning.pytorch.loggers import CSVLogger, WandbLogger

LoggerFactory = Callable[[str], Logger]


def csv_logger(save_dir: str) -> Logger:
    """Return a logger that keeps one `metrics.csv` in the run's folder."""
    return CSVLogger(save_dir, name="", version="", flush_logs_every_n_steps=1)


def wandb_logger(
    save_dir: str,
    project: str = "fedsp",
    name: str | None = None,
    offline: bool | None = None,
) -> Logger:
    """Return a Weights & Biases logger that sends nothing unless asked to.

    Args:
        save_dir: The run's folder.
        project: W&B project.
        name: Name of the run; null takes the run folder's.
        offline: True keeps everything in the run folder for `wandb sync`; null does so unless `WANDB_MODE` or
            `WANDB_API_KEY` is set.
    """
    if offline is None:
        offline = "WANDB_MODE" not in os.environ and "WANDB_API_KEY" not in os.environ
    folder = Path(save_dir)
    return WandbLogger(
        name=name or folder.parent.name, save_dir=str(folder), project=project, offline=offline
    )


class Tracker:
    """The loggers of one run, used by the process with rank zero only."""

    def __init__(
        self, factories: Sequence[LoggerFactory], save_dir: Path, *, enabled: bool = True
    ) -> None:
        """Create the loggers.

        Args:
            factories: Each called with the folder for its files.
            save_dir: That folder.
            enabled: False for every process but the one with rank zero.
        """
        save_dir.mkdir(parents=True, exist_ok=True)
        # a logger that finds its old file deletes it with a warning; `replay` writes it anew from the history
        (save_dir / "metrics.csv").unlink(missing_ok=True)
        self.loggers = [factory(str(save_dir)) for factory in factories] if enabled else []

    def log_config(self, config: dict[str, Any]) -> None:
        """Log the run's configuration as hyperparameters."""
        for logger in self.loggers:
            logger.log_hyperparams(config)

    def log(self, metrics: dict[str, float], round_idx: int) -> None:
        """Log a round.

        Args:
            metrics: Values by name, such as `server/val_loss`.
            round_idx: 0-based communication round, the x-axis.
        """
        for logger in self.loggers:
            logger.log_metrics({**metrics, "round": round_idx}, step=round_idx)

    def replay(self, history: Sequence[dict[str, float]]) -> None:
        """Write the rounds before a resume into the file loggers, whose file begins anew at every start."""
        for logger in self.loggers:
            if isinstance(logger, CSVLogger):
                for metrics in history:
                    logger.log_metrics(metrics, step=int(metrics["round"]))

    def finalize(self, status: str = "success") -> None:
        """Flush and close the loggers; Fabric does not do it."""
        for logger in self.loggers:
            logger.finalize(status)
