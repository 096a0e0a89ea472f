"""Initial distillation: what the auxiliary model is taught, and how well it learned it.

Axes: B batch, T text tokens, E embedding size, N positions with logits, V vocabulary.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedsp.backbone import Backbone
from fedsp.losses import hidden_loss, kd_loss, token_cross_entropy
from fedsp.stages import Stage

QUALITY_BATCHES = 8
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
        kd_temperature: Softmax temperature of the KL divergence, above 0.
        max_logit_tokens: Label positions a batch may spend on logits; a random choice is taken of
            more.
        cache_dir: Folder of finished auxiliary models, found again by a hash of all that made them;
            null takes `$FEDSP_CACHE` or `~/.cache/fedsp`; an empty string keeps none.
        strict_public_data: Stop where public examples occur in a client's data, instead of warning.
    """

    stage: Stage = Stage(steps=DISTILLATION_STEPS)
    hidden_weight: float = 1.0
    logit_weight: float = 0.0
    lm_weight: float = 0.0
    kd_temperature: float = 1.0
    max_logit_tokens: int = 512
    cache_dir: str | None = None
    strict_public_data: bool = False

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            ValueError: If a weight is negative or all are zero, or another number is out of its
            range.
        """
        weights = (self.hidden_weight, self.logit_weight, self.lm_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "`model.initial_distillation` needs `hidden_weight`, `logit_weight`, `lm_weight` "
                f">= 0 and one above 0, got {weights}."
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
    ) -> Tensor:
        """Loss of one public batch, both models without a prompt.

        Args:
            teacher: The frozen global model.
            student: The auxiliary model's backbone.
            batch: `input_ids`, `attention_mask` and `labels`, [B, T].
            generator: Draws the label positions when there are too many.

        Returns:
            [] scalar in fp32.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            teacher_hidden = teacher.hidden_states(ids, mask)
        student_hidden = student.hidden_states(ids, mask)
        total = student_hidden.new_zeros((), dtype=torch.float32)
        if self.hidden_weight:
            error = relative_hidden_error(student_hidden, teacher_hidden, mask.bool())
            total = total + self.hidden_weight * error
        if not (self.logit_weight or self.lm_weight):
            return total
        positions, targets = self._logit_positions(batch["labels"], generator)
        student_logits = student.logits(student_hidden[positions])
        if self.logit_weight:
            with torch.no_grad():
                teacher_logits = teacher.logits(teacher_hidden[positions])
            divergence = kd_loss(student_logits, teacher_logits, self.kd_temperature)
            total = total + self.logit_weight * divergence
        if self.lm_weight:
            total = total + self.lm_weight * token_cross_entropy(student_logits, targets).mean()
        return total

    def _logit_positions(
        self, labels: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        rows, columns = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
        if rows.numel() > self.max_logit_tokens:
            chosen = torch.randperm(rows.numel(), generator=generator)[: self.max_logit_tokens]
            chosen = chosen.sort().values.to(rows.device)
            rows, columns = rows[chosen], columns[chosen]
        return (rows, columns), labels[rows, columns + 1]


def relative_hidden_error(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden mean squared error as a share of the teacher's mean square over the same positions.

    Args:
        student_hidden: [B, T, E].
        teacher_hidden: [B, T, E].
        mask: [B, T] bool, True where a token is text.

    Returns:
        [] scalar in fp32; 0 for equal models, about 1 for a student that knows nothing.
    """
    scale = teacher_hidden[mask].float().pow(2).mean()
    return hidden_loss(student_hidden, teacher_hidden, mask) / scale


@dataclass(frozen=True)
class Quality:
    """How close an auxiliary model is to its global model, both without a prompt.

    Args:
        lm_loss: The auxiliary's loss on the labels it was measured on, in nats a token.
        global_lm_loss: The global model's on the same labels.
        hidden_error: Hidden mean squared error as a share of the teacher's mean square.
        divergence: KL divergence from the global model's next-token distribution, in nats a token.
    """

    lm_loss: float
    global_lm_loss: float
    hidden_error: float
    divergence: float


@torch.no_grad()
def measure_quality(
    teacher: Backbone, student: Backbone, batches: Iterable[dict[str, Tensor]]
) -> Quality:
    """Compare two models on batches that already lie on their device.

    Args:
        teacher: The global model.
        student: The auxiliary model's backbone.
        batches: Batches with labels; each counts by its number of tokens.

    Returns:
        Means over the tokens.
    """
    sums, num_tokens, num_labels = torch.zeros(4, dtype=torch.float64), 0, 0
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        teacher_hidden = teacher.hidden_states(ids, mask)
        student_hidden = student.hidden_states(ids, mask)
        rows, columns = torch.nonzero(batch["labels"][:, 1:] != -100, as_tuple=True)
        targets = batch["labels"][rows, columns + 1]
        teacher_logits = teacher.logits(teacher_hidden[rows, columns])
        student_logits = student.logits(student_hidden[rows, columns])
        count, tokens = rows.numel(), int(mask.sum())
        error = relative_hidden_error(student_hidden, teacher_hidden, mask.bool())
        values = (
            token_cross_entropy(student_logits, targets).sum(),
            token_cross_entropy(teacher_logits, targets).sum(),
            error * tokens,
            kd_loss(student_logits, teacher_logits, 1.0) * count,
        )
        sums += torch.tensor([float(value) for value in values], dtype=torch.float64)
        num_tokens, num_labels = num_tokens + tokens, num_labels + count
    labels, tokens = max(1, num_labels), max(1, num_tokens)
    student_loss, teacher_loss, hidden_error, divergence = sums.tolist()
    return Quality(
        student_loss / labels, teacher_loss / labels, hidden_error / tokens, divergence / labels
    )


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
        flat = parameter.detach().flatten().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    weights = asdict(replace(spec, stage=Stage(steps=0), cache_dir="", strict_public_data=False))
    weights.pop("stage")
    described = {
        "spec": weights,
        "stage": _describe_stage(spec.stage),
        "position_offset": teacher.spec.position_offset,
        **facts,
    }
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _describe_stage(stage: Stage) -> dict[str, Any]:
    """Optimizer and schedule by what they do: callables themselves have no stable text."""
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
