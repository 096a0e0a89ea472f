"""The summary before the first round, against figures counted by hand and the ledger's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedsp.auxiliary import SharedCell
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.display import human_bytes
from fedsp.distillation import Distillation
from fedsp.federation import Communication
from fedsp.history import Evaluation
from fedsp.ledger import read_ledger
from fedsp.prompt_pool import PromptPool
from fedsp.quality import Quality
from fedsp.sampling import UniformSampler
from fedsp.server import SoftPromptSpec
from fedsp.stages import Stage
from fedsp.summary import (
    data_rows,
    message_bytes,
    model_rows,
    quality_rows,
    run_rows,
    start_summary,
    traffic_rows,
    trained_rows,
)
from tiny import fit, make_client, make_data, make_server

# GPT-2 with E = 32, V = 257, 64 positions, 4 layers of 12 E^2 + 13 E, and a final norm of 2 E
LAYER = 12 * 32**2 + 13 * 32
EMBEDDINGS = (257 + 64) * 32
GLOBAL = EMBEDDINGS + 4 * LAYER + 2 * 32
PROMPT = 4 * 2 * 32 * 4


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("summary")
    communication = Communication(wire_dtype="float16")
    sampler = UniformSampler(clients_per_round=2)
    return fit(folder, folder / "run", num_rounds=2, communication=communication, sampler=sampler)


def test_parameters_of_all_models_are_counted(trainer: Any) -> None:
    (_, model), (_, auxiliary), (_, depth), (_, prompt) = model_rows(trainer)
    assert model == f"{GLOBAL / 1000:.1f} k parameters, frozen, fp32: random gpt2"
    shared_cell = EMBEDDINGS + LAYER + 2 * 32
    share = f"{100 * shared_cell / GLOBAL:.1f} % of the global model"
    assert auxiliary == f"{shared_cell / 1000:.1f} k parameters, {share}"
    assert depth == "4 layers deep, embeddings and head shared and frozen"
    assert prompt.startswith(f"1 024 parameters, {100 * PROMPT / GLOBAL:.2f} %: 4 virtual tokens")


def test_the_trained_share_counts_the_prompt_beside_the_frozen_model(trainer: Any) -> None:
    assert PROMPT == 1024
    rows = dict(trained_rows(trainer))
    share = 100 * PROMPT / (GLOBAL + PROMPT)
    total = (GLOBAL + PROMPT) / 1000
    assert rows["server"] == f"prompt: 1 024 of {total:.1f} k ({share:.2f} %), 2 steps a round"


def test_message_bytes_are_those_in_the_ledger(trainer: Any) -> None:
    rows = list(read_ledger(trainer.folder.ledger))
    prompts = [row for row in rows if row["kind"] != "auxiliary_handout"]
    up, down = message_bytes(trainer)
    assert {row["bytes"] for row in prompts if row["direction"] == "up"} == {up}
    assert {row["bytes"] for row in prompts if row["direction"] == "down"} == {down}


def test_fedavg_sends_the_full_model_up_and_down(trainer: Any) -> None:
    rows = dict(traffic_rows(trainer))
    up, down = message_bytes(trainer)
    fedavg = 2 * 4 * GLOBAL
    assert rows["a round"].startswith(f"{2 * (up + down) / 1000:.2f} kB for 2 clients")
    assert rows["FedAvg"] == (
        f"{2 * fedavg / 1000:.0f} kB with the full model, "
        f"{round(fedavg / (up + down))} times as much"
    )
    assert rows["hand-out"].startswith(f"{4 * (EMBEDDINGS + LAYER + 64) / 1000:.1f} kB once")


def test_embeddings_of_the_auxiliary_are_named(tmp_path: Path) -> None:
    server = make_server(tmp_path, auxiliary=SharedCell(train_embeddings=True))
    trainer = fit(tmp_path, tmp_path / "run", server=server, num_rounds=0)
    texts = [text for _, text in model_rows(trainer)]
    assert "4 layers deep, embeddings and head of its own" in texts


def test_a_round_without_clients_costs_nothing(tmp_path: Path) -> None:
    sampler = UniformSampler(clients_per_round=0)
    trainer = fit(tmp_path, tmp_path / "run", sampler=sampler, num_rounds=0)
    assert dict(traffic_rows(trainer))["a round"].startswith("0 B for 0 clients")


def test_quality_stands_beside_the_global_model() -> None:
    before, after = (
        Quality(6.0, 3.0, 0.9, 2.0, 2.5, 0.1),
        Quality(4.0, 3.0, 0.1, 0.5, 0.75, 0.8),
    )
    rows = dict(quality_rows(SimpleNamespace(before=before, after=after, cached=True)))
    assert rows == {
        "LM loss": "6.0000 -> 4.0000   (global model: 3.0000)",
        "hidden error": "0.9000 -> 0.1000",
        "KL to global": "2.0000 -> 0.5000",
        "KL with prompt": "2.5000 -> 0.7500",
        "alignment": "0.1000 -> 0.8000",
        "distilled": "found in the cache",
    }


def test_an_auxiliary_that_was_not_taught_has_one_quality() -> None:
    quality = Quality(6.0, 3.0, 0.9, 2.0, 2.5, 0.1)
    rows = dict(quality_rows(SimpleNamespace(before=quality, after=quality, cached=False)))
    assert rows["LM loss"] == "6.0000   (global model: 3.0000)"
    assert rows["distilled"] == "no"


def test_unmeasured_quality_says_what_is_missing() -> None:
    rows = quality_rows(SimpleNamespace(before=None, after=None, cached=False))
    assert "`data.public`" in rows[0][1]


def test_data_counts_every_party() -> None:
    counts = {
        "clients": {"numpy": 120, "pandas": 7},
        "server": 50,
        "public": 0,
        "selection": 10,
        "test": 12_000,
        "num_cut": {"clients": 3, "server": 1},
        "num_left_out": {"clients": 0},
    }
    assert dict(data_rows(counts)) == {
        "clients": "2 clients, 127 examples (7 to 120 each)",
        "splits": "server 50, public -, selection 10, test 12.0 k",
        "cut to fit": "4 examples",
    }


def test_clients_of_one_size_are_named_once() -> None:
    counts = {"clients": {"a": 5, "b": 5}, "server": 0, "public": 0, "selection": 0, "test": 0}
    rows = dict(data_rows({**counts, "num_cut": {}, "num_left_out": {}}))
    assert rows["clients"] == "2 clients, 10 examples (5 each)"


def test_what_picks_the_best_round_is_named(trainer: Any) -> None:
    evaluation = Evaluation(every_n_rounds=5, monitor="server/val_accuracy", mode="max", patience=3)
    other = SimpleNamespace(**{**vars(trainer), "history": SimpleNamespace(evaluation=evaluation)})
    rows = dict(run_rows(other))
    assert rows["rounds"] == (
        "2, the best has the highest server/val_accuracy, measured every 5, patience 3"
    )
    assert "float16" in rows["device"]


def test_the_summary_of_a_model_without_a_prompt_is_whole(tmp_path: Path) -> None:
    options: Any = {"soft_prompt": SoftPromptSpec(0), "training": Stage(steps=0)}
    server, client = make_server(tmp_path, **options), make_client(soft_prompt=Stage(steps=0))
    data = make_data(tmp_path)
    trainer = fit(tmp_path, tmp_path / "run", server=server, client=client, data=data, num_rounds=0)
    console = Console(width=80, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    with console.file:
        console.print(start_summary(trainer))
    assert "0 parameters, 0.00 %: 0 virtual tokens" in console.export_text()


def test_a_small_auxiliary_model_runs_a_round_and_its_handout_counts_the_token_maps(
    tmp_path: Path,
) -> None:
    """257 and 30 token ids of 4 bytes beside the parameters, as in the ledger's payload."""
    recipe = TrimmedVocabulary(LowRank(2), 30)
    distillation = Distillation(
        Stage(steps=2),
        logit_weight=1.0,
        gradient_weight=0.1,
        prompts=PromptPool(rounds=1, noise=0.1),
        cache_dir="",
    )
    server = make_server(tmp_path, auxiliary=recipe, initial_distillation=distillation)
    trainer = fit(tmp_path, tmp_path / "run", server=server, num_rounds=1)
    handout = trainer.preparation.auxiliary.handout()
    size = sum(tensor.numel() * tensor.element_size() for tensor in handout.values())
    assert sum(handout[f"vocabulary.{name}"].numel() for name in ("kept", "row_of")) == 257 + 30
    rows = read_ledger(tmp_path / "run" / "ledger.jsonl")
    sent = [row["bytes"] for row in rows if row["kind"] == "auxiliary_handout"]
    assert all(size < payload < size + 20_000 for payload in sent)
    assert dict(traffic_rows(trainer))["hand-out"].startswith(human_bytes(size))
