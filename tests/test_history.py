import math

import pytest
import torch

from fedsp.history import Evaluation, History

PREFIX = torch.zeros(1, 2, 1, 1, 1)


def _offer(history: History, *losses: float) -> list[bool]:
    return [
        history.offer(r, {"server/val_loss": loss}, {"soft_prompt": PREFIX + r})
        for r, loss in enumerate(losses)
    ]


def test_the_lowest_loss_is_the_best_round() -> None:
    history = History(Evaluation())
    assert _offer(history, 3.0, 2.0, 2.5, 2.0) == [True, True, False, False]
    assert history.best is not None
    assert (history.best.round_idx, history.best.value) == (1, 2.0)
    assert torch.equal(history.best.payload["soft_prompt"], PREFIX + 1)


def test_the_highest_accuracy_is_the_best_round() -> None:
    history = History(Evaluation(monitor="server/val_accuracy", mode="max"))
    for round_idx, value in enumerate((0.2, 0.5, 0.4)):
        history.offer(round_idx, {"server/val_accuracy": value}, {"soft_prompt": PREFIX})
    assert history.best is not None
    assert history.best.round_idx == 1


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    history = History(Evaluation())
    assert _offer(history, math.nan, 5.0, math.nan, -math.inf) == [False, True, False, False]


def test_patience_counts_evaluations_without_a_better_value() -> None:
    history = History(Evaluation(patience=2))
    _offer(history, 3.0, 2.0, 2.5)
    assert not history.should_stop
    history.offer(3, {"server/val_loss": 2.1}, {"soft_prompt": PREFIX})
    assert history.should_stop


def test_evaluations_are_due_every_n_rounds_and_after_the_last() -> None:
    history = History(Evaluation(every_n_rounds=3))
    assert [r for r in range(8) if history.is_due(r, 8)] == [2, 5, 7]


def test_an_unknown_metric_to_monitor_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"monitor` must be one of \['server/val_loss', .*\], got 'val_loss'"
    ):
        Evaluation(monitor="val_loss")


def test_an_accuracy_without_choices_names_what_was_measured() -> None:
    history = History(Evaluation(monitor="server/val_accuracy", mode="max"))
    with pytest.raises(
        ValueError, match=r"must be one of \['server/val_loss'\], got 'server/val_acc"
    ):
        history.offer(0, {"server/val_loss": 1.0}, {"soft_prompt": PREFIX})


@pytest.mark.parametrize(("option", "value"), [("every_n_rounds", 0), ("patience", 0)])
def test_numbers_below_one_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`trainer.evaluation.{option}` must be at least 1"):
        Evaluation(**{option: value})


def test_a_history_survives_its_state() -> None:
    history = History(Evaluation(patience=5))
    history.add({"round": 0.0, "server/val_loss": 2.0})
    history.zero_shot = {"server/val_loss": 4.0}
    _offer(history, 3.0, 2.0, 2.5)
    restored = History(Evaluation(patience=5))
    restored.load_state_dict(history.state_dict())
    assert restored.state_dict() == history.state_dict()
    assert restored.rounds_done == 1


def test_exact_match_cannot_be_monitored_where_nothing_is_written() -> None:
    with pytest.raises(ValueError, match=r"needs completions .*`trainer.evaluation.generate_token"):
        Evaluation(monitor="server/val_f1", mode="max")
    with pytest.raises(ValueError, match=r"generate_tokens` must be at least 0, got -1"):
        Evaluation(generate_tokens=-1)


@pytest.mark.parametrize(
    ("monitor", "lower"),
    [
        ("server/val_loss", True),
        ("server/val_perplexity", True),
        ("server/val_accuracy", False),
        ("server/val_accuracy_norm", False),
        ("server/val_exact_match", False),
        ("server/val_f1", False),
    ],
)
def test_without_a_mode_the_metric_says_which_way_is_better(monitor: str, lower: bool) -> None:
    assert Evaluation(monitor=monitor, generate_tokens=8).lower_is_better is lower
    assert Evaluation(monitor=monitor, mode="max", generate_tokens=8).lower_is_better is False
