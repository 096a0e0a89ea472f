"""What a run shows: on a terminal, in a log file, when it is interrupted and when it is resumed."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsp import progress as progress_module
from fedsp.baseline import ServerOnlyBaseline
from fedsp.callbacks import FederatedCallback
from fedsp.progress import RichProgress
from fedsp.stages import Stage
from tiny import fit, make_client, make_data, make_trainer

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class CountingLoss:
    """A loss that counts how often it is read from the device."""

    def __init__(self) -> None:
        self.readings = 0

    def __float__(self) -> float:
        self.readings += 1
        return 0.5


def make_console(*, terminal: bool = False, width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, legacy_windows=False, _environ={}
    )


def output(console: Console) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def fake_trainer(run_dir: Path, *, rank_zero: bool = True, **options: Any) -> Any:
    history = SimpleNamespace(rounds=[], rounds_done=0, zero_shot={}, best=None)
    folder = SimpleNamespace(path=run_dir, config=run_dir / "config.yaml", started_by="")
    names = ["numpy", "pandas"]
    defaults = {
        "fabric": SimpleNamespace(is_global_zero=rank_zero),
        "history": history,
        "folder": folder,
        "callbacks": [],
        "client": SimpleNamespace(stages={"auxiliary": Stage(steps=0)}, privacy=None),
        "rules": SimpleNamespace(privacy=None),
        "data": SimpleNamespace(client_names=names, num_clients=2),
        "num_rounds": 2,
    }
    return SimpleNamespace(**{**defaults, **options})


def run(folder: Path, run_dir: Path, console: Console, **options: Any) -> Any:
    """A whole tiny run that shows itself on the console."""
    callbacks = [*options.pop("callbacks", []), RichProgress(console)]
    return fit(folder, run_dir, callbacks=callbacks, **options)


# --- a whole run ----------------------------------------------------------------------------------


def test_a_log_file_gets_one_plain_line_a_round(tmp_path: Path) -> None:
    console = make_console()
    trainer = run(tmp_path, tmp_path / "run", console, callbacks=[ServerOnlyBaseline()])
    text = output(console)
    assert not CONTROL.search(text)
    for round_idx, metrics in enumerate(trainer.history.rounds):
        (line,) = re.findall(rf"^ *(?:\* )?{round_idx} .*$", text, re.MULTILINE)
        for name in ("client/train_loss", "server/val_loss", "baseline/val_loss"):
            assert f"{metrics[name]:.4f}" in line
    (zero_shot,) = re.findall(r"^zero-shot +\d\.\d{4}$", text, re.MULTILINE)
    assert zero_shot.endswith(f"{trainer.history.zero_shot['server/val_loss']:.4f}")
    assert len(re.findall(r"initial +\d\.\d{4}$", text, re.MULTILINE)) == 1


def test_nothing_but_copyable_commands_is_wider_than_eighty_columns(tmp_path: Path) -> None:
    console = make_console()
    run(tmp_path, tmp_path / "run", console, callbacks=[ServerOnlyBaseline()])
    before_commands = output(console).split("\nNext\n")[0]
    assert max(len(line) for line in before_commands.splitlines()) <= 80


def test_the_end_says_where_everything_is(tmp_path: Path) -> None:
    console = make_console(width=300)
    run_dir = tmp_path / "run"
    run(tmp_path, run_dir, console)
    end = output(console).split("Result")[1]
    for name in ("checkpoints/", "adapter/", "ledger.jsonl", "results.json", "metrics.csv"):
        assert f"{run_dir}/" in end
        assert name in end
    assert "PeftModel.from_pretrained" in end


def test_a_terminal_gets_bars_that_are_gone_at_the_end(tmp_path: Path) -> None:
    console = make_console(terminal=True)
    run(tmp_path, tmp_path / "run", console, num_rounds=2)
    text = output(console)
    for name in ("distil", "rounds", "clients", "server", "evaluate"):
        assert name in text
    assert "1 of 2" in text
    assert "left" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0


def test_an_evaluation_outside_a_run_gives_the_cursor_back(tmp_path: Path) -> None:
    console, trainer = make_console(terminal=True), fake_trainer(tmp_path)
    shown = RichProgress(console)
    shown.on_evaluation_start(trainer, "test", 2)
    assert output(console).count("\x1b[?25h") == 0
    shown.on_evaluation_step(trainer, 1)
    shown.on_evaluation_end(trainer, "test", {"loss": 1.0})
    assert output(console).count("\x1b[?25l") == output(console).count("\x1b[?25h") == 1


def test_a_terminal_without_cursor_movement_gets_plain_lines(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})
    run(tmp_path, tmp_path / "run", console, num_rounds=1)
    assert not CONTROL.search(output(console))


def test_a_resumed_run_shows_the_rounds_before(tmp_path: Path) -> None:
    class Interrupt(FederatedCallback):
        def on_round_start(self, trainer: Any, round_idx: int, cohort: Any) -> None:
            if round_idx == 2:
                raise KeyboardInterrupt

    first, second = make_console(), make_console()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "run", first, callbacks=[Interrupt()])
    assert "Interrupted; last complete round: 1." in output(first)
    run(tmp_path, tmp_path / "run", second, callbacks=[FederatedCallback()], ckpt_path="last")

    def rows(text: str) -> list[str]:
        table = text.split(" time\n")[1].split("\n\n")[0]
        # without the marks: a resumed run marks only the best of the rounds before
        return [row for row in table.replace("*", " ").splitlines() if "Interrupted" not in row]

    before, after = rows(output(first)), rows(output(second))
    assert after[:4] == before
    assert [row.split()[0] for row in after] == ["zero-shot", "initial", "0", "1", "2"]


def test_a_finished_run_that_is_resumed_shows_its_table_and_its_end(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "run", make_console(), num_rounds=1)
    console = make_console()
    run(tmp_path, tmp_path / "run", console, num_rounds=1, ckpt_path="last")
    assert re.search(r"^ *\* 0 ", output(console), re.MULTILINE)
    assert "Result" in output(console)


def test_runs_without_rounds_or_selection_data_show_what_there_is(tmp_path: Path) -> None:
    console = make_console()
    data = make_data(tmp_path, selection=None, test=None)
    run(tmp_path, tmp_path / "run", console, num_rounds=0, data=data)
    assert "zero-shot" not in output(console)
    assert "Files" in output(console)


def test_the_trainer_shows_progress_unless_told_not_to(tmp_path: Path) -> None:
    def shown(**options: Any) -> bool:
        callbacks = make_trainer(tmp_path / "run", **options).callbacks
        return any(isinstance(callback, RichProgress) for callback in callbacks)

    assert shown(enable_progress_bar=True)
    assert not shown(enable_progress_bar=False)


def test_standard_output_that_is_no_terminal_gets_no_colour_even_if_forced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    RichProgress().on_update_rejected(fake_trainer(tmp_path), 0, 0, "too far")
    assert capsys.readouterr().out == (
        "warning: round 0, client 0 (numpy): the update is rejected: too far\n"
    )


# --- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("total_steps", "lines"), [(1000, 10), (95, 10), (10, 10), (3, 3), (1, 1)])
def test_a_log_file_hears_of_every_tenth_of_the_distillation(
    total_steps: int, lines: int, tmp_path: Path
) -> None:
    console, loss, trainer = make_console(), CountingLoss(), fake_trainer(tmp_path)
    shown = RichProgress(console)
    shown.on_distillation_start(trainer, total_steps)
    for step in range(1, total_steps + 1):
        shown.on_distillation_step(trainer, step, loss)  # type: ignore[arg-type]
    text = output(console)
    assert text.count("loss 0.5000") == lines
    assert loss.readings == lines
    assert f"step {total_steps} of {total_steps} (100 %)" in text


def test_a_loss_is_read_at_most_twice_a_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    console, loss, trainer = make_console(terminal=True), CountingLoss(), fake_trainer(tmp_path)
    shown = RichProgress(console)
    shown.on_distillation_start(trainer, 1000)
    start = shown._last_reading
    clock = iter([start + step * 0.01 for step in range(1, 1001)])
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for step in range(1, 1001):
        shown.on_distillation_step(trainer, step, loss)  # type: ignore[arg-type]
    shown.bars.stop()
    assert 15 <= loss.readings <= 20


# --- single events --------------------------------------------------------------------------------


@pytest.mark.parametrize("client_id", [-1, 2**40])
def test_who_is_nobody_of_this_run_has_no_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], client_id: int
) -> None:
    RichProgress().on_update_rejected(fake_trainer(tmp_path), 0, client_id, "not asked")
    assert f"round 0, client {client_id}: the update is rejected" in capsys.readouterr().out


def test_a_rejected_update_is_named_with_its_reason(tmp_path: Path) -> None:
    console = make_console(width=200)
    reason = "norm [1.5] above `max_update_norm`"
    RichProgress(console).on_update_rejected(fake_trainer(tmp_path), 3, 1, reason)
    assert output(console) == (
        f"warning: round 3, client 1 (pandas): the update is rejected: {reason}\n"
    )


def test_ctrl_c_leaves_one_line_with_the_command_that_goes_on(tmp_path: Path) -> None:
    console = make_console(width=40)
    trainer = fake_trainer(tmp_path)
    trainer.folder.config.touch()
    trainer.history.rounds_done = 3
    shown = RichProgress(console)
    shown._open_table(trainer)
    console.file.truncate(0)
    console.file.seek(0)
    shown.on_checkpoint_saved(trainer, tmp_path)
    shown.on_exception(trainer, KeyboardInterrupt())
    assert output(console) == (
        "Interrupted; last complete round: 2. Go on with: "
        f"fedsp fit --config {tmp_path}/config.yaml --ckpt_path last\n"
    )


def test_ctrl_c_before_the_first_round_says_so(tmp_path: Path) -> None:
    console = make_console()
    RichProgress(console).on_exception(fake_trainer(tmp_path), KeyboardInterrupt())
    assert output(console).startswith("Interrupted; no round is complete. Go on with: ")


def test_an_error_before_the_first_round_speaks_for_itself(tmp_path: Path) -> None:
    console = make_console()
    RichProgress(console).on_exception(fake_trainer(tmp_path), ValueError("wrong"))
    assert output(console) == ""


def test_an_error_in_a_later_round_says_how_to_go_on(tmp_path: Path) -> None:
    console, trainer = make_console(), fake_trainer(tmp_path)
    shown = RichProgress(console)
    shown.on_round_start(trainer, 2, [0, 1])
    shown.on_exception(trainer, OSError("disk full"))
    assert "Stopped; last complete round: 1. Go on with: " in output(console)


def test_an_interrupt_between_training_and_saving_does_not_count_the_round(tmp_path: Path) -> None:
    console, trainer = make_console(), fake_trainer(tmp_path)
    shown = RichProgress(console)
    shown.on_round_start(trainer, 1, [0])
    trainer.history.rounds_done = 2
    shown.on_round_end(trainer, 1, {})
    shown.on_exception(trainer, KeyboardInterrupt())
    assert "last complete round: 0." in output(console)


@pytest.mark.parametrize("terminal", [True, False])
def test_only_the_first_process_prints(terminal: bool, tmp_path: Path) -> None:
    console, trainer = make_console(terminal=terminal), fake_trainer(tmp_path, rank_zero=False)
    shown = RichProgress(console)
    shown.on_distillation_start(trainer, 10)
    shown.on_distillation_step(trainer, 1, torch.tensor(1.0))
    shown.on_distillation_end(trainer, None, None, False)
    shown.on_fit_start(trainer)
    shown.on_checkpoint_saved(trainer, tmp_path)
    shown.on_round_start(trainer, 0, [0, 1])
    shown.on_client_start(trainer, 0, 0)
    shown.on_client_end(trainer, 0, 0, {})
    shown.on_update_rejected(trainer, 0, 0, "too far")
    shown.on_server_train_start(trainer, 0)
    shown.on_server_train_end(trainer, 0, None)
    shown.on_evaluation_start(trainer, "selection", 2)
    shown.on_evaluation_step(trainer, 1)
    shown.on_evaluation_end(trainer, "selection", {"loss": 1.0})
    shown.on_round_end(trainer, 0, {"server/val_loss": 1.0})
    shown.on_fit_end(trainer, {})
    shown.on_exception(trainer, KeyboardInterrupt())
    assert output(console) == ""


def test_time_left_is_the_mean_time_of_a_step_times_the_steps_left() -> None:
    task = SimpleNamespace(
        total=10, completed=4, elapsed=21.0, fields={"offset": 2, "seconds": 20.0}
    )
    # two steps took 20 s; of the six that are left, one second has passed
    assert progress_module.TimeLeft().render(task).plain.strip() == "59 s left"  # type: ignore[arg-type]


def test_no_time_left_is_guessed_before_the_first_step() -> None:
    task = SimpleNamespace(total=10, completed=2, elapsed=5.0, fields={"offset": 2, "seconds": 0})
    assert progress_module.TimeLeft().render(task).plain.strip() == ""  # type: ignore[arg-type]


def test_a_client_without_an_auxiliary_stage_has_no_column_for_it(tmp_path: Path) -> None:
    console = make_console()
    run(tmp_path, tmp_path / "run", console, client=make_client(auxiliary=Stage(steps=0)))
    assert " aux " not in output(console)
    assert "auxiliary: not trained (0 steps)" in output(console)


def test_the_first_line_says_what_is_being_loaded() -> None:
    console = Console(record=True, width=80, force_terminal=False)
    server = SimpleNamespace(backbone_spec=SimpleNamespace(name_or_path="some/model"))
    trainer = SimpleNamespace(fabric=SimpleNamespace(is_global_zero=True), server=server)
    RichProgress(console).on_setup_start(trainer)
    assert console.export_text() == "Loading some/model and reading the data\n"
