"""A global model divided among two processes: equal results, half the memory in each."""

import json
import logging
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from families import random_prefix, random_text, tiny_backbone, tiny_config
from fedsp.auxiliary import AuxiliaryRecipe, KeptLayers, SharedCell
from fedsp.backbone import load_backbone
from fedsp.baseline import ServerOnlyBaseline
from fedsp.callbacks import FederatedCallback
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.distillation import Distillation
from fedsp.memory_probe import tensor_bytes
from fedsp.pretrained import BackboneSpec
from fedsp.prompt_pool import PromptPool
from fedsp.stages import Stage
from processes import assert_close, federation, run_ranks, state
from tiny import adamw, files, make_client, make_data, make_server, make_trainer

FAMILIES = ["gpt2", "llama", "gemma3_text", "gpt_neox"]
RECIPES: dict[str, AuxiliaryRecipe] = {
    "gpt2": SharedCell(start=1),
    "llama": KeptLayers(layers=[0, 3], train_embeddings=True),
    "gemma3_text": TrimmedVocabulary(LowRank(rank=4, calibration_batches=2), num_tokens=64),
    "gpt_neox": KeptLayers(num_layers=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of every family."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        config = tiny_config(family, vocab_size=257)
        tiny_backbone(family, config=config).model.save_pretrained(folder / family)
    return folder


# --- the model ------------------------------------------------------------------------------------


def compare(folder: Path) -> dict[str, Any]:
    """Load every family whole and sharded; differences, and bytes by the time they are held."""
    Fabric(accelerator="cpu", devices=2, strategy="ddp").launch()
    told = StringIO()
    logging.getLogger("transformers").addHandler(logging.StreamHandler(told))
    found: dict[str, Any] = {}
    for family in FAMILIES:
        whole = load_backbone(BackboneSpec(str(folder / family)))
        sharded = load_backbone(BackboneSpec(str(folder / family), sharded=True))
        held = [held_bytes(whole), held_bytes(sharded)]
        one, other = (outputs(backbone) for backbone in (whole, sharded))
        found[family] = {
            "difference": max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)),
            "bytes": [*held, held_bytes(sharded)],
        }
    return found | {"told": told.getvalue()}


def held_bytes(backbone: Any) -> int:
    """Bytes of the parameters that this process holds."""
    return tensor_bytes([*backbone.model.parameters()])


def outputs(backbone: Any) -> list[torch.Tensor]:
    """Logits, prompt gradient, hidden states, logits of these, keys and values."""
    ids, mask = random_text()
    prefix = random_prefix(backbone).requires_grad_()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    logits, targets, _ = backbone.label_logits(batch, prefix)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), prefix)
    with torch.no_grad():
        hidden = backbone.hidden_states(ids, mask, prefix)
        return [logits, gradient, hidden, backbone.logits(hidden), backbone.keys_values(ids[:1])]


def test_logits_and_gradients_are_equal_and_each_rank_holds_half(
    models: Path, tmp_path: Path
) -> None:
    for found in run_ranks(compare, tmp_path, models):
        assert found["told"] == ""
        for family in FAMILIES:
            assert found[family]["difference"] < 1e-5, family
            whole, loaded, used = found[family]["bytes"]
            assert loaded == used <= 0.55 * whole, family


# --- the run --------------------------------------------------------------------------------------


def spec(folder: Path, models: Path, family: str, sharded: bool) -> BackboneSpec:
    tokenizer, _ = files(folder)
    return BackboneSpec(str(models / family), tokenizer=tokenizer, sharded=sharded)


def run(
    folder: Path, models: Path, family: str, name: str, devices: int, **options: Any
) -> dict[str, Any]:
    """Run a federation, with the model sharded where there are several ranks."""
    tokenizer, _ = files(folder)
    model = str(models / family)
    lesson = Distillation(
        Stage(3, adamw(1e-3)),
        logit_weight=0.5,
        gradient_weight=0.5,
        prompts=PromptPool(rounds=1, texts=1),
        max_logit_tokens=3,
        cache_dir="",
    )
    server = make_server(
        folder,
        backbone=BackboneSpec(model, tokenizer=tokenizer, sharded=devices > 1),
        auxiliary=RECIPES[family],
        initial_distillation=lesson,
    )
    settings: dict[str, Any] = {"num_rounds": 2, "callbacks": None, "server": server, **options}
    return federation(folder, folder / f"{name}-{family}", devices, **settings)


def run_all(folder: Path, models: Path, name: str, devices: int) -> dict[str, Any]:
    """Run every family for a round, the first one with a baseline for two."""
    first = {"callbacks": [ServerOnlyBaseline()]}
    return {
        family: run(
            folder, models, family, name, devices, **(first if not idx else {"num_rounds": 1})
        )
        for idx, family in enumerate(FAMILIES)
    }


class Stop(FederatedCallback):
    """Ctrl-C before the second round, on every rank."""

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Any) -> None:
        if round_idx == 1:
            raise KeyboardInterrupt


def stopped(folder: Path, models: Path) -> None:
    run(folder, models, "gpt2", "resumed", 2, callbacks=[ServerOnlyBaseline(), Stop()])


def test_rounds_reach_what_one_process_reaches(models: Path, tmp_path: Path) -> None:
    expected = run_all(tmp_path, models, "whole", 1)
    first, second = run_ranks(run_all, tmp_path / "out", tmp_path, models, "sharded", 2)
    assert first == second
    for family in FAMILIES:
        assert_close(first[family], expected[family], family)
    whole, sharded = (state(tmp_path / f"{name}-gpt2", 2) for name in ("whole", "sharded"))
    assert_close(sharded["tree"], whole["tree"])
    # and a sharded run goes on in one process
    run_ranks(stopped, tmp_path / "out", tmp_path, models, fails=True)
    baseline = [ServerOnlyBaseline()]
    result = run(tmp_path, models, "gpt2", "resumed", 1, callbacks=baseline, ckpt_path="last")
    assert_close(result, expected["gpt2"])


# --- the plan -------------------------------------------------------------------------------------


def planned(folder: Path, models: Path, devices: int) -> dict[str, Any]:
    """Plan a run of the tiny GPT-2 and return what the first rank prints, as text and as JSON."""
    server = make_server(folder, backbone=spec(folder, models, "gpt2", sharded=devices > 1))
    trainer = make_trainer(folder / "planned", devices=devices, strategy="ddp")
    printed = []
    for as_json in (True, False):
        with redirect_stdout(StringIO()) as out:
            trainer.plan(server, make_client(), make_data(folder), as_json=as_json)
        printed.append(out.getvalue())
    return {"plan": json.loads(printed[0] or "{}"), "table": " ".join(printed[1].split())}


def test_a_plan_counts_what_each_process_holds(models: Path, tmp_path: Path) -> None:
    whole = planned(tmp_path, models, 1)["plan"]
    found, other = run_ranks(planned, tmp_path / "out", tmp_path, models, 2)
    assert other == {"plan": {}, "table": ""}
    plan = found["plan"]
    assert plan["parameters"] == whole["parameters"]
    assert plan["traffic"] == whole["traffic"]
    memory, in_one = plan["server_memory"], whole["server_memory"]
    assert memory["weights"] <= 0.55 * in_one["weights"]
    # token embeddings once more for the head they are tied to, positions, the last norm; two layers
    layer = 12 * 32**2 + 13 * 32
    assert memory["gathered"] == 4 * ((2 * 257 + 64) * 32 + 2 * 32 + 2 * layer)
    assert in_one["gathered"] == 0
    assert "gathered for a step" in found["table"]
    assert "in each of 2 processes that play all, in" in found["table"]


# --- what is refused ------------------------------------------------------------------------------


def test_one_process_has_nothing_to_shard_with(models: Path) -> None:
    with pytest.raises(ValueError, match=r"divides the model among several processes, got one"):
        load_backbone(BackboneSpec(str(models / "gpt2"), sharded=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"model_type": "gpt2"}}, "needs weights in files"),
        ({"position_offset": 0}, "must be null with `model.backbone.sharded`, got 0"),
    ],
)
def test_what_cannot_be_sharded_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneSpec(str(models / "gpt2"), sharded=True, **options))


def test_what_needs_the_model_in_one_piece_says_so(tmp_path: Path) -> None:
    server = make_server(tmp_path, backbone=BackboneSpec(sharded=True))
    with pytest.raises(ValueError, match=r"^`fedsp predict` needs the global model in one piece"):
        server.check_whole("`fedsp predict`")
