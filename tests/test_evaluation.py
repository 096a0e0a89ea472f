"""What an evaluation of a run measures, end to end on the tiny federation."""

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from fedsp.evaluation_loops import evaluate_completions
from fedsp.history import Evaluation
from fedsp.tasks import PromptCompletion, RawText
from tiny import fit, make_client, make_data, make_server, make_trainer

TASK = PromptCompletion("{prompt}", "{completion}", add_eos=False)
WRITE = Evaluation(monitor="server/val_f1", mode="max", generate_tokens=1)


def test_exact_match_is_that_of_the_written_predictions(tmp_path: Path) -> None:
    """Oracle: the file that `fedsp predict` writes, compared with the rows by `==`."""
    parts = {"server": make_server(tmp_path), "client": make_client()}
    data = make_data(tmp_path, task=TASK, test=60)
    trainer = fit(tmp_path, tmp_path / "run", num_rounds=1, evaluation=WRITE, data=data, **parts)
    metrics = trainer.history.rounds[0]
    assert {"server/val_exact_match", "server/val_f1"} <= set(metrics)
    measured = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert set(measured["zero_shot"]) == set(measured["best"])

    trainer = make_trainer(tmp_path / "run")
    data = make_data(tmp_path, task=TASK, test=60)
    trainer.predict(make_server(tmp_path), make_client(), data, max_new_tokens=1)
    written = map(json.loads, (tmp_path / "run" / "predictions.jsonl").read_text().splitlines())
    right = [line["completion"] == data.raw_row(line["row"])["completion"] for line in written]
    assert math.isclose(measured["best"]["exact_match"], sum(right) / len(right), abs_tol=1e-6)


def test_what_is_written_is_compared_with_the_answer_of_its_own_row(tmp_path: Path) -> None:
    """A writer that adds up rightly where the first number is below 6."""
    data = make_data(tmp_path, task=TASK, test=60)
    data.limit_tokens(60)
    data.setup("test")

    def add_up(batch: dict[str, torch.Tensor], batch_idx: int) -> list[str]:
        texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        pairs = [[int(number) for number in text.strip("=").split("+")] for text in texts]
        return [f" {a + b}\n" if a < 6 else "no idea" for a, b in pairs]

    def references(row: int) -> list[str]:
        return data.task.references_of(data.raw_row(row))

    loader = data.prompt_dataloader("test")
    rows = [row for batch in loader for row in batch["row"].tolist()]
    share = sum(int(data.raw_row(row)["prompt"].split("+")[0]) < 6 for row in rows) / len(rows)
    fabric = Fabric(accelerator="cpu", devices=1)
    measured = evaluate_completions(fabric, add_up, loader, references)
    assert 0 < share < 1
    assert measured == pytest.approx({"exact_match": share, "f1": share}, abs=1e-6)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_completions_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, command: str
) -> None:
    def start(**options: object) -> None:
        evaluation = Evaluation(generate_tokens=options.pop("generate_tokens", 4))  # type: ignore[arg-type]
        trainer = make_trainer(tmp_path / "run", evaluation=evaluation)
        parts = make_server(tmp_path), make_client(), make_data(tmp_path, **options)
        getattr(trainer, command)(*parts, ckpt_path=None)

    with pytest.raises(ValueError, match="gives examples without one"):
        start(task=RawText("{prompt}{completion}"))
    # 64 positions, 4 virtual tokens, the longest prompt is "12+4=" or the like
    with pytest.raises(ValueError, match=r"generate_tokens` must be at most 5\d, .* got 60"):
        start(generate_tokens=60)
    assert not (tmp_path / "run").exists()
