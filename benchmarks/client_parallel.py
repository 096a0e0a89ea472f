"""Time a round of ten clients in two processes against one, one thread each.

Run: python benchmarks/client_parallel.py [--rounds 5] [--repeats 2]

Runs the quickstart's model, clients and steps, in turn with one process and with two, and prints
the ratio of the median round times (target: at most 0.60 on two free cores) and how far the
prompts lie apart. The server's part of a round and the evaluation are in it.

Where other programs use the cores, wall time says little. `cpu` is the processor time of the
process that used most of it in a round: what the round would take on free cores, waiting left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figure import Figure

from fedsp.callbacks import FederatedCallback
from fedsp.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MEASURES = ("round/seconds", "round/client_seconds", "round/server_seconds", "cpu")
RATIO_TARGET = 0.60


class CpuClock(FederatedCallback):
    """Writes each round's processor time of its process into the run folder."""

    def __init__(self) -> None:
        """Wait for the first round."""
        self._start = 0.0

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Any) -> None:
        """Note the time."""
        self._start = time.process_time()

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Append what was used since then."""
        file = trainer.folder.path / f"cpu-{trainer.fabric.global_rank}.txt"
        with file.open("a") as lines:
            lines.write(f"{time.process_time() - self._start}\n")


def run(folder: Path, devices: int, rounds: int, cache: Path) -> tuple[list[dict[str, Any]], Any]:
    """Run the quickstart with a short distillation.

    Args:
        folder: The run's folder.
        devices: Number of processes.
        rounds: Number of rounds.
        cache: Folder of what runs share.

    Returns:
        Every round's metrics, and the last prompt.
    """
    options = {
        "trainer.devices": devices,
        "trainer.run_dir": folder,
        "trainer.num_rounds": rounds,
        "trainer.callbacks": "client_parallel.CpuClock",
        "trainer.enable_progress_bar": "false",
        "model.init_args.initial_distillation.stage.steps": 20,
        "model.init_args.initial_distillation.cache_dir": cache,
        "data.init_args.cache_dir": cache,
    }
    command = [
        sys.executable,
        "-m",
        "fedsp",
        "fit",
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
    ]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    metrics = json.loads((folder / "results.json").read_text())["rounds"]
    clocks = [map(float, clock.read_text().split()) for clock in folder.glob("cpu-*.txt")]
    for row, of_ranks in zip(metrics, zip(*clocks, strict=True), strict=True):
        row["cpu"] = max(of_ranks)
    tree = Checkpoints(folder / "checkpoints").load("last").tree
    return metrics, tree["federation"]["payload"]["soft_prompt"]


def main() -> None:
    """Run both sides in turn and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    seconds: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    prompts: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(arguments.repeats):
            for devices in (1, 2):
                folder = Path(scratch) / f"{devices}-{repeat}"
                rows, prompts[devices] = run(folder, devices, arguments.rounds, Path(scratch))
                for row in rows:
                    for name in MEASURES:
                        seconds[devices].setdefault(name, []).append(row[name])
    print(f"{os.cpu_count()} cores, {arguments.repeats} runs of {arguments.rounds} rounds a side")
    print("                          1 process  2 processes  ratio")
    ratios = {}
    for name in seconds[1]:
        one, two = (statistics.median(seconds[devices][name]) for devices in (1, 2))
        ratios[name] = two / one
        print(f"{name:<24} {one:8.2f} s   {two:8.2f} s   {two / one:.2f}")
    distance = (prompts[1] - prompts[2]).abs().max()
    print(f"largest difference of the last prompts: {distance:.1e}")
    for label, name in {"wall time": "round/seconds", "CPU time of the busiest": "cpu"}.items():
        print(Figure(f"ten clients, 2 processes / 1: {label}", ratios[name], RATIO_TARGET).line())


if __name__ == "__main__":
    main()
