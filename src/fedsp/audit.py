"""Whether anything but what was declared has left, by the ledgers of one side or of both.

It reads what was written down and judges it; it shows nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsp.ledger_checks import DIRECTIONS, Book, check_book, read_book, repeats, tensor_texts
from fedsp.run_folder import RunFolder
from fedsp.run_record import read_run

_FIRST_DIGITS = 12

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
    book = read_book(RunFolder(run_dir).ledger)
    others, silent = _read_clients(book, clients)
    notes: list[str] = []
    findings: list[str] = []
    for each in (book, *others.values(), *silent):
        findings += check_book(each)
        notes += repeats(each)
    if not book.damage:
        _check_metrics(run_dir, notes, findings)
    agreed = 0
    for client_id, other in others.items():
        agreed += _compare(book, other, client_id, notes, findings)
    names = {client_id: other.name for client_id, other in others.items()}
    if clients:
        _check_absent(book, set(names), silent, notes, findings)
    return AuditReport(
        declared={kind: tensor_texts(tensors) for kind, tensors in book.declared.items()},
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


def _read_clients(server: Book, folders: Sequence[Path]) -> tuple[dict[int, Book], list[Book]]:
    """Return the clients' ledgers by client id, and those that do not say whose they are."""
    if folders and server.client_id is not None:
        raise ValueError(
            "`RUN_DIR` must be the server's run where clients are given, got "
            f"{server.path.parent}, whose ledger is that of client {server.client_id}."
        )
    books: dict[int, Book] = {}
    silent = []
    for folder in folders:
        path = folder.resolve()
        name = path.parent.name if path.name == "run" else path.name
        book = read_book(RunFolder(folder).ledger, name)
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
    server: Book, compared: set[int], silent: list[Book], notes: list[str], findings: list[str]
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


def _check_metrics(run_dir: Path, notes: list[str], findings: list[str]) -> None:
    """Hold the ledger's sums against the metrics of finished rounds, where the run has some."""
    run, ledger = read_run(run_dir), RunFolder(run_dir).ledger
    notes += [
        f"{ledger}, round {round_idx}: {late} bytes came up after the round was measured"
        for round_idx, late in run.late_bytes().items()
    ]
    for round_idx, direction, surplus in run.ledger_gaps():
        more = "more" if surplus > 0 else "fewer: lines are gone"
        findings.append(
            f"{ledger}, round {round_idx}: comm/{direction}_bytes of the run's metrics is another "
            f"number, the ledger has {abs(surplus)} bytes {more}"
        )


def _compare(
    server: Book, client: Book, client_id: int, notes: list[str], findings: list[str]
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
        sender, receiver, sent, received = client.name, "the server", at_client, at_server
        if DIRECTIONS.get(kind) == "down":
            sender, receiver, sent, received = receiver, sender, received, sent
        findings += [
            f"{what}: {receiver} got {_digits(it)}, which {sender} never sent" for it in received
        ]
        notes += [
            f"{what}: lost on the way from {sender} to {receiver}: {_digits(it)}" for it in sent
        ]
    return agreed


def _exchanges(book: Book, client_id: int) -> dict[Exchange, Counter[tuple[str, int]]]:
    """Return by kind and round the hash and size of each message of a client."""
    found: dict[Exchange, Counter[tuple[str, int]]] = defaultdict(Counter)
    for _, row in book.lines:
        if row["client"] == client_id:
            found[row["kind"], row["round"]][row["sha256"], row["bytes"]] += 1
    return found


def _flows(book: Book, names: Mapping[int, str]) -> Iterator[Flow]:
    sums: dict[tuple[Any, ...], list[int]] = {}
    for _, row in book.lines:
        party = names.get(row["client"], f"client {row['client']}")
        key = party, row["round"], row["direction"], row["kind"], tensor_texts(row["tensors"])
        entry = sums.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += row["bytes"]
    for key, (payloads, num_bytes) in sums.items():
        yield Flow(*key, payloads=payloads, num_bytes=num_bytes)


def _digits(message: tuple[str, int]) -> str:
    sha256, num_bytes = message
    return f"{sha256:.{_FIRST_DIGITS}} ({num_bytes} bytes)"
