"""What a client keeps between rounds: in RAM, with a disk behind it.

A client that is away costs no RAM beyond the bound that was set. The store knows rounds and bytes,
not what the state means, and nothing of the server.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path

from fedsp.state_files import (
    Tree,
    check_state_file,
    decode_state,
    encode_state,
    load_state,
    remove_temporary_files,
    write_bytes_atomically,
    write_text_atomically,
)

_CHUNK_BYTES = 2**20
ANSWERS = "answers.txt"


class ClientStateStore:
    """Every client's newest state, versioned by round so that a killed run resumes consistently.

    In a round: `put` each client of the cohort, save a checkpoint that holds `versions()`, then
    `commit`. Until then the files that the checkpoints on disk name are not touched, so `restore`
    with any of these checkpoints' versions gives the states that belong to it. What a client has
    answered cannot be taken back: `count_answer` counts on whatever is restored.
    """

    def __init__(
        self, directory: Path, max_in_memory_bytes: int = 0, keep: int = 2, *, deletes: bool = True
    ) -> None:
        """Make a store without any state; `restore` brings back what a checkpoint names.

        Args:
            directory: Folder of the files; made when the first state is put.
            max_in_memory_bytes: RAM for the states used last, in encoded bytes; 0 keeps none.
            keep: Number of commits whose files stay, at least 1; as many as checkpoints are kept,
                so that a damaged newest checkpoint has states to fall back to.
            deletes: Whether this store deletes files that nobody needs; one of the processes that
                share a folder does.

        Raises:
            ValueError: If a number is out of range.
        """
        if max_in_memory_bytes < 0:
            raise ValueError(f"`max_in_memory_bytes` must be at least 0, got {max_in_memory_bytes}")
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1, got {keep}")
        self._directory = directory
        self._max_in_memory_bytes = max_in_memory_bytes
        self._keep = keep
        self._deletes = deletes
        self._versions: dict[int, int] = {}
        self._committed: list[dict[int, int]] = []
        self._superseded: list[tuple[int, int]] = []
        # Encoded, so that neither side can change what the other holds.
        self._memory: OrderedDict[int, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._answers: Counter[int] = Counter()

    def put(self, client_id: int, round_idx: int, tree: Tree) -> None:
        """Keep a client's state; it is on disk when this returns.

        A state that equals the client's newest one is not written again and keeps its round.

        Args:
            client_id: The client, from 0.
            round_idx: The round in which the state came about.
            tree: Nested state, as for `state_files.encode_state`.

        Raises:
            RuntimeError: If `round_idx` is not after the client's committed state.
            OSError: If the file cannot be written; the former state stays.
        """
        committed = self._committed[-1].get(client_id, -1) if self._committed else -1
        if round_idx <= committed:
            raise RuntimeError(
                f"client {client_id} has a committed state of round {committed}; "
                f"it cannot be replaced by one of round {round_idx}"
            )
        data = encode_state(tree)
        if not self._is_newest(client_id, data):
            path = self._path(client_id, round_idx)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, data)
            self._advance(client_id, round_idx)
        self._remember(client_id, data)

    def adopt(self, versions: Mapping[int, int]) -> None:
        """Take over the states that another process has put into the folder.

        Args:
            versions: Round of those clients' newest states, by client.
        """
        for client_id, round_idx in versions.items():
            if self._versions.get(client_id) != round_idx:
                self._memory_bytes -= len(self._memory.pop(client_id, b""))
                self._advance(client_id, round_idx)

    def get(self, client_id: int) -> Tree | None:
        """Give a client's newest state, as a copy that is the caller's own.

        Args:
            client_id: The client.

        Returns:
            The state, or None for a client without one.

        Raises:
            RuntimeError: If its file is missing or damaged.
        """
        if client_id not in self._versions:
            return None
        if client_id in self._memory:
            self._memory.move_to_end(client_id)
            return decode_state(self._memory[client_id])
        path = self._path(client_id, self._versions[client_id])
        try:
            tree = load_state(path)
        except (FileNotFoundError, ValueError) as error:
            raise _unreadable(client_id, path, error) from error
        if self._max_in_memory_bytes:
            self._remember(client_id, path.read_bytes())
        return tree

    def count_answer(self, client_id: int) -> None:
        """Note that a client is about to answer; it is on disk when this returns.

        Raises:
            OSError: If it cannot be written.
        """
        self._answers[client_id] += 1
        path = self._directory / f"{client_id:06d}" / ANSWERS
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, f"{self._answers[client_id]}\n")

    def answers(self) -> dict[int, int]:
        """How often every client that was counted has answered, repeated rounds and all."""
        return dict(self._answers)

    def adopt_answers(self, answers: Mapping[int, int]) -> None:
        """Take over what another process, or a checkpoint, has counted; no count gets smaller."""
        self._answers |= Counter(answers)

    def versions(self) -> dict[int, int]:
        """Round of every client's newest state, by client; goes into the checkpoint."""
        return dict(self._versions)

    def commit(self) -> None:
        """Delete what no kept checkpoint needs; call it once the round's checkpoint is on disk."""
        window = [*self._committed, self.versions()]
        dropped, self._committed = window[: -self._keep], window[-self._keep :]
        candidates = self._superseded + [item for versions in dropped for item in versions.items()]
        for client_id, round_idx in candidates:
            if self._deletes and all(
                versions.get(client_id) != round_idx for versions in self._committed
            ):
                self._path(client_id, round_idx).unlink(missing_ok=True)
        self._superseded = []

    def restore(self, versions: dict[int, int]) -> None:
        """Go back to the states that a checkpoint names and delete those of later rounds.

        Older ones stay as long as a kept checkpoint may need them, which `commit` counts.

        Args:
            versions: What `versions()` gave when the checkpoint was saved; {} empties the store.

        Raises:
            RuntimeError: If a state is missing or damaged; nothing is deleted then.
        """
        for client_id, round_idx in versions.items():
            path = self._path(client_id, round_idx)
            try:
                check_state_file(path)
            except (FileNotFoundError, ValueError) as error:
                raise _unreadable(client_id, path, error) from error
        older: dict[int, list[int]] = {}
        for folder in self._directory.glob("[0-9]*"):
            if self._deletes and folder.is_dir() and folder.name.isdecimal():
                client_id = int(folder.name)
                older[client_id] = self._delete_later(folder, versions.get(client_id, -1))
        self._adopt_counts()
        self._versions = dict(versions)
        self._forget()
        # a checkpoint needs no client's state that is more states old than the checkpoint is saves
        for back in range(1, self._keep):
            needed = {idx: rounds[-back] for idx, rounds in older.items() if len(rounds) >= back}
            self._committed.insert(0, needed)
        self._superseded = [
            (idx, round_idx)
            for idx, rounds in older.items()
            for round_idx in rounds[: max(0, len(rounds) - self._keep + 1)]
        ]

    def restore_before(self, client_id: int, round_idx: int) -> None:
        """Go back to what a client knew before a round, as one that keeps its state by itself does.

        States of that round and of later ones are deleted: whoever asks for the round has not taken
        their answers into a checkpoint. Of the earlier ones the newest `keep` stay.

        Args:
            client_id: The only client of this store.
            round_idx: The round that is asked for.
        """
        folder = self._path(client_id, round_idx).parent
        remove_temporary_files(folder)
        known = sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("round-*"))
        earlier = [idx for idx in known if idx < round_idx]
        for idx in set(known) - set(earlier[-self._keep :]):
            self._path(client_id, idx).unlink()
        self._adopt_counts()
        self._versions = {client_id: earlier[-1]} if earlier else {}
        self._forget()

    def disk_bytes(self) -> int:
        """Bytes of all files of the store."""
        return sum(path.stat().st_size for path in self._directory.glob("*/round-*.safetensors"))

    def memory_bytes(self) -> int:
        """Bytes of the states that are held in RAM."""
        return self._memory_bytes

    def _path(self, client_id: int, round_idx: int) -> Path:
        return self._directory / f"{client_id:06d}" / f"round-{round_idx:06d}.safetensors"

    def _adopt_counts(self) -> None:
        for path in self._directory.glob(f"[0-9]*/{ANSWERS}"):
            self.adopt_answers({int(path.parent.name): int(path.read_text())})

    def _forget(self) -> None:
        """Take the present versions for committed ones, and drop what is in memory."""
        self._committed = [dict(self._versions)]
        self._superseded = []
        self._memory.clear()
        self._memory_bytes = 0

    def _advance(self, client_id: int, round_idx: int) -> None:
        if self._versions.get(client_id, round_idx) != round_idx:
            self._superseded.append((client_id, self._versions[client_id]))
        self._versions[client_id] = round_idx

    def _delete_later(self, folder: Path, kept: int) -> list[int]:
        """Delete a client's states of rounds after `kept`; return earlier ones, in their order."""
        remove_temporary_files(folder)
        older = []
        for path in folder.glob("round-*.safetensors"):
            round_idx = int(path.stem.removeprefix("round-"))
            if round_idx > kept:
                path.unlink()
            elif round_idx < kept:
                older.append(round_idx)
        if not any(folder.iterdir()):
            folder.rmdir()
        return sorted(older)

    def _is_newest(self, client_id: int, data: bytes) -> bool:
        if client_id not in self._versions:
            return False
        if client_id in self._memory:
            return self._memory[client_id] == data
        path = self._path(client_id, self._versions[client_id])
        if not path.exists() or path.stat().st_size != len(data):
            return False
        # The checksum in the header ends the comparison in the first chunk if anything differs.
        with path.open("rb") as file:
            starts = range(0, len(data), _CHUNK_BYTES)
            return all(file.read(_CHUNK_BYTES) == data[i : i + _CHUNK_BYTES] for i in starts)

    def _remember(self, client_id: int, data: bytes) -> None:
        self._memory_bytes += len(data) - len(self._memory.pop(client_id, b""))
        self._memory[client_id] = data
        while self._memory_bytes > self._max_in_memory_bytes:
            _, evicted = self._memory.popitem(last=False)
            self._memory_bytes -= len(evicted)


def _unreadable(client_id: int, path: Path, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"the state of client {client_id} cannot be resumed from {path}: {error}. "
        "Resume from another `ckpt_path`, or start the run anew"
    )
