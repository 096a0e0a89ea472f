"""Where rows come from: files, a hub data set, the docstrings of installed packages.

A source only reads. What a row means is a task's business, who owns it a partitioner's.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from pyarrow.parquet import ParquetFile

from fedsp.docstrings import read_docstrings
from fedsp.layouts import Layout

Row = dict[str, Any]
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_ENDINGS = (*_FORMATS, ".jsonl.gz", ".json.gz", ".csv.gz")


class DataSource(ABC):
    """Rows with named fields."""

    @abstractmethod
    def load(self) -> Dataset:
        """Read all rows.

        Raises:
            ValueError: If the source is missing, empty or malformed; the text says where.
        """

    def fingerprint(self) -> str:
        """Return a hash of the rows' content, wherever they come from; reads all of them."""
        return content_hash(self.load())

    def other_split(self, split: str) -> "DataSource":
        """Return the source of another split of the same data set.

        Args:
            split: Its name.

        Raises:
            ValueError: If the source knows no splits.
        """
        raise ValueError(
            f"{split!r} names a split of `data.clients`, and {type(self).__name__} has none. Use "
            "fedsp.sources.Hub there, or give a source, a number of rows or a fraction here."
        )


def content_hash(dataset: Dataset) -> str:
    """Hash the values of all rows, in order, with their columns' names and types.

    Args:
        dataset: Rows in memory or on disk.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(dataset.features).encode())
    digest.update(str(len(dataset)).encode())
    for batch in dataset.iter(batch_size=1000):
        digest.update(json.dumps(batch, default=repr).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Files(DataSource):
    """Files on this machine: `.jsonl`/`.json` (an object a line, or one list), `.csv`, `.parquet`.

    The text formats may be compressed (`.jsonl.gz`). CSV fields are always text. Columns that a
    file lacks are empty in its rows.

    Args:
        paths: One path or several, read in this order; `~` is the home folder.
    """

    paths: str | list[str]

    def load(self) -> Dataset:
        """Read all files, one after the other."""
        paths = [self.paths] if isinstance(self.paths, str) else self.paths
        if not paths:
            raise ValueError("`paths` of a Files source must name at least one file, got none.")
        rows: list[Row] = []
        for path in paths:
            rows += _read_file(Path(path).expanduser())
        return _to_dataset(rows, ", ".join(paths))


@dataclass(frozen=True)
class Hub(DataSource):
    """A data set of the Hugging Face hub with its splits, or a local folder in its place.

    Args:
        name: `owner/name` on the hub, or a folder laid out like a data set of the hub.
        subset: Name of the data set's configuration. None: its only or default one.
        split: Split to read, also a slice such as `train[:10%]`.
        revision: Branch, tag or commit on the hub; fix a commit for runs that can be repeated.
        layout: Function of a row that brings it into the form the task expects, such as
            `fedsp.layouts.arc`. None: rows as they are.
        folder: Folder that holds the splits as files (`train.jsonl`, `test.csv.gz`, …), already in
            the form that the layout would give. It is read instead of the hub.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    layout: Layout | None = None
    folder: str | None = None

    def load(self) -> Dataset:
        """Read the folder; else download, or read from the local cache."""
        if self.folder is not None:
            return Files(str(_split_file(Path(self.folder).expanduser(), self.split))).load()
        dataset = self._load_hub()
        if len(dataset) == 0:
            raise ValueError(f"The data set {self.name!r}, split {self.split!r}, holds no rows.")
        return dataset if self.layout is None else self._lay_out(dataset, self.layout)

    def other_split(self, split: str) -> "Hub":
        """Return the same data set with another split."""
        return replace(self, split=split)

    def _load_hub(self) -> Dataset:
        try:
            return datasets.load_dataset(
                self.name, self.subset, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"The data set `name`={self.name!r}, `subset`={self.subset!r}, "
                f"`split`={self.split!r}, `revision`={self.revision!r} cannot be loaded: {error}. "
                "Check the spelling, the access rights and the connection (HF_HUB_OFFLINE allows "
                "only what is cached), or give a local `folder`."
            ) from error

    def _lay_out(self, dataset: Dataset, layout: Layout) -> Dataset:
        rows = []
        for row_idx, row in enumerate(dataset):
            try:
                rows.append(layout(row))
            except (LookupError, ValueError, TypeError, AttributeError, SyntaxError) as error:
                raise ValueError(
                    f"The data set {self.name!r}, split {self.split!r}: row {row_idx} does not fit "
                    f"`layout`={layout.__name__}: {error!r}. Its fields are {', '.join(row)}."
                ) from error
        return _to_dataset(rows, self.name)


@dataclass(frozen=True)
class Docstrings(DataSource):
    """Definitions and their docstrings' summaries, from the source of installed packages.

    Rows have the fields `package`, `prompt` (the definition) and `completion` (the summary).
    Packages are read as text, never imported.

    Args:
        packages: Import names of installed packages or modules.
        max_rows_per_package: At most so many rows of each package, spread over its files. None:
            all.
    """

    packages: list[str]
    max_rows_per_package: int | None = None

    def load(self) -> Dataset:
        """Read the packages in the order given."""
        if not self.packages:
            raise ValueError("`packages` of a Docstrings source must name at least one, got none.")
        rows = read_docstrings(self.packages, max_rows=self.max_rows_per_package)
        return _to_dataset(list(rows), ", ".join(self.packages))


def _split_file(folder: Path, split: str) -> Path:
    found = [folder / f"{split}{end}" for end in _ENDINGS if (folder / f"{split}{end}").is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"`folder`={str(folder)!r} must hold one file of the split {split!r}, named {split} "
            f"with one of the endings {', '.join(_ENDINGS)}; found: {names} (looked from "
            f"{Path.cwd()})."
        )
    return found[0]


def _to_dataset(rows: Sequence[Row], origin: str) -> Dataset:
    # `Dataset.from_list` would take the columns from the first row alone
    columns = dict.fromkeys(name for row in rows for name in row)
    if not columns:
        raise ValueError(f"No rows with fields in {origin}.")
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (TypeError, ValueError, OverflowError):
        for name in columns:
            _check_column(name, [row.get(name) for row in rows], origin)
        raise


def _check_column(name: str, values: Sequence[object], origin: str) -> None:
    try:
        Dataset.from_dict({name: values})
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Field {name!r} holds values of several kinds in {origin}: {error}. Give it one kind "
            "in all rows."
        ) from error


def _read_file(path: Path) -> list[Row]:
    suffixes = path.suffixes[-2:]
    compressed = bool(suffixes) and suffixes[-1] == ".gz"
    kind = suffixes[-2] if compressed and len(suffixes) == 2 else path.suffix
    if kind not in _FORMATS or (compressed and kind == ".parquet"):
        raise ValueError(
            f"Data file {path} must end in {', '.join(_FORMATS)} (the text formats also with .gz)."
        )
    if not path.is_file():
        raise ValueError(f"Data file {path} does not exist (looked from {Path.cwd()}).")
    if path.stat().st_size == 0:
        raise ValueError(f"Data file {path} is empty.")
    if kind == ".parquet":
        rows = _read_parquet(path)
    else:
        text = _read_text(path, compressed)
        rows = list(_csv_rows(path, text) if kind == ".csv" else _json_rows(path, text))
    if not rows:
        raise ValueError(f"Data file {path} holds no rows.")
    return rows


def _read_text(path: Path, compressed: bool) -> str:
    try:
        data = path.read_bytes()
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first name
        return (gzip.decompress(data) if compressed else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"Data file {path}, line {line}: not UTF-8 text ({error.reason})."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Data file {path} cannot be read: {error}.") from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        rows = [(idx, row) for idx, row in enumerate(_parse(path, text, 1))]
        place = "entry"
    else:
        # only \n ends a line of JSON: str.splitlines also breaks at U+2028, which may stand in a
        # text
        lines = [(idx, line) for idx, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(idx, _parse(path, line, idx)) for idx, line in lines]
        place = "line"
    for idx, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"Data file {path}, {place} {idx}: a JSON object with named fields is wanted, got "
                f"{json.dumps(row)[:60]}."
            )
        yield row


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Data file {path}, line {first_line + error.lineno - 1}, column {error.colno}: "
            f"malformed JSON: {error.msg}."
        ) from error


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or "" in header:
            raise ValueError(
                f"Data file {path}, line 1: every column needs a name of its own, got {header}."
            )
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"Data file {path}, line {reader.line_num}: {len(header)} fields are wanted as "
                    f"in line 1, got {len(fields)}."
                )
            # an empty cell is how CSV writes null
            yield {name: cell or None for name, cell in zip(header, fields, strict=True)}
    except csv.Error as error:
        raise ValueError(
            f"Data file {path}, line {reader.line_num}: malformed CSV: {error}."
        ) from error


def _read_parquet(path: Path) -> list[Row]:
    try:
        with ParquetFile(path) as file:
            rows: list[Row] = file.read().to_pylist()
    except (OSError, ValueError) as error:  # Arrow's own are of these
        raise ValueError(f"Data file {path} is no readable Parquet file: {error}.") from error
    return rows
