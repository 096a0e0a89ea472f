"""How close an auxiliary model is to its global model, alone and as a reader of prompts.

Axes: B batch, T text tokens, L layers, K key/value heads, P virtual tokens, D head size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsp.backbone import Backbone
from fedsp.losses import kd_loss, relative_hidden_error, token_cross_entropy
from fedsp.ranks import Ranks, num_labels
from fedsp.soft_prompt import pool_layers
from fedsp.vocabulary import IGNORED_LABEL

QUALITY_BATCHES = 8
POOR_ALIGNMENT = 0.05
POOR_DIVERGENCE = 0.6


@dataclass(frozen=True)
class Quality:
    """How close an auxiliary model is to its global model.

    Args:
        lm_loss: The auxiliary's loss without a prompt on the labels it was measured on, in nats a
            token.
        global_lm_loss: The global model's on the same labels.
        hidden_error: Hidden mean squared error without a prompt, as a share of the teacher's mean
            square.
        divergence: KL divergence from the global model's next-token distribution without a prompt,
            in nats a token.
        prompted_divergence: The same with the initial prompt before both.
        alignment: Cosine of the two models' gradients with respect to the initial prompt, all
            batches together; in [-1, 1], where 0 is what an unrelated model has. None without a
            prompt.
    """

    lm_loss: float
    global_lm_loss: float
    hidden_error: float
    divergence: float
    prompted_divergence: float
    alignment: float | None

    @property
    def shortcomings(self) -> list[str]:
        """Why prompts tuned on it will hardly help the global model; empty if nothing is known.

        The thresholds are measured: docs/what-makes-it-work.md.
        """
        if self.alignment is None:
            return []
        found, most = [], POOR_DIVERGENCE * self.global_lm_loss
        if not self.alignment >= POOR_ALIGNMENT:
            found.append(f"an alignment of {self.alignment:.3f} (wanted: {POOR_ALIGNMENT} or more)")
        if not self.prompted_divergence <= most:
            text = f"a KL divergence of {self.prompted_divergence:.2f} nats"
            found.append(f"{text} (wanted: at most {most:.2f})")
        return found


@torch.no_grad()
def measure_quality(
    teacher: Backbone,
    student: Backbone,
    batches: Iterable[dict[str, Tensor]],
    prefix: Tensor,
    slots: Sequence[Sequence[int]],
) -> Quality:
    """Compare two models on batches that already lie on their device.

    A student with a trimmed vocabulary is measured on the labels that it knows, and against the
    global model's distribution over its tokens.

    Args:
        teacher: The global model.
        student: The auxiliary model's backbone.
        batches: Batches with labels; each counts by its number of tokens.
        prefix: [L, 2, K, P, D] prompt that the global model reads, such as the initial one.
        slots: Global layers whose prompt slots each of the student's layers stands for.

    Returns:
        Means over the tokens.
    """
    sums, num_tokens, num_labels = torch.zeros(5, dtype=torch.float64), 0, 0
    gradients = [torch.zeros_like(prefix), torch.zeros_like(prefix)]
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = student.own_labels(batch["labels"])
        rows, columns = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
        targets, count, tokens = labels[rows, columns + 1], rows.numel(), int(mask.sum())
        hidden = [model.hidden_states(ids, mask) for model in (teacher, student)]
        values = [relative_hidden_error(hidden[1], hidden[0], mask.bool()) * tokens]
        if count:
            taught = teacher.logits(hidden[0][rows, columns], student.known_tokens)
            own = student.logits(hidden[1][rows, columns])
            wanted, full = _prompt_gradient(teacher, batch, prefix)
            got, prompted = _prompt_gradient(student, batch, pool_layers(prefix, slots))
            # each model's gradient is that of all it is asked for; the student may know less of it
            known = labels[:, 1:][batch["labels"][:, 1:] != IGNORED_LABEL] != IGNORED_LABEL
            gradients[0] += wanted
            for group, part in zip(slots, got, strict=True):
                gradients[1][list(group)] += part / len(group)
            values += [
                token_cross_entropy(own, targets).sum(),
                token_cross_entropy(taught, targets).sum(),
                kd_loss(own, taught, 1.0) * count,
                kd_loss(prompted, student.own_logits(full[known]), 1.0) * count,
            ]
        sums[: len(values)] += torch.tensor([float(v) for v in values], dtype=torch.float64)
        num_tokens, num_labels = num_tokens + tokens, num_labels + count
    hidden_error, *means = sums.tolist()
    alignment = float(F.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0))
    lm_loss, global_lm_loss, divergence, prompted_divergence = (
        value / max(1, num_labels) for value in means
    )
    return Quality(
        lm_loss,
        global_lm_loss,
        hidden_error / max(1, num_tokens),
        divergence,
        prompted_divergence,
        alignment if prefix.numel() else None,
    )


def prompt_gradient(
    backbone: Backbone, batch: dict[str, Tensor], prefix: Tensor, *, create_graph: bool = False
) -> Tensor:
    """Return how a batch's mean loss over the labels changes with the prompt.

    Args:
        backbone: The model that reads both.
        batch: With labels.
        prefix: [L, 2, K, P, D] as `backbone` reads it.
        create_graph: Whether the gradient itself will be differentiated.

    Returns:
        [L, 2, K, P, D].
    """
    return _prompt_gradient(backbone, batch, prefix, create_graph=create_graph)[0]


def prompt_gradient_error(
    teacher: Backbone,
    student: Backbone,
    batch: dict[str, Tensor],
    prefix: Tensor,
    slots: Sequence[Sequence[int]],
    ranks: Ranks,
) -> Tensor:
    """Return 1 minus the cosine of both models' gradients with respect to the prompt.

    Args:
        teacher: The global model; only the student is differentiated.
        student: The auxiliary model's backbone.
        batch: With labels.
        prefix: [L, 2, K, P, D] prompt that both read.
        slots: Global layers whose prompt slots each of the student's layers stands for.
        ranks: Who shares the batch.

    Returns:
        [] in [0, 2], over those layers of the prompt that the student reads; the same on every
        rank, while its gradient is that of the rank's own rows.
    """
    rows = ranks.rows(batch)
    share = ranks.share(num_labels(batch["labels"]))
    wanted = ranks.sum(prompt_gradient(teacher, rows, prefix) * share)
    wanted, own_prefix = pool_layers(wanted, slots), pool_layers(prefix, slots)
    share = ranks.share(num_labels(student.own_labels(batch["labels"])))
    # the fused attention kernels have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        own = prompt_gradient(student, rows, own_prefix, create_graph=True)
    own = ranks.total(own * share)
    return 1 - F.cosine_similarity(own.flatten(), wanted.flatten(), dim=0)


@torch.enable_grad()
def _prompt_gradient(
    backbone: Backbone, batch: dict[str, Tensor], prefix: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradient, and the logits behind the prompt that it comes with."""
    prefix = prefix.detach().requires_grad_()
    logits, targets, _ = backbone.label_logits(batch, prefix)
    loss = token_cross_entropy(logits, targets).sum() / max(1, len(targets))
    if not prefix.numel():
        return torch.zeros_like(prefix), logits.detach()
    (gradient,) = torch.autograd.grad(loss, prefix, create_graph=create_graph)
    return gradient, logits.detach()
