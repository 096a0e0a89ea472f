"""lm-eval inside `fedsp test`, lm-eval by its own command, and fedsp itself, on the same rows."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commands import Outcome, changed, command, make_config, of_class, write_config
from families import POSITIONS, random_prefix, random_text, tiny_backbone
from fedsp.backbone import load_backbone
from fedsp.collate import collate_choices
from fedsp.export import import_adapter
from fedsp.harness import Harness, PromptedModel, find_tasks
from fedsp.pretrained import BackboneSpec, load_tokenizer
from fedsp.scoring import score
from fedsp.tasks import MultipleChoice
from tiny import GPT2, write_tokenizer

ROWS, NEW, STOP = 24, 5, "a"
TASK = {
    "task": "tiny_sums",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITING = {
    **{name: value for name, value in TASK.items() if name != "doc_to_choice"},
    "task": "tiny_writing",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": [STOP, "\n"], "max_gen_toks": NEW},
    "metric_list": [{"metric": "exact_match"}],
}


def make_rows(folder: Path) -> list[dict[str, Any]]:
    """Write sums with wrong answers of other lengths, and the task files that read them."""
    draw = random.Random(0)
    rows = []
    for _ in range(ROWS):
        a, b = draw.randrange(50), draw.randrange(50)
        choices = [str(a + b), str(a - b), f"{a} and {b}", "none"]
        draw.shuffle(choices)
        rows.append(
            {"question": f"{a}+{b}=", "choices": choices, "answer": choices.index(str(a + b))}
        )
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    source = {"data_files": {"test": str(folder / "questions.jsonl")}}
    for task in (TASK, WRITING):
        text = yaml.safe_dump({**task, "dataset_kwargs": source})
        (tasks / f"{task['task']}.yaml").write_text(text)
    return rows


def make_run(folder: Path) -> Path:
    """Fit a federation on the rows and return its configuration."""
    model = folder / "model"
    write_tokenizer(model)
    load_backbone(BackboneSpec(config=GPT2)).model.save_pretrained(model)
    source = of_class("fedsp.sources.Files", paths=str(folder / "questions.jsonl"))
    config = changed(
        make_config(folder),
        {
            "trainer.num_rounds": 1,
            "trainer.callbacks": [],
            "model.init_args.backbone": {"name_or_path": str(model)},
            # so strong a prompt that no figure could be the bare model's
            "model.init_args.soft_prompt.initializer": of_class(
                "fedsp.soft_prompt.NormalInit", std=2.0
            ),
            "data.init_args.clients": source,
            "data.init_args.task": of_class("fedsp.tasks.MultipleChoice"),
            "data.init_args.test": source,
            **{f"data.init_args.{name}": 4 for name in ("server", "public", "selection")},
        },
    )
    outcome = command("fit", "--config", write_config(folder / "config.yaml", config))
    assert outcome.status == 0, outcome.err
    return folder / "run" / "config.yaml"


def read_samples(path: Path, task: str = "tiny_sums") -> list[dict[str, Any]]:
    """Return the lines of a task in the order of the rows; lm-eval's own file names no task."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line.get("task", task) == task]
    return sorted(lines, key=lambda line: line["doc_id"])


def read_choices(path: Path) -> tuple[torch.Tensor, list[float], list[float]]:
    """Return [rows, choices] log-likelihoods, and both accuracies by row."""
    lines = read_samples(path)
    likelihoods = [[float(response[0]) for response in line["filtered_resps"]] for line in lines]
    return (
        torch.tensor(likelihoods),
        [line["acc"] for line in lines],
        [line["acc_norm"] for line in lines],
    )


def own_likelihoods(rows: list[dict[str, Any]], folder: Path, adapter: Path) -> torch.Tensor:
    """Return the same of the built-in evaluation, under the exported prompt."""
    spec = BackboneSpec(name_or_path=str(folder / "model"))
    examples = MultipleChoice().encode(rows, load_tokenizer(spec))
    batch = collate_choices(examples, pad_id=0)
    with torch.no_grad():
        scores = score(load_backbone(spec), batch, import_adapter(adapter))
    return scores["log_likelihood"].view(len(rows), -1)


def lm_eval_command(folder: Path, adapter: Path) -> Path:
    """Run lm-eval's own command on model and adapter; return the file of its samples."""
    arguments = {"pretrained": folder / "model", "peft": adapter, "max_length": 60}
    out = folder / "lm_eval"
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    line += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    line += ["--tasks", TASK["task"], "--include_path", str(folder / "tasks")]
    line += ["--log_samples", "--output_path", str(out), "--batch_size", "8"]
    done = subprocess.run(line, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = out.rglob("samples_*.jsonl")
    return samples


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Outcome]:
    """Folder, rows and output of a run that lm-eval was asked to test."""
    folder = tmp_path_factory.mktemp("harness")
    rows = make_rows(folder)
    config = make_run(folder)
    options = ["--harness.tasks", "[tiny_sums, tiny_writing]", "--harness.log_samples", "true"]
    options += ["--harness.include_path", folder / "tasks"]
    outcome = command("test", "--config", config, *options)
    assert outcome.status == 0, outcome.err
    return folder, rows, outcome


def test_the_built_in_evaluation_agrees_with_lm_eval_on_the_same_rows(
    tested: tuple[Path, list[dict[str, Any]], Outcome],
) -> None:
    folder, rows, outcome = tested
    run = folder / "run"
    assert "|tiny_sums" in outcome.out
    built_in = json.loads(outcome.out[: outcome.out.index("\n}\n") + 3])["test"]
    figures = json.loads((run / "harness.json").read_text())["results"]["tiny_sums"]
    assert figures["acc,none"] == pytest.approx(built_in["accuracy"], abs=1e-6)
    assert figures["acc_norm,none"] == pytest.approx(built_in["accuracy_norm"], abs=1e-6)

    inside, _, _ = read_choices(run / "harness_samples.jsonl")
    own = own_likelihoods(rows, folder, run / "adapter")
    assert own.shape == (ROWS, 4)
    torch.testing.assert_close(inside, own, atol=1e-3, rtol=0)
    right = torch.tensor([row["answer"] for row in rows]) == own.argmax(dim=1)
    assert built_in["accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-6)


@pytest.mark.slow  # lm-eval starts anew in a process of its own
def test_lm_evals_own_command_agrees_on_the_exported_adapter(
    tested: tuple[Path, list[dict[str, Any]], Outcome],
) -> None:
    folder, _, _ = tested
    inside, *accuracies = read_choices(folder / "run" / "harness_samples.jsonl")
    outside, *same = read_choices(lm_eval_command(folder, folder / "run" / "adapter"))
    torch.testing.assert_close(outside, inside, atol=1e-3, rtol=0)
    assert same == accuracies


def test_written_answers_are_greedy_and_stop_where_the_task_says(
    tested: tuple[Path, list[dict[str, Any]], Outcome],
) -> None:
    """Oracle: greedy decoding by hand of every row, cut at the first stop."""
    folder, rows, _ = tested
    lines = read_samples(folder / "run" / "harness_samples.jsonl", "tiny_writing")
    assert [line["doc"]["question"] for line in lines] == [row["question"] for row in rows]
    spec = BackboneSpec(name_or_path=str(folder / "model"))
    backbone, tokenizer = load_backbone(spec), load_tokenizer(spec)
    prefix = import_adapter(folder / "run" / "adapter")
    for line in lines:
        ids = tokenizer(line["doc"]["question"])["input_ids"]
        new: list[int] = []
        for _ in range(NEW):
            text = torch.tensor([ids + new])
            with torch.no_grad():
                hidden = backbone.hidden_states(text, torch.ones_like(text), prefix)
            new.append(int(backbone.logits(hidden)[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(new, skip_special_tokens=True)
        assert line["resps"][0][0] == expected.split(STOP)[0].split("\n")[0]


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@torch.no_grad()
def test_rows_of_different_lengths_are_continued_as_if_alone(family: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(BackboneSpec(name_or_path=str(tmp_path), tokenizer=str(tmp_path)))
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone)
    model = PromptedModel(backbone, tokenizer, prefix)
    ids, _ = random_text(rows=2, length=12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(ids, mask, max_length=18, stopping_criteria=[], **options)
    for row, start in ((0, 0), (1, 5)):
        text = ids[row : row + 1, start:]
        for _ in range(6):
            hidden = backbone.hidden_states(text, torch.ones_like(text), prefix)
            text = torch.cat([text, backbone.logits(hidden)[:, -1:].argmax(-1)], dim=1)
        assert got[row, start:].tolist() == text[0].tolist()
    assert POSITIONS > 18


# --- bad input ----------------------------------------------------------------------------------


def test_a_missing_lm_eval_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "config.yaml", make_config(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "lm_eval" else find(name, *args),
    )
    outcome = command("test", "--config", config, "--harness.tasks", "arc_easy")
    assert outcome.status == 1
    assert 'pip install "fedsp[eval]"' in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_an_unknown_task_is_answered_with_close_ones(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", make_config(tmp_path))
    outcome = command("test", "--config", config, "--harness.tasks", "arc_eazy")
    assert outcome.status == 1
    assert "`harness.tasks` names 'arc_eazy'" in outcome.err
    assert "arc_easy" in outcome.err
    outcome = command("test", "--config", config, "--harness.tasks", "x", "--harness.limit", 0)
    assert "`harness.limit` must be at least 1, got 0." in outcome.err


def test_task_files_in_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`harness.include_path` must be a folder, got 'nowhere'"):
        find_tasks(Harness("arc_easy", include_path="nowhere"))
    with pytest.raises(ValueError, match=r"`harness.tasks` must name at least one task"):
        Harness([])
