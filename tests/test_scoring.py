import pytest
import torch

from families import random_prefix, tiny_backbone
from fedsp.collate import collate_choices
from fedsp.examples import Example
from fedsp.scoring import score

QUESTIONS = [
    Example([5, 6, 7], [[8], [9, 10, 11]], 1, [1, 3]),
    Example([12], [[13, 14], [15], [16, 17]], 0, [2, 1, 2]),
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("with_prompt", [False, True])
@torch.no_grad()
def test_every_choice_is_scored_as_if_it_were_alone(family: str, with_prompt: bool) -> None:
    """Oracle: the full logits of each choice by itself, without padding."""
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone) if with_prompt else None
    scores = score(backbone, collate_choices(QUESTIONS, pad_id=0), prefix)
    expected, of_answers = [], []
    for question in QUESTIONS:
        for index, choice in enumerate(question.completions):
            ids = torch.tensor([question.prompt_ids + choice])
            hidden = backbone.hidden_states(ids, torch.ones_like(ids), prefix)
            logs = backbone.logits(hidden)[0, :-1].log_softmax(-1)
            logs = logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(choice) :]
            expected.append(logs.sum())
            if index == question.answer:
                of_answers.append(-logs)
    assert torch.allclose(scores["log_likelihood"], torch.stack(expected), atol=1e-4)
    assert torch.allclose(scores["token_losses"], torch.cat(of_answers), atol=1e-4)


@torch.no_grad()
def test_half_precision_models_are_scored_in_float32() -> None:
    backbone = tiny_backbone("llama", dtype="bfloat16")
    scores = score(backbone, collate_choices(QUESTIONS, pad_id=0), random_prefix(backbone))
    assert {tensor.dtype for tensor in scores.values()} == {torch.float32}  # type: ignore[attr-defined]


@torch.no_grad()
def test_an_answer_of_many_tokens_gives_one_loss_each() -> None:
    scores = score(tiny_backbone("gpt2"), collate_choices(QUESTIONS, pad_id=0), None)
    assert scores["token_losses"].shape == (3 + 2,)
    assert scores["log_likelihood"].shape == (5,)
