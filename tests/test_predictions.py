"""Completions in a file, against greedy decoding by hand on the full logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from fedsp.batching import Batching
from fedsp.generation import generate
from fedsp.predictions import write_predictions
from fedsp.server import ServerModule
from tiny import fit, make_client, make_data, make_server, make_trainer

NEW = 5


@pytest.fixture
def server(tmp_path: Path) -> ServerModule:
    module = make_server(tmp_path)
    module.configure_model()
    prompt = module.require_model()[1]
    prompt.load_prefix(prompt.prefix() * 20)
    return module


def ready_data(folder: Path, **options: Any) -> Any:
    data = make_data(folder, **options)
    data.limit_tokens(50)
    data.setup("predict")
    return data


def write(server: ServerModule, data: Any, path: Path, new: int = NEW) -> list[dict[str, Any]]:
    fabric = Fabric(accelerator="cpu", devices=1)
    count = write_predictions(fabric, server, data.predict_dataloader(), path, max_new_tokens=new)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == count
    return lines


@torch.no_grad()
def greedy(server: ServerModule, prompt: str) -> str:
    """Token by token, from all logits of the text so far, without a cache."""
    backbone, soft_prompt = server.eval().require_model()
    ids = server.tokenizer(prompt)["input_ids"]
    new: list[int] = []
    for _ in range(NEW):
        text = torch.tensor([ids + new])
        hidden = backbone.hidden_states(text, torch.ones_like(text), soft_prompt())
        new.append(int(backbone.logits(hidden)[0, -1].argmax()))
        if new[-1] == server.tokenizer.eos_token_id:
            break
    return server.tokenizer.decode(new, skip_special_tokens=True)


def test_every_test_row_is_completed_greedily_with_the_soft_prompt(
    tmp_path: Path, server: ServerModule
) -> None:
    data = ready_data(tmp_path, test=9)
    server.train()  # dropout must not matter
    lines = write(server, data, tmp_path / "run" / "predictions.jsonl")
    assert len(lines) == 9
    for line in lines:
        assert line.keys() == {"row", "completion"}
        prompt = data.raw_row(line["row"])["prompt"]
        assert line["completion"] == greedy(server, prompt), prompt
    bare = [greedy_without_prompt(server, data.raw_row(line["row"])["prompt"]) for line in lines]
    assert bare != [line["completion"] for line in lines]


@torch.no_grad()
def greedy_without_prompt(server: ServerModule, prompt: str) -> str:
    backbone = server.require_model()[0]
    ids = server.tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = generate(backbone, ids, torch.ones_like(ids), None, max_new_tokens=NEW)
    return server.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_lines_are_in_the_order_of_the_rows_whatever_the_batches(
    tmp_path: Path, server: ServerModule
) -> None:
    texts = []
    for rows in (1, 4, 100):
        data = ready_data(tmp_path, batching=Batching(eval_batch_size=rows))
        lines = write(server, data, tmp_path / f"{rows}.jsonl")
        assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
        texts.append(lines)
    assert texts[0] == texts[1] == texts[2]


def test_letters_of_any_language_stay_readable(
    tmp_path: Path, server: ServerModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server, "predict_step", lambda batch, idx, **options: ["Größe\n語"] * len(batch["row"])
    )
    path = tmp_path / "predictions.jsonl"
    lines = write(server, ready_data(tmp_path), path)
    assert {line["completion"] for line in lines} == {"Größe\n語"}
    assert "語" in path.read_text(encoding="utf-8")


def test_a_second_prediction_replaces_the_first(tmp_path: Path, server: ServerModule) -> None:
    path = tmp_path / "predictions.jsonl"
    first = write(server, ready_data(tmp_path, test=9), path)
    second = write(server, ready_data(tmp_path, test=4), path)
    assert (len(first), len(second)) == (9, 4)
    assert [file.name for file in path.parent.glob("*.tmp")] == []


@pytest.mark.parametrize("new", [0, -3])
def test_a_completion_of_no_tokens_is_refused_before_any_work(tmp_path: Path, new: int) -> None:
    fit(tmp_path, tmp_path / "run", num_rounds=0)
    parts = make_server(tmp_path), make_client(), make_data(tmp_path)
    with pytest.raises(ValueError, match="`max_new_tokens` must be greater than 0"):
        make_trainer(tmp_path / "run").predict(*parts, max_new_tokens=new)


def test_a_finished_run_predicts_with_its_best_prompt(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run", num_rounds=1)
    assert trainer.history.best is not None
    parts = make_server(tmp_path), make_client(), make_data(tmp_path)
    make_trainer(tmp_path / "run").predict(*parts, max_new_tokens=NEW)
    server = parts[0]
    assert torch.equal(
        server.require_model()[1].prefix(), trainer.history.best.payload["soft_prompt"]
    )
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 12
    row = json.loads(lines[0])
    assert row["completion"] == greedy(server, parts[2].raw_row(row["row"])["prompt"])
