"""`kill -9` in the middle of a run, at random moments and between its file operations, then resume.

The runs are processes of their own, forked from a server that has paid for the imports once.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.audit import audit
from fedsp.ledger import read_ledger
from fedsp.state_files import load_state
from processes import PRELOADED
from tiny import fit_with_states

ROUNDS = 4
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


def child(folder: Path, run_dir: Path, kill_at: int | None, counts: Any) -> None:
    """Run in a process of its own and, where asked to, kill it before its n-th file operation."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    done = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in FILE_EVENTS or not str(args[0]).startswith(str(run_dir)):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    sys.addaudithook(watch)
    fit_with_states(folder, run_dir, ROUNDS)
    counts.value = done


class Runs:
    """Starts runs in one folder; an undisturbed one is there under the name `whole`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.operations = self.context.Value("i", 0)
        assert self.go("whole") == 0
        self.of_a_whole_run = self.operations.value

    def go(self, name: str, kill_at: int | None = None, after: float | None = None) -> int:
        """Return the exit code: -9 for a run that was killed, 0 for one that came to its end."""
        args = (self.folder, self.folder / name, kill_at, self.operations)
        process = self.context.Process(target=child, args=args)
        process.start()
        process.join(after)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode

    def state(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "checkpoints" / f"round-{ROUNDS:06d}.safetensors"
        state: dict[str, Any] = load_state(path)
        return state["tree"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kill"))


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Places at which two nested states differ in any bit, wall-clock seconds aside."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for key in one.keys() | other.keys() if "second" not in str(key)}
        return [
            place
            for key in keys
            for place in differences(one.get(key, ...), other.get(key, ...), f"{path}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{path}/{i}")]
    return [] if type(one) is type(other) and one == other else [path]


def records(folder: Path) -> list[dict[str, Any]]:
    """Lines of `rounds.jsonl`, wall-clock seconds aside."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        for stages in line["clients"].values():
            for stage in stages.values():
                del stage["seconds"]
    return lines


def assert_same_as_undisturbed(runs: Runs, name: str) -> None:
    whole, killed = runs.state("whole"), runs.state(name)
    assert {"federation", "history"} <= whole.keys()
    assert differences(whole, killed) == []
    written = records(runs.folder / name)
    assert [record["round"] for record in written] == list(range(ROUNDS))
    assert written == records(runs.folder / "whole")
    results = [json.loads((runs.folder / n / "results.json").read_text()) for n in ("whole", name)]
    assert differences(*results) == []
    assert len(results[0]["rounds"]) == ROUNDS
    adapters = [
        (runs.folder / n / "adapter" / "adapter_model.safetensors").read_bytes()
        for n in ("whole", name)
    ]
    assert adapters[0] == adapters[1]
    tables = [(runs.folder / n / "csv" / "metrics.csv").read_text() for n in ("whole", name)]
    assert [len(table.splitlines()) for table in tables] == [ROUNDS + 1] * 2
    assert_ledger_balances(runs, name)
    left = [path for path in (runs.folder / name).rglob("*") if path.suffix == ".tmp"]
    assert left == []


def assert_ledger_balances(runs: Runs, name: str) -> None:
    """Of each round's last attempt: one broadcast and one answer a client, and the bytes logged."""
    rows = read_ledger(runs.folder / name / "ledger.jsonl")
    history = runs.state(name)["history"]["rounds"]
    for round_idx in range(ROUNDS):
        of_round = [row for row in rows if row["round"] == round_idx]
        last = max(row["attempt"] for row in of_round)
        of_round = [row for row in of_round if row["attempt"] == last]
        received = [row["client"] for row in of_round if row["kind"] == "server_broadcast"]
        answered = [row["client"] for row in of_round if row["kind"] == "client_update"]
        assert received == answered
        assert len(set(answered)) == len(answered) == 2
        for direction in ("up", "down"):
            total = sum(row["bytes"] for row in of_round if row["direction"] == direction)
            assert history[round_idx][f"comm/{direction}_bytes"] == total
    assert audit(runs.folder / name).findings == ()
    whole = read_ledger(runs.folder / "whole" / "ledger.jsonl")
    last_attempts: dict[int, int] = {}
    for row in rows:
        last_attempts[row["round"]] = max(last_attempts.get(row["round"], 0), row["attempt"])
    final = [row for row in rows if row["attempt"] == last_attempts[row["round"]]]
    assert [{**row, "attempt": 0} for row in final] == whole


def kill_often(runs: Runs, name: str, kills: int, seed: int) -> None:
    """Half of the kills come after a random time, half between two file operations."""
    draw = random.Random(seed)
    operations = runs.of_a_whole_run
    assert operations > 50
    started = time.perf_counter()
    assert runs.go(f"{name}-timed") == 0
    seconds = time.perf_counter() - started
    killed = 0
    while killed < kills:
        if killed % 2:
            code = runs.go(name, after=draw.uniform(0.3, 0.9) * seconds)
        else:
            code = runs.go(name, kill_at=draw.randrange(operations // 2))
        if code == 0:  # it was through before the blow: begin another run
            assert_same_as_undisturbed(runs, name)
            name += "-again"
        else:
            killed += 1
    assert runs.go(name) == 0
    assert_same_as_undisturbed(runs, name)


def test_the_comparison_sees_a_single_bit() -> None:
    """The last bit of one number, a dtype, a type, a length, an absent key."""
    tree = {"a": [torch.ones(3), {"n": 1, "seconds": 2.0}]}
    assert differences(tree, {"a": [torch.ones(3), {"n": 1, "seconds": 9.0}]}) == []
    nudged = torch.nextafter(torch.ones(3), torch.tensor([2.0, 1.0, 1.0]))
    for other in (
        {"a": [nudged, {"n": 1}]},
        {"a": [torch.ones(3).double(), {"n": 1}]},
        {"a": [torch.ones(3), {"n": 1.0}]},
        {"a": [torch.ones(3)]},
        {"a": [torch.ones(3), {}]},
    ):
        assert len(differences(tree, other)) == 1


def test_two_undisturbed_runs_are_equal(runs: Runs) -> None:
    assert runs.go("twin") == 0
    assert_same_as_undisturbed(runs, "twin")


def test_a_run_killed_three_times_ends_as_the_undisturbed_one(runs: Runs) -> None:
    kill_often(runs, "three", kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_ten_times_ends_as_the_undisturbed_one(runs: Runs, seed: int) -> None:
    kill_often(runs, f"ten-{seed}", kills=10, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two runs for each file operation of a run
def test_a_kill_before_any_file_operation_can_be_resumed(runs: Runs) -> None:
    """Each in a run of its own; the last operations only write what a finished run leaves."""
    for kill_at in range(runs.of_a_whole_run):
        name = f"operation-{kill_at}"
        assert runs.go(name, kill_at=kill_at) == -signal.SIGKILL
        assert runs.go(name) == 0
        assert_same_as_undisturbed(runs, name)
