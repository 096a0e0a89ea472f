import math

import pytest
import torch

from fedsp.losses import hidden_loss, kd_loss, token_cross_entropy


def test_token_cross_entropy_of_uniform_scores_is_the_log_of_the_vocabulary() -> None:
    losses = token_cross_entropy(torch.zeros(3, 8), torch.tensor([0, 3, 7]))
    assert losses.tolist() == pytest.approx([math.log(8)] * 3)


def test_token_cross_entropy_refuses_a_missing_target() -> None:
    with pytest.raises(ValueError, match="one target per row"):
        token_cross_entropy(torch.zeros(3, 8), torch.tensor([0, 3]))


def test_hidden_loss_leaves_padding_out() -> None:
    student, teacher = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)
    teacher[0, 0] = torch.tensor([3.0, 4.0])
    teacher[0, 2] = 1e6  # padding: must not count
    mask = torch.tensor([[True, True, False]])
    # (9 + 16 + 0 + 0) / 4 by hand
    assert hidden_loss(student, teacher, mask).item() == pytest.approx(6.25)


def test_hidden_loss_sends_no_gradient_to_the_teacher() -> None:
    student = torch.ones(1, 2, 2, requires_grad=True)
    teacher = torch.zeros(1, 2, 2, requires_grad=True)
    hidden_loss(student, teacher, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_hidden_loss_with_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one position"):
        hidden_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_kd_loss_equals_the_closed_form_for_two_outcomes() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.log(torch.tensor([[3.0, 1.0]]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd_loss(torch.zeros(1, 2), teacher, 1.0).item() == pytest.approx(expected)


def test_kd_loss_scales_with_the_square_of_the_temperature() -> None:
    # at temperature 2 the teacher is softmax(ln 9 / 2, 0) = (3/4, 1/4)
    teacher = torch.log(torch.tensor([[9.0, 1.0]]))
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kd_loss(torch.zeros(1, 2), teacher, 2.0).item() == pytest.approx(expected)


def test_kd_loss_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="`kd_temperature` must be above 0, got 0"):
        kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
