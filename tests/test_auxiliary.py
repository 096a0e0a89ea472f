"""The auxiliary model against deep copies of the layers; what is copied, trained and kept."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import (
    FAMILIES,
    VOCAB,
    WITH_KERNELS,
    random_prefix,
    random_text,
    tiny_backbone,
    tiny_config,
)
from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe, KeptLayers, SharedCell
from fedsp.backbone import Backbone
from fedsp.generation import generate

P = 5
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
RECIPES: list[tuple[AuxiliaryRecipe, list[int]]] = [
    (SharedCell(), [0, 0, 0, 0]),
    (SharedCell(start=1, cell_size=2), [1, 2, 1, 2]),
    (SharedCell(cell_size=4), [0, 1, 2, 3]),
    (KeptLayers(layers=[0, 2, 3]), [0, 2, 3]),
]
EVERY_RECIPE = pytest.mark.parametrize(("recipe", "sources"), RECIPES)


def reference(backbone: Backbone, sources: list[int]) -> Backbone:
    """A deep copy of the model whose layers are deep copies, each with an index of its own."""
    model = copy.deepcopy(backbone.model)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    layers = copy.deepcopy(backbone).layers
    copies = [copy.deepcopy(layers[source]) for source in sources]
    for index, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    decoder = model.get_decoder()
    name = next(n for n, child in decoder.named_children() if isinstance(child, nn.ModuleList))
    setattr(decoder, name, nn.ModuleList(copies))
    config.num_hidden_layers = len(sources)
    if kinds is not None:
        config.layer_types = [kinds[source] for source in sources]
    return Backbone(model.requires_grad_(True), backbone.spec)


def loss_and_logits(backbone: Backbone, prefix: Tensor) -> tuple[Tensor, Tensor]:
    ids, mask = random_text()
    hidden = backbone.hidden_states(ids, mask, prefix)[mask.bool()]
    logits = backbone.logits(hidden)
    return logits.square().mean() + hidden.square().mean(), logits


def same_storage(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)
@EVERY_RECIPE
def test_logits_and_gradients_equal_those_of_deep_copies(
    family: str, kernel: str, recipe: AuxiliaryRecipe, sources: list[int]
) -> None:
    backbone = tiny_backbone(family, kernel)
    auxiliary = recipe.build(backbone)
    truth = reference(backbone, sources)
    prefix = random_prefix(truth, P).requires_grad_()
    loss, logits = loss_and_logits(auxiliary.backbone, prefix)
    expected_loss, expected_logits = loss_and_logits(truth, prefix)
    assert (logits - expected_logits).abs().max() < 1e-5

    (gradient,) = torch.autograd.grad(loss, prefix, retain_graph=True)
    (expected,) = torch.autograd.grad(expected_loss, prefix, retain_graph=True)
    assert (gradient - expected).abs().max() < 1e-5
    assert (gradient.abs().amax(dim=(1, 2, 3, 4)) > 0).all(), "every repetition has its own slot"

    loss.backward()
    expected_loss.backward()
    for position, source in enumerate(sources):
        own = dict(auxiliary.backbone.layers[position].named_parameters())
        for name, parameter in own.items():
            copies = [
                dict(truth.layers[other].named_parameters())[name]
                for other, other_source in enumerate(sources)
                if other_source == source
            ]
            # Sharing adds up what each repetition would get.
            total = sum(one.grad for one in copies)
            scale = 1 + total.abs().max()
            assert (parameter.grad - total).abs().max() / scale < 1e-5, name


@EVERY_FAMILY
@pytest.mark.parametrize("hooked_before", [True, False])
def test_hidden_states_of_every_repetition_come_out_once(family: str, hooked_before: bool) -> None:
    backbone = tiny_backbone(family)
    ids, _ = random_text()
    if hooked_before:
        # transformers installs the hooks that collect hidden states on first use.
        backbone.model(input_ids=ids, output_hidden_states=True)
    cut = SharedCell(start=1, cell_size=2).build(backbone).backbone.model
    truth = reference(backbone, [1, 2, 1, 2]).model
    got = cut(input_ids=ids, output_hidden_states=True).hidden_states
    expected = truth(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 5
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@EVERY_FAMILY
def test_gradient_checkpointing_of_shared_layers_is_bit_equal(family: str) -> None:
    backbone = tiny_backbone(family)
    results = []
    for saving in (False, True):
        spec = replace(backbone.spec, gradient_checkpointing=saving)
        auxiliary = SharedCell(cell_size=2).build(Backbone(backbone.model, spec))
        prefix = random_prefix(backbone, P).requires_grad_()
        loss_and_logits(auxiliary.backbone, prefix)[0].backward()
        results.append([prefix.grad, *(p.grad for p in auxiliary.trainable().values())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@EVERY_FAMILY
@EVERY_RECIPE
def test_building_neither_copies_nor_changes_the_global_model(
    family: str, recipe: AuxiliaryRecipe, sources: list[int]
) -> None:
    backbone = tiny_backbone(family)
    modules = {id(module) for module in backbone.modules()}
    before = {name: (p, p.clone()) for name, p in backbone.named_parameters()}
    config = backbone.model.config.to_dict()
    auxiliary = recipe.build(backbone)

    assert {id(module) for module in backbone.modules()} == modules
    assert backbone.model.config.to_dict() == config
    for name, parameter in backbone.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert not parameter.requires_grad
    # What is new is the cell and what stands beside the layers; all else is the global model's.
    own = {id(p) for p in auxiliary.trainable().values()}
    shared = [p for p in auxiliary.parameters() if id(p) not in own]
    theirs = {id(p) for p in backbone.parameters()}
    assert shared
    assert all(id(p) in theirs for p in shared)
    assert not own & theirs
    cells = [sum(p.numel() for p in backbone.layers[i].parameters()) for i in set(sources)]
    beside = auxiliary.summary()["norm"]
    assert sum(p.numel() for p in auxiliary.trainable().values()) == sum(cells) + beside


@EVERY_FAMILY
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_embeddings_and_head_are_shared_unless_they_are_trained(
    family: str, train_embeddings: bool
) -> None:
    backbone = tiny_backbone(family)
    auxiliary = SharedCell(train_embeddings=train_embeddings).build(backbone)
    pairs = [
        (backbone.model.get_input_embeddings(), auxiliary.backbone.model.get_input_embeddings()),
        (backbone.model.get_output_embeddings(), auxiliary.backbone.model.get_output_embeddings()),
    ]
    tied = pairs[0][0].weight is pairs[1][0].weight
    assert (pairs[0][1].weight is pairs[1][1].weight) == tied
    for theirs, own in pairs:
        assert (own.weight is theirs.weight) != train_embeddings
        assert same_storage(own.weight, theirs.weight) != train_embeddings
        assert torch.equal(own.weight, theirs.weight)
        assert own.weight.requires_grad == train_embeddings
    assert len(auxiliary.trainable()) == len([p for p in auxiliary.parameters() if p.requires_grad])


@EVERY_FAMILY
def test_a_bfloat16_model_gives_a_float32_cell_under_shared_embeddings(family: str) -> None:
    backbone = tiny_backbone(family, dtype="bfloat16")
    auxiliary = SharedCell(start=1).build(backbone)
    assert {p.dtype for p in auxiliary.trainable().values()} == {torch.float32}
    embedding = auxiliary.backbone.model.get_input_embeddings().weight
    assert embedding is backbone.model.get_input_embeddings().weight
    prefix = random_prefix(backbone, P)
    ids, mask = random_text()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    hidden = auxiliary.backbone.hidden_states(ids, mask, prefix)
    logits, targets, _ = auxiliary.backbone.label_logits(batch, prefix)
    assert hidden.dtype == torch.float32
    assert logits.shape == (len(targets), VOCAB)
    # The reference is the same model in float32 throughout.
    exact = tiny_backbone(family, dtype="bfloat16")
    exact.model.float()
    expected = SharedCell(start=1).build(exact).backbone.hidden_states(ids, mask, prefix)
    error = (hidden - expected)[mask.bool()].abs().max() / expected[mask.bool()].abs().max()
    # The embedding's factor in Gemma is rounded to bfloat16 with its table.
    assert error < (2e-2 if family.startswith("gemma") else 1e-5)


def test_generation_of_mixed_formats_is_refused() -> None:
    auxiliary = SharedCell().build(tiny_backbone("llama", dtype="bfloat16"))
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="`generate` needs embeddings and layers of one dtype"):
        generate(auxiliary.backbone, ids, torch.ones_like(ids), max_new_tokens=1)


@EVERY_RECIPE
def test_an_auxiliary_generates_with_a_prompt(recipe: AuxiliaryRecipe, sources: list[int]) -> None:
    backbone = tiny_backbone("gemma3_text")
    truth = reference(backbone, sources)
    prefix = random_prefix(truth, P)
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    options["pad_token_id"] = 0
    got = generate(recipe.build(backbone).backbone, ids, torch.ones_like(ids), prefix, **options)
    assert torch.equal(got, generate(truth, ids, torch.ones_like(ids), prefix, **options))


def moved(auxiliary: Auxiliary) -> Auxiliary:
    """Move every trained parameter, as training would."""
    with torch.no_grad():
        for parameter in auxiliary.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return auxiliary


@EVERY_FAMILY
def test_the_state_comes_back_bit_for_bit_and_is_only_what_is_trained(family: str) -> None:
    backbone = tiny_backbone(family)
    recipe = SharedCell(start=1, cell_size=2)
    first, second = moved(recipe.build(backbone)), recipe.build(backbone)
    state = first.state()
    second.load(state)
    for name, parameter in second.trainable().items():
        assert torch.equal(parameter, first.trainable()[name])
        assert torch.equal(parameter, state[name])
        assert not same_storage(parameter, state[name])
    prefix = random_prefix(backbone, P)
    assert torch.equal(
        loss_and_logits(first.backbone, prefix)[1], loss_and_logits(second.backbone, prefix)[1]
    )
    assert state.keys() == first.trainable().keys() == recipe.build(backbone).trainable().keys()
    moved(second)
    assert torch.equal(state[next(iter(state))], first.trainable()[next(iter(state))])


def test_the_trained_parameters_stay_the_same_ones_while_a_stage_freezes_them() -> None:
    auxiliary = SharedCell().build(tiny_backbone("llama"))
    names = list(auxiliary.trainable())
    auxiliary.requires_grad_(False)
    assert list(auxiliary.trainable()) == names
    assert list(copy.deepcopy(auxiliary).trainable()) == names


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    auxiliary = SharedCell().build(tiny_backbone("llama"))
    before, foreign = auxiliary.state(), moved(SharedCell().build(tiny_backbone("llama"))).state()
    name = next(iter(foreign))
    cases = [
        ({k: v for k, v in foreign.items() if k != name}, f"lacks \\['{name}'\\]"),
        ({**foreign, "extra": torch.zeros(1)}, r"in excess \['extra'\]"),
        ({**foreign, name: foreign[name][:-1]}, f"'{name}' of the auxiliary model must be"),
        ({**foreign, list(foreign)[-1]: foreign[list(foreign)[-1]].half()}, "got .* torch.float16"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            auxiliary.load(state)
    assert all(torch.equal(tensor, before[k]) for k, tensor in auxiliary.state().items())


@EVERY_FAMILY
def test_the_handout_is_everything_once(family: str) -> None:
    backbone = tiny_backbone(family, dtype="bfloat16")
    auxiliary = moved(SharedCell(cell_size=2).build(backbone))
    handout = auxiliary.handout()
    assert sum(tensor.numel() for tensor in handout.values()) == auxiliary.num_parameters()
    assert len({tensor.data_ptr() for tensor in handout.values()}) == len(handout)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in handout.values())
    assert all(torch.equal(handout[name], p) for name, p in auxiliary.trainable().items())
    # A client with the model's code and the handout alone computes the same.
    client = SharedCell(cell_size=2).build(tiny_backbone(family, dtype="bfloat16", seed=7))
    for name, parameter in client.backbone.model.named_parameters():
        with torch.no_grad():
            parameter.copy_(handout[name])
    prefix = random_prefix(backbone, P)
    assert torch.equal(
        loss_and_logits(client.backbone, prefix)[1], loss_and_logits(auxiliary.backbone, prefix)[1]
    )


def test_the_summary_of_llama_counted_by_hand() -> None:
    auxiliary = SharedCell(cell_size=2).build(tiny_backbone("llama"))
    table = VOCAB * 32
    # Query and output 32 x 32, key and value 32 x 16, three 32 x 48 in the MLP, two norms.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    total = 2 * table + 2 * layer + 32
    assert auxiliary.summary() == {
        "num_layers": 4,
        "embeddings": table,
        "cell": 2 * layer,
        "norm": 32,
        "head": table,
        "total": total,
        "trainable": 2 * layer + 32,
        "share_of_global": total / (2 * table + 4 * layer + 32),
    }
    assert auxiliary.num_parameters() == total


def test_a_tied_head_and_learned_positions_are_embeddings() -> None:
    summary = SharedCell().build(tiny_backbone("gpt2")).summary()
    assert (summary["embeddings"], summary["head"], summary["norm"]) == (
        VOCAB * 32 + 64 * 32,
        0,
        2 * 32,
    )


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        (SharedCell(start=3), (0, 1, 2, 3, 4, 5)),
        (KeptLayers(layers=[1, 4]), (1, 4)),
        (KeptLayers(num_layers=1), (0,)),
        (KeptLayers(num_layers=2), (0, 5)),
        (KeptLayers(num_layers=3), (0, 2, 5)),
        (KeptLayers(num_layers=6), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_every_layer_reads_the_slot_of_its_place(
    recipe: AuxiliaryRecipe, layers: tuple[int, ...]
) -> None:
    backbone = tiny_backbone("gemma3_text", config=tiny_config("gemma3_text", 6))
    auxiliary = recipe.build(backbone)
    assert auxiliary.slots == tuple((layer,) for layer in layers)
    assert auxiliary.backbone.kv_shape == (len(layers), 2, 16)
    config = auxiliary.backbone.model.config
    assert config.num_hidden_layers == len(config.layer_types) == len(layers)


def test_all_layers_kept_are_the_global_model() -> None:
    backbone = tiny_backbone("gpt2")
    prefix = random_prefix(backbone, P)
    whole = KeptLayers(num_layers=4).build(backbone).backbone
    expected = loss_and_logits(backbone, prefix)[1]
    assert torch.equal(loss_and_logits(whole, prefix)[1], expected)


def test_training_the_auxiliary_leaves_the_global_model_alone() -> None:
    backbone = tiny_backbone("llama")
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    auxiliary = SharedCell().build(backbone)
    optimizer = torch.optim.AdamW(auxiliary.trainable().values(), lr=0.1)
    loss_and_logits(auxiliary.backbone, random_prefix(backbone, P))[0].backward()
    optimizer.step()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell_size": 0}, r"`model\.auxiliary\.cell_size` must be at least 1, got 0"),
        ({"start": -1}, r"`model\.auxiliary\.start` must be at least 0, got -1"),
        (
            {"cell_size": 3},
            r"`model\.auxiliary\.cell_size` must divide .* 4 layers, got 3\. .*1, 2, 4",
        ),
        ({"cell_size": 8}, r"`model\.auxiliary\.cell_size` must divide"),
        ({"start": 3, "cell_size": 2}, r"at most the global model's 4 layers, got 3 \+ 2"),
    ],
)
def test_a_cell_that_does_not_fit_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedCell(**settings).build(tiny_backbone("gpt2"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of .* must be given, got None and None"),
        ({"layers": [0], "num_layers": 1}, r"exactly one of .* got \[0\] and 1"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 1]}, r"each once and in rising order, got \[1, 1\]"),
        ({"layers": [2, 1]}, r"each once and in rising order, got \[2, 1\]"),
        ({"layers": [-1, 1]}, r"`model\.auxiliary\.layers` must be in \[0, 3\].*got \[-1, 1\]"),
        ({"layers": [1, 4]}, r"must be in \[0, 3\].*got \[1, 4\]"),
        ({"num_layers": 0}, r"`model\.auxiliary\.num_layers` must be at least 1, got 0"),
        ({"num_layers": 5}, r"`model\.auxiliary\.num_layers` must be at most .* 4 layers, got 5"),
    ],
)
def test_kept_layers_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptLayers(**settings).build(tiny_backbone("gpt2"))
