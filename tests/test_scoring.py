"""Likelihoods of choices behind one run of their prompt, against a run for each choice."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from families import FAMILIES, WITH_KERNELS, peft_model, random_prefix, tiny_backbone
from fedsp.auxiliary import KeptLayers
from fedsp.backbone import Backbone
from fedsp.collate import collate_choices
from fedsp.examples import Example
from fedsp.scoring import score

# the second prompt is longer than the sliding windows of the tiny models, the third question has a
# single choice, the fourth has no prompt
QUESTIONS = [
    Example([5, 6, 7], [[8], [9, 10, 11]], 1, [1, 3]),
    Example(list(range(20, 34)), [[13, 14], [15], [16, 17, 18, 19]], 0, [2, 1, 4]),
    Example([40, 41], [[42, 43]], 0, [2]),
    Example([], [[50, 51, 52], [53, 54]], 0, [3, 2]),
]


def expected_scores(
    logits_of: Callable[[Tensor], Tensor], questions: list[Example] = QUESTIONS
) -> tuple[Tensor, Tensor]:
    """Return token losses of the answers and every choice's log-likelihood, run one by one."""
    of_answers, sums = [], []
    for question in questions:
        for index, choice in enumerate(question.completions):
            ids = torch.tensor([question.prompt_ids + choice])
            logs = logits_of(ids)[0, :-1].float().log_softmax(-1)
            logs = logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(choice) :]
            sums.append(logs.sum())
            if index == question.answer:
                of_answers.append(-logs)
    return torch.cat(of_answers), torch.stack(sums)


def own_logits(backbone: Backbone, prefix: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda ids: backbone.logits(backbone.hidden_states(ids, torch.ones_like(ids), prefix))


@pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)
@torch.no_grad()
def test_choices_without_a_prompt_score_as_in_transformers_own_model(
    family: str, kernel: str
) -> None:
    backbone = tiny_backbone(family, kernel)
    losses, sums = expected_scores(lambda ids: backbone.model(ids, use_cache=False).logits)
    scores = score(backbone, collate_choices(QUESTIONS, pad_id=0), None)
    torch.testing.assert_close(scores["log_likelihood"], sums, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores["token_losses"], losses, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)
@torch.no_grad()
def test_choices_behind_a_prompt_score_as_in_peft(family: str, kernel: str) -> None:
    backbone = tiny_backbone(family, kernel)
    prefix = random_prefix(backbone)
    model, _ = peft_model(tiny_backbone(family, kernel), prefix)
    losses, sums = expected_scores(lambda ids: model(input_ids=ids).logits)
    scores = score(backbone, collate_choices(QUESTIONS, pad_id=0), prefix)
    torch.testing.assert_close(scores["log_likelihood"], sums, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores["token_losses"], losses, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_may_start_at_another_position(family: str) -> None:
    backbone = tiny_backbone(family)
    backbone = Backbone(backbone.model, replace(backbone.spec, position_offset=0))
    prefix = random_prefix(backbone)
    losses, sums = expected_scores(own_logits(backbone, prefix))
    scores = score(backbone, collate_choices(QUESTIONS, pad_id=0), prefix)
    torch.testing.assert_close(scores["log_likelihood"], sums, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores["token_losses"], losses, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@torch.no_grad()
def test_texts_of_one_choice_each_score_the_same(family: str) -> None:
    backbone = tiny_backbone(family)
    questions = [replace(q, completions=[q.completions[0]], answer=0) for q in QUESTIONS]
    prefix = random_prefix(backbone)
    losses, sums = expected_scores(own_logits(backbone, prefix), questions)
    scores = score(backbone, collate_choices(questions, pad_id=0), prefix)
    torch.testing.assert_close(scores["log_likelihood"], sums, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores["token_losses"], losses, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_only_positions_count_against_the_models_length() -> None:
    """A prompt of 40 tokens with ten choices of 5 has 90 places and 45 of the 64 positions."""
    backbone = tiny_backbone("gpt2")
    choices = [[idx, 50, 51, 52, 53] for idx in range(10)]
    questions = [Example(list(range(3, 43)), choices, 4, [1] * 10)]
    _, sums = expected_scores(own_logits(backbone, None), questions)
    scores = score(backbone, collate_choices(questions, pad_id=0), None)
    torch.testing.assert_close(scores["log_likelihood"], sums, atol=2e-4, rtol=1e-5)
    longer = [Example(list(range(3, 63)), choices, 4, [1] * 10)]
    with pytest.raises(ValueError, match="the model has 64 positions"):
        score(backbone, collate_choices(longer, pad_id=0), None)


@pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)
@torch.no_grad()
def test_half_precision_models_are_scored_in_float32(family: str, kernel: str) -> None:
    backbone = tiny_backbone(family, kernel, dtype="bfloat16")
    prefix = random_prefix(backbone)
    scores = score(backbone, collate_choices(QUESTIONS, pad_id=0), prefix)
    assert scores["token_losses"].dtype == scores["log_likelihood"].dtype == torch.float32
    alone, _ = expected_scores(own_logits(backbone, prefix))
    # the same numbers in another order of summation: bfloat16 holds two to three digits
    assert (scores["token_losses"] - alone).abs().mean() < 0.05 * alone.abs().mean()


@pytest.mark.parametrize(("family", "kernel"), WITH_KERNELS)
@torch.no_grad()
def test_mixed_precision_scores_are_close_to_full_precision(family: str, kernel: str) -> None:
    backbone = tiny_backbone(family, kernel)
    batch, prefix = collate_choices(QUESTIONS, pad_id=0), random_prefix(backbone)
    full = score(backbone, batch, prefix)["token_losses"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = score(backbone, batch, prefix)["token_losses"]
    assert (full - mixed).abs().mean() < 0.05 * full.abs().mean()


@torch.no_grad()
def test_an_answer_of_many_tokens_gives_one_loss_each() -> None:
    scores = score(tiny_backbone("gpt2"), collate_choices(QUESTIONS, pad_id=0), None)
    assert scores["token_losses"].shape == (3 + 2 + 2 + 2,)
    assert scores["log_likelihood"].shape == (8,)


@pytest.mark.parametrize("layers", [[0, 2], [1, 3], [0, 1, 3]])
@torch.no_grad()
def test_a_model_of_some_of_the_layers_keeps_their_windows(layers: list[int]) -> None:
    """Of Gemma 3's layers the even ones slide and the odd ones do not."""
    auxiliary = KeptLayers(layers=layers).build(tiny_backbone("gemma3_text")).backbone
    prefix = random_prefix(auxiliary)
    losses, sums = expected_scores(own_logits(auxiliary, prefix))
    scores = score(auxiliary, collate_choices(QUESTIONS, pad_id=0), prefix)
    torch.testing.assert_close(scores["log_likelihood"], sums, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores["token_losses"], losses, atol=2e-4, rtol=1e-5)
