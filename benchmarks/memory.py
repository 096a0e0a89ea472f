"""Peak memory with many simulated clients against few, and after many rounds against after few.

Run: python benchmarks/memory.py [--clients 1000] [--rounds 50]

The cohort is 10 clients and the data are the same 8,000 rows throughout, so that what differs is
the number of clients; each keeps an auxiliary model and its optimizers' moments. Each setting runs
in a process of its own; what Python and the libraries take is subtracted, so the ratios are of what
fedsp itself holds. Linux only: the figures come from /proc.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from figure import Figure

from fedsp.auxiliary import SharedCell
from fedsp.batching import Batching
from fedsp.callbacks import FederatedCallback
from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.partition import IID
from fedsp.pretrained import BackboneSpec
from fedsp.sampling import UniformSampler
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.sources import Files
from fedsp.stages import Stage
from fedsp.tasks import PromptCompletion
from fedsp.trainer import FederatedTrainer

MODEL = "fedsp://docstring-nano"
COHORT, NUM_ROWS, STEPS, FEW_ROUNDS = 10, 8000, 2, 5
RATIO_TARGET = 1.10
GROWTH_TARGET = 1.02
# what is held after one round depends on what the allocator gave back just then
ROUNDS_AVERAGED = 5


class Gauge(FederatedCallback):
    """Notes the process's memory after every round, in kB."""

    def __init__(self) -> None:
        """Take what is in use now as what the libraries need."""
        self.base = status("VmRSS")
        self.peaks: list[int] = []
        self.held: list[int] = []

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        """Look, once the round is done with."""
        self.peaks.append(status("VmHWM") - self.base)
        self.held.append(status("VmRSS") - self.base)


def status(name: str) -> int:
    """Return an entry of this process's status in kB."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {name}: this benchmark needs Linux.")
    return int(found[1])


def measure(num_clients: int, num_rounds: int) -> None:
    """Run one setting and print its figures as JSON."""
    warnings.simplefilter("ignore")
    gauge = Gauge()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        with rows.open("w") as file:
            for idx in range(NUM_ROWS):
                prompt = f"def function_{idx}(first, second, option=None):"
                row = {"prompt": prompt, "completion": f" Return number {idx} of the list."}
                file.write(json.dumps(row) + "\n")
        stage = Stage(steps=STEPS)
        server = ServerModule(
            BackboneSpec(MODEL), SoftPromptSpec(8), stage, SharedCell(cell_size=1)
        )
        data = FederatedDataModule(
            Files(str(rows)),
            PromptCompletion(),
            IID(num_clients),
            server=8,
            selection=8,
            batching=Batching(batch_size=4),
            cache_dir=str(folder / "cache"),
        )
        trainer = FederatedTrainer(
            accelerator="cpu",
            num_rounds=num_rounds,
            sampler=UniformSampler(COHORT),
            run_dir=str(folder / "run"),
            callbacks=[gauge],
            enable_progress_bar=False,
        )
        trainer.fit(server, ClientModule(stage, stage), data)
        states = trainer.federation.executor.simulation.store
        figures = {"disk": states.disk_bytes(), "clients_with_state": len(states.versions())}
    # the first entry is from before round 0
    print(json.dumps({"peaks": gauge.peaks[1:], "held": gauge.held[1:], **figures}))


def run(num_clients: int, num_rounds: int) -> dict[str, Any]:
    """Measure one setting in a process of its own."""
    words = [sys.executable, __file__, "--setting", str(num_clients), str(num_rounds)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure the settings and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--setting", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.setting:
        measure(*given.setting)
        return
    few, many = run(COHORT, FEW_ROUNDS), run(given.clients, FEW_ROUNDS)
    long = run(given.clients, given.rounds)
    ratio = many["peaks"][-1] / few["peaks"][-1]
    first, last = (
        statistics.mean(long["held"][end - ROUNDS_AVERAGED : end])
        for end in (FEW_ROUNDS + ROUNDS_AVERAGED - 1, given.rounds)
    )
    growth = last / first
    print(f"peak memory beside the libraries, cohort of {COHORT}, {FEW_ROUNDS} rounds")
    for clients, figures in ((COHORT, few), (given.clients, many)):
        states = f"{figures['clients_with_state']} states on disk, {figures['disk'] / 1e6:.1f} MB"
        print(f"  {clients:>5} clients: {figures['peaks'][-1] / 1e3:6.1f} MB   ({states})")
    print(f"  ratio: {ratio:.3f} (target: at most {RATIO_TARGET})")
    print(
        f"{given.clients} clients, held after a round: mean of {ROUNDS_AVERAGED} rounds from round "
        f"{FEW_ROUNDS} on, and of the last {ROUNDS_AVERAGED} of {given.rounds}"
    )
    print(f"  {first / 1e3:.1f} MB, {last / 1e3:.1f} MB", end="")
    peaks = long["peaks"]
    print(f"   (peaks: {peaks[FEW_ROUNDS - 1] / 1e3:.1f} MB, {peaks[-1] / 1e3:.1f} MB)")
    print(f"  ratio: {growth:.3f} (target: at most {GROWTH_TARGET})")
    figures = [
        Figure(f"peak memory, {given.clients} / {COHORT} clients", ratio, RATIO_TARGET),
        Figure(f"memory held, {given.rounds} / {FEW_ROUNDS} rounds", growth, GROWTH_TARGET),
    ]
    for figure in figures:
        print(figure.line())


if __name__ == "__main__":
    main()
