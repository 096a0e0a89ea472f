"""Prompts of a user's own file: only the prompt's fields are asked for, and nothing is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command, make_config, write_config
from fedsp.prompts import Prompts, room_for_prompt
from fedsp.server import ServerModule
from fedsp.sources import Files
from fedsp.tasks import ChatCompletion, MultipleChoice, PromptCompletion, RawText, Task
from tiny import files, fit, make_client, make_data, make_server, make_trainer

NEW = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a finished run of the tiny federation."""
    folder = tmp_path_factory.mktemp("run")
    file = write_config(folder / "config.yaml", make_config(folder))
    assert command("fit", "--config", file).status == 0
    return folder / "run" / "config.yaml"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_test_rows_is_completed_as_the_test_split_is(tmp_path: Path) -> None:
    """The rows of the split without their completions, in the order of their indices."""
    fit(tmp_path, tmp_path / "run", num_rounds=1)
    trainer = make_trainer(tmp_path / "run")
    data = make_data(tmp_path)
    trainer.predict(make_server(tmp_path), make_client(), data, max_new_tokens=NEW)
    split = read_lines(tmp_path / "run" / "predictions.jsonl")
    prompts = [{"prompt": data.raw_row(line["row"])["prompt"], "note": "x"} for line in split]
    own = write_lines(tmp_path / "own.jsonl", prompts)
    output = tmp_path / "new" / "answers.jsonl"
    trainer.predict(
        make_server(tmp_path),
        make_client(),
        # the run's own data may be gone
        make_data(tmp_path, clients=Files(str(tmp_path / "gone.jsonl"))),
        max_new_tokens=NEW,
        input=own,
        output=str(output),
    )
    lines = read_lines(output)
    assert [line["row"] for line in lines] == list(range(len(split)))
    assert [line["completion"] for line in lines] == [line["completion"] for line in split]
    assert any(line["completion"] for line in lines)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("name", ["own.csv", "own.parquet"])
def test_tables_are_read_too(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    table = Dataset.from_dict({"prompt": ["1+2=", "3+4="]})
    path = tmp_path / name
    (table.to_csv if name.endswith("csv") else table.to_parquet)(str(path))
    server = make_server(tmp_path)
    server.configure_model()
    loader = Prompts(str(path), PromptCompletion()).loader(
        server.tokenizer, 8, text_room=None, max_new_tokens=1
    )
    (batch,) = list(loader)
    assert server.tokenizer.batch_decode(batch["input_ids"]) == ["1+2=", "3+4="]
    assert batch["row"].tolist() == [0, 1]


def test_prompts_of_different_length_are_padded_on_the_left(
    tmp_path: Path,
) -> None:
    tokenizer = make_data(tmp_path).tokenizer
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "1"}, {"prompt": "1+2="}])
    prompts = Prompts(own, PromptCompletion())
    (batch,) = list(prompts.loader(tokenizer, 8, text_room=5, max_new_tokens=1))
    assert batch["row"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("task", "row", "prompt", "fields"),
    [
        (
            PromptCompletion(prompt="{a} and {b[c]}{a}"),
            {"a": "x", "b": {"c": "y"}},
            "x and yx",
            ["a", "b"],
        ),
        (PromptCompletion(), {"prompt": "x"}, "x", ["prompt"]),
        (MultipleChoice(question="Q: {question}"), {"question": "x"}, "Q: x", ["question"]),
        (ChatCompletion(prompt=" {ask}{more?}"), {"ask": "x"}, "x", ["ask", "more"]),
    ],
)
def test_a_prompt_needs_only_its_own_fields(
    task: Task, row: dict[str, Any], prompt: str, fields: list[str]
) -> None:
    assert task.prompt_fields() == fields
    assert task.render_prompt(row, 0) == prompt


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "1"}, {"text": "1"}],
            "`--input`: `data.task.prompt` names the field 'prompt', which row 1 lacks or leaves "
            "empty (null). Its fields are prompt, text.",
        ),
        (
            [{"prompt": "1" * 10}, {"prompt": "1" * 57}],
            "`--input`: the prompt of row 1 has 57 tokens, the model's positions leave 56 beside "
            "the virtual tokens and `--max_new_tokens`. Shorten it, or lower `--max_new_tokens`.",
        ),
        ([{"prompt": ""}], "`--input`: row 0 gives no prompt, and nothing to continue."),
    ],
)
def test_rows_that_cannot_be_completed_are_refused(
    tmp_path: Path, run: Path, rows: list[dict[str, Any]], message: str
) -> None:
    own = write_lines(tmp_path / "own.jsonl", rows)
    outcome = command(
        "predict", "--config", run, "--input", own, "--output", tmp_path / "out",
        "--max_new_tokens", 4,
    )  # fmt: skip
    assert outcome.err.endswith(f"fedsp: error: {message}\n")
    assert outcome.status == 1
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_just_fits_is_completed(tmp_path: Path, run: Path) -> None:
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "1" * 56}])
    outcome = command(
        "predict", "--config", run, "--input", own, "--output", tmp_path / "out",
        "--max_new_tokens", 4,
    )  # fmt: skip
    assert outcome.status == 0, outcome
    assert len(read_lines(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "no-such.jsonl"], "`--input`: Data file no-such.jsonl does not exist"),
        (["--input", "rows.txt"], "`--input`: Data file rows.txt must end in .jsonl"),
        (["--output", "."], "`--output` must be a new file, got the folder ."),
        (
            ["--max_new_tokens", 0, "--input", "rows"],
            "`--max_new_tokens` must be at least 1, got 0",
        ),
        (["--max_new_tokens", 60, "--input", "rows"], "`--max_new_tokens` must be below 60"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, run: Path, options: list[object], message: str
) -> None:
    _, rows = files(tmp_path)
    given = [rows if option == "rows" else option for option in options]
    outcome = command("predict", "--config", run, *given)
    assert f"fedsp: error: {message}" in outcome.err
    assert outcome.status == 1


def test_a_chats_prompt_is_all_that_comes_before_the_answer(tmp_path: Path) -> None:
    """The same tokens as the prompt of a whole example."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    task = ChatCompletion(system="S", template=template)
    tokenizer = make_data(tmp_path).tokenizer
    (ids,) = task.encode_prompts([{"prompt": "1+2"}], tokenizer)
    assert tokenizer.decode(ids) == "<system>S;<user>1+2;<assistant>"
    (example,) = task.encode([{"prompt": "1+2", "completion": "3"}], tokenizer)
    assert ids == example.prompt_ids


def test_a_task_without_a_prompt_has_nothing_to_continue(tmp_path: Path) -> None:
    own = write_lines(tmp_path / "own.jsonl", [{"text": "1"}])
    task: Task = RawText()
    assert task.prompt_fields() == []
    with pytest.raises(ValueError, match="row 0 gives no prompt"):
        Prompts(own, task)


def test_a_model_without_a_limit_has_room_for_any_prompt() -> None:
    assert room_for_prompt(None, 10) is None
    assert room_for_prompt(60, 10) == 50


def test_completions_are_greedy_whatever_the_model_folder_says(tmp_path: Path) -> None:
    server: ServerModule = make_server(tmp_path)
    server.configure_model()
    ids = torch.randint(1, 250, (4, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    backbone = server.eval().require_model()[0]
    expected = server.predict_step(batch, 0, max_new_tokens=8)
    backbone.model.generation_config.do_sample = True
    backbone.model.generation_config.temperature = 10.0
    assert server.predict_step(batch, 0, max_new_tokens=8) == expected


def test_a_file_that_is_there_is_not_written_over(run: Path, tmp_path: Path) -> None:
    """It may be the input itself."""
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "1+1="}])
    outcome = command("predict", "--config", run, "--input", own, "--output", own)
    assert outcome.status == 1
    assert f"`--output` must be a new file, got the file {own}, which exists" in outcome.err
    assert read_lines(Path(own)) == [{"prompt": "1+1="}]
