"""`fedsp report`, `fedsp compare` and `fedsp audit`: what looks at runs and needs no model.

Everything that takes long to import is imported only when a command's words are understood.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedsp.shipped import expand_names, shipped_names

if TYPE_CHECKING:
    from rich.console import Console

    from fedsp.sweep import Sweep

INTERRUPTED = 130
TERMINATED = 143


class Parser(argparse.ArgumentParser):
    """Says what is wrong in the way of the other commands."""

    def error(self, message: str) -> NoReturn:
        """Print the reason without all options, and exit with 2."""
        self.exit(2, f"fedsp: error: {message}\nAll options: {self.prog} --help\n")


def report(arguments: Sequence[str]) -> int:
    """Write one HTML page about a run, or about several beside each other.

    Args:
        arguments: The words after `fedsp report`.

    Returns:
        The exit status.

    Raises:
        ValueError: If a folder is not that of a run, or holds damaged files.
        ModuleNotFoundError: If the extra `report` is not installed.
    """
    parser = _parser("report", report)
    parser.add_argument(
        "run_dir", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run or a comparison"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write the page (default: report.html in the first RUN_DIR)",
    )
    given = parser.parse_args(arguments)
    from fedsp.html_report import write_report
    from fedsp.run_record import find_runs, read_run

    paths = [path for folder in given.run_dir for path in find_runs(folder)]
    output = given.output or given.run_dir[0] / "report.html"
    if not output.parent.is_dir():
        raise ValueError(f"`--output` must lie in a folder that exists, got {output}.")
    runs = [read_run(path) for path in dict.fromkeys(paths)]
    write_report(runs, output)
    for run in runs:
        for gap in run.missing:
            print(f"fedsp: warning: {run.path}: {gap}", file=sys.stderr)
    print(f"report: {output}")
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Run methods with seeds, one after the other, and compare them; goes on where it stopped.

    Args:
        arguments: The words after `fedsp compare`.

    Returns:
        The exit status: 1 if a run failed.

    Raises:
        ValueError: If a name is unknown or the folder holds another comparison.
        ModuleNotFoundError: If the extra `report` is not installed.
    """
    parser = _parser("compare", compare)
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="configuration that all runs have; may be repeated",
    )
    parser.add_argument(
        "--task", metavar="NAME", help="a shipped task over the configurations so far"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"YAML files, or of the shipped ones: {', '.join(shipped_names('method'))}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument(
        "--run_dir",
        type=Path,
        default=Path("runs/compare"),
        help="the runs lie in RUN_DIR/METHOD/seed-N (default: %(default)s)",
    )
    parser.epilog = (
        "Any other option is one of `fedsp fit` and holds for every run, unless its method's "
        "file says otherwise."
    )
    if any(word.partition("=")[0] == "--method" for word in arguments):
        parser.error("`--method` is an option of `fedsp fit`; here it is `--methods NAME ...`.")
    given, options = parser.parse_known_args(expand_names([*arguments]))
    from fedsp.sweep import Sweep, find_methods

    methods = find_methods(given.methods)
    sweep = Sweep(given.run_dir, (*given.config,), methods, (*given.seeds,), (*options,))
    return _run(sweep)


def audit(arguments: Sequence[str]) -> int:
    """Check by the ledgers, of one side or of both, that only declared payloads travelled.

    Args:
        arguments: The words after `fedsp audit`.

    Returns:
        The exit status: 1 if anything is wrong.

    Raises:
        ValueError: If a folder is not that of a run or a federation.
    """
    parser = _parser("audit", audit)
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="folder of a run, of either side's, or of a federation, whose runs are found in it",
    )
    parser.add_argument(
        "--clients",
        nargs="+",
        type=Path,
        default=[],
        metavar="CLIENT_RUN",
        help="folders of the clients' runs, compared with RUN_DIR, the server's",
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="default: %(default)s"
    )
    given = parser.parse_args(arguments)
    from dataclasses import asdict

    from rich.console import Console

    from fedsp.audit import audit as make_audit
    from fedsp.audit_table import print_audit

    made = make_audit(given.run_dir, given.clients)
    if given.format == "json":
        print(json.dumps(asdict(made) | {"passed": made.passed}, indent=2))
    else:
        print_audit(made, _console(Console()))
        for finding in made.findings:
            print(f"fedsp: error: {finding}", file=sys.stderr)
    return 0 if made.passed else 1


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "report": report,
    "compare": compare,
    "audit": audit,
}


def main(arguments: Sequence[str]) -> None:
    """Run one of `COMMANDS` and exit.

    Args:
        arguments: The command line; its first word is the command.
    """
    # as an exception it reaches whoever waits for a run, which ends that run too
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        status = COMMANDS[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("FEDSP_TRACEBACK"):
            raise
        print(f"fedsp: error: {error}", file=sys.stderr)
        status = 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.exit(status)


def _run(sweep: "Sweep") -> int:
    """Do a sweep's runs and show what came of them."""
    from rich.console import Console

    from fedsp.comparison import comparison_table, group_runs, write_comparison
    from fedsp.html_report import write_report
    from fedsp.run_record import find_runs, read_run

    sweep.claim()
    failed = sweep.run(lambda text: print(f"fedsp compare: {text}", flush=True))
    finished = [folder for folder in sweep.run_folders() if (folder / "results.json").exists()]
    if finished:
        runs = [read_run(path) for folder in finished for path in find_runs(folder)]
        runs.sort(key=lambda run: list(sweep.methods).index(run.method))
        write_comparison(runs, sweep.folder)
        write_report(runs, sweep.folder / "report.html")
        console = _console(Console())
        console.print(comparison_table(group_runs(runs)))
        print(f"comparison: {sweep.folder}/comparison.csv, .json and report.html")
    for line in failed:
        print(f"fedsp: error: {line}", file=sys.stderr)
    return 1 if failed else 0


def _console(console: "Console") -> "Console":
    if not console.is_terminal:
        console.width = 200  # a file has no edge to wrap at
    return console


def _parser(name: str, command: Callable[[Sequence[str]], int]) -> Parser:
    return Parser(
        prog=f"fedsp {name}",
        description=(command.__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
