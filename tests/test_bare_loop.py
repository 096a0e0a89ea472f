"""fedsp against rounds written by hand in plain PyTorch: both end in the same prompt."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fedsp.auxiliary import SharedCell
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.partition import BySizes
from fedsp.pretrained import BackboneSpec
from fedsp.server import SoftPromptSpec
from fedsp.soft_prompt import TextInit
from fedsp.stages import Stage
from tiny import adamw, files, make_client, make_data, make_server, make_trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from round_overhead import RATES, Case, Race

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "activation_function": "gelu_pytorch_tanh",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def small() -> TrimmedVocabulary:
    return TrimmedVocabulary(LowRank(rank=4, calibration_batches=0), num_tokens=8)


CASES = {
    "prompt stage only": Case(GPT2, SharedCell, 2, 0, 3, 2),
    "auxiliary stage": Case(GPT2, SharedCell, 2, 2, 3, 2),
    "low rank, few tokens": Case(GPT2, small, 2, 0, 3, 2),
}


def run(case: Case, precision: Any, folder: Path, **rates: float) -> Race:
    """Three rounds of both; `rates` are other learning rates for the plain loop."""
    race = Race(case, precision == "bf16-mixed", {**RATES, **rates})
    tokenizer, _ = files(folder)
    server = make_server(
        folder,
        backbone=BackboneSpec(tokenizer, config=GPT2, tokenizer=tokenizer),
        soft_prompt=SoftPromptSpec(num_virtual_tokens=4, initializer=TextInit()),
        training=Stage(case.server_steps, adamw(RATES["server"])),
        auxiliary=case.recipe(),
        initial_distillation=None,
    )
    client = make_client(
        auxiliary=Stage(case.auxiliary_steps, adamw(RATES["model"])),
        soft_prompt=Stage(case.prompt_steps, adamw(RATES["prompt"])),
        dropout=0.0,
    )
    # clients of different sizes and texts of different lengths: partial batches and padding
    data = make_data(folder, partitioner=BySizes([0.9, 0.1]), selection=None, test=None)
    make_trainer(folder / "run", precision=precision, callbacks=[race]).fit(server, client, data)
    return race


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("precision", "atol"), [("32-true", 1e-5), ("bf16-mixed", 1e-3)])
def test_rounds_end_in_the_prompt_of_a_plain_loop(
    case: Case, precision: Any, atol: float, tmp_path: Path
) -> None:
    race = run(case, precision, tmp_path)
    assert [len(clocks) for clocks in race.seconds.values()] == [3, 3]
    assert race.difference <= atol
    assert (race.server.prompt - race.initial).abs().max() > 0.01


@pytest.mark.parametrize("party", ["prompt", "server"])
def test_another_learning_rate_in_the_plain_loop_shows(party: str, tmp_path: Path) -> None:
    race = run(CASES["prompt stage only"], "32-true", tmp_path, **{party: 0.03})
    assert race.difference > 1e-3
