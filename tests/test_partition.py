"""Partitions: disjoint, complete, by the book; and every refusal."""

import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from fedsp.partition import IID, ByColumn, BySizes, Dirichlet, Partitioner, apportion, carve
from fedsp.seeding import numpy_stream

TOPICS = ["b"] * 60 + ["a"] * 30 + ["c"] * 10


@pytest.fixture
def dataset() -> Dataset:
    return Dataset.from_dict({"topic": TOPICS, "text": [str(row) for row in range(len(TOPICS))]})


@pytest.mark.parametrize(
    "partitioner",
    [
        IID(1),
        IID(7),
        IID(100),
        Dirichlet(5, "topic", 0.3),
        Dirichlet(3, "topic", 100.0, min_examples=10),
        ByColumn("topic"),
        BySizes([50, 30, 20]),
        BySizes([0.5, 0.25, 0.25]),
    ],
    ids=repr,
)
def test_every_row_has_exactly_one_owner(partitioner: Partitioner, dataset: Dataset) -> None:
    parts = partitioner(dataset, 0)
    assert sorted(row for part in parts for row in part) == list(range(100))
    assert all(part for part in parts)
    assert len(partitioner.names(dataset)) == len(parts)
    assert partitioner.num_clients in (None, len(parts))
    assert parts == partitioner(dataset, 0)


def test_another_seed_gives_another_partition(dataset: Dataset) -> None:
    assert IID(4)(dataset, 0) != IID(4)(dataset, 1)


def test_iid_sizes_differ_by_at_most_one(dataset: Dataset) -> None:
    assert Counter(len(part) for part in IID(7)(dataset, 0)) == {14: 5, 15: 2}


def test_a_column_gives_a_client_for_each_value_in_sorted_order(dataset: Dataset) -> None:
    parts = ByColumn("topic")(dataset, 0)
    assert parts == [list(range(60, 90)), list(range(60)), list(range(90, 100))]
    assert ByColumn("topic").names(dataset) == ["a", "b", "c"]


def test_numbers_are_sorted_as_numbers() -> None:
    dataset = Dataset.from_dict({"site": [10, 9, 10, 2]})
    assert ByColumn("site").names(dataset) == ["2", "9", "10"]


def test_dirichlet_divides_each_value_by_the_drawn_proportions(dataset: Dataset) -> None:
    parts = Dirichlet(4, "topic", 5.0)(dataset, 3)
    rng = numpy_stream(3, "partition")
    for topic, size in (("a", 30), ("b", 60), ("c", 10)):
        cumulated = np.cumsum(rng.dirichlet([5.0] * 4))
        borders = [0, *np.floor(cumulated[:3] * size).astype(int), size]
        rng.permutation(size)
        counts = [sum(TOPICS[row] == topic for row in part) for part in parts]
        assert counts == np.diff(borders).tolist()


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_distributions_variance(alpha: float) -> None:
    # a share of Dir(alpha) over N clients has variance (N - 1) / (N^2 (N alpha + 1))
    num_clients, size = 4, 1000
    dataset = Dataset.from_dict({"topic": [str(row % 40) for row in range(40 * size)]})
    parts = Dirichlet(num_clients, "topic", alpha)(dataset, 0)
    shares = np.array([np.bincount(np.array(part) % 40, minlength=40) / size for part in parts])
    variance = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    np.testing.assert_allclose(shares.mean(), 1 / num_clients, atol=1e-9)
    np.testing.assert_allclose(shares.var(), variance, rtol=0.3)


def test_dirichlet_draws_until_every_client_has_enough(dataset: Dataset) -> None:
    for seed in range(5):
        parts = Dirichlet(5, "topic", 0.2, min_examples=4)(dataset, seed)
        assert min(len(part) for part in parts) >= 4


def test_whole_sizes_may_leave_rows_unused(dataset: Dataset) -> None:
    parts = BySizes([3, 5])(dataset, 0)
    assert [len(part) for part in parts] == [3, 5]
    assert len({row for part in parts for row in part}) == 8


def test_fractions_are_rounded_by_largest_remainder(dataset: Dataset) -> None:
    parts = BySizes([1 / 3, 1 / 3, 1 / 3])(dataset, 0)
    assert sorted(len(part) for part in parts) == [33, 33, 34]


def test_apportion_keeps_the_sum_and_the_limits() -> None:
    assert apportion([2.5, 2.5, 5.0], [2, 9, 9]) == [2, 3, 5]
    assert apportion([0.4, 0.3, 0.3], [1, 1, 1]) == [1, 0, 0]
    assert apportion([3.0, 1.0], [1, 5]) == [1, 3]


@pytest.mark.parametrize(
    ("partitioner", "message"),
    [
        (IID(101), "101 clients need at least 101 rows, but only 100 rows are left"),
        (Dirichlet(51, "topic", 1.0, min_examples=2), "51 clients need at least 102 rows"),
        (Dirichlet(30, "topic", 0.01), "No division in 1000 draws gives each of"),
        (
            Dirichlet(2, "topik", 1.0),
            "`data.partitioner.column` must be a column of `data.clients`, got 'topik'; its "
            "columns are topic, text.",
        ),
        (ByColumn("author"), "its columns are topic, text."),
        (BySizes([99, 2]), "`data.partitioner.sizes` asks for 101 rows, but 100 are left"),
        (BySizes([0.999, 0.001]), "`data.partitioner.sizes`: client-1 would get no row"),
    ],
    ids=str,
)
def test_a_partition_that_cannot_be_is_refused(
    partitioner: Partitioner, message: str, dataset: Dataset
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        partitioner(dataset, 0)


def test_a_row_without_an_owner_is_refused() -> None:
    with pytest.raises(ValueError, match="got None in row 1"):
        ByColumn("topic")(Dataset.from_dict({"topic": ["a", None]}), 0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IID(0),
        lambda: Dirichlet(0, "topic", 1.0),
        lambda: Dirichlet(2, "topic", 0.0),
        lambda: Dirichlet(2, "topic", 1.0, min_examples=0),
        lambda: BySizes([]),
        lambda: BySizes([1, 0.5]),
        lambda: BySizes([0.5, 0.6]),
        lambda: BySizes([3, 0]),
    ],
)
def test_values_out_of_range_name_their_option(build: object) -> None:
    with pytest.raises(ValueError, match=r"`data\.partitioner\.\w+` must be"):
        build()


def test_carved_splits_are_disjoint_and_have_the_sizes(dataset: Dataset) -> None:
    wanted = {"test": 0.2, "selection": 10, "server": 5}
    splits, left = carve(dataset, wanted, stratify_by=None, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "test": 20,
        "selection": 10,
        "server": 5,
    }
    assert sorted(left + [row for rows in splits.values() for row in rows]) == list(range(100))


def test_an_earlier_split_does_not_depend_on_later_ones(dataset: Dataset) -> None:
    alone, _ = carve(dataset, {"test": 0.2}, stratify_by="topic", seed=0)
    both, _ = carve(dataset, {"test": 0.2, "server": 30}, stratify_by="topic", seed=0)
    assert alone["test"] == both["test"]


def test_strata_are_carved_in_proportion(dataset: Dataset) -> None:
    splits, left = carve(dataset, {"test": 0.1, "server": 20}, stratify_by="topic", seed=0)
    assert Counter(TOPICS[row] for row in splits["test"]) == {"b": 6, "a": 3, "c": 1}
    assert Counter(TOPICS[row] for row in splits["server"]) == {"b": 12, "a": 6, "c": 2}
    assert Counter(TOPICS[row] for row in left) == {"b": 42, "a": 21, "c": 7}


def test_no_client_loses_its_last_row_to_a_split(dataset: Dataset) -> None:
    _, left = carve(dataset, {"test": 90, "server": 7}, stratify_by="topic", seed=0)
    assert Counter(TOPICS[row] for row in left) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"`data\.test` as a fraction must be in \(0, 1\), got"):
        carve(dataset, {"test": fraction}, stratify_by=None, seed=0)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, r"`data\.server` must be a number of rows of at least 1, .*, got 0"),
        (-3, r"`data\.server` must be a number of rows of at least 1, .*, got -3"),
        (0.001, r"`data\.server`=0.001 of `data\.clients` with 100 rows is"),
    ],
)
def test_a_split_of_no_rows_is_refused(size: float, message: str, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=message):
        carve(dataset, {"server": size}, stratify_by=None, seed=0)


@pytest.mark.parametrize(("column", "most"), [(None, 99), ("topic", 97)])
def test_more_rows_than_there_are_cannot_be_carved(
    column: str | None, most: int, dataset: Dataset
) -> None:
    carve(dataset, {"test": 50, "public": most - 50}, stratify_by=column, seed=0)
    message = re.escape(f"are {most + 1} rows (`data.test`: 50, `data.public`: {most - 49})")
    with pytest.raises(ValueError, match=message):
        carve(dataset, {"test": 50, "public": most - 49}, stratify_by=column, seed=0)
