"""The comparison that FedSP must win: the same server steps on the same data, without any client.

It trains a prompt of its own beside the run and never touches the run's.
"""

from collections.abc import Sequence
from typing import Any

from fedsp.callbacks import FederatedCallback
from fedsp.history import Best, History

_SERVER, _BASELINE = "server/val_", "baseline/val_"


class ServerOnlyBaseline(FederatedCallback):
    """Trains a twin of the server's prompt with the server's batches and steps, without clients.

    The twin starts from the run's initial prompt and is measured whenever the server is: its
    figures are the metrics `baseline/val_loss` and so on. Its best round is chosen as FedSP's is,
    and tested at the end.
    """

    def __init__(self) -> None:
        """Wait for the run to start; there is nothing to set."""
        self._twin: Any = None
        self._optimization: Any = None
        self._history: History | None = None

    def on_setup_start(self, trainer: Any) -> None:
        """Refuse a method that tunes something else than a soft prompt on the global model.

        Raises:
            ValueError: If it does.
        """
        if trainer.server.tuned_weights is not None or trainer.server.deploy_auxiliary:
            raise ValueError(
                "`trainer.callbacks`: ServerOnlyBaseline tunes a soft prompt on the global model, "
                "and this method tunes something else. Leave the callback out."
            )

    def on_fit_start(self, trainer: Any) -> None:
        """Make the twin from the initial prompt.

        Raises:
            ValueError: If the server does not train, so that there is nothing to compare with.
        """
        _check_server_trains(trainer)
        self._twin = trainer.fabric.to_device(trainer.server.twin())
        self._optimization = trainer.federation.optimization_for(self._twin)
        self._history = History(trainer.history.evaluation)

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Take over the initial prompt's figure: nobody has trained yet, it is the twin's too."""
        initial = trainer.history.best
        if round_idx == 0 and initial is not None:
            history = self._require_history()
            history.best = Best(-1, initial.value, initial.payload)

    def on_round_metrics(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Train the twin for the round, and measure it where the server was measured."""
        trainer.federation.train(self._twin, self._optimization, round_idx)
        if f"{_SERVER}loss" not in metrics:
            return
        measured = trainer.measure(self._twin, "selection")
        metrics |= {f"{_BASELINE}{name}": value for name, value in measured.items()}
        as_server = {f"{_SERVER}{name}": value for name, value in measured.items()}
        self._require_history().offer(round_idx, as_server, self._twin.payload())

    def on_test_end(self, trainer: Any, results: dict[str, Any]) -> None:
        """Test the twin's best prompt beside FedSP's.

        Args:
            trainer: At the end of its run.
            results: What will be written to `results.json`; gets `selection.server_only` and,
                where there is a test split, `test.server_only`.
        """
        best = self._require_history().best
        if best is not None:
            self._twin.load_payload(best.payload)
            monitor = trainer.history.evaluation.monitor.replace(_SERVER, _BASELINE, 1)
            results.setdefault("selection", {})["server_only"] = {
                "round": best.round_idx,
                monitor: best.value,
            }
        if "test" in results:
            results["test"]["server_only"] = trainer.measure(self._twin, "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the twin's prompt, optimizer and best round; nothing before `on_fit_start`."""
        if self._twin is None:
            return {}
        prompt = self._twin.require_model()[1]
        return {
            "soft_prompt": {name: value.cpu() for name, value in prompt.state_dict().items()},
            "optimization": self._optimization.state_dict(),
            "history": self._require_history().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after `on_fit_start`."""
        if not state:
            return
        self._twin.require_model()[1].load_state_dict(state["soft_prompt"])
        self._optimization.load_state_dict(state["optimization"])
        self._require_history().load_state_dict(state["history"])

    def _require_history(self) -> History:
        if self._history is None:
            raise RuntimeError("expected a started run; `on_fit_start` comes first")
        return self._history


def _check_server_trains(trainer: Any) -> None:
    wanted = "`trainer.callbacks`: ServerOnlyBaseline needs a server that trains, but"
    if not trainer.server.training_stage.steps:
        raise ValueError(
            f"{wanted} `model.training.steps` is 0. Raise it or leave the callback out."
        )
    if not trainer.data.num_examples("server"):
        raise ValueError(
            f"{wanted} `data.server` is null. Give the server data or leave the callback out."
        )
