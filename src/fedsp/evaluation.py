"""One measurement of a model on a split: its questions scored and, where wanted, answers written.

Which model, when, and what follows from the figures is decided elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fedsp.backbone import Backbone
from fedsp.data import FederatedDataModule
from fedsp.evaluation_loops import evaluate, evaluate_completions
from fedsp.history import Evaluation
from fedsp.scoring import Scores, complete, score


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        score: From an evaluation batch and its index to its scores; a role's `validation_step`.
        complete: From a batch of prompts, its index and `generate`'s options to texts; a role's
            `predict_step`. None writes nothing.
    """

    score: Callable[[dict[str, Tensor], int], Scores]
    complete: Callable[..., list[str]] | None = None


def model_subject(backbone: Backbone, prefix: Tensor | None, tokenizer: Any = None) -> Subject:
    """Return a bare backbone, with or without a prefix, as something to measure.

    Args:
        backbone: The model.
        prefix: [L, 2, K, P, D] of the model's own depth, or None.
        tokenizer: The transformers tokenizer of its texts; None writes nothing.
    """

    def complete_batch(batch: dict[str, Tensor], batch_idx: int, **options: Any) -> list[str]:
        return complete(backbone, tokenizer, batch, prefix, **options)

    return Subject(
        lambda batch, _: score(backbone, batch, prefix),
        None if tokenizer is None else complete_batch,
    )


def check_completions(data: FederatedDataModule, split: str, evaluation: Evaluation) -> None:
    """Make sure that completions can be written for a split where they are wanted.

    Raises:
        ValueError: If the task has no prompts, or they leave too few positions.
    """
    if evaluation.generate_tokens and data.num_examples(split):
        data.prompt_dataloader(split, evaluation.generate_tokens)


def measure_split(trainer: Any, subject: Subject, split: str) -> dict[str, float]:
    """Measure on `selection` or `test`.

    Args:
        trainer: Gives Fabric, data and what is wanted; its callbacks are told.
        subject: In evaluation mode.
        split: Which split.

    Returns:
        The metrics of `fedsp.evaluation_loops.evaluate` and, where answers are written, of
        `fedsp.evaluation_loops.evaluate_completions`.
    """
    data, fabric = trainer.data, trainer.fabric
    new_tokens = trainer.history.evaluation.generate_tokens if subject.complete else 0
    loader = {"selection": data.val_dataloader, "test": data.test_dataloader}[split]()
    prompts = data.prompt_dataloader(split, new_tokens) if new_tokens else []
    trainer.call("on_evaluation_start", split, len(loader) + len(prompts))
    on_step = partial(trainer.call, "on_evaluation_step")
    metrics = evaluate(fabric, subject.score, loader, on_step=on_step)
    if subject.complete is not None and new_tokens:
        metrics |= evaluate_completions(
            fabric,
            partial(subject.complete, max_new_tokens=new_tokens),
            prompts,
            lambda row: data.task.references_of(data.raw_row(row, split)),
            on_step=lambda step: on_step(len(loader) + step),
        )
    trainer.call("on_evaluation_end", split, metrics)
    return metrics
