"""Runs methods and seeds one after the other, each in a process of its own, and can go on.

Which runs there are and how they ended is known here; what they measured is not.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsp.run_folder import RunFolder
from fedsp.run_record import SEED_FOLDER
from fedsp.shipped import find_shipped, shipped_names
from fedsp.state_files import write_text_atomically

# what a sweep gives every run by itself
RESERVED = ("--seed_everything", "--trainer.run_dir", "--ckpt_path")


def find_methods(names: Sequence[str]) -> dict[str, Path]:
    """Return the configuration of every method by its name.

    Args:
        names: Names of shipped methods, or YAML files, whose method is named as the file is.

    Raises:
        ValueError: If a name is unknown, a file is missing, or two methods have one name.
    """
    known = shipped_names("method")
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name) if name.endswith(".yaml") else None
        if name not in known and (path is None or not path.is_file()):
            raise ValueError(f"`--methods` must be files or of {', '.join(known)}, got {name!r}.")
        label = path.stem if path else name
        if label in found:
            raise ValueError(f"`--methods` must name each once, got {label!r} twice.")
        found[label] = path or find_shipped("method", name)
    return found


@dataclass(frozen=True)
class Sweep:
    """Every method with every seed.

    Args:
        folder: Holds a folder a run, `METHOD/seed-SEED`, and `compare.json`.
        configs: Configuration files that all runs have, in order.
        methods: Files by name; a method has the last word, over `options` too.
        seeds: Seeds of everything.
        options: Further options of `fedsp fit` that all runs have.
    """

    folder: Path
    configs: tuple[str, ...]
    methods: Mapping[str, Path]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what can be checked before any work.

        Raises:
            ValueError: If a seed stands twice, or an option is one that the sweep sets itself.
        """
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`--seeds` must name each once, got {list(self.seeds)}.")
        for option in self.options:
            if option.partition("=")[0] in RESERVED:
                raise ValueError(
                    f"`{option}` cannot be given to `fedsp compare`, which sets it for every run: "
                    "use `--methods`, `--seeds` and `--run_dir`."
                )

    def run_folders(self) -> list[Path]:
        """Return the folders of all runs, in their order."""
        return [self.run_folder(method, seed) for method, seed in self._pairs()]

    def run_folder(self, method: str, seed: int) -> Path:
        """Return the folder of one run."""
        return self.folder / method / f"{SEED_FOLDER}{seed}"

    def claim(self) -> None:
        """Make sure that what lies in the folder was run with these settings, and note them.

        Methods and seeds may be added later; everything else must stay.

        Raises:
            ValueError: If the folder holds runs of other settings.
            OSError: If a configuration cannot be read or the note not be written.
        """
        note = self.folder / "compare.json"
        noted: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
        if not noted and any(RunFolder(folder).results.exists() for folder in self.run_folders()):
            raise ValueError(
                f"`--run_dir` {self.folder} holds finished runs of which no compare.json tells the "
                "settings. Name another folder."
            )
        base = {"configs": [_digest(path) for path in self.configs], "options": [*self.options]}
        methods = {name: _digest(path) for name, path in self.methods.items()}
        kept = noted.get("methods", {})
        changed = sorted(name for name in methods if kept.get(name, methods[name]) != methods[name])
        if noted and (noted["base"] != base or changed):
            what = f"of the method {changed[0]}" if changed else "(--config or options)"
            raise ValueError(
                f"`--run_dir` {self.folder} holds a comparison with other settings {what}. "
                "Name another folder, or give the same files and options to go on with it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"base": base, "methods": kept | methods}
        write_text_atomically(note, json.dumps(content, indent=2) + "\n")

    def run(self, say: Callable[[str], None]) -> list[str]:
        """Do all runs that are not finished; one that fails does not keep the others from theirs.

        Args:
            say: Told what is about to happen.

        Returns:
            A line for every run that failed.
        """
        failed = []
        pairs = self._pairs()
        for number, (method, seed) in enumerate(pairs, start=1):
            folder = self.run_folder(method, seed)
            heading = f"{method}, seed {seed} ({number} of {len(pairs)})"
            if RunFolder(folder).results.exists():
                say(f"{heading}: finished already")
                continue
            say(f"{heading}: {'goes on' if folder.exists() else 'starts'} in {folder}")
            status = _wait(self.command(method, seed))
            if status or not RunFolder(folder).results.exists():
                failed.append(f"{method}, seed {seed}: exit status {status}, {folder}")
        return failed

    def command(self, method: str, seed: int) -> list[str]:
        """Return the command of one run."""
        folder = self.run_folder(method, seed)
        command = [sys.executable, "-m", "fedsp", "fit"]
        for file in self.configs:
            command += ["--config", file]
        # without rounds or without a prompt, some methods are what they are: no option undoes that
        command += [*self.options, "--config", str(self.methods[method])]
        command += ["--seed_everything", str(seed), "--trainer.run_dir", str(folder)]
        return [*command, "--ckpt_path", "last"] if folder.exists() else command

    def _pairs(self) -> Sequence[tuple[str, int]]:
        # seed by seed: what a comparison shows early is complete for some seeds
        return [(method, seed) for seed in self.seeds for method in self.methods]


def _wait(command: list[str]) -> int:
    """Run a command and return its exit status; it never outlives this process' own end."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
