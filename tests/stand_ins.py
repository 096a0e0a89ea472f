"""Programs that stand in for those of a cluster, and linters that development tools bring."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from shipped_files import ROOT

# Writes its arguments, one a line.
RECORDER = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$RECORD"\n'


def with_programs(folder: Path, **programs: str) -> dict[str, str]:
    """Return an environment in which these programs come first; their recorder writes `record`."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RECORD": str(folder / "record")}


def slurm(**changes: str) -> dict[str, str]:
    """Return what Slurm tells a job."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    return {**job, "SLURM_CPUS_PER_TASK": "1", **changes}


def directives(script: Path) -> dict[str, str]:
    """Return what a job script asks of Slurm."""
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in lines)
    return {name: value for name, _, value in pairs}


def ended(
    words: Iterable[object], environment: dict[str, str] | None = None, text: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, from the root of the checkout."""
    return subprocess.run(
        [str(word) for word in words],
        env=environment,
        input=text,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def run(words: Iterable[object], environment: dict[str, str]) -> str:
    """Run a program that has to succeed."""
    done = ended(words, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def linter(name: str) -> str:
    """Return the program of a linter; skip only where there is none for this kind of machine."""
    own = Path(sys.executable).parent
    found = shutil.which(name, path=f"{own}{os.pathsep}{os.environ['PATH']}")
    if found is None and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip(f"the registry has no {name} for this machine")
    assert found is not None, f"{name} is missing; `make setup` installs it"
    return found
