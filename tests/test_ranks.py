"""What a rank does of the work: rows, shares and turns add up to the whole."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fedsp.ranks import Ranks, check_processes, num_labels


def seen_from(rank: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


def batch(num_rows: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(num_rows * 3).view(num_rows, 3)
    labels = ids.clone()
    labels[0, 1] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("num_rows", "size"), [(5, 2), (4, 4), (2, 3), (1, 2)])
def test_every_row_is_one_ranks_and_the_shares_add_up(num_rows: int, size: int) -> None:
    whole = batch(num_rows)
    counts = num_labels(whole["labels"])
    assert counts.tolist() == [1, *[2] * (num_rows - 1)]
    first_ids, shares = [], []
    for rank in range(size):
        ranks = seen_from(rank, size)
        own = ranks.rows(whole)
        shares.append(float(ranks.share(counts)))
        if ranks.owns_rows(num_rows):
            first_ids += own["input_ids"][:, 0].tolist()
        else:
            assert torch.equal(own["input_ids"], whole["input_ids"][:1])
            assert shares[-1] == 0
    assert sorted(first_ids) == whole["input_ids"][:, 0].tolist()
    assert sum(shares) == pytest.approx(1.0)


def test_the_parts_of_a_mean_add_up_to_it() -> None:
    whole = batch(5)

    def mean_label(part: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        labels = part["labels"][:, 1:]
        return labels[labels != -100].float().mean()

    parts = [seen_from(rank, 3).split(mean_label)(whole, 0) for rank in range(3)]
    assert float(sum(parts)) == pytest.approx(float(mean_label(whole, 0)))


@pytest.mark.parametrize("num_batches", [0, 1, 5, 6])
def test_every_batch_is_scored_once_and_all_ranks_take_as_many_turns(num_batches: int) -> None:
    batches: list[Any] = list(range(num_batches))
    turns = [list(seen_from(rank, 3).turns(batches)) for rank in range(3)]
    assert {len(of_rank) for of_rank in turns} == {-(-num_batches // 3)}
    counted = [item for of_rank in turns for _, item, counts in of_rank if counts]
    assert sorted(counted) == batches
    for of_rank in turns:
        assert [done for done, _, _ in of_rank][-1:] == [num_batches][: len(of_rank)]


def test_processes_of_another_strategy_are_refused() -> None:
    wanted = "`trainer.strategy` must be ddp or auto with 2 processes, got SimpleNamespace."
    with pytest.raises(ValueError, match=re.escape(wanted)):
        check_processes(cast(Any, SimpleNamespace(world_size=2, strategy=SimpleNamespace())))
    check_processes(cast(Any, SimpleNamespace(world_size=1, strategy=SimpleNamespace())))


def test_a_rank_alone_changes_nothing() -> None:
    ranks, whole = Ranks(), batch(2)
    assert ranks.rows(whole) is whole
    assert ranks.split(max) is max
    assert ranks.gather(b"x") == [b"x"]
    loss = torch.ones((), requires_grad=True)
    assert ranks.total(loss) is loss
    assert ranks.once(loss) is loss
