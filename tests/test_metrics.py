import math

import torch

from fedsp.metrics import AnswerMatch, ChoiceAccuracy, TokenLoss


def test_token_loss_does_not_depend_on_how_tokens_are_batched() -> None:
    one, two = TokenLoss(), TokenLoss()
    losses = torch.tensor([1.0, 2.0, 6.0])
    one.update(losses)
    two.update(losses[:1])
    two.update(losses[1:])
    assert one.compute().item() == two.compute().item() == 3.0


def test_token_loss_without_tokens_is_nan() -> None:
    metric = TokenLoss()
    metric.update(torch.zeros(0))
    assert math.isnan(metric.compute().item())


def _accuracy(normalize: bool, scores: list[float], chars: list[int]) -> float:
    metric = ChoiceAccuracy(normalize=normalize)
    # two questions of 3 and 2 choices; right are the second and the first choice
    metric.update(
        torch.tensor(scores),
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([False, True, False, True, False]),
        torch.tensor(chars),
    )
    return metric.compute().item()


def test_choice_accuracy_counts_the_highest_log_likelihood() -> None:
    assert _accuracy(False, [-3.0, -1.0, -2.0, -5.0, -4.0], [1] * 5) == 0.5


def test_normalised_accuracy_divides_by_characters() -> None:
    # question 2: -5 / 10 beats -4 / 2
    assert _accuracy(True, [-3.0, -1.0, -2.0, -5.0, -4.0], [1, 1, 1, 10, 2]) == 1.0


def test_a_model_that_cannot_tell_the_choices_apart_is_right_by_position_only() -> None:
    # argmax takes the first of equal scores, as lm-eval does: wrong for question 1, right for
    # question 2
    assert _accuracy(False, [-1.0] * 5, [1] * 5) == 0.5


def test_written_answers_are_compared_as_squad_does() -> None:
    """Figures by hand: articles, case and punctuation do not count, the closest reference does."""
    match = AnswerMatch()
    match.update(["The Cat!", " a big cat\nQuestion: next"], [["dog", "cat"], ["cat"]])
    match.update(["dog"], [["cat"]])
    result = match.compute()
    assert math.isclose(result["exact_match"], 1 / 3, rel_tol=1e-6)
    # precision 1/2 and recall 1 of the second answer
    assert math.isclose(result["f1"], (1 + 2 / 3 + 0) / 3, rel_tol=1e-6)


def test_an_answer_of_several_lines_is_compared_whole() -> None:
    match = AnswerMatch()
    match.update(["one\ntwo"], [["one\ntwo"]])
    match.update(["one\nthree"], [["one\ntwo"]])
    assert match.compute() == {"exact_match": 0.5, "f1": 0.75}
