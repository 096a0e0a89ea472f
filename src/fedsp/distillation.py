"""Initial distillation: what the auxiliary model is taught, and how well it learned it.

Axes: B batch, T text tokens, E embedding size, N positions with logits, V vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedsp.backbone import Backbone
from fedsp.losses import kd_loss, relative_hidden_error, token_cross_entropy
from fedsp.prompt_pool import PromptPool
from fedsp.quality import prompt_gradient_error
from fedsp.ranks import Ranks
from fedsp.shards import whole
from fedsp.soft_prompt import pool_layers
from fedsp.stages import Stage
from fedsp.vocabulary import IGNORED_LABEL

DISTILLATION_STEPS = 1000


@dataclass(frozen=True)
class Distillation:
    """How the server makes the auxiliary model useful before the first round.

    Args:
        stage: Steps, optimizer, schedule (warm-up) and clipping; zero steps skip the distillation.
        hidden_weight: Weight of the mean squared error between the last hidden states, padding left
            out, as a share of the teacher's mean square (so that the weight means the same for
            every model).
        logit_weight: Weight of the KL divergence from the global model's next-token distribution,
            in nats.
        lm_weight: Weight of the auxiliary's own cross-entropy, in nats.
        gradient_weight: Weight of 1 minus the cosine of both models' gradients with respect to the
            prompt; counts where there is one.
        prompts: Soft prompts that both models read in front of the public texts; null has none.
        kd_temperature: Softmax temperature of the KL divergence, above 0.
        all_tokens: Learn from the logits at every token of the public texts, prompts included, and
            not at those of the right answers only.
        max_logit_tokens: Positions a batch may spend on logits; a random choice is taken of more.
        cache_dir: Folder of finished auxiliary models, found again by a hash of all that made them;
            null takes `$FEDSP_CACHE` or `~/.cache/fedsp`; an empty string keeps none.
        strict_public_data: Stop where public examples occur in a client's data, instead of warning.
    """

    stage: Stage = Stage(steps=DISTILLATION_STEPS)
    hidden_weight: float = 1.0
    logit_weight: float = 0.0
    lm_weight: float = 0.0
    gradient_weight: float = 0.0
    prompts: PromptPool | None = None
    kd_temperature: float = 1.0
    all_tokens: bool = False
    max_logit_tokens: int = 512
    cache_dir: str | None = None
    strict_public_data: bool = False

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: If a weight is negative or all are zero, or another number is out of its
            range.
        """
        weights = (self.hidden_weight, self.logit_weight, self.lm_weight, self.gradient_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "`model.initial_distillation` needs `hidden_weight`, `logit_weight`, `lm_weight`, "
                f"`gradient_weight` >= 0 and one above 0, got {weights}."
            )
        if self.gradient_weight and self.prompts is None:
            raise ValueError(
                "`model.initial_distillation.gradient_weight` needs prompts, but "
                "`model.initial_distillation.prompts` is null. Set both or neither."
            )
        if self.max_logit_tokens < 1:
            raise ValueError(
                "`model.initial_distillation.max_logit_tokens` must be at least 1, got "
                f"{self.max_logit_tokens}."
            )
        if not self.kd_temperature > 0:
            raise ValueError(
                "`model.initial_distillation.kd_temperature` must be above 0, got "
                f"{self.kd_temperature}."
            )

    def loss(
        self,
        teacher: Backbone,
        student: Backbone,
        batch: dict[str, Tensor],
        generator: torch.Generator,
        prefix: Tensor | None = None,
        slots: Sequence[Sequence[int]] = (),
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Loss of one public batch; of several ranks, this one's part of it.

        Args:
            teacher: The frozen global model.
            student: The auxiliary model's backbone.
            batch: `input_ids`, `attention_mask` and `labels`, [B, T]; the same on every rank.
            generator: Draws the positions when there are too many.
            prefix: [L, 2, K, P, D] soft prompt that both read; None is none.
            slots: Global layers whose prompt slots each of the student's layers stands for; not
                used without a prompt.
            ranks: Who shares the batch; None shares it with nobody.

        Returns:
            [] scalar in fp32.
        """
        ranks = ranks or Ranks()
        rows = ranks.rows(batch)
        ids, mask = rows["input_ids"], rows["attention_mask"]
        own_prefix = None if prefix is None else pool_layers(prefix, slots)
        with torch.no_grad():
            teacher_hidden = teacher.hidden_states(ids, mask, prefix)
        student_hidden = student.hidden_states(ids, mask, own_prefix)
        total = student_hidden.new_zeros((), dtype=torch.float32)
        if self.hidden_weight:
            error = relative_hidden_error(student_hidden, teacher_hidden, mask.bool())
            error = error * _share_of_squares(ranks, len(batch["labels"]), teacher_hidden, mask)
            total = total + self.hidden_weight * error
        if self.gradient_weight and prefix is not None:
            error = prompt_gradient_error(teacher, student, batch, prefix, slots, ranks)
            total = total + self.gradient_weight * ranks.once(error)
        labels = student.own_labels(self._labels(batch))
        positions, targets, share = self._logit_positions(labels, generator, ranks)
        if not (self.logit_weight or self.lm_weight) or not targets.numel():
            # a batch that teaches nothing: a zero that can be differentiated all the same
            return total if total.requires_grad else 0.0 * student_hidden[mask.bool()].float().sum()
        student_logits = student.logits(student_hidden[positions])
        if self.logit_weight:
            with torch.no_grad():
                teacher_logits = teacher.logits(teacher_hidden[positions], student.known_tokens)
            divergence = kd_loss(student_logits, teacher_logits, self.kd_temperature)
            total = total + self.logit_weight * divergence * share
        if self.lm_weight:
            cross_entropy = token_cross_entropy(student_logits, targets).mean()
            total = total + self.lm_weight * cross_entropy * share
        return total

    def _labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Return [B, T] what is to be predicted, -100 where nothing is."""
        if not self.all_tokens:
            return batch["labels"]
        return torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED_LABEL)

    def _logit_positions(
        self, labels: Tensor, generator: torch.Generator, ranks: Ranks
    ) -> tuple[tuple[Tensor, Tensor], Tensor, float]:
        """Return this rank's positions among its rows, their labels, and its share of all."""
        rows, columns = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
        if rows.numel() > self.max_logit_tokens:
            chosen = torch.randperm(rows.numel(), generator=generator)[: self.max_logit_tokens]
            chosen = chosen.sort().values.to(rows.device)
            rows, columns = rows[chosen], columns[chosen]
        if ranks.size == 1 or not rows.numel():
            return (rows, columns), labels[rows, columns + 1], 1.0
        is_own = rows % ranks.size == ranks.rank
        share = float(is_own.float().mean())
        if not share:
            # takes part in what all have to do together, at any place and without weight
            return (rows[:1] * 0, columns[:1]), labels[rows[:1], columns[:1] + 1], share
        rows, columns = rows[is_own], columns[is_own]
        return (rows // ranks.size, columns), labels[rows, columns + 1], share


def _share_of_squares(ranks: Ranks, num_rows: int, hidden: Tensor, mask: Tensor) -> Tensor | float:
    """Return the share of a rank's rows in the squares of all, which relative errors weigh by.

    Args:
        ranks: Who shares the batch.
        num_rows: Rows of the whole batch.
        hidden: [B, T, E] states of this rank's rows.
        mask: [B, T], 1 where a token is text.
    """
    if ranks.size == 1:
        return 1.0
    squares = hidden[mask.bool()].float().square().sum() * ranks.owns_rows(num_rows)
    return squares / ranks.sum(squares)


def cache_key(teacher: Backbone, spec: Distillation, facts: dict[str, Any]) -> str:
    """Hash everything that makes a distilled auxiliary model.

    Args:
        teacher: The global model; its configuration, every bit of its parameters and the place of
            its text count.
        spec: The distillation; its optimizer and schedule count by their numbers.
        facts: Whatever else counts, as plain data: recipe, public data, seed, precision.

    Returns:
        A hexadecimal SHA-256.
    """
    digest = hashlib.sha256()
    digest.update(teacher.model.config.to_json_string().encode())
    for name, parameter in teacher.model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        flat = whole(parameter.detach()).flatten().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    weights = asdict(replace(spec, stage=Stage(steps=0), cache_dir="", strict_public_data=False))
    weights.pop("stage")
    described = {
        "spec": weights,
        "stage": describe_stage(spec.stage),
        "position_offset": teacher.spec.position_offset,
        **facts,
    }
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def describe_stage(stage: Stage) -> dict[str, Any]:
    """Return optimizer and schedule by what they do: callables themselves have no stable text."""
    optimizer, scheduler = stage.build([Parameter(torch.zeros(1))], max(1, stage.steps))
    group = optimizer.param_groups[0]
    group["params"][0].grad = torch.zeros(1)
    settings = []
    for _ in range(max(1, stage.steps)):
        settings.append({name: str(value) for name, value in group.items() if name != "params"})
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {
        "steps": stage.steps,
        "optimizer": type(optimizer).__qualname__,
        "settings": settings,
        "gradient_clip_norm": stage.gradient_clip_norm,
        "accumulate_grad_batches": stage.accumulate_grad_batches,
    }
