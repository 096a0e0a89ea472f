"""Frozen weights in 8 and 4 bits: transformers' own model is the oracle, where bitsandbytes is."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from families import random_prefix, random_text, tiny_backbone, tiny_config
from fedsp.auxiliary import KeptLayers
from fedsp.backbone import Backbone, load_backbone
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.gathering import gathered
from fedsp.pretrained import BackboneSpec
from fedsp.tuned import LoRA
from tiny import files, fit, make_data, make_server

with_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
BITS = pytest.mark.parametrize("bits", ["8bit", "4bit"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    config = tiny_config("llama", vocab_size=257, hidden_size=128, intermediate_size=256)
    tiny_backbone("llama", config=config).model.save_pretrained(folder)
    return folder


def load(folder: Path, bits: Any) -> Backbone:
    return load_backbone(BackboneSpec(str(folder), quantization=bits))


@torch.no_grad()
def logits(backbone: Backbone, prefix: Tensor | None) -> Tensor:
    ids, mask = random_text(rows=1)
    return backbone.logits(backbone.hidden_states(ids, mask, prefix))


@with_library
@BITS
def test_it_is_the_model_that_transformers_quantises(folder: Path, bits: str) -> None:
    backbone = load(folder, bits)
    settings = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    theirs.train(bits == "4bit")  # without dropout: no layer packs its weights for inference
    ids, _ = random_text(rows=1)
    with torch.no_grad():
        assert torch.equal(logits(backbone, None), theirs(ids).logits)
    plain = load(folder, None)
    assert not torch.equal(logits(backbone, None), logits(plain, None))
    weight = backbone.layers[0].self_attn.q_proj.weight
    assert weight.numel() * weight.element_size() <= plain.hidden_size**2


@with_library
@BITS
def test_a_prompt_gets_the_gradient_of_the_model_in_plain_numbers(folder: Path, bits: str) -> None:
    """8-bit products also round their inputs, so that only 4 bits are as exact as that."""
    backbone = load(folder, bits)
    plain = gathered(backbone, range(len(backbone.layers)))
    gradients = []
    for model in (backbone, plain):
        prefix = random_prefix(model).requires_grad_()
        ids, mask = random_text()
        hidden = model.hidden_states(ids, mask, prefix)
        (gradient,) = torch.autograd.grad(model.logits(hidden)[mask.bool()].pow(2).mean(), prefix)
        gradients.append(gradient.flatten())
    similarity = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert similarity > (0.9999 if bits == "4bit" else 0.97)


@with_library
@BITS
def test_an_auxiliary_model_is_made_of_what_the_weights_stand_for(folder: Path, bits: str) -> None:
    backbone = load(folder, bits)
    sources = range(len(backbone.layers))
    auxiliary = KeptLayers(num_layers=4).build(gathered(backbone, sources))
    close = 1e-4 if bits == "4bit" else 0.2
    prefix = random_prefix(backbone)
    expected = logits(backbone, prefix)
    assert (logits(auxiliary.backbone, prefix) - expected).abs().max() < close * expected.std()
    assert all(p.dtype == torch.float32 for p in auxiliary.trainable().values())


@with_library
@BITS
def test_a_run_is_close_to_that_of_the_plain_model(tmp_path: Path, folder: Path, bits: Any) -> None:
    tokenizer, _ = files(tmp_path)
    losses = []
    for quantization in (None, bits):
        spec = BackboneSpec(str(folder), tokenizer=tokenizer, quantization=quantization)
        recipe = TrimmedVocabulary(LowRank(4, calibration_batches=2), 100)
        server = make_server(tmp_path, backbone=spec, auxiliary=recipe)
        trainer = fit(tmp_path, tmp_path / str(quantization), server=server, num_rounds=2)
        losses.append([metrics["server/val_loss"] for metrics in trainer.history.rounds])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_what_cannot_be_quantised_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`model.backbone.quantization` 4bit needs bitsandbytes"):
        load(folder, "4bit")
    monkeypatch.setattr("fedsp.quantization.find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"must be null with `model.backbone.config`, got 8bit"):
        load_backbone(BackboneSpec(str(folder), config={"model_type": "gpt2"}, quantization="8bit"))


@with_library
def test_beside_quantised_weights_only_a_prompt_is_tuned(tmp_path: Path, folder: Path) -> None:
    tokenizer, _ = files(tmp_path)
    spec = BackboneSpec(str(folder), tokenizer=tokenizer, quantization="4bit")
    server = make_server(tmp_path, backbone=spec, tuned_weights=LoRA())
    with pytest.raises(ValueError, match=r"`model.tuned_weights` needs .* to be null, got 4bit"):
        fit(tmp_path, tmp_path / "run", server=server, data=make_data(tmp_path))
    assert not (tmp_path / "run").exists()
