"""Where a run keeps its files and runs share a cache; a run never overwrites another one."""

import os
from pathlib import Path

from fedsp.state_files import remove_temporary_files, write_text_atomically


def cache_folder(cache_dir: str | None) -> Path | None:
    """Say where runs share what they need not make twice.

    Args:
        cache_dir: As the user set it. None takes `$FEDSP_CACHE`, else `~/.cache/fedsp`; an empty
            string keeps nothing.

    Returns:
        The folder, which may not exist yet, or None to keep nothing.
    """
    if cache_dir is None:
        cache_dir = os.environ.get("FEDSP_CACHE") or "~/.cache/fedsp"
    return Path(cache_dir).expanduser() if cache_dir else None


class RunFolder:
    """The folder of one run; every file of it has one place, named here."""

    def __init__(self, path: str | Path) -> None:
        """Name the folder; nothing is created yet.

        Args:
            path: The folder, relative to the working folder or absolute.
        """
        self.path = Path(path).expanduser()
        # the command that goes on with the run where that is not `fedsp fit`
        self.started_by = ""
        self.config = self.path / "config.yaml"
        self.auxiliary = self.path / "auxiliary.safetensors"
        self.handout = self.path / "handout.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.clients = self.path / "clients"
        self.ledger = self.path / "ledger.jsonl"
        self.rounds = self.path / "rounds.jsonl"
        self.metrics = self.path / "csv" / "metrics.csv"
        self.adapter = self.path / "adapter"
        self.results = self.path / "results.json"
        self.harness = self.path / "harness.json"
        self.harness_samples = self.path / "harness_samples.jsonl"
        self.privacy = self.path / "privacy.json"
        self.privacy_budget = self.path / "privacy_budget.json"
        self.client_privacy = self.path / "client_privacy.json"
        self.predictions = self.path / "predictions.jsonl"

    def check(self, *, resume: bool) -> None:
        """Make sure that the run may use the folder, before any work.

        Args:
            resume: The run goes on from what lies there.

        Raises:
            FileExistsError: If the folder holds anything and `resume` is off, or is none.
            PermissionError: If nothing can be written there.
        """
        if (
            not resume
            and self.path.exists()
            and (not self.path.is_dir() or any(self.path.iterdir()))
        ):
            raise FileExistsError(
                f"`trainer.run_dir` must be a new or empty folder, got {self.path}, which is in "
                "use. Go on from it with `--ckpt_path last`, or name another one with "
                "`--trainer.run_dir`."
            )
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise FileExistsError(
                f"`trainer.run_dir` must be a folder, got {self.path}: {existing} is a file."
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(
                f"`trainer.run_dir` must be writable, got {self.path}: no permission to write in "
                f"{existing}."
            )

    def is_before_first_checkpoint(self) -> bool:
        """Whether a run was started here and stopped before it had anything to go on from."""
        if not self.path.is_dir() or any(self.checkpoints.glob("round-*")):
            return False
        started = self.config.exists() or self.ledger.exists()
        # killed between making the folder and the first file that is whole
        return started or all(path.suffix == ".tmp" for path in self.path.iterdir())

    def create(self, config: str) -> None:
        """Create the folder and keep the configuration of the first start that got anywhere.

        Args:
            config: Text of the configuration; empty keeps none.
        """
        if self.is_before_first_checkpoint():
            self.config.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(self.path)
        if config and not self.config.exists():
            write_text_atomically(self.config, config)
