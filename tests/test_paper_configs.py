"""The authors' settings: every file of `configs/paper` against the table of what their code ran.

Read in the authors' released code: FederatedScope, branch `fedsp`, commit f8ac88c6.
"""

from pathlib import Path
from typing import Any

import pytest

from shipped_files import ROOT, values

PAPER = ROOT / "configs" / "paper"
HIDDEN = 512
# (model, task): rounds, local steps, learning rate, width of the projection, batch, accumulation
TABLE = {
    ("gpt2-xl", "arc_challenge"): (50, 10, 5e-4, None, 1, 16),
    ("gpt2-xl", "arc_easy"): (50, 10, 5e-4, None, 1, 16),
    ("gpt2-xl", "openbookqa"): (100, 20, 5e-4, None, 1, 16),
    ("gpt2-xl", "webquestions"): (50, 10, 5e-4, None, 1, 16),
    ("gpt2-xl", "hellaswag"): (200, 20, 1e-4, HIDDEN, 1, 16),
    ("gpt2-xl", "piqa"): (50, 10, 5e-4, None, 1, 16),
    ("gpt2-xl", "sciq"): (50, 10, 5e-4, HIDDEN, 1, 16),
    ("gpt2-xl", "race"): (50, 10, 5e-4, HIDDEN, 1, 16),
    ("opt-1.3b", "arc_challenge"): (100, 20, 5e-4, None, 16, 1),
    ("opt-1.3b", "arc_easy"): (20, 10, 5e-4, None, 16, 1),
    ("opt-1.3b", "openbookqa"): (100, 20, 5e-4, None, 16, 1),
    ("opt-1.3b", "webquestions"): (50, 10, 5e-4, None, 16, 1),
    ("opt-1.3b", "hellaswag"): (200, 20, 1e-4, HIDDEN, 16, 1),
    ("opt-1.3b", "piqa"): (100, 10, 5e-4, None, 1, 16),
    ("opt-1.3b", "sciq"): (50, 10, 5e-4, None, 1, 16),
    ("opt-1.3b", "race"): (50, 10, 5e-4, HIDDEN, 1, 16),
}
IDS = {"gpt2-xl": "openai-community/gpt2-xl", "opt-1.3b": "facebook/opt-1.3b"}


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _arguments(part: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = part["init_args"]
    return arguments


def test_every_cell_of_the_table_has_its_file_and_no_other_is_there() -> None:
    found = {(file.parent.name, file.stem) for file in PAPER.glob("*/*.yaml")}
    assert found == TABLE.keys()


@pytest.mark.parametrize(("model", "task"), TABLE, ids=lambda name: name)
def test_a_file_holds_the_tables_numbers(model: str, task: str) -> None:
    rounds, steps, rate, width, batch_size, accumulated = TABLE[model, task]
    parsed = values(PAPER / model / f"{task}.yaml")
    server, client = _arguments(parsed["model"]), _arguments(parsed["client"])
    assert parsed["trainer"]["num_rounds"] == rounds
    assert server["backbone"]["name_or_path"] == IDS[model]
    for stage in (server["training"], client["auxiliary"], client["soft_prompt"]):
        assert stage["steps"] == steps
        assert _settings(stage) == (rate, accumulated)
    distillation = server["initial_distillation"]
    assert distillation["stage"]["steps"] == 5000
    assert _settings(distillation["stage"]) == (5e-4, accumulated)
    assert _arguments(parsed["data"])["batching"]["batch_size"] == batch_size
    assert server["soft_prompt"]["reparameterization_size"] == width
    assert client["reparameterization_size"] == width


def _settings(stage: dict[str, Any]) -> tuple[float, int]:
    """Check what all stages have in common; return learning rate and accumulation."""
    assert stage["optimizer"]["class_path"] == "torch.optim.AdamW"
    optimizer = _arguments(stage["optimizer"])
    assert (optimizer["eps"], optimizer["weight_decay"]) == (1e-4, 0.01)
    assert stage["lr_scheduler"]["class_path"] == "fedsp.schedules.LinearWarmup"
    assert _arguments(stage["lr_scheduler"])["warmup_fraction"] == 0.1
    return optimizer["lr"], stage["accumulate_grad_batches"]


@pytest.mark.parametrize(("model", "task"), TABLE, ids=lambda name: name)
def test_what_all_settings_share_is_in_every_file(model: str, task: str) -> None:
    parsed = values(PAPER / model / f"{task}.yaml")
    server, data = _arguments(parsed["model"]), _arguments(parsed["data"])
    assert server["soft_prompt"]["num_virtual_tokens"] == 40
    assert data["max_tokens"] == 1024
    assert parsed["trainer"]["sampler"] is None  # all clients take part
    cell = server["auxiliary"]
    assert cell["class_path"] == "fedsp.auxiliary.SharedCell"
    assert (_arguments(cell)["start"], _arguments(cell)["cell_size"]) == (0, 1)
    distillation = server["initial_distillation"]
    weights = [distillation[f"{name}_weight"] for name in ("hidden", "logit", "lm")]
    assert weights == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("model", "task"), TABLE, ids=lambda name: name)
def test_server_and_clients_own_eleven_equal_parts(model: str, task: str) -> None:
    """Of the train split's rows, but for those that select where no split does."""
    data = _arguments(values(PAPER / model / f"{task}.yaml")["data"])
    carved = [data[split] for split in ("selection", "test") if isinstance(data[split], float)]
    assert data["partitioner"]["class_path"] == "fedsp.partition.IID"
    assert _arguments(data["partitioner"])["num_clients"] == 10
    assert data["server"] == pytest.approx((1 - sum(carved)) / 11, rel=1e-6)
    assert data["public"] == "server"


def test_the_task_is_the_one_that_the_file_is_named_after() -> None:
    for model, task in TABLE:
        ours = _arguments(values(PAPER / model / f"{task}.yaml")["data"])
        alone = _arguments(values(_task_file(task))["data"])
        for part in ("clients", "task", "selection", "test"):
            assert ours[part] == alone[part]


def _task_file(task: str) -> Path:
    return ROOT / "configs" / "task" / f"{task}.yaml"
