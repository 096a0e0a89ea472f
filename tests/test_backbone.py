"""The backbone with a prompt, against peft, against transformers' own model and against itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from families import (
    FAMILIES,
    POSITIONS,
    ROTARY,
    SLIDING,
    VOCAB,
    WITH_KERNELS,
    at_offset,
    logits_of,
    peft_model,
    random_prefix,
    random_text,
    tiny_backbone,
    tiny_config,
    tiny_spec,
)
from fedsp.backbone import Backbone, load_backbone
from fedsp.pretrained import BackboneSpec

P = 5
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_KERNEL = pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)


@EVERY_KERNEL
def test_prompt_logits_and_gradients_equal_pefts_prefix_tuning(family: str, kernel: str) -> None:
    backbone = tiny_backbone(family, kernel)
    ids, mask = random_text()
    valid = mask.bool()
    prefix = random_prefix(backbone, P).requires_grad_()
    own = logits_of(backbone, ids, mask, prefix)[valid]
    (own_gradient,) = torch.autograd.grad(own.square().mean(), prefix)

    # Row by row without padding: beside it, peft's prompts slide out of windows too early.
    model, weight = peft_model(tiny_backbone(family, kernel), prefix.detach())
    rows = [row[keep][None] for row, keep in zip(ids, valid, strict=True)]
    theirs = torch.cat([model(input_ids=row).logits[0] for row in rows])
    (flat,) = torch.autograd.grad(theirs.square().mean(), weight)
    num_layers, num_kv_heads, head_dim = backbone.kv_shape
    their_gradient = flat.view(P, num_layers, 2, num_kv_heads, head_dim).permute(1, 2, 3, 0, 4)

    assert (own - theirs).abs().max() < 1e-5
    assert (own_gradient - their_gradient).abs().max() < 1e-5
    assert (own_gradient.abs().amax(dim=(2, 3, 4)) > 0).all(), "keys and values of every layer"


@EVERY_KERNEL
def test_text_without_a_prompt_equals_the_models_own_logits(family: str, kernel: str) -> None:
    backbone = tiny_backbone(family, kernel)
    ids, _ = random_text()
    mask = torch.ones_like(ids)
    expected = backbone.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    empty = random_prefix(backbone, 0)
    for prefix in (None, empty):
        got = logits_of(backbone, ids, mask, prefix)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@EVERY_KERNEL
@pytest.mark.parametrize("position_offset", [None, 0, 3])
def test_padding_on_either_side_changes_nothing(
    family: str, kernel: str, position_offset: int | None
) -> None:
    backbone = at_offset(tiny_backbone(family, kernel), position_offset)
    prefix = random_prefix(backbone, P)
    text, _ = random_text(rows=1, length=7)
    alone = logits_of(backbone, text, torch.ones_like(text), prefix)[0]
    pad, real = torch.zeros(1, 4, dtype=torch.long), torch.ones_like(text)
    both = torch.cat([torch.cat([pad, text], 1), torch.cat([text, pad], 1)])
    mask = torch.cat([torch.cat([pad, real], 1), torch.cat([real, pad], 1)])
    left, right = logits_of(backbone, both, mask, prefix)
    torch.testing.assert_close(left[4:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right[:7], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "kernel", "position_offset"),
    [(*pair, None) for pair in WITH_KERNELS]
    + [(family, kernel, 0) for family, kernel in WITH_KERNELS if family in ROTARY],
)
def test_a_prompt_of_real_tokens_equals_the_tokens(
    family: str, kernel: str, position_offset: int | None
) -> None:
    # 12 tokens after a window of 9: the prompt slides out of the windows as the tokens do.
    backbone = at_offset(tiny_backbone(family, kernel), position_offset)
    ids, _ = random_text(rows=1)
    mask = torch.ones_like(ids)
    whole = logits_of(backbone, ids, mask, None)[:, P:]
    prefix = backbone.keys_values(ids[:, :P])
    assert prefix.shape == random_prefix(backbone, P).shape
    assert prefix.dtype == torch.float32
    got = logits_of(backbone, ids[:, P:], mask[:, P:], prefix)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SLIDING)
def test_a_prompt_longer_than_the_window_is_kept_whole(family: str) -> None:
    backbone = tiny_backbone(family)
    ids, _ = random_text(rows=1, length=16)
    mask = torch.ones_like(ids)
    prefix = backbone.keys_values(ids[:, :11])
    whole = logits_of(backbone, ids, mask, None)[:, 11:]
    got = logits_of(backbone, ids[:, 11:], mask[:, 11:], prefix)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SLIDING)
def test_the_prompt_slides_out_of_a_sliding_window(family: str) -> None:
    config = tiny_config(family, sliding_window=4)
    if "layer_types" in config:
        config["layer_types"] = ["sliding_attention"] * 4
    backbone = tiny_backbone(family, config=config | {"num_hidden_layers": 1, "layer_types": None})
    ids, mask = random_text(rows=1)
    near, far = (
        logits_of(backbone, ids, mask, random_prefix(backbone, P, seed)) for seed in (1, 2)
    )
    changed = (near - far).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [True] * 3 + [False] * 9


@EVERY_FAMILY
def test_label_logits_are_the_full_logits_at_the_labels(family: str) -> None:
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone, P)
    ids, mask = random_text()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :9] = -100
    seen: list[torch.Size] = []
    head = backbone.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    logits, targets, rows = backbone.label_logits(batch, prefix)
    handle.remove()

    shifted = labels[:, 1:]
    assert seen == [(len(targets), VOCAB)]
    assert targets.tolist() == shifted[shifted != -100].tolist()
    assert rows.tolist() == [i for i in range(3) for label in shifted[i] if label != -100]
    full = logits_of(backbone, ids, mask, prefix)[:, :-1].reshape(-1, VOCAB)
    expected = F.cross_entropy(full, shifted.reshape(-1))
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


def test_the_loss_without_a_prompt_is_transformers_own() -> None:
    backbone = tiny_backbone("gpt2")
    ids, mask = random_text(rows=2)
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    logits, targets, _ = backbone.label_logits(batch)
    expected = backbone.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


def test_a_batch_without_labels_gives_no_logits() -> None:
    backbone = tiny_backbone("llama")
    ids, mask = random_text()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100)}
    logits, targets, rows = backbone.label_logits(batch, random_prefix(backbone))
    assert (logits.shape, targets.shape, rows.shape) == ((0, VOCAB), (0,), (0,))


def test_the_backbone_stays_bit_for_bit_while_the_prompt_is_trained() -> None:
    backbone = tiny_backbone("llama")
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    prefix = random_prefix(backbone, P).requires_grad_()
    optimizer = torch.optim.AdamW([prefix, *backbone.parameters()], lr=0.1, weight_decay=0.1)
    ids, mask = random_text()
    for _ in range(2):
        optimizer.zero_grad()
        backbone.hidden_states(ids, mask, prefix).square().mean().backward()
        optimizer.step()
    assert not backbone.training
    assert not torch.equal(prefix, random_prefix(backbone, P))
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@EVERY_FAMILY
def test_a_float32_prompt_of_a_bfloat16_model_keeps_its_float32_gradient(family: str) -> None:
    backbone = tiny_backbone(family, dtype="bfloat16")
    prefix = random_prefix(backbone, P).requires_grad_()
    ids, mask = random_text()
    logits = logits_of(backbone, ids, mask, prefix)
    (gradient,) = torch.autograd.grad(logits.float().square().mean(), prefix)
    assert logits.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert (gradient.abs().amax(dim=(1, 2, 3, 4)) > 0).all()


def test_autocast_computes_the_layers_in_bfloat16() -> None:
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, P).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(backbone, *random_text(), prefix)
    assert logits.dtype == torch.bfloat16
    logits.float().mean().backward()
    assert prefix.grad is not None
    assert prefix.grad.dtype == torch.float32


@contextmanager
def counted_attention(backbone: Backbone) -> Iterator[list[int]]:
    """Count how often each layer's first linear part runs."""
    counts = [0] * len(backbone.layers)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    leaves = [
        next(m for m in layer.modules() if not list(m.children())) for layer in backbone.layers
    ]
    handles = [leaf.register_forward_pre_hook(count(i)) for i, leaf in enumerate(leaves)]
    yield counts
    for handle in handles:
        handle.remove()


@EVERY_KERNEL
def test_gradient_checkpointing_recomputes_every_layer_bit_for_bit(
    family: str, kernel: str
) -> None:
    plain = tiny_backbone(family, kernel)
    saving = Backbone(plain.model, replace(plain.spec, gradient_checkpointing=True))
    ids, mask = random_text()
    results = []
    for backbone, runs in ((plain, 1), (saving, 2)):
        prefix = random_prefix(backbone, P).requires_grad_()
        with counted_attention(backbone) as counts:
            hidden = backbone.hidden_states(ids, mask, prefix)
            hidden[mask.bool()].square().mean().backward()
        assert counts == [runs] * 4
        results.append((hidden, prefix.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert all("forward" not in vars(layer) for layer in plain.layers)


def test_nothing_is_recomputed_where_no_gradient_is_wanted() -> None:
    backbone = tiny_backbone("llama", gradient_checkpointing=True)
    with torch.no_grad(), counted_attention(backbone) as counts:
        backbone.hidden_states(*random_text(), random_prefix(backbone))
    assert counts == [1] * 4


def test_checkpointing_replays_dropout() -> None:
    config = tiny_config("gpt2", resid_pdrop=0.3, attn_pdrop=0.3)
    gradients = []
    for saving in (False, True):
        backbone = tiny_backbone("gpt2", config=config, gradient_checkpointing=saving).train()
        prefix = random_prefix(backbone, P).requires_grad_()
        torch.manual_seed(0)
        backbone.hidden_states(*random_text(), prefix).square().mean().backward()
        gradients.append(prefix.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_text_past_the_models_positions_is_refused_before_it_runs(family: str) -> None:
    backbone = tiny_backbone(family)
    ids, mask = random_text(rows=1, length=POSITIONS - P + 1)
    prefix = random_prefix(backbone, P)
    message = f"has {POSITIONS} positions, virtual tokens and text need {POSITIONS + 1}"
    with pytest.raises(ValueError, match=message):
        backbone.hidden_states(ids, mask, prefix)
    with pytest.raises(ValueError, match=f"need {POSITIONS + 1}"):
        backbone.keys_values(torch.zeros(1, POSITIONS + 1, dtype=torch.long))
    assert backbone.hidden_states(ids[:, 1:], mask[:, 1:], prefix).isfinite().all()
    assert at_offset(backbone, 0).hidden_states(ids, mask, prefix).isfinite().all()


def test_a_prompt_of_another_model_is_refused() -> None:
    backbone = tiny_backbone("llama")
    ids, mask = random_text()
    for foreign in (torch.zeros(4, 2, 4, P, 8), torch.zeros(3, 2, 2, P, 8), torch.zeros(2, P, 8)):
        with pytest.raises(ValueError, match=r"= \[4, 2, 2, P, 8\] was expected"):
            backbone.hidden_states(ids, mask, foreign)


def test_a_negative_position_offset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model\.backbone\.position_offset` must be at least 0"):
        load_backbone(tiny_spec("llama", position_offset=-1))


def test_a_model_with_another_treatment_of_its_logits_is_refused() -> None:
    config = tiny_config("llama", model_type="cohere", logit_scale=0.5)
    with pytest.raises(ValueError, match="whose logits differ by"):
        load_backbone(BackboneSpec(config=config))


def test_a_model_with_unequal_heads_is_refused() -> None:
    config = tiny_config(
        "llama",
        model_type="deepseek_v2",
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=4,
        num_key_value_heads=4,
        first_k_dense_replace=4,
    )
    with pytest.raises(ValueError, match="all keep keys and values of"):
        load_backbone(BackboneSpec(config=config))


def test_a_model_with_other_layers_than_attention_is_refused() -> None:
    config = tiny_config(
        "llama",
        model_type="qwen3_next",
        head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_experts=0,
    )
    with pytest.raises(ValueError, match=r"layers of kind \['linear_attention'\]"):
        load_backbone(BackboneSpec(config=config))


def test_a_model_without_a_head_is_refused() -> None:
    backbone = tiny_backbone("gpt2")
    backbone.model.set_output_embeddings(None)
    with pytest.raises(ValueError, match="with no output embedding"):
        Backbone(backbone.model, backbone.spec)


@EVERY_FAMILY
def test_the_backbone_describes_itself(family: str) -> None:
    backbone = tiny_backbone(family)
    keys = 4 if family in ("gpt2", "opt", "gpt_neox") else 2
    size = 16 if family in ("qwen3", "gemma2", "gemma3_text") else 8
    assert backbone.kv_shape == (4, keys, size)
    assert backbone.vocab_size == VOCAB
    assert backbone.max_positions == POSITIONS
    assert backbone.hidden_states(*random_text()).shape == (3, 12, backbone.hidden_size)
