"""A client's model, made of the hand-out on the outline of the global model, is the server's."""

from collections.abc import Callable

import pytest
import torch

from families import random_prefix, tiny_backbone, tiny_config
from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe, KeptLayers, SharedCell
from fedsp.backbone import Backbone, outline_backbone
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.handout import receive_handout
from fedsp.messages import MessageError, encode_handout
from fedsp.recipes import FirstLayers, OffsiteTuning, WholeModel

IDS = torch.arange(12).reshape(2, 6)
MASK = torch.ones_like(IDS)
RECIPES: dict[str, Callable[[], AuxiliaryRecipe]] = {
    "shared_cell": lambda: SharedCell(cell_size=2),
    "kept_layers": lambda: KeptLayers(num_layers=2, train_embeddings=True),
    "whole_model": WholeModel,
    "first_layers": lambda: FirstLayers(2),
    "offsite_tuning": lambda: OffsiteTuning(1, 1),
    "trimmed_low_rank": lambda: TrimmedVocabulary(LowRank(4), num_tokens=20),
}


def counts(backbone: Backbone) -> torch.Tensor:
    # every third token is frequent: what is kept is not simply the first rows
    return (torch.arange(backbone.vocab_size) % 3 == 0).long() + 1


def both(family: str, recipe: str) -> tuple[Backbone, Auxiliary, Auxiliary]:
    backbone = tiny_backbone(family)
    made = RECIPES[recipe]().build(backbone, counts(backbone)).requires_grad_(False)
    outline = outline_backbone(backbone.spec)
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    received = receive_handout(encode_handout(made.handout()), RECIPES[recipe](), outline)
    return backbone, made, received


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3_text", "gpt_neox", "mistral"])
def test_it_computes_the_same(family: str, recipe: str) -> None:
    _, made, received = both(family, recipe)
    prefix = random_prefix(made.backbone)
    for ids in (IDS, IDS + 40):
        batch = {"input_ids": ids, "attention_mask": MASK, "labels": ids}
        mine, mine_targets, _ = received.backbone.label_logits(batch, prefix)
        theirs, their_targets, _ = made.backbone.label_logits(batch, prefix)
        assert torch.equal(mine, theirs)
        assert torch.equal(mine_targets, their_targets)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_the_same_parameters_and_shares_what_is_shared(recipe: str) -> None:
    _, made, received = both("gpt2", recipe)
    assert list(received.trainable()) == list(made.trainable())
    assert received.num_parameters() == made.num_parameters()
    assert (received.slots, received.sources) == (made.slots, made.sources)
    assert received.summary() == made.summary()
    for name, tensor in made.handout().items():
        assert torch.equal(received.handout()[name], tensor)


def test_the_outline_is_not_changed_and_holds_nothing() -> None:
    backbone = tiny_backbone("llama")
    outline = outline_backbone(backbone.spec)
    made = KeptLayers(num_layers=2).build(backbone)
    receive_handout(encode_handout(made.handout()), KeptLayers(num_layers=2), outline)
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    assert outline.kv_shape == backbone.kv_shape


def test_another_recipes_handout_is_refused() -> None:
    backbone = tiny_backbone("gpt2")
    data = encode_handout(KeptLayers(num_layers=2).build(backbone).handout())
    with pytest.raises(MessageError, match="auxiliary_handout: expected"):
        receive_handout(data, KeptLayers(num_layers=3), outline_backbone(backbone.spec))


@pytest.mark.parametrize("name", ["vocabulary.kept", "vocabulary.row_of"])
@pytest.mark.parametrize("value", [-1, 10_000])
def test_maps_of_tokens_that_lead_nowhere_are_refused(name: str, value: int) -> None:
    backbone = tiny_backbone("gpt2")
    recipe = RECIPES["trimmed_low_rank"]()
    tensors = recipe.build(backbone, counts(backbone)).handout()
    tensors[name][3] = value
    with pytest.raises(MessageError, match=f"`{name}` must be in"):
        receive_handout(encode_handout(tensors), recipe, outline_backbone(backbone.spec))


def test_tiny_config_is_what_the_outline_is_made_of() -> None:
    backbone = tiny_backbone("gemma3_text")
    config = tiny_config("gemma3_text")
    assert outline_backbone(backbone.spec).kv_shape.num_layers == config["num_hidden_layers"]
