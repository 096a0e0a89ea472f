"""Run the benchmarks one after the other and print all their figures in one table.

Run: OMP_NUM_THREADS=1 python benchmarks/table.py ["traffic.py" "round_overhead.py --quick"]

Each script has a process of its own and its output is shown as it comes; its figures are the lines
that `figure.py` writes. A missed target is in the table; the exit code is 1 only where a script
failed or told nothing.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from figure import PREFIX, Figure, read_figures

# ten minutes on two free cores
SCRIPTS = (
    "round_overhead.py --quick",
    "client_parallel.py --repeats 1",
    "memory.py",
    "sharded_memory.py",
    "traffic.py",
    "bench_prompt_step.py",
    "bench_choices.py",
)


@dataclass(frozen=True)
class Outcome:
    """How a script ended.

    Args:
        script: The script and its options.
        exit_code: Of its process.
        figures: What it told.
    """

    script: str
    exit_code: int
    figures: list[Figure]

    @property
    def failed(self) -> bool:
        """Whether it ended with an error, or without a figure."""
        return self.exit_code != 0 or not self.figures


def run(folder: Path, script: str) -> Outcome:
    """Run a script in a process of its own, showing what it prints for people.

    Args:
        folder: Where the script is.
        script: Its file name and options.
    """
    name, *options = script.split()
    print(f"== {script}", flush=True)
    lines = []
    command = [sys.executable, str(folder / name), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            if not line.startswith(PREFIX):
                print(line, end="", flush=True)
    return Outcome(script, process.returncode, read_figures("".join(lines)))


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table: a row for every figure, and for every script that failed."""
    rows = [("", "ratio", "target", "met")]
    for outcome in outcomes:
        for figure in outcome.figures:
            target = "" if figure.at_most is None else f"<= {figure.at_most:.2f}"
            met = "" if figure.at_most is None else "yes" if figure.met else "no"
            rows.append((figure.name, f"{figure.ratio:.3f}", target, met))
        if outcome.failed:
            reason = f"exit code {outcome.exit_code}" if outcome.exit_code else "no figure"
            rows.append((f"{outcome.script}: {reason}", "", "", "failed"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {ratio:>{widths[1]}}  {target:>{widths[2]}}  {met}".rstrip()
        for name, ratio, target, met in rows
    ]
    return "\n".join(lines)


def main(folder: Path, scripts: Sequence[str]) -> int:
    """Run the scripts, print the table and return the exit code."""
    outcomes = [run(folder, script) for script in scripts]
    print(f"\n{table(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, sys.argv[1:] or SCRIPTS))
