"""Generation behind a prompt, against greedy loops by hand and against peft."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families import (
    POSITIONS,
    SLIDING,
    WITH_KERNELS,
    at_offset,
    logits_of,
    peft_model,
    random_prefix,
    random_text,
    tiny_backbone,
)
from fedsp.backbone import Backbone
from fedsp.generation import generate

P = 5
EVERY_KERNEL = pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)


def greedy(backbone: Backbone, ids: Tensor, prefix: Tensor | None, num_new: int) -> list[int]:
    for _ in range(num_new):
        logits = logits_of(backbone, ids, torch.ones_like(ids), prefix)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -num_new:].tolist()


@EVERY_KERNEL
@pytest.mark.parametrize("position_offset", [None, 0])
def test_generation_equals_a_greedy_loop_by_hand(
    family: str, kernel: str, position_offset: int | None
) -> None:
    backbone = at_offset(tiny_backbone(family, kernel), position_offset)
    long, short = random_text(rows=1, length=9)[0], random_text(rows=1, length=5, seed=9)[0]
    ids = torch.cat([long, F.pad(short, (4, 0))])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for prefix in (random_prefix(backbone, P), None):
        got = generate(backbone, ids, mask, prefix, **options)[:, 9:].tolist()
        assert got == [greedy(backbone, text, prefix, 6) for text in (long, short)]


def test_beam_search_equals_pefts() -> None:
    backbone = tiny_backbone("llama")
    ids, mask = random_text(rows=1)
    prefix = random_prefix(backbone, P)
    options = {"max_new_tokens": 5, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    got = generate(backbone, ids, mask, prefix, num_return_sequences=2, **options)
    model, _ = peft_model(tiny_backbone("llama"), prefix)
    expected = model.generate(input_ids=ids, attention_mask=mask, num_return_sequences=2, **options)
    assert got.tolist() == expected.tolist()


def test_generation_needs_padding_on_the_left() -> None:
    backbone = tiny_backbone("llama")
    ids, mask = random_text(rows=2)
    with pytest.raises(ValueError, match="padded on the left, got padding on the right"):
        generate(backbone, ids, mask, max_new_tokens=1)


@pytest.mark.parametrize("family", SLIDING)
def test_text_goes_on_behind_a_prompt_longer_than_the_window(family: str) -> None:
    backbone = tiny_backbone(family)
    ids, _ = random_text(rows=1, length=16)
    mask = torch.ones_like(ids)
    prefix = backbone.keys_values(ids[:, :11])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = generate(backbone, ids[:, 11:], mask[:, 11:], prefix, **options)[0, 5:]
    assert generated.tolist() == greedy(backbone, ids, None, 4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_text_that_would_pass_the_models_positions_is_refused(family: str) -> None:
    backbone = tiny_backbone(family)
    ids, mask = random_text(rows=1, length=POSITIONS - P - 1)
    with pytest.raises(ValueError, match=f"virtual tokens and text need {POSITIONS + 1}"):
        generate(backbone, ids, mask, random_prefix(backbone, P), max_new_tokens=2)
