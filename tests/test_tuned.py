"""Weights that travel: one name on both sides, peft's arithmetic, nothing shared by accident."""

import peft
import pytest
import torch

from families import tiny_backbone, tiny_config
from fedsp.auxiliary import KeptLayers, SharedCell
from fedsp.recipes import OffsiteTuning, WholeModel
from fedsp.tuned import AllWeights, LoRA, OuterLayers, load_weights, weights_payload

IDS = torch.arange(12).reshape(2, 6)
MASK = torch.ones_like(IDS)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3_text", "gpt_neox"])
def test_lora_computes_what_pefts_model_computes(family: str) -> None:
    ours, theirs = tiny_backbone(family), tiny_backbone(family)
    recipe = LoRA(rank=4, alpha=16)
    weights = recipe.select(ours, list(range(len(ours.layers))), seed=0)
    model = peft.get_peft_model(theirs.model, recipe.config(theirs))
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            named[f"base_model.model.{name}"].copy_(parameter)
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    got = ours.logits(ours.hidden_states(IDS, MASK))
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, tiny_backbone(family).model(input_ids=IDS).logits, atol=1e-3)


def test_lora_of_a_whole_client_model_leaves_the_servers_model_alone() -> None:
    server = tiny_backbone("gpt2")
    client = WholeModel().build(server)
    layers = list(range(len(server.layers)))
    on_client = LoRA(2).select(client.backbone, client.sources, seed=0)
    assert not [name for name, _ in server.model.named_parameters() if "lora" in name]
    on_server = LoRA(2).select(server, layers, seed=0)
    assert on_client.keys() == on_server.keys()
    assert all(torch.equal(on_client[name], on_server[name]) for name in on_server)
    assert not {id(p) for p in on_client.values()} & {id(p) for p in on_server.values()}


def test_lora_wants_clients_with_all_layers() -> None:
    client = KeptLayers(num_layers=2).build(tiny_backbone("gpt2"))
    with pytest.raises(ValueError, match=r"set `model.auxiliary` to fedsp.recipes.WholeModel"):
        LoRA().select(client.backbone, client.sources, seed=0)


def test_lora_of_unknown_modules_is_refused_by_name() -> None:
    backbone, recipe = tiny_backbone("gpt2"), LoRA(target_modules=["nowhere"])
    with pytest.raises(ValueError, match=r"`model.tuned_weights.target_modules`: .*nowhere"):
        recipe.select(backbone, range(len(backbone.layers)), seed=0)


def test_adapters_have_the_same_names_and_values_on_both_sides() -> None:
    server = tiny_backbone("gpt2", config=tiny_config("gpt2", 6))
    client = OffsiteTuning(num_adapter_layers=1, num_emulator_layers=2).build(server)
    here = OuterLayers(1).select(server, range(6), seed=0)
    there = OuterLayers(1).select(client.backbone, client.sources, seed=0)
    assert here.keys() == there.keys()
    assert {name.split(".")[0] for name in here} == {"first", "last"}
    assert all(torch.equal(here[name], there[name]) for name in here)
    first = dict(server.layers[0].named_parameters())
    assert all(here[f"first.0.{name}"] is parameter for name, parameter in first.items())


def test_adapters_that_overlap_are_refused() -> None:
    backbone = tiny_backbone("gpt2", config=tiny_config("gpt2", 2))
    with pytest.raises(ValueError, match="must fit in a model of 2 layers, got 2"):
        OuterLayers(2).select(backbone, range(2), seed=0)


def test_weights_travel_as_copies_and_come_back() -> None:
    backbone = tiny_backbone("gpt2")
    weights = AllWeights().select(backbone, range(len(backbone.layers)), seed=0)
    payload = weights_payload(weights)
    with torch.no_grad():
        for parameter in weights.values():
            parameter.zero_()
    assert any(tensor.abs().sum() > 0 for tensor in payload.values())
    load_weights(weights, payload)
    assert all(torch.equal(payload[name], weights[name]) for name in weights)


def test_weights_shared_with_the_global_model_are_never_trained_by_a_client() -> None:
    auxiliary = SharedCell().build(tiny_backbone("gpt2"))
    weights = AllWeights().select(auxiliary.backbone, auxiliary.sources, seed=0)
    with pytest.raises(ValueError, match=r"Set `model.auxiliary.train_embeddings` to true"):
        auxiliary.leave_out(weights.values())


@pytest.mark.parametrize("recipe", [OuterLayers(1), AllWeights()])
def test_half_precision_weights_cannot_be_tuned(recipe: AllWeights) -> None:
    backbone = tiny_backbone("gpt2")
    backbone.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"`model.backbone.dtype` must be float32"):
        recipe.check(backbone)
    LoRA().check(backbone)


@pytest.mark.parametrize("make", [lambda: LoRA(rank=0), lambda: OuterLayers(0)])
def test_sizes_out_of_range_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"`model.tuned_weights.\w+` must be"):
        make()
