"""Quality of known pairs of models: equal ones, and against sums over tokens."""

import pytest
import torch
from torch import Tensor

from families import random_prefix, random_text, tiny_backbone
from fedsp.auxiliary import KeptLayers, SharedCell
from fedsp.backbone import Backbone
from fedsp.quality import Quality, measure_quality, prompt_gradient
from oracles import closed_forms

P = 5
ALL_SLOTS = [[0], [1], [2], [3]]


@pytest.fixture
def teacher() -> Backbone:
    return tiny_backbone("gpt2")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids, mask = random_text(rows=2)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_a_model_is_perfect_beside_itself(teacher: Backbone, batch: dict[str, Tensor]) -> None:
    twin = SharedCell(cell_size=4).build(teacher).backbone
    quality = measure_quality(teacher, twin, [batch], random_prefix(teacher, P), ALL_SLOTS)
    assert quality.hidden_error == 0.0
    assert quality.divergence == pytest.approx(0.0, abs=1e-6)
    assert quality.prompted_divergence == pytest.approx(0.0, abs=1e-6)
    assert quality.alignment == pytest.approx(1.0, abs=1e-5)
    assert quality.lm_loss == pytest.approx(quality.global_lm_loss)


def test_quality_is_the_mean_over_the_tokens_of_all_batches(
    teacher: Backbone, batch: dict[str, Tensor]
) -> None:
    """Batches of different sizes weigh by their tokens and label tokens."""
    student = SharedCell().build(teacher).backbone
    small = {name: tensor[:1, :6] for name, tensor in batch.items()}
    quality = measure_quality(
        teacher, student, [batch, small], random_prefix(teacher, P), ALL_SLOTS
    )
    terms = [closed_forms(teacher, student, part) for part in (batch, small)]
    tokens = [int(part["attention_mask"].sum()) for part in (batch, small)]
    labels = [int((part["labels"][:, 1:] != -100).sum()) for part in (batch, small)]

    def mean(name: str, counts: list[int]) -> float:
        weighted = sum(float(t[name]) * count for t, count in zip(terms, counts, strict=True))
        return weighted / sum(counts)

    assert quality.hidden_error == pytest.approx(mean("hidden", tokens), rel=1e-4)
    assert quality.divergence == pytest.approx(mean("logit", labels), rel=1e-4)
    assert quality.lm_loss == pytest.approx(mean("lm", labels), rel=1e-4)


def test_without_a_prompt_there_is_no_alignment(
    teacher: Backbone, batch: dict[str, Tensor]
) -> None:
    student = SharedCell().build(teacher).backbone
    quality = measure_quality(teacher, student, [batch], random_prefix(teacher, 0), ALL_SLOTS)
    assert quality.alignment is None
    assert quality.prompted_divergence == pytest.approx(quality.divergence)


def test_the_prompts_gradient_is_the_slope_of_the_loss(
    teacher: Backbone, batch: dict[str, Tensor]
) -> None:
    """Against central differences of the model's own loss along random directions."""
    prefix = random_prefix(teacher, P)
    gradient = prompt_gradient(teacher, batch, prefix)

    def loss(at: Tensor) -> float:
        logits, targets, _ = teacher.label_logits(batch, at)
        return float(torch.nn.functional.cross_entropy(logits.double(), targets))

    for seed in (5, 6):
        direction = random_prefix(teacher, P, seed=seed)
        slope = (loss(prefix + 1e-2 * direction) - loss(prefix - 1e-2 * direction)) / 2e-2
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_alignment_counts_the_slots_that_the_student_lacks(
    teacher: Backbone, batch: dict[str, Tensor]
) -> None:
    """It is the cosine over the whole prompt, with zeros where the student has no layer."""
    student = KeptLayers(layers=[0, 3]).build(teacher)
    prefix = random_prefix(teacher, P)
    quality = measure_quality(teacher, student.backbone, [batch], prefix, student.slots)
    wanted = prompt_gradient(teacher, batch, prefix)
    own = prompt_gradient(student.backbone, batch, prefix[[0, 3]])
    dot = sum((wanted[at] * own[idx]).sum() for idx, at in enumerate((0, 3)))
    assert quality.alignment == pytest.approx(float(dot / (wanted.norm() * own.norm())), rel=1e-4)


@pytest.mark.parametrize(
    ("alignment", "divergence", "poor"),
    [
        (0.5, 2.3, False),
        (0.05, 2.4, False),
        (0.04, 1.0, True),
        (-0.9, 0.1, True),
        (0.9, 2.5, True),
        (float("nan"), 0.1, True),
        (0.9, float("nan"), True),
        (None, 9.0, False),
    ],
)
def test_it_is_poor_that_reads_prompts_otherwise_or_predicts_otherwise_behind_them(
    alignment: float | None, divergence: float, poor: bool
) -> None:
    """Wanted: a cosine of 0.05 or more, a divergence of at most 0.6 of the global loss."""
    assert bool(Quality(6.0, 4.0, 0.1, 0.1, divergence, alignment).shortcomings) == poor
