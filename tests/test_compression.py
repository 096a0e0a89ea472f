"""Smaller auxiliary models against the full ones: equal where nothing is lost, counted by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, random_prefix, tiny_backbone
from fedsp.auxiliary import AuxiliaryRecipe, KeptLayers, SharedCell
from fedsp.backbone import Backbone
from fedsp.compression import LowRank, TrimmedVocabulary, _second_moments
from fedsp.vocabulary import trim

P = 5
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def counts(backbone: Backbone, kept: range) -> Tensor:
    result = torch.zeros(backbone.vocab_size, dtype=torch.long)
    result[list(kept)] = 3
    return result


def text(tokens: range, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokens.start, tokens.stop, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@EVERY_FAMILY
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_on_kept_tokens_it_is_the_full_model_and_scores_only_them(
    family: str, train_embeddings: bool
) -> None:
    backbone = tiny_backbone(family)
    full = KeptLayers(num_layers=4, train_embeddings=train_embeddings)
    small = TrimmedVocabulary(full, 20).build(backbone, counts(backbone, range(5, 25)))
    batch, prefix = text(range(5, 25)), random_prefix(backbone, P)
    got, targets, _ = small.backbone.label_logits(batch, prefix)
    expected, ids, _ = backbone.label_logits(batch, prefix)
    assert (got - expected[:, 5:25]).abs().max() < 1e-5
    assert torch.equal(targets, ids - 5)
    hidden = backbone.hidden_states(batch["input_ids"], batch["attention_mask"], prefix)
    part = backbone.logits(hidden, small.backbone.known_tokens)
    assert (part - backbone.logits(hidden)[..., 5:25]).abs().max() < 1e-5
    table = small.backbone.model.get_input_embeddings().weight
    assert any(table is p for p in small.trainable().values()) == train_embeddings


def test_the_summary_and_the_handout_count_what_is_left() -> None:
    backbone = tiny_backbone("llama")
    whole = KeptLayers(num_layers=4).build(backbone)
    small = TrimmedVocabulary(KeptLayers(num_layers=4), 20).build(
        backbone, counts(backbone, range(5, 25))
    )
    width, vocab = backbone.hidden_size, backbone.vocab_size
    tables = 1 + (whole.summary()["head"] > 0)
    assert whole.num_parameters() - small.num_parameters() == tables * (vocab - 20) * width
    handout = small.handout()
    assert handout["vocabulary.kept"].tolist() == list(range(5, 25))
    assert handout["vocabulary.row_of"].shape == (vocab,)
    assert backbone.model.get_input_embeddings().weight.shape == (vocab, width)


def test_an_unknown_token_is_read_as_its_neighbour_and_never_predicted() -> None:
    backbone = tiny_backbone("gpt2")
    with torch.no_grad():
        table = backbone.model.get_input_embeddings().weight
        table[30] = 1.7 * table[7]
    small = TrimmedVocabulary(KeptLayers(num_layers=4), 20).build(
        backbone, counts(backbone, range(5, 25))
    )
    batch = text(range(5, 25))
    batch["input_ids"][0, 4], batch["labels"][0, 5] = 30, 31
    like = {**batch, "input_ids": batch["input_ids"].clone()}
    like["input_ids"][0, 4] = 7
    logits, targets, rows = small.backbone.label_logits(batch)
    assert torch.equal(logits, small.backbone.label_logits(like)[0])
    assert len(targets) == len(rows) == 2 * 6 - 1


def test_the_most_frequent_tokens_are_kept() -> None:
    embeddings = torch.eye(6)
    vocabulary = trim(embeddings, torch.tensor([0, 5, 2, 9, 2, 0]), 3)
    assert vocabulary.kept.tolist() == [1, 2, 3]
    assert vocabulary.rows(torch.tensor([1, 2, 3])).tolist() == [0, 1, 2]
    everything = trim(embeddings, torch.ones(6), 99)
    assert everything.kept.tolist() == list(range(6))


@EVERY_FAMILY
@pytest.mark.parametrize("recipe", [KeptLayers(num_layers=3), SharedCell(cell_size=2)])
def test_low_rank_is_the_truncated_svd_of_every_projection(
    family: str, recipe: AuxiliaryRecipe
) -> None:
    """Against the full model with numpy's best approximations written into its weights."""
    backbone = tiny_backbone(family)
    thin, truth = LowRank(2, recipe).build(backbone), recipe.build(backbone)
    changed = set()
    for module in truth.backbone.layers.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or weight in changed:
            continue
        if 2 * sum(weight.shape) < weight.numel():
            left, sizes, right = torch.linalg.svd(weight.detach().double())
            best = left[:, :2] @ torch.diag(sizes[:2]) @ right[:2]
            weight.data = best.float()
            changed.add(weight)
    assert changed
    batch, prefix = (
        text(range(5, 25)),
        random_prefix(backbone, P)[[slot for (slot,) in truth.slots]],
    )
    got, expected = (it.backbone.label_logits(batch, prefix)[0] for it in (thin, truth))
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    assert thin.num_parameters() < truth.num_parameters()


@EVERY_FAMILY
def test_calibrated_it_is_the_best_of_its_rank_for_the_inputs_that_occur(family: str) -> None:
    """Oracle: Eckart and Young on the outputs themselves, as recorded in the global model."""
    backbone, rank = tiny_backbone(family), 3
    recipe = LowRank(rank, calibration_batches=2)
    auxiliary, prefix = recipe.build(backbone), random_prefix(backbone, P)
    batches = [text(range(3, 60), rows=4), text(range(3, 60), rows=2, length=6)]
    batches[0]["attention_mask"][0, 7:] = 0
    layer = dict(backbone.layers[1].named_modules())
    thin = dict(auxiliary.backbone.layers[1].named_modules())
    names = [name for name, module in thin.items() if hasattr(module, "down")]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    real = Tensor()

    def keep(name: str) -> Any:
        return lambda _, args: seen[name].append(args[0].flatten(0, -2)[real.flatten()].double())

    hooks = [layer[name].register_forward_pre_hook(keep(name)) for name in names]
    for batch in batches:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            backbone.hidden_states(batch["input_ids"], batch["attention_mask"], prefix)
    for hook in hooks:
        hook.remove()
    recipe.calibrate(auxiliary, backbone, batches, prefix)
    assert len(names) >= 2
    for name in names:
        inputs = torch.cat(seen[name])
        weight = layer[name].weight.double()
        outputs = inputs @ (weight if isinstance(layer[name], Conv1D) else weight.T)
        # of the outputs, no map of rank r gives more than their first r principal directions
        fewest = torch.linalg.svdvals(outputs)[rank:].pow(2).sum()
        got = inputs @ (thin[name].up @ thin[name].down).double().T
        assert (got - outputs).pow(2).sum() <= fewest * 1.001 + 1e-6 * outputs.pow(2).sum()


def sums_by_module(
    backbone: Any, modules: list[nn.Linear], batches: list[dict[str, Tensor]], prefix: Tensor
) -> dict[nn.Module, Tensor]:
    """Sum x x^T for every module by itself."""
    sums: dict[nn.Module, Tensor] = {}
    real = Tensor()

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)[real.flatten()]
        sums[module] = sums[module] + rows.T @ rows if module in sums else rows.T @ rows

    hooks = [module.register_forward_pre_hook(add) for module in modules]
    for batch in batches:
        real = batch["attention_mask"].bool()
        backbone.hidden_states(batch["input_ids"], batch["attention_mask"], prefix)
    for hook in hooks:
        hook.remove()
    return sums


@torch.no_grad()
@EVERY_FAMILY
def test_projections_of_one_input_have_one_sum_with_the_bits_of_their_own(family: str) -> None:
    """Four a layer, whatever the projections: before and in attention, before and in the MLP."""
    backbone = tiny_backbone(family)
    kinds = nn.Linear | Conv1D
    modules = [it for layer in backbone.layers for it in layer.modules() if isinstance(it, kinds)]
    batches = [text(range(3, 60), rows=4), text(range(3, 60), rows=2, length=6)]
    batches[0]["attention_mask"][0, 7:] = 0
    prefix = random_prefix(backbone, P)
    moments = _second_moments(backbone, modules, batches, prefix)
    assert len({moment.data_ptr() for moment in moments.values()}) == 4 * len(backbone.layers)
    expected = sums_by_module(backbone, modules, batches, prefix)
    assert moments.keys() == expected.keys() == set(modules)
    assert all(torch.equal(moments[module], expected[module]) for module in modules)


class Reading(nn.Module):
    """Three projections of which the first two read the same tensor in short texts only."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))

    def hidden_states(self, ids: Tensor, mask: Tensor, prefix: Tensor) -> None:
        inputs = ids[..., None] * torch.tensor([1.0, 2.0])
        self.parts[0](inputs)
        self.parts[1](inputs if ids.shape[1] < 3 else inputs + 1)
        self.parts[2](inputs)
        self.parts[2](inputs)


@torch.no_grad()
def test_projections_that_read_together_in_some_batches_only_are_told_apart() -> None:
    reading: Any = Reading()
    batches = [
        {"input_ids": torch.ones(1, n), "attention_mask": torch.ones(1, n)} for n in (2, 3, 2)
    ]
    moments = _second_moments(reading, reading.parts, batches, Tensor())
    expected = sums_by_module(reading, reading.parts, batches, Tensor())
    # 4 + 3 tokens of (1, 2), or the 3 of them as (2, 3); the last one reads all twice
    assert moments[reading.parts[0]].tolist() == [[7, 14], [14, 28]]
    assert moments[reading.parts[1]].tolist() == [[16, 26], [26, 43]]
    assert moments[reading.parts[2]].tolist() == [[14, 28], [28, 56]]
    assert all(torch.equal(moments[part], expected[part]) for part in reading.parts)


def test_low_rank_keeps_sharing_and_what_it_would_not_shrink() -> None:
    backbone = tiny_backbone("gpt2")
    shared = LowRank(2, SharedCell()).build(backbone)
    kept = LowRank(2, KeptLayers(num_layers=1)).build(backbone)
    assert shared.num_parameters() == kept.num_parameters()
    every = LowRank(2).build(backbone)
    assert every.sources == (0, 1, 2, 3)
    same = LowRank(10_000, SharedCell()).build(backbone)
    assert same.num_parameters() == SharedCell().build(backbone).num_parameters()


def test_what_makes_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model.auxiliary.num_tokens` must be at least 2"):
        TrimmedVocabulary(SharedCell(), 1)
    with pytest.raises(ValueError, match=r"`model.auxiliary.rank` must be at least 1"):
        LowRank(0, SharedCell())
    with pytest.raises(ValueError, match=r"`model.auxiliary.calibration_batches` must be at least"):
        LowRank(1, calibration_batches=-1)
    with pytest.raises(ValueError, match=r"`data.server` and `data.public` are null"):
        TrimmedVocabulary(SharedCell(), 5).build(tiny_backbone("gpt2"))
