"""Who owns which row: held-out rows are carved off, the rest is divided among the clients.

Rows are only counted and assigned here; nothing reads their text and nothing is tokenised.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from fedsp.seeding import numpy_stream

# A draw of Dirichlet shares that leaves a client short is repeated this often before it is an
# error.
_MAX_DRAWS = 1000


class Partitioner(ABC):
    """Divides rows among clients; no row belongs to two of them.

    `num_clients` is None where only the data can tell.
    """

    num_clients: int | None

    @property
    def stratify_by(self) -> str | None:
        """Column whose values held-out splits must have in the data's proportions, if any."""
        return None

    @abstractmethod
    def __call__(self, dataset: Dataset, seed: int) -> list[list[int]]:
        """Return each client's rows, ascending; where all are here, no client is without one.

        Args:
            dataset: The rows to divide.
            seed: The run's seed.

        Raises:
            ValueError: If there are fewer rows than clients, or a client would get none.
        """

    def names(self, dataset: Dataset) -> list[str]:
        """Return a name for each client, in the order of `__call__`."""
        return [f"client-{client_id}" for client_id in range(self.num_clients or 0)]


@dataclass(frozen=True)
class IID(Partitioner):
    """Equal shares of the shuffled rows.

    Args:
        num_clients: Number of clients, at least 1.
    """

    num_clients: int

    def __post_init__(self) -> None:
        _check_num_clients(self.num_clients)

    def __call__(self, dataset: Dataset, seed: int) -> list[list[int]]:
        """Divide a seeded permutation into parts whose sizes differ by at most one."""
        _check_enough(len(dataset), self.num_clients)
        order = numpy_stream(seed, "partition").permutation(len(dataset))
        return [sorted(part.tolist()) for part in np.array_split(order, self.num_clients)]


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Skewed shares: every value of a column is divided by proportions drawn from Dir(alpha).

    Args:
        num_clients: Number of clients, at least 1.
        column: Column whose values are divided unevenly, such as a label or a topic.
        alpha: Concentration, > 0: 0.1 gives nearly one value a client, 100 nearly equal shares.
        min_examples: Every client gets at least so many rows; draws that fail are repeated.

    Source: Hsu et al. 2019, arXiv 1909.06335, with the values divided among clients.
    """

    num_clients: int
    column: str
    alpha: float
    min_examples: int = 1

    def __post_init__(self) -> None:
        _check_num_clients(self.num_clients)
        if not self.alpha > 0:
            raise ValueError(f"`data.partitioner.alpha` must be above 0, got {self.alpha}.")
        if self.min_examples < 1:
            raise ValueError(
                f"`data.partitioner.min_examples` must be at least 1, got {self.min_examples}."
            )

    def __call__(self, dataset: Dataset, seed: int) -> list[list[int]]:
        """Divide by the first draw that leaves every client `min_examples` rows."""
        _check_enough(len(dataset), self.num_clients, self.min_examples)
        groups = list(_group(_column(dataset, self.column)).values())
        rng = numpy_stream(seed, "partition")
        for _ in range(_MAX_DRAWS):
            parts = self._draw(groups, rng)
            if min(len(part) for part in parts) >= self.min_examples:
                return [sorted(part) for part in parts]
        raise ValueError(
            f"No division in {_MAX_DRAWS} draws gives each of `data.partitioner.num_clients`="
            f"{self.num_clients} clients `data.partitioner.min_examples`={self.min_examples} of "
            f"{len(dataset)} rows at `data.partitioner.alpha`={self.alpha}. Raise alpha or lower "
            "one of the others."
        )

    def _draw(self, groups: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(self.num_clients)]
        for rows in groups:
            shares = rng.dirichlet(np.full(self.num_clients, self.alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rng.permutation(rows), cuts), strict=True):
                part.extend(piece.tolist())
        return parts


@dataclass(frozen=True)
class ByColumn(Partitioner):
    """Natural partition: one client for every value of a column, in the values' sorted order.

    Args:
        column: Column that says whose row it is, such as an author, a hospital or a package.
    """

    column: str
    num_clients: None = field(default=None, init=False)

    @property
    def stratify_by(self) -> str:
        """The column itself, so that every client's kind of data is held out."""
        return self.column

    def __call__(self, dataset: Dataset, seed: int) -> list[list[int]]:
        """Group the rows by value; nothing is drawn."""
        return list(_group(_column(dataset, self.column)).values())

    def names(self, dataset: Dataset) -> list[str]:
        """Return the values as the clients' names."""
        return list(_group(_column(dataset, self.column)))


@dataclass(frozen=True)
class BySizes(Partitioner):
    """Shares of given sizes of the shuffled rows.

    Args:
        sizes: One entry a client: numbers of rows (rows beyond their sum stay unused), or fractions
            in (0, 1) that add up to 1.
    """

    sizes: list[int | float]
    num_clients: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_clients", len(self.sizes))
        kinds = {type(size) for size in self.sizes}
        if kinds == {int} and min(self.sizes) >= 1:
            return
        if kinds == {float} and min(self.sizes) > 0 and abs(sum(self.sizes) - 1) < 1e-6:
            return
        raise ValueError(
            "`data.partitioner.sizes` must be all whole numbers of at least 1, or all fractions "
            f"above 0 that add up to 1, got {self.sizes}."
        )

    def __call__(self, dataset: Dataset, seed: int) -> list[list[int]]:
        """Cut a seeded permutation into the sizes."""
        counts = self._counts(len(dataset))
        order = numpy_stream(seed, "partition").permutation(len(dataset))
        cuts = np.cumsum(counts)
        return [sorted(part.tolist()) for part in np.split(order[: cuts[-1]], cuts[:-1])]

    def _counts(self, num_rows: int) -> list[int]:
        if isinstance(self.sizes[0], float):
            _check_enough(num_rows, self.num_clients)
            counts = apportion(
                [size * num_rows for size in self.sizes], [num_rows] * len(self.sizes)
            )
        else:
            counts = [int(size) for size in self.sizes]
        if sum(counts) > num_rows:
            raise ValueError(
                f"`data.partitioner.sizes` asks for {sum(counts)} rows, but {num_rows} are left "
                "for the clients. Lower the sizes or carve out less."
            )
        if 0 in counts:
            raise ValueError(
                f"`data.partitioner.sizes`: client-{counts.index(0)} would get no row: "
                f"{self.sizes[counts.index(0)]} of {num_rows} rows. Raise its fraction."
            )
        return counts


@dataclass(frozen=True)
class Parties(Partitioner):
    """The parties of a live federation, each with data that only its own process reads.

    `fedsp federation init` writes it: at the server nobody has rows, at a party all are its own.

    Args:
        parties: Names, in the order of the client ids.
        own: Whose rows these are; null where there are none.
    """

    parties: list[str]
    own: str | None = None
    num_clients: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_clients", len(self.parties))
        if not self.parties or len(set(self.parties)) != len(self.parties):
            raise ValueError(
                "`data.partitioner.parties` must name at least one party, each once, got "
                f"{self.parties}."
            )
        if self.own is not None and self.own not in self.parties:
            raise ValueError(
                f"`data.partitioner.own` must be one of {', '.join(self.parties)} or null, got "
                f"{self.own!r}."
            )

    def __call__(self, dataset: Dataset, seed: int) -> list[list[int]]:
        """Give all rows to the party whose they are; the others' lists are empty."""
        rows = list(range(len(dataset)))
        return [rows if name == self.own else [] for name in self.parties]

    def names(self, dataset: Dataset) -> list[str]:
        """Return the parties."""
        return self.parties


def carve(
    dataset: Dataset, wanted: Mapping[str, int | float], *, stratify_by: str | None, seed: int
) -> tuple[dict[str, list[int]], list[int]]:
    """Take held-out rows off a data set, on one seeded permutation and in the order given.

    Args:
        dataset: The clients' source.
        wanted: Split name to a number of rows (int) or a fraction of `dataset` in (0, 1) (float).
        stratify_by: Column whose values every split has in proportion; one row of each value is
            always left over. None carves regardless of content.
        seed: The run's seed.

    Returns:
        Ascending rows of every split, and the ascending rows that are left.

    Raises:
        ValueError: If a size is out of range, or more rows are carved than there are.
    """
    counts = {name: _count(name, size, len(dataset)) for name, size in wanted.items()}
    groups = (
        list(_group(_column(dataset, stratify_by)).values())
        if stratify_by is not None
        else [list(range(len(dataset)))]
    )
    room = len(dataset) - len(groups)
    if sum(counts.values()) > room:
        listed = ", ".join(f"`data.{name}`: {count}" for name, count in counts.items())
        left = (
            f"one of each of the {len(groups)} values of {stratify_by!r}" if stratify_by else "one"
        )
        raise ValueError(
            f"Carved out of `data.clients` are {sum(counts.values())} rows ({listed}), but of its "
            f"{len(dataset)} rows {left} must be left for the clients. Lower them or give these "
            "splits sources of their own."
        )
    rng = numpy_stream(seed, "carve")
    pools = [rng.permutation(rows).tolist() for rows in groups]
    splits = {name: _take(pools, count) for name, count in counts.items()}
    return splits, sorted(row for pool in pools for row in pool)


def apportion(quotas: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Round quotas to whole numbers of the same sum, largest remainder first, none above its limit.

    Args:
        quotas: Non-negative numbers; their sum is (nearly) whole.
        limits: Largest value of each; their sum is at least the quotas' sum.
    """
    counts = [min(int(quota), limit) for quota, limit in zip(quotas, limits, strict=True)]
    missing = round(sum(quotas)) - sum(counts)
    order = sorted(range(len(quotas)), key=lambda idx: (counts[idx] - quotas[idx], idx))
    while missing > 0:
        for idx in order:
            if missing > 0 and counts[idx] < limits[idx]:
                counts[idx] += 1
                missing -= 1
    return counts


def _take(pools: list[list[int]], count: int) -> list[int]:
    """Remove `count` rows from the pools in proportion to their sizes, leaving one in each."""
    total = sum(len(pool) for pool in pools)
    quotas = [len(pool) * count / total for pool in pools]
    shares = apportion(quotas, [len(pool) - 1 for pool in pools])
    taken = []
    for pool, share in zip(pools, shares, strict=True):
        taken += pool[:share]
        del pool[:share]
    return sorted(taken)


def _count(name: str, size: int | float, num_rows: int) -> int:
    if isinstance(size, float):
        if not 0 < size < 1:
            raise ValueError(
                f"`data.{name}` as a fraction must be in (0, 1), got {size}. Give a whole number "
                "for rows, or null for none."
            )
        count = round(size * num_rows)
        if count < 1:
            raise ValueError(
                f"`data.{name}`={size} of `data.clients` with {num_rows} rows is no row at all. "
                "Raise it, or give null for none."
            )
    else:
        count = size
        if count < 1:
            raise ValueError(
                f"`data.{name}` must be a number of rows of at least 1, a fraction in (0, 1), a "
                f"source or null, got {size}."
            )
    return count


def _column(dataset: Dataset, column: str) -> list[object]:
    if column not in dataset.column_names:
        raise ValueError(
            f"`data.partitioner.column` must be a column of `data.clients`, got {column!r}; its "
            f"columns are {', '.join(dataset.column_names)}."
        )
    return list(dataset[column])


def _group(values: Sequence[object]) -> dict[str, list[int]]:
    """Rows of every value, values in sorted order: numbers by size, everything else as text."""
    groups: dict[object, list[int]] = {}
    for row, value in enumerate(values):
        if value is None or isinstance(value, list | dict):
            raise ValueError(
                "`data.partitioner.column` must hold a text or a number in every row, got "
                f"{value!r} in row {row}."
            )
        groups.setdefault(value, []).append(row)
    numeric = all(isinstance(value, int | float) for value in groups)
    ordered = sorted(groups, key=(lambda value: value) if numeric else str)
    return {str(value): groups[value] for value in ordered}


def _check_num_clients(num_clients: int) -> None:
    if num_clients < 1:
        raise ValueError(f"`data.partitioner.num_clients` must be at least 1, got {num_clients}.")


def _check_enough(num_rows: int, num_clients: int, each: int = 1) -> None:
    if num_rows < num_clients * each:
        raise ValueError(
            f"`data.partitioner`: {num_clients} clients need at least {num_clients * each} rows, "
            f"but only {num_rows} rows are left for them. Lower the number of clients, carve out "
            "less or bring more data."
        )
