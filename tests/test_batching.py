"""Batches: each epoch complete, each step a function of the seed, the owner and its number "
"alone."""

from itertools import chain, islice, pairwise

import numpy as np
import pytest

from fedsp.batching import Batching, StepBatches, eval_batches

LENGTHS = np.random.default_rng(0).integers(5, 200, size=203)


def batches(start: int, num: int | None, **changes: object) -> list[list[int]]:
    settings = {"seed": 0, "owner": "client", "client_id": 2, **changes}
    batching = settings.pop("batching", Batching(batch_size=4))
    lengths = settings.pop("lengths", LENGTHS)
    sampler = StepBatches(lengths, batching, start_step=start, num_steps=num, **settings)
    result = list(sampler)
    assert len(sampler) == len(result)
    return result


@pytest.mark.parametrize("length_grouping", [True, False])
@pytest.mark.parametrize("num_examples", [1, 3, 4, 5, 203])
def test_every_epoch_holds_every_example_once(num_examples: int, length_grouping: bool) -> None:
    batching = Batching(batch_size=4, length_grouping=length_grouping)
    per_epoch = -(-num_examples // 4)
    all_batches = batches(0, 3 * per_epoch, batching=batching, lengths=LENGTHS[:num_examples])
    for epoch in range(3):
        rows = chain(*all_batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(rows) == list(range(num_examples))


@pytest.mark.parametrize("start", [0, 1, 50, 51, 52, 101, 102])
def test_a_step_does_not_depend_on_where_reading_starts(start: int) -> None:
    assert batches(start, 10) == batches(0, start + 10)[start:]
    assert batches(start, 5) + batches(start + 5, 5) == batches(start, 10)


def test_ten_steps_over_a_short_epochs_borders_resume() -> None:
    short = LENGTHS[:9]
    whole = batches(0, 10, lengths=short)
    assert batches(0, 5, lengths=short) + batches(5, 5, lengths=short) == whole


def test_epochs_owners_clients_and_seeds_have_orders_of_their_own() -> None:
    first = batches(0, None)
    assert len(first) == 51
    for other in (
        batches(51, 51),
        batches(0, None, owner="server"),
        batches(0, None, client_id=3),
        batches(0, None, seed=1),
    ):
        assert other != first


def test_lightnings_epochs_are_the_streams() -> None:
    sampler = StepBatches(LENGTHS, Batching(batch_size=4), seed=0, owner="client", client_id=2)
    sampler.sampler.set_epoch(3)
    assert list(sampler) == batches(3 * 51, 51)


def padding_share(all_batches: list[list[int]]) -> float:
    padded = sum(len(rows) * LENGTHS[rows].max() for rows in all_batches)
    return 1 - LENGTHS.sum() / padded


def test_length_grouping_saves_most_of_the_padding() -> None:
    grouped = padding_share(batches(0, None))
    random = padding_share(batches(0, None, batching=Batching(batch_size=4, length_grouping=False)))
    assert grouped < random / 3


def test_grouping_does_not_put_the_same_examples_together_every_epoch() -> None:
    pairs = [
        {pair for rows in batches(51 * epoch, 51) for pair in pairwise(sorted(rows))}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.2 * len(pairs[0])


def test_no_steps_are_no_batches() -> None:
    assert batches(7, 0) == []


@pytest.mark.parametrize(("start", "num"), [(-1, 3), (0, -3)])
def test_negative_steps_are_refused(start: int, num: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        batches(start, num)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
def test_a_batch_holds_something(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`data\.batching\.{name}` must be at least 1, got 0"):
        Batching(**{name: 0})


def test_evaluation_goes_from_long_to_short_and_keeps_questions_whole() -> None:
    lengths, num_rows = [5, 9, 7, 9, 1], [2, 2, 2, 5, 1]
    assert eval_batches(lengths, num_rows, 4) == [[1], [3], [2, 0], [4]]
    assert eval_batches(lengths, num_rows, 100) == [[1, 3, 2, 0, 4]]


def test_evaluation_holds_every_example_once() -> None:
    result = eval_batches(LENGTHS.tolist(), [4] * len(LENGTHS), 32)
    assert sorted(chain(*result)) == list(range(len(LENGTHS)))
    assert {len(rows) for rows in islice(result, len(result) - 1)} == {8}
