"""Which runs a sweep starts, leaves, goes on with and refuses; the runs are stand-ins."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fedsp import sweep as module
from fedsp.shipped import find_shipped, shipped_names
from fedsp.sweep import Sweep, find_methods

METHOD = "fedsp"
METHODS = {METHOD: find_shipped("method", METHOD)}


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base.yaml").write_text("trainer: {num_rounds: 1}\n")
    return str(tmp_path / "base.yaml")


def make(tmp_path: Path, base: str, **changes: Any) -> Sweep:
    options: dict[str, Any] = {"configs": (base,), "methods": METHODS, "seeds": (0, 1)}
    return Sweep(tmp_path / "runs", **{**options, **changes})


def pretend(monkeypatch: pytest.MonkeyPatch, statuses: list[int]) -> list[list[str]]:
    """Let commands end with these statuses, finished ones with results; return the commands."""
    commands: list[list[str]] = []

    def wait(command: list[str]) -> int:
        commands.append(command)
        status = statuses[len(commands) - 1]
        folder = Path(command[command.index("--trainer.run_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if status == 0:
            (folder / "results.json").write_text("{}")
        return status

    monkeypatch.setattr(module, "_wait", wait)
    return commands


def test_a_method_has_the_last_word_over_files_and_options(tmp_path: Path, base: str) -> None:
    sweep = make(tmp_path, base, options=("--trainer.num_rounds", "2"))
    assert sweep.command(METHOD, 1) == [
        *(sys.executable, "-m", "fedsp", "fit", "--config", base),
        *("--trainer.num_rounds", "2", "--config", str(METHODS[METHOD])),
        *("--seed_everything", "1"),
        *("--trainer.run_dir", str(tmp_path / "runs" / METHOD / "seed-1")),
    ]


def test_finished_runs_are_left_and_unfinished_ones_gone_on_with(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make(tmp_path, base, seeds=(0, 1, 2))
    commands = pretend(monkeypatch, [0, 1, 0, 0])
    said: list[str] = []
    (failure,) = sweep.run(said.append)
    assert failure.startswith(f"{METHOD}, seed 1: exit status 1")
    assert len(commands) == 3
    assert sweep.run(said.append) == []
    assert commands[3][-2:] == ["--ckpt_path", "last"]
    assert "seed-1" in commands[3][-3]
    assert said[3].endswith("(1 of 3): finished already")
    assert "(2 of 3): goes on" in said[4]


def test_a_run_that_ends_well_without_results_has_failed(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_wait", lambda command: 0)
    assert len(make(tmp_path, base).run(lambda text: None)) == 2


def test_methods_and_seeds_may_be_added_later(tmp_path: Path, base: str) -> None:
    make(tmp_path, base).claim()
    make(tmp_path, base, seeds=(0, 1, 2)).claim()


@pytest.mark.parametrize("change", ["options", "config"])
def test_other_settings_are_refused_in_a_used_folder(
    tmp_path: Path, base: str, change: str
) -> None:
    make(tmp_path, base).claim()
    options: dict[str, Any] = {}
    if change == "options":
        options = {"options": ("--trainer.num_rounds", "9")}
    else:
        Path(base).write_text("trainer: {num_rounds: 9}\n")
    with pytest.raises(ValueError, match=r"^`--run_dir` .* other settings \(--config or options\)"):
        make(tmp_path, base, **options).claim()


def test_finished_runs_of_unknown_settings_are_refused(tmp_path: Path, base: str) -> None:
    folder = make(tmp_path, base).run_folder(METHOD, 1)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^`--run_dir` .* holds finished runs of which no"):
        make(tmp_path, base).claim()


def test_a_method_that_changed_is_refused_in_a_used_folder(tmp_path: Path, base: str) -> None:
    make(tmp_path, base).claim()
    other = tmp_path / "other.yaml"
    other.write_text("{}\n")
    with pytest.raises(ValueError, match=f"other settings of the method {METHOD}"):
        make(tmp_path, base, methods={METHOD: other}).claim()


def test_a_method_is_a_shipped_name_or_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("{}\n")
    assert find_methods([str(mine), METHOD]) == {"mine": mine, **METHODS}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["no-such"], f"must be files or of {', '.join(shipped_names('method'))}, got 'no-such'"),
        (["no-such.yaml"], r"must be files or of .*, got 'no-such\.yaml'"),
        ([METHOD, METHOD], f"must name each once, got '{METHOD}' twice"),
    ],
)
def test_unknown_and_repeated_methods_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_methods(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, "`--seeds` must name each once"),
        ({"options": ("--seed_everything=3",)}, "cannot be given to `fedsp compare`"),
        ({"options": ("--ckpt_path", "last")}, "`--ckpt_path` cannot be given"),
    ],
)
def test_bad_words_are_refused_before_any_work(
    tmp_path: Path, base: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, base, **changes)


def test_a_command_never_outlives_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while waiting: the run is ended before the interrupt goes on."""
    code = "import time; time.sleep(60)"

    class Interrupted(module.subprocess.Popen):  # type: ignore[misc,type-arg,name-defined]
        waits = 0

        def wait(self, timeout: float | None = None) -> int:
            type(self).waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(module.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._wait([sys.executable, "-c", code])
    assert Interrupted.waits == 2
