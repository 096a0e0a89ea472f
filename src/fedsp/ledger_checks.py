"""One ledger by itself: what it declares and holds, and what in it must not be."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsp.display import printable
from fedsp.ledger import parse_line
from fedsp.message_sizes import size_limits

DIRECTIONS = {"auxiliary_handout": "down", "server_broadcast": "down", "client_update": "up"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_TENSORS = 3

Line = tuple[int, dict[str, Any]]


@dataclass
class Book:
    """A ledger as it was found.

    Args:
        name: What its writer is called.
        path: The file.
        declared: Its tensors by kind of message; empty where it declares nothing.
        client_id: The client whose own ledger it is; None for a server's.
        lines: The payloads, each with the number of its line.
        damage: What is wrong with the lines that are none, a sentence each.
        attempts: Line number and attempt of every line.
    """

    name: str
    path: Path
    declared: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    client_id: int | None = None
    lines: list[Line] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    attempts: list[tuple[int, int]] = field(default_factory=list)

    def at(self, number: int) -> str:
        """Return how findings name a line."""
        return f"{self.path}, line {number}"


def read_book(path: Path, name: str = "") -> Book:
    """Read a ledger, damaged or not.

    Args:
        path: The file.
        name: What its writer is called.

    Raises:
        OSError: If it cannot be read.
    """
    book = Book(name, path)
    *whole, rest = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            row = parse_line(text, book.at(number))
        except ValueError as error:
            book.damage.append(str(error))
            continue
        book.attempts.append((number, row["attempt"]))
        if "declares" not in row:
            book.lines.append((number, row))
        elif not book.declared:
            book.declared, book.client_id = row["declares"], row["client"]
        elif (row["declares"], row["client"]) != (book.declared, book.client_id):
            book.damage.append(f"{book.at(number)}: it declares something else than before")
    if rest:
        book.damage.append(
            f"{book.at(len(whole) + 1)}: it is cut off. Its writer was killed at it, and nothing "
            "left then (a resumed run removes the line), or the file was shortened"
        )
    return book


def check_book(book: Book) -> list[str]:
    """Return what must not be in a ledger, a sentence each.

    Args:
        book: What `read_book` returned.
    """
    return [*book.damage, *_check_payloads(book), *_check_sequence(book)]


def _check_payloads(book: Book) -> Iterator[str]:
    """Hold every line by itself against what was declared."""
    if book.lines and not book.declared:
        yield (
            f"{book.path}: it declares nothing, so that nothing may travel: the line is gone, or "
            "an older fedsp wrote the file"
        )
        return
    for number, row in book.lines:
        for fault in _faults(row, book):
            yield f"{book.at(number)}: {_what(row)} {fault}"


def _faults(row: dict[str, Any], book: Book) -> Iterator[str]:
    kind, tensors = row["kind"], row["tensors"]
    if kind not in DIRECTIONS or kind not in book.declared:
        yield "is of a kind that is not declared"
        return
    if row["direction"] != DIRECTIONS[kind]:
        yield f"went {row['direction']}, its direction is {DIRECTIONS[kind]}"
    if book.client_id not in (None, row["client"]):
        yield f"is not of client {book.client_id}, whose ledger this is"
    if not _SHA256.fullmatch(row["sha256"]):
        yield f"has no SHA-256 but {row['sha256']!r:.80}"
    declared = book.declared[kind]
    if tensors != declared:
        yield from _differences(tensors, declared)
        return
    try:
        low, high = size_limits(tensors)
    except ValueError as error:
        yield f"cannot be measured: {error}"
        return
    if not low < row["bytes"] <= high:
        yield (
            f"has {row['bytes']} bytes, where its tensors are {low} and at most {high - low} may "
            "be around them"
        )


def _differences(tensors: Sequence[Any], declared: Sequence[Any]) -> Iterator[str]:
    came, wanted = tensor_texts(tensors), tensor_texts(declared)
    foreign, missing = Counter(came) - Counter(wanted), Counter(wanted) - Counter(came)
    if foreign:
        yield f"holds what is not declared: {_short(foreign)}"
    if missing:
        yield f"lacks what is declared: {_short(missing)}"
    if not foreign and not missing:
        yield "has its tensors in another order"


def _check_sequence(book: Book) -> Iterator[str]:
    """Hold every line against those before it: what must precede it, and what must be the same."""
    yield from _check_attempts(book)
    handouts: dict[int, str] = {}  # by client
    broadcasts: dict[tuple[int, int], str] = {}  # by attempt and round
    asked: Counter[tuple[int, int, int]] = Counter()
    newest: dict[int, int] = defaultdict(int)
    for number, row in book.lines:
        where, kind, client_id = f"{book.at(number)}: {_what(row)}", row["kind"], row["client"]
        turn = row["attempt"], row["round"]
        if kind == "auxiliary_handout":
            first = next(iter(handouts.values()), row["sha256"])
            if first != row["sha256"]:
                yield f"{where} is another auxiliary model than that handed out before"
            handouts[client_id] = row["sha256"]
        elif kind == "server_broadcast":
            asked[*turn, client_id] += 1
            if client_id not in handouts:
                yield f"{where} went to a client without an auxiliary model: a line is gone"
            if book.client_id is None:
                yield from _check_broadcast(where, row, broadcasts, newest)
        elif kind == "client_update":
            asked[*turn, client_id] -= 1
            if asked[*turn, client_id] < 0:
                yield f"{where} answers no broadcast, or one that was answered before"


def _check_attempts(book: Book) -> Iterator[str]:
    before = -1
    for number, attempt in book.attempts:
        if not before <= attempt <= before + 1:
            yield f"{book.at(number)}: attempt {attempt} is out of turn: lines are gone"
        before = attempt


def _check_broadcast(
    where: str,
    row: dict[str, Any],
    broadcasts: dict[tuple[int, int], str],
    newest: dict[int, int],
) -> Iterator[str]:
    """Look at the rounds of a server, which a client cannot tell from repeated ones."""
    attempt, round_idx = row["attempt"], row["round"]
    if broadcasts.setdefault((attempt, round_idx), row["sha256"]) != row["sha256"]:
        yield f"{where} is another one than that of the round to others"
    if round_idx < newest[attempt]:
        yield f"{where} comes after round {newest[attempt]} has begun"
    newest[attempt] = max(newest[attempt], round_idx)


def repeats(book: Book) -> Iterator[str]:
    """Tell of auxiliary models that were handed out again, to a client that had lost its own.

    Args:
        book: What `read_book` returned.

    Yields:
        A sentence for each such client.
    """
    counts = Counter(row["client"] for _, row in book.lines if row["kind"] == "auxiliary_handout")
    for client_id, count in sorted(counts.items()):
        if count > 1:
            yield f"{book.path}: client {client_id} was handed the auxiliary model {count} times"


def tensor_texts(tensors: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return tensors of a ledger as `name [shape] dtype`."""
    return tuple(f"{printable(it['name'])} {it['shape']} {it['dtype']}" for it in tensors)


def _what(row: Mapping[str, Any]) -> str:
    kind = row["kind"].replace("_", " ")
    return f"the {kind!s:.80} of client {row['client']} in round {row['round']}"


def _short(texts: Counter[str]) -> str:
    first = ", ".join([*texts][:_MOST_TENSORS])
    return (
        first if len(texts) <= _MOST_TENSORS else f"{first} and {len(texts) - _MOST_TENSORS} more"
    )
