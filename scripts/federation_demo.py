"""A live federation of three parties on this machine, held against the simulation.

    make federation-demo

Server and clients are processes of their own, which know each other by TLS and keys only, each with
its own folder. At the end the ledgers of both sides are compared, and the prompt with that of
`fedsp fit --config configs/federation.yaml`.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedsp.checkpoint import Checkpoints
from fedsp.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "federation.yaml"
# as the simulation divides its rows: by package, in the order of their names
PACKAGES = {"alpha": "datasets", "beta": "numpy", "gamma": "torchmetrics"}
SECONDS = 600
TOLERANCE = 1e-5


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fedsp(*words: str) -> list[str]:
    """Return the command line of `fedsp`."""
    return [sys.executable, "-m", "fedsp", *words]


def data_of(party: str) -> list[str]:
    """Return the options that name a party's data, as its own operator would give them."""
    source = "--data.clients"
    return [
        f"{source}=fedsp.sources.Docstrings",
        f"{source}.packages=[{PACKAGES[party]}]",
        f"{source}.max_rows_per_package=300",
    ]


def run_parties(folder: Path) -> None:
    """Run server and clients until the federation is over.

    Raises:
        SystemExit: If one of them fails.
    """
    commands = {"server": fedsp("federation", "server", str(folder / "server"))}
    for party in PACKAGES:
        client = str(folder / "clients" / party)
        commands[party] = fedsp("federation", "client", client, *data_of(party))
    running = {name: start(name, words, folder) for name, words in commands.items()}
    try:
        deadline = time.monotonic() + SECONDS
        for name, process in running.items():
            status = process.wait(timeout=max(1.0, deadline - time.monotonic()))
            print(f"{name}: exit status {status}", flush=True)
            if status:
                log = folder / f"{name}.log"
                sys.exit(log.read_text() if log.exists() else f"{name} failed")
    finally:
        for process in running.values():
            process.kill()


def start(name: str, words: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a process that writes to a log of its own; the server's is shown."""
    log = None if name == "server" else (folder / f"{name}.log").open("wb")
    return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT if log else None)


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between the last prompts of two runs."""
    prompts = []
    for run in (one, other):
        tree = Checkpoints(RunFolder(run).checkpoints).load("last").tree
        prompts.append(tree["federation"]["broadcast"]["soft_prompt"])
    return float((prompts[0] - prompts[1]).abs().max())


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, help="new folder (default: a temporary one)")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = given.folder or Path(temporary) / "federation"
        address = f"127.0.0.1:{free_port()}"
        names = ["--clients", *PACKAGES]
        config = ["--config", str(CONFIG)]
        subprocess.run(
            fedsp("federation", "init", str(root), *config, *names, "--address", address),
            check=True,
        )
        run_parties(root)
        subprocess.run(fedsp("audit", str(root)), check=True)
        live = time.monotonic() - started
        simulated = Path(temporary) / "simulated"
        quiet = ["--trainer.run_dir", str(simulated), "--trainer.enable_progress_bar=false"]
        subprocess.run(fedsp("fit", *config, *quiet), check=True, stdout=subprocess.DEVNULL)
        gap = difference(root / "server" / "run", simulated)
        print(f"live federation: {live:.0f} s, from the folder to the audit")
        print(f"largest difference to the simulation's prompt: {gap:.1e}")
        sys.exit(0 if gap <= TOLERANCE else "the live federation came to another prompt")


if __name__ == "__main__":
    main()
