"""What a run shows in the terminal: bars with time left, a line a round, a summary at either end.

Live bars only where the output is a terminal; elsewhere plain lines without control characters.
"""

import atexit
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column as TableColumn
from rich.text import Text
from torch import Tensor

from fedsp.baseline import ServerOnlyBaseline
from fedsp.callbacks import FederatedCallback
from fedsp.display import human_seconds
from fedsp.report import end_report, next_commands, resume_command
from fedsp.round_table import (
    ACCURACY,
    AUXILIARY,
    BASELINE,
    CLIENT_EPSILON,
    EPSILON,
    F1,
    Column,
    RoundTable,
)
from fedsp.summary import start_summary

# a loss is read from the device at most this often: each reading waits for all work before it
_SECONDS_BETWEEN_READINGS = 0.5
_PLAIN_DISTILLATION_LINES = 10


class TimeLeft(ProgressColumn):
    """Time left at the task's mean speed so far.

    rich's own column looks at the last 30 seconds, in which a large model's round does not end.
    """

    def render(self, task: Task) -> Text:
        """Return the time left, or blanks before the first step is done."""
        done = task.completed - task.fields["offset"]
        if task.total is None or done <= 0 or task.elapsed is None:
            return Text(" " * 14)
        per_step = task.fields["seconds"] / done
        left = per_step * (task.total - task.fields["offset"]) - task.elapsed
        return Text(f"{human_seconds(max(left, 0.0))} left".rjust(14), style="cyan")


class Count(ProgressColumn):
    """How many steps of how many are done."""

    def render(self, task: Task) -> Text:
        """Return `3 of 10`; blanks where the number of steps is unknown."""
        if task.total is None:
            return Text(" " * 11)
        return Text(f"{task.completed:.0f} of {task.total:.0f}".rjust(11))


class LiveBars:
    """A few named bars under the scrolling output; on plain output all calls do nothing."""

    def __init__(self, console: Console) -> None:
        """Make the display; it appears with the first bar.

        Args:
            console: Where it appears.
        """
        self.enabled = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            Count(),
            TimeLeft(),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=TableColumn(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            transient=True,
            refresh_per_second=4,
            expand=True,
            disable=not self.enabled,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, name: str, total: int | None, *, done: int = 0, detail: str = "") -> None:
        """Start a bar from the left, or where `done` says; an older one of the name is replaced."""
        if not self.enabled:
            return
        self.hide(name)
        if not self._tasks:
            # an error between two hooks must not leave the terminal without its cursor
            atexit.register(self._progress.stop)
            self._progress.start()
        self._tasks[name] = self._progress.add_task(
            name.ljust(8), total=total, completed=done, offset=done, seconds=0.0, detail=detail
        )

    def is_shown(self, name: str) -> bool:
        """Whether there is a bar of this name."""
        return name in self._tasks

    def move(self, name: str, done: int | None = None, *, detail: str | None = None) -> None:
        """Move a bar to `done` steps, change the text behind it, or both."""
        if name not in self._tasks:
            return
        task_id = self._tasks[name]
        fields: dict[str, Any] = {} if detail is None else {"detail": detail}
        if done is not None:
            fields["seconds"] = self._progress.tasks[self._progress.task_ids.index(task_id)].elapsed
        self._progress.update(task_id, completed=done, **fields)

    def hide(self, name: str) -> None:
        """Remove a bar, if it is there; with the last one the cursor comes back."""
        if name not in self._tasks:
            return
        self._progress.remove_task(self._tasks.pop(name))
        if not self._tasks:
            self._progress.stop()
            atexit.unregister(self._progress.stop)

    def stop(self) -> None:
        """Remove all bars."""
        for name in list(self._tasks):
            self.hide(name)


class RichProgress(FederatedCallback):
    """Shows the run: bars with time left, a table line for every round, a summary at either end."""

    on_every_rank = False

    def __init__(self, console: Console | None = None) -> None:
        """Keep the console; nothing is shown before a hook is called.

        Args:
            console: Where to print; None is standard output.
        """
        # Without force_terminal rich would write colours into a file where FORCE_COLOR is set.
        plain = False if not sys.stdout.isatty() else None
        self.console = console or Console(force_terminal=plain, highlight=False, soft_wrap=False)
        self.bars = LiveBars(self.console)
        self._table: RoundTable | None = None
        self._initial: dict[str, float] = {}
        self._rounds_saved = 0
        self._total_steps = 0
        self._last_reading = 0.0
        self._clients_done = 0

    # --- before the first round -------------------------------------------------------------------

    def on_setup_start(self, trainer: Any) -> None:
        """Say what takes the first seconds, which have nothing else to show."""
        if trainer.fabric.is_global_zero:
            name = trainer.server.backbone_spec.name_or_path
            self._print(f"Loading {name} and reading the data")

    def on_distillation_start(self, trainer: Any, total_steps: int) -> None:
        """Announce the distillation."""
        if not trainer.fabric.is_global_zero:
            return
        self._total_steps = total_steps
        self._last_reading = time.monotonic()
        self._print(f"Teaching the auxiliary model from the global one: {total_steps} steps")
        self.bars.show("distil", total_steps)

    def on_distillation_step(self, trainer: Any, step: int, loss: Tensor) -> None:
        """Move the bar; on plain output write a line every tenth of the way."""
        if not trainer.fabric.is_global_zero:
            return
        if self.bars.enabled:
            now = time.monotonic()
            due = now - self._last_reading >= _SECONDS_BETWEEN_READINGS
            if due:
                self._last_reading = now
            self.bars.move("distil", step, detail=f"loss {float(loss):.4f}" if due else None)
        elif _crosses_a_tenth(step, self._total_steps):
            share = 100 * step // self._total_steps
            self._print(f"  step {step} of {self._total_steps} ({share} %), loss {float(loss):.4f}")

    def on_distillation_end(self, trainer: Any, before: Any, after: Any, cached: bool) -> None:
        """Remove the bar; the summary says what came of it."""
        self.bars.hide("distil")

    def on_fit_start(self, trainer: Any) -> None:
        """Say what the run is made of."""
        if trainer.fabric.is_global_zero:
            self.bars.hide("distil")
            self._print(start_summary(trainer))
            self._print("")

    # --- rounds -----------------------------------------------------------------------------------

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Start the bars of the round."""
        if not trainer.fabric.is_global_zero:
            return
        self._rounds_saved = round_idx
        self._open_table(trainer)
        if not self.bars.is_shown("rounds"):
            self.bars.show("rounds", trainer.num_rounds, done=round_idx)
        self._clients_done = 0
        self.bars.show("clients", len(cohort))

    def on_client_start(self, trainer: Any, round_idx: int, client_id: int) -> None:
        """Name the client that works."""
        self.bars.move("clients", detail=trainer.data.client_names[client_id])

    def on_client_end(
        self, trainer: Any, round_idx: int, client_id: int, stages: dict[str, Any]
    ) -> None:
        """Count the client."""
        self._clients_done += 1
        self.bars.move("clients", self._clients_done, detail="")

    def on_update_rejected(self, trainer: Any, round_idx: int, client_id: int, reason: str) -> None:
        """Say why an update does not count."""
        if trainer.fabric.is_global_zero:
            name = _client_name(trainer, client_id)
            text = f"warning: round {round_idx}, {name}: the update is rejected: {reason}"
            self._print(Text(text, style="yellow"))

    def on_server_train_start(self, trainer: Any, round_idx: int) -> None:
        """Show that the server trains."""
        self.bars.hide("clients")
        if trainer.fabric.is_global_zero:
            self.bars.show("server", None, detail="trains on its own data")

    def on_server_train_end(self, trainer: Any, round_idx: int, result: Any) -> None:
        """Remove the server's bar."""
        self.bars.hide("server")

    def on_evaluation_start(self, trainer: Any, split: str, num_batches: int) -> None:
        """Start the bar of an evaluation."""
        self.bars.hide("clients")
        if trainer.fabric.is_global_zero:
            self.bars.show("evaluate", num_batches, detail=split)

    def on_evaluation_step(self, trainer: Any, step: int) -> None:
        """Move the bar of the evaluation."""
        self.bars.move("evaluate", step)

    def on_evaluation_end(self, trainer: Any, split: str, metrics: dict[str, float]) -> None:
        """Remove the bar; before the first round, remember what the initial prompt reached."""
        self.bars.hide("evaluate")
        if self._table is None and split == "selection":
            self._initial = {f"server/val_{name}": value for name, value in metrics.items()}

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Write the round's line."""
        if trainer.fabric.is_global_zero:
            self._write_row(trainer, str(round_idx), metrics, round_idx)
            self.bars.move("rounds", round_idx + 1)

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        """Remember what a resumed run would start from."""
        self._rounds_saved = trainer.history.rounds_done
        if trainer.fabric.is_global_zero:
            self._open_table(trainer)

    # --- the end ----------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Any, report: dict[str, Any]) -> None:
        """Say what the run reached, where everything is and what to do next."""
        if not trainer.fabric.is_global_zero:
            return
        self._open_table(trainer)
        self.bars.stop()
        self._print("")
        self._print(end_report(trainer, report, self._initial))
        commands = next_commands(trainer.folder)
        if commands:
            self._print(Text("\nNext", style="bold cyan"))
        for purpose, command in commands:
            self._print(Text.assemble("  ", (f"# {purpose}", "dim")))
            self._print_whole(f"  {command}")

    def on_exception(self, trainer: Any, exception: BaseException) -> None:
        """Take the bars away and say how to go on."""
        if not trainer.fabric.is_global_zero:
            return
        self.bars.stop()
        interrupted = isinstance(exception, KeyboardInterrupt)
        if interrupted or self._rounds_saved:
            last = self._rounds_saved - 1
            done = f"last complete round: {last}" if last >= 0 else "no round is complete"
            word = "Interrupted" if interrupted else "Stopped"
            self._print_whole(f"{word}; {done}. Go on with: {resume_command(trainer.folder)}")

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the initial prompt's metrics, so that a resumed run's table is whole."""
        return {"initial": self._initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._initial = dict(state.get("initial", {}))

    # --- parts ------------------------------------------------------------------------------------

    def _open_table(self, trainer: Any) -> None:
        """Write the table's head, the start's measurements, and the rounds before a resume."""
        if self._table is not None:
            return
        history, without = trainer.history, _without(trainer)
        self._table = RoundTable(width=self.console.width, without=without)
        for line in self._table.header():
            self._print(line)
        if history.zero_shot:
            self._print(self._table.row("zero-shot", history.zero_shot))
        if self._initial:
            self._write_row(trainer, "initial", self._initial, -1)
        for round_idx, metrics in enumerate(history.rounds):
            self._write_row(trainer, str(round_idx), metrics, round_idx)

    def _write_row(
        self, trainer: Any, label: str, metrics: dict[str, float], round_idx: int
    ) -> None:
        best = trainer.history.best
        if self._table is not None:
            is_best = best is not None and best.round_idx == round_idx
            self._print(self._table.row(label, metrics, is_best=is_best))

    def _print(self, content: RenderableType) -> None:
        self.console.print(content, markup=False, highlight=False)

    def _print_whole(self, text: str) -> None:
        """Print a command in one piece, however long, so that it can be copied."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _crosses_a_tenth(step: int, total_steps: int) -> bool:
    lines = _PLAIN_DISTILLATION_LINES
    return step * lines // total_steps > (step - 1) * lines // total_steps


def _without(trainer: Any) -> list[Column]:
    """Columns that a run has nothing for."""
    zero_shot, callbacks = trainer.history.zero_shot, trainer.callbacks
    has = {
        AUXILIARY: trainer.client.stages["auxiliary"].steps > 0,
        ACCURACY: "server/val_accuracy" in zero_shot,
        F1: "server/val_f1" in zero_shot,
        BASELINE: any(isinstance(callback, ServerOnlyBaseline) for callback in callbacks),
        EPSILON: trainer.rules.privacy is not None,
        CLIENT_EPSILON: trainer.client.privacy is not None,
    }
    return [column for column, is_there in has.items() if not is_there]


def _client_name(trainer: Any, client_id: int) -> str:
    names = trainer.data.client_names
    # who answers unasked may be nobody of this run
    return f"client {client_id}" + (f" ({names[client_id]})" if 0 <= client_id < len(names) else "")
