"""Losses as pure functions of tensors; no state and no model lives here.

Axes: B batch, T text tokens, E embedding size, N counted positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats and fp32.

    Args:
        logits: [N, V] Scores at label positions only.
        targets: [N] int64 Token ids.

    Returns:
        [N] One loss a token; the caller averages.

    Raises:
        ValueError: If the lengths differ.
    """
    if logits.shape[:1] != targets.shape:
        raise ValueError(
            f"expected one target per row of logits, got logits {tuple(logits.shape)} and targets "
            f"{tuple(targets.shape)}"
        )
    return F.cross_entropy(logits.float(), targets, reduction="none")


def hidden_loss(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error between hidden states over the masked positions only.

    Args:
        student_hidden: [B, T, E] The student's last hidden states.
        teacher_hidden: [B, T, E] The teacher's; no gradient flows into them.
        mask: [B, T] bool, True where a token is text and not padding. At least one must be.

    Returns:
        [] scalar in fp32.

    Raises:
        ValueError: If the shapes differ or no position counts.

    Source: Dong et al. 2023, arXiv 2311.06805, initial distillation; padding is left out here.
    """
    if student_hidden.shape != teacher_hidden.shape or mask.shape != student_hidden.shape[:2]:
        raise ValueError(
            "expected equal shapes [B, T, E] and a mask [B, T], got "
            f"{tuple(student_hidden.shape)}, {tuple(teacher_hidden.shape)} and {tuple(mask.shape)}"
        )
    if not mask.any():
        raise ValueError("expected at least one position that counts, got an all-False mask")
    return F.mse_loss(student_hidden[mask].float(), teacher_hidden.detach()[mask].float())


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


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, kd_temperature: float) -> Tensor:
    """Mean forward KL divergence from teacher to student over the given positions, in nats.

    Args:
        student_logits: [N, V] Student scores.
        teacher_logits: [N, V] Teacher scores; no gradient flows into them.
        kd_temperature: Softmax temperature of both sides, above 0. The loss is scaled by its
            square.

    Returns:
        [] scalar in fp32.

    Raises:
        ValueError: If the shapes differ, there is no position, or `kd_temperature` <= 0.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.1.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.shape[0] == 0:
        raise ValueError(
            "expected equal shapes [N, V] with N > 0, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if kd_temperature <= 0:
        raise ValueError(f"`kd_temperature` must be above 0, got {kd_temperature}.")
    student = torch.log_softmax(student_logits.float() / kd_temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach().float() / kd_temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return divergence * kd_temperature**2
