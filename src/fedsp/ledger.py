"""The ledger: one JSON line for every payload that travels, written before it leaves.

Lines of another kind declare what may travel, so that the file can be audited by itself. It knows
what a message says of itself, not what the message is for.
"""

import errno
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from fedsp.message_sizes import describe_tensors
from fedsp.messages import Contract, describe
from fedsp.tensor_files import Buffer

Direction = Literal["up", "down"]

_FIELDS: dict[str, type] = {
    "attempt": int,
    "round": int,
    "client": int,
    "direction": str,
    "kind": str,
    "tensors": list,
    "bytes": int,
    "sha256": str,
}
_DECLARATION: dict[str, type | tuple[type, ...]] = {
    "attempt": int,
    "client": (int, type(None)),
    "declares": dict,
}
# characters by which a payload's description may be longer than the declared one
_UNDECLARED = 4096
_TENSOR: dict[str, type] = {"name": str, "shape": list, "dtype": str}


def digest(data: Buffer) -> tuple[dict[str, Any], int, str]:
    """Describe and hash a payload; worth keeping when the same bytes go to many clients.

    Args:
        data: The payload.

    Returns:
        What `Ledger.record_digest` takes: description, size in bytes, SHA-256.

    Raises:
        MessageError: If the payload is not a message.
    """
    return describe(data), len(data), hashlib.sha256(data).hexdigest()


class Ledger:
    """An append-only file of payloads, for one writer.

    A line is in the operating system's hands before `record` returns, so that a payload handed on
    after it is named even if the process is killed. A half-written last line belongs to a payload
    that never left and is cut off when the file is opened again.
    """

    def __init__(self, path: Path | None, attempt: int = 0) -> None:
        """Open or create the file.

        Args:
            path: The file; missing folders are made. None only adds up, as the processes beside
                the one writer do.
            attempt: 0 for a run, one more for each time it is resumed (see `next_attempt`):
                a round that was repeated shows under both.

        Raises:
            ValueError: If `attempt` is below 0.
            OSError: If the file cannot be written.
        """
        if attempt < 0:
            raise ValueError(f"`attempt` must be at least 0, got {attempt}")
        self.path = path
        self.attempt = attempt
        self._totals: dict[int, dict[str, int]] = defaultdict(lambda: {"up": 0, "down": 0})
        self._file = -1
        # the longest description of a payload by its kind, once it is declared
        self._room: dict[str, int] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            _cut_torn_line(self._file)

    def declare(
        self, contract: Contract, handout: Mapping[str, Tensor], client_id: int | None = None
    ) -> None:
        """Note which tensors may travel in this attempt, of which kind, shape and dtype.

        Args:
            contract: What a payload has to be, in both directions.
            handout: The auxiliary model's tensors by name; meta tensors will do.
            client_id: The client whose own ledger this is; None for the server's, which names all.

        Raises:
            OSError: If the line cannot be written; nothing must be sent then.
        """
        tensors = contract.describe()
        declares = {
            "auxiliary_handout": describe_tensors(handout),
            "server_broadcast": tensors,
            "client_update": tensors,
        }
        self._append({"attempt": self.attempt, "client": client_id, "declares": declares})
        self._room = {kind: _UNDECLARED + len(json.dumps(it)) for kind, it in declares.items()}

    def record(self, round_idx: int, client_id: int, direction: Direction, data: Buffer) -> None:
        """Note a payload; call it before the payload is handed on.

        Args:
            round_idx: The round, from 0.
            client_id: The client that sends or receives it.
            direction: `up` to the server, `down` to the client.
            data: The payload.

        Raises:
            ValueError: If `direction` is neither.
            MessageError: If the payload is not a message.
            OSError: If the line cannot be written; the payload must not leave then.
        """
        self.record_digest(round_idx, client_id, direction, *digest(data))

    def record_digest(
        self,
        round_idx: int,
        client_id: int,
        direction: Direction,
        description: Mapping[str, Any],
        num_bytes: int,
        sha256: str,
    ) -> None:
        """Note a payload that goes to many clients and was read and hashed once.

        Args:
            round_idx: The round, from 0.
            client_id: The client that sends or receives it.
            direction: `up` to the server, `down` to the client.
            description: What `messages.describe` said of the payload.
            num_bytes: Its size.
            sha256: Its checksum in hexadecimal.

        Raises:
            ValueError: If `direction` is neither.
            OSError: If the line cannot be written; the payload must not leave then.
        """
        if direction not in get_args(Direction):
            raise ValueError(f"`direction` must be up or down, got {direction!r}")
        row = {
            "attempt": self.attempt,
            "round": round_idx,
            "client": client_id,
            "direction": direction,
            "kind": description["kind"],
            "tensors": self._bounded(description["kind"], description["tensors"]),
            "bytes": num_bytes,
            "sha256": sha256,
        }
        self._append(row)
        self._totals[round_idx][direction] += num_bytes

    def _bounded(self, kind: str, tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out what a sender fills the disk with: names without end that nobody declared."""
        room = self._room.get(kind)
        if room is None or len(json.dumps(tensors)) <= room:
            return tensors
        kept: list[dict[str, Any]] = []
        for tensor in tensors:
            room -= len(json.dumps(tensor))
            if room < 0:
                break
            kept.append(tensor)
        left_out = f"and {len(tensors) - len(kept)} tensors more"
        return [*kept, {"name": left_out, "shape": [], "dtype": "float32"}]

    def totals(self, round_idx: int) -> dict[str, int]:
        """Bytes of one round in this attempt.

        Args:
            round_idx: The round, from 0.

        Returns:
            `up_bytes` and `down_bytes`.
        """
        sums = self._totals.get(round_idx, {"up": 0, "down": 0})
        return {"up_bytes": sums["up"], "down_bytes": sums["down"]}

    def close(self) -> None:
        """Bring the file to the disk and close it; closing twice does nothing."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(row).encode() + b"\n"
        if self._file < 0:
            raise RuntimeError(f"{self.path} is closed: nothing more may be sent")
        # One call: a killed process leaves a whole line or a torn one, never two halves apart.
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise OSError(error.errno, self._refusal(error.strerror)) from error
        if written != len(line):
            _cut_torn_line(self._file)
            raise OSError(errno.ENOSPC, self._refusal(os.strerror(errno.ENOSPC)))

    def _refusal(self, reason: str | None) -> str:
        return f"cannot write the ledger {self.path}: {reason}; the payload must not be sent"


def next_attempt(path: Path) -> int:
    """Number of the attempt that is about to start.

    Args:
        path: The ledger of the run; it may be missing.

    Returns:
        0 for a new ledger, else one more than its last line says.

    Raises:
        ValueError: If that line is damaged.
    """
    if not path.exists():
        return 0
    file = os.open(path, os.O_RDONLY)
    try:
        end = _end_of_line_before(file, os.fstat(file).st_size)
        start = _end_of_line_before(file, end - 1) if end else 0
        last = os.pread(file, end - start, start)
    finally:
        os.close(file)
    return parse_line(last, f"{path}, last line")["attempt"] + 1 if last else 0


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read a ledger.

    Args:
        path: The file.

    Returns:
        One dict a payload: attempt, round, client, direction, kind, tensors, bytes, sha256. What
        was declared is left out, and so is a half-written last line: its payload never left.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is damaged; the message names its number.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = (parse_line(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1))
    return [row for row in rows if "declares" not in row]


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Add up a ledger.

    Args:
        rows: What `read_ledger` returned, or some of it.

    Returns:
        By kind of message: `up_bytes`, `down_bytes` and the number of `payloads`.
    """
    sums: dict[str, dict[str, int]] = {}
    for row in rows:
        entry = sums.setdefault(row["kind"], {"up_bytes": 0, "down_bytes": 0, "payloads": 0})
        entry[f"{row['direction']}_bytes"] += row["bytes"]
        entry["payloads"] += 1
    return sums


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Read one line of a ledger.

    Args:
        line: Without its newline.
        where: How errors name it.

    Returns:
        A payload, as `read_ledger` returns it, or what `Ledger.declare` noted: attempt, client
        (None in a server's ledger) and, as "declares", the tensors of each kind.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the ledger is damaged, expected JSON: {error}") from error
    declares = isinstance(row, dict) and "declares" in row
    fields = _DECLARATION if declares else _FIELDS
    if not isinstance(row, dict) or set(row) != set(fields):
        raise ValueError(f"{where}: the ledger is damaged, expected the fields {list(fields)}")
    for name, kind in fields.items():
        # a bool is an int to isinstance
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{where}: the ledger is damaged, `{name}` is {row[name]!r:.80}")
    if not declares and row["direction"] not in get_args(Direction):
        raise ValueError(f"{where}: the ledger is damaged, `direction` is {row['direction']!r:.80}")
    for tensors in row["declares"].values() if declares else [row["tensors"]]:
        _check_tensors(tensors, where)
    return row


def _check_tensors(tensors: Any, where: str) -> None:
    for tensor in tensors if isinstance(tensors, list) else [tensors]:
        if (
            not isinstance(tensor, dict)
            or set(tensor) != set(_TENSOR)
            or not all(isinstance(tensor[name], kind) for name, kind in _TENSOR.items())
            or not all(type(size) is int and size >= 0 for size in tensor["shape"])
        ):
            raise ValueError(f"{where}: the ledger is damaged, a tensor is {tensor!r:.80}")


def _cut_torn_line(file: int) -> None:
    size = os.fstat(file).st_size
    end = _end_of_line_before(file, size)
    if end != size:
        os.ftruncate(file, end)


def _end_of_line_before(file: int, stop: int) -> int:
    """Position just behind the last newline in the first `stop` bytes, 0 if there is none."""
    block = 65536
    while stop > 0:
        start = max(stop - block, 0)
        found = os.pread(file, stop - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0
