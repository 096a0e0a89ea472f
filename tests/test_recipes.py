"""Client models of the methods that FedSP is compared with."""

import pytest
import torch

from families import random_prefix, tiny_backbone, tiny_config
from fedsp.recipes import FirstLayers, OffsiteTuning, WholeModel

IDS = torch.arange(12).reshape(2, 6)
MASK = torch.ones_like(IDS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_the_whole_model_is_the_global_one_without_a_copy(family: str) -> None:
    backbone = tiny_backbone(family)
    auxiliary = WholeModel().build(backbone)
    prefix = random_prefix(backbone)
    expected = backbone.hidden_states(IDS, MASK, prefix)
    assert torch.equal(auxiliary.backbone.hidden_states(IDS, MASK, prefix), expected)
    theirs = {id(parameter) for parameter in backbone.model.parameters()}
    assert {id(parameter) for parameter in auxiliary.backbone.model.parameters()} == theirs
    assert not auxiliary.trainable()


def test_first_layers_stand_for_equal_runs_of_slots() -> None:
    assert FirstLayers(2).sources(6) == [0, 1]
    assert FirstLayers(2).slots(6) == [[0, 1, 2], [3, 4, 5]]


def test_first_layers_must_divide_the_depth() -> None:
    with pytest.raises(ValueError, match="must divide the global model's 6 layers, got 4"):
        FirstLayers(4).check(6)
    with pytest.raises(ValueError, match=r"`model.auxiliary.num_layers` must be at least 1, got 0"):
        FirstLayers(0)


@pytest.mark.parametrize(
    ("adapters", "emulator", "layers"),
    [(1, 1, [0, 3, 5]), (2, 2, [0, 1, 2, 3, 4, 5]), (2, 1, [0, 1, 3, 4, 5]), (1, 0, [0, 5])],
)
def test_adapters_stand_at_both_ends_and_the_emulator_between(
    adapters: int, emulator: int, layers: list[int]
) -> None:
    assert OffsiteTuning(adapters, emulator).sources(6) == layers


def test_only_the_emulator_is_taught() -> None:
    backbone = tiny_backbone("gpt2", config=tiny_config("gpt2", 6))
    auxiliary = OffsiteTuning(num_adapter_layers=2, num_emulator_layers=1).build(backbone)
    emulator = {id(parameter) for parameter in auxiliary.backbone.layers[2].parameters()}
    taught = {id(parameter) for parameter in auxiliary.trainable().values()}
    assert emulator <= taught
    outer = [auxiliary.backbone.layers[idx] for idx in (0, 1, 3, 4)]
    assert not taught & {id(p) for layer in outer for p in layer.parameters()}


def test_an_emulator_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the global model's 4 layers, got 2 \* 2 \+ 1"):
        OffsiteTuning(2, 1).check(4)
