"""Score an evaluation batch with a backbone and a prefix, or complete prompts; for both roles.

Axes: B questions, C choices, T text tokens, N tokens of right answers.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor

from fedsp.backbone import Backbone
from fedsp.generation import generate
from fedsp.losses import token_cross_entropy


class Scores(TypedDict):
    """What an evaluation needs of one batch; a mapping, as Lightning wants of a step."""

    token_losses: Tensor
    """[N] Negative log-likelihood of every token of the right answers, in nats."""
    log_likelihood: Tensor
    """[C] Sum of the log-likelihood over each choice's tokens, in nats."""


def score(backbone: Backbone, batch: dict[str, Tensor], prefix: Tensor | None) -> Scores:
    """Run a batch of choices and keep the label tokens' likelihoods.

    Args:
        backbone: The model that reads the text.
        batch: As `fedsp.collate.collate_choices` makes it.
        prefix: [L, 2, K, P, D] or None for the bare model.

    Returns:
        Scores on the batch's device.
    """
    logits, targets, choices = backbone.choice_logits(batch, prefix)
    losses = token_cross_entropy(logits, targets)
    is_answer = batch["is_answer"]
    log_likelihood = torch.zeros(len(is_answer), dtype=losses.dtype, device=losses.device)
    log_likelihood = log_likelihood.index_add(0, choices, -losses)
    return {"token_losses": losses[is_answer[choices]], "log_likelihood": log_likelihood}


def complete(
    backbone: Backbone,
    tokenizer: Any,
    batch: dict[str, Tensor],
    prefix: Tensor | None,
    **options: Any,
) -> list[str]:
    """Continue a batch of prompts greedily.

    Args:
        backbone: The model that writes.
        tokenizer: The transformers tokenizer of its texts.
        batch: `input_ids` and `attention_mask` [B, T], left-padded.
        prefix: [L, 2, K, P, D] or None for the bare model.
        options: Passed on to `generate`, such as `max_new_tokens`.

    Returns:
        One text a row, without its prompt.
    """
    ids = batch["input_ids"]
    # many models come with settings of their own that draw at random
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    output = generate(backbone, ids, batch["attention_mask"], prefix, **options)
    texts: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return texts
