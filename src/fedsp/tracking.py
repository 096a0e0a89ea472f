"""Send a round's metrics to Lightning's loggers, with the round as the x-axis.

In a configuration a logger is a function by its name, which takes no settings, or a logger class
whose first argument is the folder of its files, with settings:

    trainer:
      logger:
        - fedsp.tracking.csv_logger
        - class_path: fedsp.tracking.OfflineWandb
          init_args:
            project: my-project
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import Logger
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

LoggerFactory = Callable[[str], Logger]


def csv_logger(save_dir: str) -> Logger:
    """Return a logger that keeps `csv/metrics.csv`, one row a round, in the run's folder."""
    # Lightning deletes an earlier start's file with a warning; `Tracker.replay` writes it anew
    Path(save_dir, "csv", "metrics.csv").unlink(missing_ok=True)
    return CSVLogger(save_dir, name="csv", version="", flush_logs_every_n_steps=1)


def tensorboard_logger(save_dir: str) -> Logger:
    """Return a TensorBoard logger with its files in `tensorboard` in the run's folder."""
    # the rounds of an earlier start are written anew, and would be shown twice
    for path in Path(save_dir, "tensorboard").glob("events.out.tfevents.*"):
        path.unlink()
    return TensorBoardLogger(save_dir, name="tensorboard", version="")


class OfflineWandb(WandbLogger):
    """A Weights & Biases logger that sends nothing unless asked to."""

    def __init__(
        self,
        save_dir: str,
        project: str = "fedsp",
        name: str | None = None,
        offline: bool | None = None,
    ) -> None:
        """Choose where the run goes; W&B is started with the first figure.

        Args:
            save_dir: The run's folder; the trainer gives it.
            project: W&B project.
            name: Name of the run; null takes the run folder's.
            offline: True keeps everything in the run folder for `wandb sync`; null does so unless
                `WANDB_MODE` or `WANDB_API_KEY` is set.
        """
        if offline is None:
            offline = "WANDB_MODE" not in os.environ and "WANDB_API_KEY" not in os.environ
        super().__init__(
            name=name or Path(save_dir).name, save_dir=save_dir, project=project, offline=offline
        )

    def finalize(self, status: str) -> None:
        """End the W&B run: Lightning leaves it open for the process's next run to go on in."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def wandb_logger(save_dir: str) -> Logger:
    """Return a Weights & Biases logger with the defaults of `OfflineWandb`."""
    return OfflineWandb(save_dir)


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
        self.loggers = [factory(str(save_dir)) for factory in factories] if enabled else []

    def log_config(self, config: dict[str, Any]) -> None:
        """Log the configuration as hyperparameters; beside the CSV file lies `config.yaml`."""
        for logger in self.loggers:
            if not isinstance(logger, CSVLogger):
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
        """Log the rounds before a resume again, since every start begins a log of its own."""
        for metrics in history:
            for logger in self.loggers:
                logger.log_metrics(metrics, step=int(metrics["round"]))

    def finalize(self, status: str = "success") -> None:
        """Flush and close the loggers; Fabric does not do it."""
        for logger in self.loggers:
            logger.finalize(status)
