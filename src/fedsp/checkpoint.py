"""Run state on disk: save, load, resume; atomic, versioned, without pickle.

It does not know what a run's state means; `trainer` decides what goes in and what to do with it.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsp.state_files import load_state, remove_temporary_files, save_state

FORMAT_VERSION = 3

_NAME = "round-{:06d}.safetensors"
_BEST = "best.safetensors"
_MARK = "fedsp checkpoint"
_ABSENT = "(absent)"


@dataclass(frozen=True, eq=False, slots=True)
class RunState:
    """Everything that a run needs to go on as if it had not been stopped.

    Args:
        round_idx: Number of rounds completed.
        tree: The trainer's state: nested plain values and tensors.
        config: The run's configuration: nested plain values.
    """

    round_idx: int
    tree: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """A folder of `round-000003.safetensors` and `best.safetensors`."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """Point at a folder; nothing is made or read yet.

        Args:
            directory: The folder; made at the first save.
            keep: Number of newest rounds that stay, at least 1. With 2 a damaged newest file
                costs one round and not the run.

        Raises:
            ValueError: If `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"`trainer.keep_checkpoints` must be at least 1, got {keep}")
        self.directory = directory
        self.keep = keep

    def save(self, state: RunState) -> Path:
        """Save a round, then delete what is older than `keep` rounds or newer than this one.

        Newer files can only be there after resuming from an older one: they belong to a past that
        this run has left, and `last` must not go back to it.

        Args:
            state: The run's state.

        Returns:
            The file.

        Raises:
            OSError: If it cannot be written, as on a full disk; the earlier files stay.
            TypeError: If the state holds something that is neither plain nor a tensor.
        """
        path = self.path(state.round_idx)
        self._write(path, state)
        rounds = self._rounds()
        older = [idx for idx in rounds if idx < state.round_idx]
        newer = [idx for idx in rounds if idx > state.round_idx]
        for round_idx in newer + older[: max(0, len(older) - (self.keep - 1))]:
            rounds[round_idx].unlink()
        return path

    def path(self, round_idx: int) -> Path:
        """Return the file of the checkpoint after so many rounds; it may not exist."""
        return self.directory / _NAME.format(round_idx)

    def save_best(
        self, tree: dict[str, Any], *, round_idx: int = 0, config: dict[str, Any] | None = None
    ) -> Path:
        """Save the best round so far in `best.safetensors`, in place of the one before.

        Args:
            tree: What the final test and the export need: nested plain values and tensors.
            round_idx: Number of rounds completed when it was found.
            config: The run's configuration; without it `load` has nothing to compare.

        Returns:
            The file.

        Raises:
            OSError: If it cannot be written; the file before stays.
        """
        path = self.directory / _BEST
        self._write(path, RunState(round_idx, tree, config or {}))
        return path

    def forget_best(self) -> None:
        """Remove `best.safetensors`, if it is there."""
        (self.directory / _BEST).unlink(missing_ok=True)

    def last(self) -> Path:
        """Newest file that can be read; warns of every newer one that cannot.

        Returns:
            The file.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If none can be read, or the newest has another format version.
        """
        return self._newest()[0]

    def load(
        self, path: str | Path, config: dict[str, Any] | None = None, ignore: tuple[str, ...] = ()
    ) -> RunState:
        """Read a checkpoint and check that it belongs to this configuration.

        Args:
            path: A file, a folder of checkpoints, or `last` or `best` of this folder.
            config: This run's configuration; None accepts a checkpoint of any.
            ignore: Dotted keys that may differ, each with everything below it.

        Returns:
            The state.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or foreign, has another format version or comes
                from another configuration; the message names the keys that differ.
        """
        file, state = self._find(path)
        if config is not None and state.config:
            _check_config(file, state.config, config, ignore)
        return state

    def _find(self, path: str | Path) -> tuple[Path, RunState]:
        if path == "last":
            return self._newest()
        file = self.directory / _BEST if path == "best" else Path(path)
        if file.is_dir():
            return Checkpoints(file)._newest()
        if not file.exists():
            raise FileNotFoundError(
                f"`ckpt_path` must be a checkpoint, a folder of them, last or best; "
                f"got {str(path)!r}, but there is no {file}"
            )
        return file, _read(file)

    def _newest(self) -> tuple[Path, RunState]:
        rounds = self._rounds()
        for path in reversed(rounds.values()):
            try:
                return path, _read(path)
            except _DamagedError as error:
                warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=4)
        if rounds:
            raise ValueError(
                f"`ckpt_path`: none of the checkpoints in {self.directory} is readable"
            )
        raise FileNotFoundError(
            f"`ckpt_path` last: there is no checkpoint in {self.directory}. Give the run folder of "
            "the run to resume, or leave `ckpt_path` out to start from round 0"
        )

    def _rounds(self) -> dict[int, Path]:
        found = ((re.fullmatch(r"round-(\d{6,})\.safetensors", p.name), p) for p in self._files())
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def _files(self) -> list[Path]:
        return list(self.directory.glob("round-*.safetensors"))

    def _write(self, path: Path, state: RunState) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(self.directory)
        save_state(
            path,
            {
                "kind": _MARK,
                "format_version": FORMAT_VERSION,
                "round_idx": state.round_idx,
                "tree": state.tree,
                "config": state.config,
            },
        )


class _DamagedError(ValueError):
    """A file that is no readable checkpoint."""


def _read(path: Path) -> RunState:
    try:
        content = load_state(path)
    except ValueError as error:
        raise _DamagedError(f"`ckpt_path`: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != _MARK:
        raise _DamagedError(f"`ckpt_path`: {path} holds fedsp state, but is not a run's checkpoint")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"`ckpt_path`: {path} has checkpoint format version {content['format_version']}, this "
            f"fedsp reads version {FORMAT_VERSION}. Resume with the release that wrote it"
        )
    return RunState(content["round_idx"], content["tree"], content["config"])


def _check_config(
    path: Path, saved: dict[str, Any], current: dict[str, Any], ignore: tuple[str, ...]
) -> None:
    old, new = _flatten(saved), _flatten(current)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        ignored = any(key == prefix or key.startswith(f"{prefix}.") for prefix in ignore)
        if not ignored and not _is_same(before, after):
            lines.append(f"  {key}: {before!r} in the checkpoint, {after!r} now")
    if lines:
        raise ValueError(
            f"`ckpt_path`: {path} comes from another configuration:\n"
            + "\n".join(lines)
            + "\nSet these back to resume, or leave `ckpt_path` out to start anew"
        )


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested configuration by dotted key; an empty dict or list is a leaf."""
    if isinstance(node, dict) and node:
        items = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, list | tuple) and node:
        items = [(str(i), value) for i, value in enumerate(node)]
    else:
        return {prefix: list(node) if isinstance(node, tuple) else node}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def _is_same(before: Any, after: Any) -> bool:
    if type(before) is bool or type(after) is bool:
        return before is after
    return bool(before == after) or (before != before and after != after)  # NaN equals NaN here
