"""The points of a run at which the trainer calls its callbacks.

The `trainer` argument is the `FederatedTrainer`; its `server`, `client`, `data`, `history` and
`run_dir` may be read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsp.payload import Payload


class FederatedCallback:
    """Does nothing at any point; override what is wanted.

    State that must outlast a kill goes through `state_dict` and `load_state_dict`: plain data and
    tensors only.

    Attributes:
        on_every_rank: Whether each of several processes calls it; what only shows or writes
            something is for the first one.
    """

    on_every_rank = True

    def on_setup_start(self, trainer: Any) -> None:
        """Nothing is loaded; `server` and `data` have their settings only."""

    def on_fit_start(self, trainer: Any) -> None:
        """Models are loaded and the auxiliary model is ready; no round has run."""

    def on_distillation_start(self, trainer: Any, total_steps: int) -> None:
        """The auxiliary model is about to be taught."""

    def on_distillation_step(self, trainer: Any, step: int, loss: Tensor) -> None:
        """One optimizer step of the distillation is done; `loss` is a scalar on the device."""

    def on_distillation_end(self, trainer: Any, before: Any, after: Any, cached: bool) -> None:
        """The auxiliary model is ready; `before` and `after` are `Quality` or None."""

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """The cohort is known, nothing has been sent."""

    def on_client_start(self, trainer: Any, round_idx: int, client_id: int) -> None:
        """A client is about to receive the broadcast."""

    def on_client_end(
        self, trainer: Any, round_idx: int, client_id: int, stages: dict[str, Any]
    ) -> None:
        """A client's answer is in; `stages` maps a stage to its `StageResult`."""

    def on_update_accepted(
        self, trainer: Any, round_idx: int, client_id: int, update: Payload, reference: Payload
    ) -> None:
        """An update goes into the aggregate; `reference` is the broadcast that it started from."""

    def on_update_rejected(self, trainer: Any, round_idx: int, client_id: int, reason: str) -> None:
        """An update was left out of the aggregate."""

    def on_aggregate_end(self, trainer: Any, round_idx: int, payload: Payload) -> None:
        """The server holds the aggregate; `payload` maps names to tensors."""

    def on_server_train_start(self, trainer: Any, round_idx: int) -> None:
        """The server is about to train the aggregate on its own data."""

    def on_server_train_end(self, trainer: Any, round_idx: int, result: Any) -> None:
        """The server has trained; `result` is a `StageResult`."""

    def on_evaluation_start(self, trainer: Any, split: str, num_batches: int) -> None:
        """An evaluation on `selection` or `test` begins."""

    def on_evaluation_step(self, trainer: Any, step: int) -> None:
        """One evaluation batch is done."""

    def on_evaluation_end(self, trainer: Any, split: str, metrics: dict[str, float]) -> None:
        """An evaluation is done."""

    def on_round_metrics(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """The round's metrics are complete; entries added here are logged and kept."""

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """The round is logged; its checkpoint is next."""

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        """The round is safe on disk."""

    def on_test_end(self, trainer: Any, results: dict[str, Any]) -> None:
        """The best prompt is tested; entries added to `results["test"]` are kept and shown."""

    def on_fit_end(self, trainer: Any, report: dict[str, Any]) -> None:
        """The run is over; `report` says where everything is."""

    def on_exception(self, trainer: Any, exception: BaseException) -> None:
        """The run stops early."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback must find again after a resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
