"""Whether anything but what was declared has left, by the ledgers of one side or of both.

It reads what was written down and judges it; it shows nothing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsp.ledger import parse_line
from fedsp.messages import size_limits
from fedsp.run_folder import RunFolder
from fedsp.run_record import read_run

DIRECTIONS = {"auxiliary_handout": "down", "server_broadcast": "down", "client_update": "up"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIRST_DIGITS = 12

Line = tuple[int, dict[str, Any]]
Exchange = tuple[str, int]  # kind and round


@dataclass(frozen=True)
class Flow:
    """What went one way between the server and a party in a round.

    Args:
        party: The client's name, or `client` and its id.
        round_idx: The round, from 0.
        direction: `up` to the server, `down` to the party.
        kind: Kind of the messages.
        tensors: What was in each, as `name [shape] dtype`.
        payloads: Number of messages, those of repeated rounds too.
        num_bytes: Their bytes.
    """

    party: str
    round_idx: int
    direction: str
    kind: str
    tensors: tuple[str, ...]
    payloads: int
    num_bytes: int


@dataclass(frozen=True)
class AuditReport:
    """What the ledgers say, and what is wrong with it.

    Args:
        declared: By kind of message the tensors that may travel, as `name [shape] dtype`.
        flows: What travelled, by the audited run's ledger, in its order.
        agreed: Messages that both sides' ledgers hold; None where there is one side only.
        notes: What is worth knowing and no fault, a sentence each.
        findings: What must not be, a sentence each.
    """

    declared: dict[str, tuple[str, ...]]
    flows: tuple[Flow, ...]
    agreed: int | None
    notes: tuple[str, ...]
    findings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


@dataclass
class _Book:
    """A ledger as it was found: its whole lines, and what is wrong with the others."""

    name: str
    path: Path
    declared: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    client_id: int | None = None
    lines: list[Line] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    attempts: list[tuple[int, int]] = field(default_factory=list)  # line number and attempt

    def at(self, number: int) -> str:
        """Return how findings name a line."""
        return f"{self.path}, line {number}"


def audit(run_dir: Path, clients: Sequence[Path] = ()) -> AuditReport:
    """Check that nothing but declared payloads travelled, and that both sides say the same.

    Args:
        run_dir: Folder of a run, of either side's, or of a federation (`fedsp federation init`),
            where the clients' runs are found in it.
        clients: Folders of the clients' runs, where `run_dir` is the server's.

    Returns:
        What travelled and what is wrong with it. A message that was sent and never arrived is noted
        only: its receiver was not there.

    Raises:
        ValueError: If a folder is none of these, or two ledgers are of the same client.
        OSError: If a ledger cannot be read.
    """
    run_dir, clients = _find_runs(run_dir, clients)
    book = _read_book(run_dir, "the server" if clients else "")
    others, silent = _read_clients(book, clients)
    notes: list[str] = []
    findings: list[str] = []
    for each in (book, *others.values(), *silent):
        findings += [*each.damage, *_check_payloads(each), *_check_sequence(each)]
        notes += _repeats(each)
    if not book.damage:
        _check_metrics(run_dir, notes, findings)
    agreed = 0
    for client_id, other in others.items():
        agreed += _compare(book, other, client_id, notes, findings)
    names = {client_id: other.name for client_id, other in others.items()}
    if clients:
        _check_absent(book, set(names), silent, notes, findings)
    return AuditReport(
        declared={kind: _texts(tensors) for kind, tensors in book.declared.items()},
        flows=tuple(_flows(book, names)),
        agreed=agreed if clients else None,
        notes=tuple(notes),
        findings=tuple(findings),
    )


def _find_runs(folder: Path, clients: Sequence[Path]) -> tuple[Path, list[Path]]:
    for option, path in (("RUN_DIR", folder), *(("--clients", path) for path in clients)):
        server = path / "server" / "run"
        if option == "RUN_DIR" and not clients and RunFolder(server).ledger.is_file():
            runs = sorted(path.glob("clients/*/run"))
            return server, [run for run in runs if RunFolder(run).ledger.is_file()]
        if not RunFolder(path).ledger.is_file():
            also = "" if clients else ", or that of a federation, with server/run/ledger.jsonl"
            state = "which holds none" if path.is_dir() else "which is no folder"
            raise ValueError(
                f"`{option}` must be the folder of a run, with ledger.jsonl in it{also}, got "
                f"{path}, {state}."
            )
    return folder, list(clients)


def _read_book(run_dir: Path, name: str = "") -> _Book:
    path = RunFolder(run_dir).ledger
    book = _Book(name, path)
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


def _read_clients(server: _Book, folders: Sequence[Path]) -> tuple[dict[int, _Book], list[_Book]]:
    """Return the clients' ledgers by client id, and those that do not say whose they are."""
    if folders and server.client_id is not None:
        raise ValueError(
            "`RUN_DIR` must be the server's run where clients are given, got "
            f"{server.path.parent}, whose ledger is that of client {server.client_id}."
        )
    books: dict[int, _Book] = {}
    silent = []
    for folder in folders:
        path = folder.resolve()
        book = _read_book(folder, path.parent.name if path.name == "run" else path.name)
        ids = {row["client"] for _, row in book.lines}
        if not book.declared and len(ids) <= 1:
            book.client_id = next(iter(ids), None)
        elif book.client_id is None:
            raise ValueError(
                f"`--clients` must be the folders of clients' runs, got {folder}, whose ledger "
                "is not that of one client."
            )
        if book.client_id is None:
            silent.append(book)
        elif book.client_id in books:
            raise ValueError(
                f"`--clients` must be different clients, got {books[book.client_id].path.parent} "
                f"and {folder}, both of client {book.client_id}."
            )
        else:
            books[book.client_id] = book
    return dict(sorted(books.items())), silent


def _check_absent(
    server: _Book, compared: set[int], silent: list[_Book], notes: list[str], findings: list[str]
) -> None:
    """Tell of clients whose ledgers are not here, and of empty ledgers that could be theirs."""
    answered = {row["client"] for _, row in server.lines if row["direction"] == "up"}
    for client_id in sorted({row["client"] for _, row in server.lines} - compared):
        if silent and client_id in answered:
            findings.append(
                f"client {client_id} answered the server and no ledger here says so; empty: "
                f"{', '.join(str(book.path) for book in silent)}"
            )
        else:
            notes.append(f"client {client_id}: its ledger is not here to compare")


def _check_payloads(book: _Book) -> Iterator[str]:
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


def _faults(row: dict[str, Any], book: _Book) -> Iterator[str]:
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
    came, wanted = _texts(tensors), _texts(declared)
    foreign, missing = Counter(came) - Counter(wanted), Counter(wanted) - Counter(came)
    if foreign:
        yield f"holds what is not declared: {_short(foreign)}"
    if missing:
        yield f"lacks what is declared: {_short(missing)}"
    if not foreign and not missing:
        yield "has its tensors in another order"


def _check_sequence(book: _Book) -> Iterator[str]:
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


def _check_attempts(book: _Book) -> Iterator[str]:
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


def _repeats(book: _Book) -> Iterator[str]:
    """Tell of auxiliary models that were handed out again, to a client that had lost its own."""
    counts = Counter(row["client"] for _, row in book.lines if row["kind"] == "auxiliary_handout")
    for client_id, count in sorted(counts.items()):
        if count > 1:
            yield f"{book.path}: client {client_id} was handed the auxiliary model {count} times"


def _check_metrics(run_dir: Path, notes: list[str], findings: list[str]) -> None:
    """Hold the ledger's sums against the metrics of finished rounds, where the run has some."""
    for round_idx, direction, surplus in read_run(run_dir).ledger_gaps():
        where = f"{RunFolder(run_dir).ledger}, round {round_idx}"
        if direction == "up" and surplus > 0:
            notes.append(f"{where}: {surplus} bytes came up after the round was measured")
        else:
            more = "more" if surplus > 0 else "fewer: lines are gone"
            findings.append(
                f"{where}: comm/{direction}_bytes of the run's metrics is another number, the "
                f"ledger has {abs(surplus)} bytes {more}"
            )


def _compare(
    server: _Book, client: _Book, client_id: int, notes: list[str], findings: list[str]
) -> int:
    """Hold the server's lines of a client against the client's own; return how many agree."""
    if server.declared != client.declared:
        findings.append(f"{client.name} and the server do not declare the same tensors")
    agreed = 0
    ours, theirs = _exchanges(server, client_id), _exchanges(client, client_id)
    for kind, round_idx in sorted(ours.keys() | theirs.keys(), key=lambda it: (it[1], it[0])):
        mine, own = ours[kind, round_idx], theirs[kind, round_idx]
        agreed += (mine & own).total()
        at_server, at_client = sorted((mine - own).elements()), sorted((own - mine).elements())
        what = f"round {round_idx}, {kind.replace('_', ' ')}"
        while at_server and at_client:
            one, other = at_server.pop(0), at_client.pop(0)
            findings.append(
                f"{what}: the server's ledger and that of {client.name} differ: "
                f"{_digits(one)} and {_digits(other)}"
            )
        sent, came = (client.name, "the server"), at_server
        lost = at_client
        if DIRECTIONS.get(kind) == "down":
            sent, came, lost = ("the server", client.name), at_client, at_server
        for one in came:
            findings.append(f"{what}: {sent[1]} got {_digits(one)}, which {sent[0]} never sent")
        for one in lost:
            notes.append(f"{what}: lost on the way from {sent[0]} to {sent[1]}: {_digits(one)}")
    return agreed


def _exchanges(book: _Book, client_id: int) -> dict[Exchange, Counter[tuple[str, int]]]:
    """Return by kind and round the hash and size of each message of a client."""
    found: dict[Exchange, Counter[tuple[str, int]]] = defaultdict(Counter)
    for _, row in book.lines:
        if row["client"] == client_id:
            found[row["kind"], row["round"]][row["sha256"], row["bytes"]] += 1
    return found


def _flows(book: _Book, names: Mapping[int, str]) -> Iterator[Flow]:
    sums: dict[tuple[Any, ...], list[int]] = {}
    for _, row in book.lines:
        party = names.get(row["client"], f"client {row['client']}")
        key = party, row["round"], row["direction"], row["kind"], _texts(row["tensors"])
        entry = sums.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += row["bytes"]
    for key, (payloads, num_bytes) in sums.items():
        yield Flow(*key, payloads=payloads, num_bytes=num_bytes)


def _texts(tensors: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{it['name']} {it['shape']} {it['dtype']}" for it in tensors)


def _what(row: Mapping[str, Any]) -> str:
    kind = row["kind"].replace("_", " ")
    return f"the {kind!s:.80} of client {row['client']} in round {row['round']}"


def _short(texts: Counter[str]) -> str:
    first = ", ".join([*texts][:3])
    return first if len(texts) <= 3 else f"{first} and {len(texts) - 3} more"


def _digits(message: tuple[str, int]) -> str:
    sha256, num_bytes = message
    return f"{sha256:.{_FIRST_DIGITS}} ({num_bytes} bytes)"
