"""`fedsp chat`: a scripted conversation against the same prompts completed by `predict`."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from commands import Outcome, changed, command, make_config, of_class, write_config

LINES = ["1+2=", "3+4=", "12+7="]
NEW = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run whose task wraps the question in more text."""
    folder = tmp_path_factory.mktemp("run")
    task = of_class("fedsp.tasks.PromptCompletion", prompt="Q {prompt} A", add_eos=False)
    # a rate at which the prompt makes a difference to a model of random weights
    sgd = {"steps": 2, "optimizer": of_class("torch.optim.SGD", lr=500.0)}
    changes = {"data.init_args.task": task, "model.init_args.training": sgd}
    file = write_config(folder / "config.yaml", changed(make_config(folder), changes))
    assert command("fit", "--config", file).status == 0
    return folder / "run"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, run: Path):
    """Run `fedsp chat RUN` with the given lines on stdin."""

    def _talk(*options: object, lines: list[str] = LINES, folder: Path = run) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command("chat", folder, "--max_new_tokens", NEW, *options)

    return _talk


def completions(run: Path, tmp_path: Path, prompts: list[str], ckpt_path: str = "best") -> str:
    """What `predict` makes of the same texts, as a conversation prints it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    outcome = command(
        "predict", "--config", run / "config.yaml", "--input", rows, "--output", output,
        "--max_new_tokens", NEW, "--ckpt_path", ckpt_path,
    )  # fmt: skip
    assert outcome.status == 0, outcome
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return "".join(line["completion"] + "\n" for line in lines)


def test_every_line_is_answered_as_predict_completes_it(talk, run: Path, tmp_path: Path) -> None:
    outcome = talk()
    assert outcome.status == 0, outcome
    assert outcome.out == completions(run, tmp_path, LINES)


def test_by_default_an_answer_may_take_half_of_a_small_model_s_room(talk) -> None:
    # 64 positions, 4 of them virtual tokens
    default = talk("--max_new_tokens", "null")
    assert default.status == 0, default
    assert default.out == talk("--max_new_tokens", 30).out


def test_exit_ends_and_empty_lines_are_passed_over(talk) -> None:
    expected = talk(lines=LINES[:1])
    assert talk(lines=["", LINES[0], "  ", "exit", LINES[1]]).out == expected.out


def test_raw_text_is_not_put_into_the_tasks_prompt(talk) -> None:
    wrapped = talk()
    assert talk("--raw", "true", lines=[f"Q {line} A" for line in LINES]).out == wrapped.out
    assert talk("--raw", "true").out != wrapped.out


def test_the_bare_global_model_answers_without_the_prompt(talk, run: Path) -> None:
    bare = talk("--without_prompt", "true")
    assert bare.status == 0
    assert bare.out != talk().out
    # whichever checkpoint it is, without its prompt the model is the same
    assert talk("--without_prompt", "true", "--ckpt_path", "last").out == bare.out


def test_sampling_follows_the_seed(talk) -> None:
    hot = ("--temperature", 5.0)
    first = talk(*hot)
    assert first.status == 0, first
    assert talk(*hot).out == first.out
    assert talk(*hot, "--seed", 1).out != first.out
    twice = talk(*hot, lines=[LINES[0], LINES[0]]).out
    assert twice != 2 * talk(*hot, lines=[LINES[0]]).out


def test_a_run_that_was_moved_is_found(talk, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    assert talk(folder=moved).out == talk().out


def test_a_line_that_is_too_long_is_told_of_and_the_next_one_answered(talk) -> None:
    outcome = talk(lines=["1" * 60, LINES[0]])
    assert "fedsp: what was typed has 64 tokens, the model's positions leave 54" in outcome.err
    assert outcome.status == 0
    assert outcome.out


@pytest.mark.parametrize("missing", ["folder", "config", "checkpoint"])
def test_a_folder_that_is_no_finished_run_is_refused(
    talk, run: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "some"
    if missing != "folder":
        folder.mkdir()
    if missing == "checkpoint":
        shutil.copy(run / "config.yaml", folder)
    outcome = talk(folder=folder)
    assert outcome.status == 1
    expected = {
        "folder": f"`fedsp chat` needs the folder of a run, got {folder}, which holds no config",
        "config": f"`fedsp chat` needs the folder of a run, got {folder}, which holds no config",
        "checkpoint": f"there is no {folder / 'checkpoints' / 'best.safetensors'}",
    }
    assert expected[missing] in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", -1.0], "`--temperature` must be at least 0, got -1.0."),
        (["--max_new_tokens", 0], "`--max_new_tokens` must be at least 1, got 0."),
        (["--max_new_tokens", 60], "`--max_new_tokens` must be below 60, the model's positions"),
    ],
)
def test_options_that_mean_nothing_are_refused(talk, options: list[object], message: str) -> None:
    outcome = talk(*options)
    assert f"fedsp: error: {message}" in outcome.err
    assert outcome.status == 1


def test_a_task_whose_prompt_has_several_fields_needs_raw_text(
    talk, run: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    config = yaml.safe_load((moved / "config.yaml").read_text())
    prompt = {"data.init_args.task.init_args.prompt": "{prompt} {completion}"}
    write_config(moved / "config.yaml", changed(config, prompt))
    outcome = talk(folder=moved)
    assert outcome.status == 1
    assert "whose fields are: prompt, completion. Use `--raw true`" in outcome.err
    assert talk("--raw", "true", folder=moved).out == talk("--raw", "true").out


def test_no_option_is_abbreviated_and_help_names_all_of_them(talk) -> None:
    assert talk("--temp", 1.0).status == 2
    outcome = command("chat", "--help")
    assert outcome.status == 0
    assert "Longest answer in tokens, at least 1;" in outcome.out


def test_a_backslash_and_an_n_start_a_new_line(talk, run: Path, tmp_path: Path) -> None:
    typed = talk(lines=[r"one\ntwo"])
    assert typed.out == completions(run, tmp_path, ["one\ntwo"])
