"""The report's charts in Weights & Biases: a callback for `trainer.callbacks`."""

from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from fedsp.callbacks import FederatedCallback
from fedsp.charts import COMPARING, OF_ONE_RUN, draw_all
from fedsp.run_record import read_run


class WandbDashboard(FederatedCallback):
    """Logs the charts of `fedsp report` to every W&B logger of the run, at its end.

    They lie under `charts/` in the W&B run, which may be offline. The metrics of every round are
    drawn over the round by W&B itself.
    """

    on_every_rank = False

    def on_fit_start(self, trainer: Any) -> None:
        """Make the round the x-axis.

        Raises:
            ValueError: If the run has no W&B logger.
        """
        loggers = _loggers(trainer)
        if not loggers:
            raise ValueError(
                "`trainer.callbacks`: WandbDashboard needs a W&B logger. Add "
                "fedsp.tracking.OfflineWandb to `trainer.logger` or leave the callback out."
            )
        for logger in loggers:
            logger.experiment.define_metric("round", hidden=True)
            # takes the place of Lightning's own axis, `trainer/global_step`
            logger.experiment.define_metric("*", step_metric="round")

    def on_fit_end(self, trainer: Any, report: dict[str, Any]) -> None:
        """Draw the run and log the figures."""
        run = read_run(trainer.folder.path)
        figures = {
            f"charts/{chart.name}": wandb.Plotly(figure)
            for chart, figure in draw_all([*COMPARING, *OF_ONE_RUN], [run])
        }
        for logger in _loggers(trainer):
            logger.experiment.log(figures)


def _loggers(trainer: Any) -> list[WandbLogger]:
    return [it for it in trainer.tracker.loggers if isinstance(it, WandbLogger)]
