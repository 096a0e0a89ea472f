"""Metrics of an evaluation, as torchmetrics so that they add up over batches and processes.

Axes: C choices, Q questions of the batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import SQuAD


def add_up(metrics: Iterable[Metric], sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Take in what the same metrics have seen in other processes.

    Args:
        metrics: All their states are sums.
        sum_over_ranks: From one process's tensor to the sum over all of them.
    """
    for metric in metrics:
        for name, value in metric.metric_state.items():
            assert isinstance(value, Tensor)
            setattr(metric, name, sum_over_ranks(value))


class TokenLoss(Metric):
    """Mean negative log-likelihood a label token, in nats, however tokens are batched."""

    full_state_update = False

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__(sync_on_compute=False)  # `add_up` does it, on any device
        self.loss_sum: Tensor
        self.num_tokens: Tensor
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_losses: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            token_losses: [N] Negative log-likelihoods in nats.
        """
        self.loss_sum += token_losses.sum(dtype=torch.float64)
        self.num_tokens += token_losses.numel()

    def compute(self) -> Tensor:
        """Return the mean; NaN without tokens."""
        return self.loss_sum / self.num_tokens


class ChoiceAccuracy(Metric):
    """Share of questions whose right choice has the highest score."""

    full_state_update = False

    def __init__(self, *, normalize: bool = False) -> None:
        """Choose the score.

        Args:
            normalize: Divide each choice's log-likelihood by its number of characters (lm-eval's
                `acc_norm`).
        """
        super().__init__(sync_on_compute=False)
        self.normalize = normalize
        self.num_right: Tensor
        self.num_questions: Tensor
        self.add_state("num_right", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_questions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, log_likelihood: Tensor, question: Tensor, is_answer: Tensor, num_chars: Tensor
    ) -> None:
        """Add the questions of a batch.

        Args:
            log_likelihood: [C] Sum over each choice's tokens, in nats; C may be 0.
            question: [C] int64 Which question a choice belongs to, 0 to Q - 1 without gaps.
            is_answer: [C] bool, True for the right choice; one a question.
            num_chars: [C] Characters of each choice's text, above 0.
        """
        if not len(question):
            return
        score = log_likelihood.double()
        if self.normalize:
            score = score / num_chars
        num_rows, num_questions = score.numel(), int(question.max()) + 1
        best = score.new_full((num_questions,), -torch.inf)
        best = best.scatter_reduce(0, question, score, "amax")
        # of equal scores the first choice counts, as argmax has it: a model that cannot tell must
        # not be right
        rows = torch.arange(num_rows, device=score.device)
        rows = rows.masked_fill(score != best[question], num_rows - 1)
        first = rows.new_full((num_questions,), num_rows - 1)
        first = first.scatter_reduce(0, question, rows, "amin")
        self.num_right += is_answer[first].sum()
        self.num_questions += num_questions

    def compute(self) -> Tensor:
        """Return the accuracy in [0, 1]; NaN without questions."""
        return self.num_right / self.num_questions


class AnswerMatch:
    """Exact match and F1 of written answers, as SQuAD has them.

    Case, punctuation, articles and spaces do not count; of several references the closest does.
    """

    def __init__(self) -> None:
        """Start without answers."""
        self._squad = SQuAD(sync_on_compute=False)

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add written answers.

        Args:
            texts: What was written. Where the references are single lines, it ends at its first
                line break, as lm-eval's `until` usually has it.
            references: At least one right answer for each text.
        """
        written: list[Any] = []
        right: list[Any] = []
        for idx, (text, answers) in enumerate(zip(texts, references, strict=True)):
            one_line = not any("\n" in answer for answer in answers)
            line = text.strip().split("\n")[0] if one_line else text
            starts = [0] * len(answers)  # of the format, without meaning here
            written.append({"prediction_text": line, "id": str(idx)})
            answer = {"text": list(answers), "answer_start": starts}
            right.append({"answers": answer, "id": str(idx)})
        self._squad.update(written, right)

    def add_up(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take in what other processes have seen; see `fedsp.metrics.add_up`."""
        add_up([self._squad], sum_over_ranks)

    def compute(self) -> dict[str, float]:
        """Return `exact_match` and `f1` in [0, 1]; NaN without answers."""
        return {name: float(value) / 100 for name, value in self._squad.compute().items()}
