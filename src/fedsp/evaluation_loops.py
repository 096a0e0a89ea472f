"""The only evaluation loops: likelihoods of right answers and choices, completions of prompts.

A loop measures what it is given; it logs nothing and saves nothing.
"""

import math
from collections.abc import Callable, Iterable

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.metrics import AnswerMatch, ChoiceAccuracy, TokenLoss, add_up
from fedsp.ranks import Ranks
from fedsp.scoring import Scores


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    score_batch: Callable[[dict[str, Tensor], int], Scores],
    batches: Iterable[dict[str, Tensor]],
    *,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Measure a model, which the caller has put into evaluation mode; nothing is trained meanwhile.

    Several ranks share the batches, and all of them return the figures of all batches.

    Args:
        fabric: Where to run.
        score_batch: A role's `validation_step`.
        batches: Evaluation batches with all choices of a question together.
        on_step: Called with the number of batches done.

    Returns:
        `loss` in nats a token over the right answers' tokens, `perplexity`, and, where questions
        have several choices, `accuracy` and `accuracy_norm` (by characters, as lm-eval's
        `acc_norm`).
    """
    loss, ranks = TokenLoss(), Ranks(fabric)
    accuracy = {"accuracy": ChoiceAccuracy(), "accuracy_norm": ChoiceAccuracy(normalize=True)}
    num_choices = torch.zeros(2, dtype=torch.int64)
    for turn, (done, batch, counts) in enumerate(ranks.turns(batches)):
        moved = fabric.to_device(batch)
        with fabric.autocast():
            scores = score_batch(moved, turn)
        if not counts:
            scores, batch = _nothing_of(scores, batch)
        is_answer = batch["is_answer"]
        num_choices += torch.stack([torch.tensor(len(is_answer)), is_answer.sum()])
        loss.update(scores["token_losses"].cpu())
        for metric in accuracy.values():
            metric.update(
                scores["log_likelihood"].cpu(), batch["question"], is_answer, batch["num_chars"]
            )
        if on_step is not None:
            on_step(done)
    add_up([loss, *accuracy.values()], ranks.sum)
    mean = float(loss.compute())
    measured = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    num_all, num_answers = ranks.sum(num_choices).tolist()
    if num_all > num_answers:
        measured |= {name: float(metric.compute()) for name, metric in accuracy.items()}
    return measured


def _nothing_of(scores: Scores, batch: dict[str, Tensor]) -> tuple[Scores, dict[str, Tensor]]:
    """Return an evaluation batch and its scores without any row."""
    empty = Scores(
        token_losses=scores["token_losses"][:0], log_likelihood=scores["log_likelihood"][:0]
    )
    return empty, {name: tensor[:0] for name, tensor in batch.items()}


@torch.no_grad()
def evaluate_completions(
    fabric: Fabric,
    complete_batch: Callable[[dict[str, Tensor], int], list[str]],
    batches: Iterable[dict[str, Tensor]],
    references_of: Callable[[int], list[str]],
    *,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Compare what a model writes after prompts with the right answers.

    Args:
        fabric: Where to run.
        complete_batch: A role's `predict_step`; the role is in evaluation mode.
        batches: Prompts, padded on the left, each with its `row`.
        references_of: From a `row` to its right answers.
        on_step: Called with the number of batches done.

    Returns:
        `exact_match` and `f1` in [0, 1], as SQuAD has them.
    """
    match, ranks = AnswerMatch(), Ranks(fabric)
    for turn, (done, batch, counts) in enumerate(ranks.turns(batches)):
        moved = fabric.to_device(batch)
        with fabric.autocast():
            texts = complete_batch(moved, turn)
        rows = batch["row"].tolist() if counts else []
        match.update(texts[: len(rows)], [references_of(row) for row in rows])
        if on_step is not None:
            on_step(done)
    match.add_up(ranks.sum)
    return match.compute()
