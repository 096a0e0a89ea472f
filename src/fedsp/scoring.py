"""Score an evaluation batch with a backbone and a prefix; shared by both roles.

Axes: R rows (one per choice), T text tokens, N label positions of right answers.
"""

from typing import TypedDict

import torch
from torch import Tensor

from fedsp.backbone import Backbone
from fedsp.losses import token_cross_entropy


class Scores(TypedDict):
    """What an evaluation needs of one batch; a mapping, as Lightning wants of a step."""

    token_losses: Tensor
    """[N] Negative log-likelihood of every token of the right answers, in nats."""
    log_likelihood: Tensor
    """[R] Sum of the log-likelihood over each row's label tokens, in nats."""


def score(backbone: Backbone, batch: dict[str, Tensor], prefix: Tensor | None) -> Scores:
    """Run a batch of choices and keep the label tokens' likelihoods.

    Args:
        backbone: The model that reads the text.
        batch: `input_ids`, `attention_mask`, `labels` [R, T] and `is_answer` [R] bool.
        prefix: [L, 2, K, P, D] or None for the bare model.

    Returns:
        Scores on the batch's device.
    """
    logits, targets, rows = backbone.label_logits(batch, prefix)
    losses = token_cross_entropy(logits, targets)
    log_likelihood = torch.zeros(len(batch["labels"]), dtype=losses.dtype, device=losses.device)
    log_likelihood = log_likelihood.index_add(0, rows, -losses)
    return {"token_losses": losses[batch["is_answer"][rows]], "log_likelihood": log_likelihood}
