"""A run that is killed at random moments, again and again, ends as if nothing had been.

Run: OMP_NUM_THREADS=1 python benchmarks/random_kills.py [--rounds 20] [--seed 0]

A small federation on the quickstart's model is run twice: in peace, and by a process that gets
`kill -9` and is started again with `--ckpt_path last` until the run is over. Three of four blows
come at a random time in the first or second round after the start, the others while the process is
still starting. The processes are forked from a server that has paid for the imports once. Prints
what that cost, and ends with exit code 1 if the two runs differ in anything.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedsp.checkpoint import Checkpoints
from fedsp.cli import main as fedsp
from fedsp.ledger import read_ledger
from fedsp.payload import flatten
from fedsp.run_folder import RunFolder
from fedsp.run_record import read_run

PRELOADED = [
    "fedsp.cli",
    "transformers.models.gpt2.modeling_gpt2",
    "peft",
    "datasets.packaged_modules.json.json",
]
CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
# few rows and steps, and every kind of state: optimizers on both sides, models that clients keep
SMALL = {
    "trainer.callbacks": "null",
    "trainer.enable_progress_bar": "false",
    "trainer.sampler": "fedsp.sampling.UniformSampler",
    "trainer.sampler.init_args.clients_per_round": 2,
    "trainer.server_optimizer": "torch.optim.Adam",
    "trainer.server_optimizer.init_args.lr": 0.01,
    "model.init_args.training.steps": 1,
    "model.init_args.initial_distillation": "null",
    "client.init_args.auxiliary.steps": 1,
    "client.init_args.soft_prompt.steps": 2,
    "client.init_args.reparameterization_size": 4,
    "data.init_args.clients.init_args.packages": "[rich, peft, fsspec]",
    "data.init_args.clients.init_args.max_rows_per_package": 20,
    "data.init_args.server.init_args.packages": "[json, xml]",
    "data.init_args.public.init_args.packages": "[xml]",
    "data.init_args.selection": 8,
    "data.init_args.test": 8,
}
POLL_SECONDS = 0.02
Payload = dict[str, Any]  # a line of the ledger
Federation = Callable[[Path], None]


@dataclass(frozen=True)
class Survival:
    """What a run went through.

    Args:
        kills: How often it was killed.
        seconds: From its first start to its end.
        quiet_seconds: The same of the undisturbed run.
        rounds: Rounds that it finished.
        begun: How often a round was begun.
        differences: In what the two ended differently, in words; it must be nothing.
    """

    kills: int
    seconds: float
    quiet_seconds: float
    rounds: int
    begun: int
    differences: list[str]

    @property
    def lost_share(self) -> float:
        """Share of the time that went into starts and into work that was done again."""
        return 1 - self.quiet_seconds / self.seconds


def quickstart(rounds: int, run_dir: Path) -> None:
    """Run `fedsp fit` on a small federation, or go on with it."""
    options = {**SMALL, "trainer.num_rounds": rounds, "trainer.run_dir": run_dir}
    if run_dir.exists():
        options["ckpt_path"] = "last"
    fedsp(["fit", f"--config={CONFIG}", *(f"--{name}={it}" for name, it in options.items())])


def attempt(federation: Federation, run_dir: Path, log: Path) -> None:
    """Run or go on, with all output in a file; the target of a process."""
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    federation(run_dir)


class Runs:
    """Starts a federation in processes of their own, and kills them."""

    def __init__(self, folder: Path, federation: Federation) -> None:
        """Start the server that processes are forked from.

        Args:
            folder: For the runs' folders and the processes' output.
            federation: Runs or goes on in a folder; it must survive a pickle.
        """
        self.folder, self.federation = folder, federation
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, name: str) -> Any:
        """Start a run, or go on where it was."""
        args = (self.federation, self.folder / name, self.folder / f"{name}.log")
        process = self.context.Process(target=attempt, args=args)
        process.start()
        return process

    def is_over(self, name: str, process: Any) -> bool:
        """Return whether a process that is gone came to its end; False if it was killed.

        Raises:
            RuntimeError: If it ended by an error of its own.
        """
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            log = (self.folder / f"{name}.log").read_text()
            raise RuntimeError(f"the run failed with {process.exitcode}:\n{log}")
        return process.exitcode == 0

    def strike(self, name: str, process: Any, after: float, rounds: int | None = None) -> None:
        """Kill a process after its start, or after the first payload of one of its rounds.

        Args:
            name: The run.
            process: Runs it.
            after: Seconds to wait.
            rounds: Rounds to let pass before the one in which the wait begins; None begins it at
                once.
        """
        ledger = RunFolder(self.folder / name).ledger
        known = len(_payloads(ledger))
        while rounds is not None and process.is_alive():
            process.join(POLL_SECONDS)
            rows = _payloads(ledger)[known:]
            if rows and rows[-1]["round"] - rows[0]["round"] >= rounds:
                break
        process.join(after)
        if process.is_alive():
            process.kill()


def survive(folder: Path, federation: Federation, *, seed: int = 0) -> Survival:
    """Run a federation in peace, then under blows, and compare.

    Args:
        folder: For both runs' folders.
        federation: Runs or goes on in a folder; it must survive a pickle.
        seed: Seed of the blows' times, which are in units of what the run in peace took.
    """
    runs, draw = Runs(folder, federation), random.Random(seed)
    warm = runs.start("warm")  # pays for the imports and the token cache
    runs.strike("warm", warm, 0.0, rounds=0)
    runs.is_over("warm", warm)
    started = time.perf_counter()
    runs.is_over("quiet", runs.start("quiet"))
    quiet_seconds = time.perf_counter() - started
    of_rounds = [row["round/seconds"] for row in read_run(folder / "quiet").rounds]
    round_seconds, start_seconds = statistics.median(of_rounds), quiet_seconds - sum(of_rounds)
    kills, started = 0, time.perf_counter()
    while True:
        process = runs.start("killed")
        if kills % 4 == 3:
            runs.strike("killed", process, draw.uniform(0, start_seconds))
        else:
            # two of three blows leave a round behind them, so that the run goes on
            passed = draw.choice((0, 1, 1))
            runs.strike("killed", process, draw.uniform(0, round_seconds), rounds=passed)
        if runs.is_over("killed", process):
            break
        kills += 1
    seconds = time.perf_counter() - started
    payloads = _payloads(RunFolder(folder / "killed").ledger)
    return Survival(
        kills=kills,
        seconds=seconds,
        quiet_seconds=quiet_seconds,
        rounds=len(read_run(folder / "killed").rounds),
        begun=len({(row["round"], row["attempt"]) for row in payloads}),
        differences=compare(folder / "quiet", folder / "killed"),
    )


def compare(quiet: Path, killed: Path) -> list[str]:
    """Say in words in what two runs differ.

    Args:
        quiet: Folder of the undisturbed run.
        killed: Folder of the other one.
    """
    one, other = read_run(quiet), read_run(killed)
    found = []
    if not torch.equal(_prompt(quiet), _prompt(killed)):
        found.append("the last prompt")
    lines = RunFolder(killed).rounds.read_text().splitlines()
    if [json.loads(line)["round"] for line in lines] != list(range(len(one.rounds))):
        found.append("the rounds in rounds.jsonl")
    if len(other.rounds) != len(one.rounds):
        found.append("the rounds in metrics.csv")
    present, wanted = _files(killed), _files(quiet)
    if present - wanted:
        found.append(f"files that are left: {', '.join(sorted(present - wanted))}")
    # a resume deletes the states that clients had before the checkpoint it goes on from
    missing = wanted - present - _older_states(quiet)
    if missing:
        found.append(f"files that are missing: {', '.join(sorted(missing))}")
    return found + ledger_differences(one.payloads, other.payloads)


def ledger_differences(quiet: Sequence[Payload], killed: Sequence[Payload]) -> list[str]:
    """Say where a ledger of several attempts is not that of one undisturbed attempt.

    Every attempt at a round has to begin with the same bytes to and from the same clients, as far
    as it came, and the last one has to come to the round's end.

    Args:
        quiet: Lines of the undisturbed run's ledger.
        killed: Lines of the other one's.
    """
    found = []
    wanted, came = _by_attempt(quiet), _by_attempt(killed)
    for round_idx in sorted(wanted.keys() | came.keys()):
        (whole,) = wanted.get(round_idx, [[]])
        attempts = came.get(round_idx, [[]])
        if attempts[-1] != whole:
            found.append(f"the ledger's last attempt at round {round_idx}")
        if any(lines != whole[: len(lines)] for lines in attempts):
            found.append(f"an attempt at round {round_idx} in the ledger")
    return found


def _by_attempt(payloads: Sequence[Payload]) -> dict[int, list[list[Payload]]]:
    """Return by round the lines of every attempt at it, in their order, without its number."""
    attempts: dict[tuple[int, int], list[Payload]] = defaultdict(list)
    for row in payloads:
        attempts[row["round"], row["attempt"]].append({**row, "attempt": None})
    rounds: dict[int, list[list[Payload]]] = defaultdict(list)
    for (round_idx, _), lines in sorted(attempts.items(), key=lambda item: item[0]):
        rounds[round_idx].append(lines)
    return rounds


def _prompt(run_dir: Path) -> torch.Tensor:
    return flatten(
        Checkpoints(RunFolder(run_dir).checkpoints).load("last").tree["federation"]["payload"]
    )


def _files(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}


def _older_states(run_dir: Path) -> set[str]:
    """Return the files of clients' states that are not their newest."""
    folders = RunFolder(run_dir).clients.glob("*")
    states = [sorted(folder.glob("round-*"))[:-1] for folder in folders]
    return {str(path.relative_to(run_dir)) for older in states for path in older}


def _payloads(ledger: Path) -> list[Payload]:
    return read_ledger(ledger) if ledger.exists() else []


def main() -> int:
    """Run both, print what happened and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the blows' times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = survive(Path(scratch), partial(quickstart, options.rounds), seed=options.seed)
    print(f"kills                {outcome.kills}")
    print(f"rounds lost          {options.rounds - outcome.rounds} of {options.rounds}")
    print(f"rounds begun again   {outcome.begun - options.rounds}")
    print(
        f"time                 {outcome.seconds:.1f} s, undisturbed {outcome.quiet_seconds:.1f} s"
    )
    print(f"time lost            {100 * outcome.lost_share:.0f} % (starts, and work done again)")
    print(f"differences          {'; '.join(outcome.differences) or 'none'}")
    return int(bool(outcome.differences))


if __name__ == "__main__":
    sys.exit(main())
