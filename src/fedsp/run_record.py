"""Reads the folder of a run, finished or not, into plain data; nothing is judged or drawn here."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsp.ledger import read_ledger
from fedsp.run_folder import RunFolder

Metrics = dict[str, float]
SEED_FOLDER = "seed-"
HANDOUT = "auxiliary_handout"


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Args:
        path: The folder.
        method: What the run is called: its folder's name, or in a comparison the method's folder.
        config: Its configuration; empty for a run that was started from Python.
        rounds: Metrics of every finished round, in order.
        records: By round, what `round_recorder` wrote of clients, drift and similarity.
        payloads: The ledger's lines.
        results: What `results.json` holds; empty before the end of the run.
        missing: What is not there, a sentence each.
    """

    path: Path
    method: str
    config: dict[str, Any]
    rounds: list[Metrics]
    records: dict[int, dict[str, Any]]
    payloads: list[dict[str, Any]]
    results: dict[str, Any]
    missing: tuple[str, ...]

    @property
    def experiment(self) -> str:
        """Name of the folder in which runs that belong together lie."""
        folder = self.path.resolve()
        return folder.parents[1 if folder.name.startswith(SEED_FOLDER) else 0].name

    @property
    def seed(self) -> int | None:
        """The seed of everything, where the configuration tells it."""
        return self.config.get("seed_everything")

    @property
    def name(self) -> str:
        """Method and seed."""
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Return the rounds in which a metric was measured, and its values."""
        points = [(it["round"], it[metric]) for it in self.rounds if metric in it]
        return [idx for idx, _ in points], [value for _, value in points]

    def total(self, metric: str) -> float:
        """Return a metric's sum over the rounds."""
        return sum(self.series(metric)[1])

    def finished_records(self) -> list[dict[str, Any]]:
        """Return the records of finished rounds, in order."""
        indices = [int(metrics["round"]) for metrics in self.rounds]
        return [self.records[idx] for idx in indices if idx in self.records]

    def handout_bytes(self) -> dict[int, int]:
        """Return by finished round the bytes of auxiliary models that were handed over."""
        sums: dict[int, int] = {}
        for row in self.settled_payloads():
            if row["kind"] == HANDOUT:
                sums[row["round"]] = sums.get(row["round"], 0) + row["bytes"]
        return sums

    def settled_payloads(self) -> list[dict[str, Any]]:
        """Return the ledger's lines of finished rounds, each of the attempt that finished it.

        The ledger keeps every attempt: a round that was cut off and repeated stands in it twice.
        """
        last: dict[int, int] = {}
        for row in self.payloads:
            last[row["round"]] = max(row["attempt"], last.get(row["round"], 0))
        finished = {int(metrics["round"]) for metrics in self.rounds}
        return [
            row
            for row in self.payloads
            if row["round"] in finished and row["attempt"] == last[row["round"]]
        ]

    def ledger_gaps(self) -> list[tuple[int, str, int]]:
        """Compare the ledger with the metrics of every finished round.

        Returns:
            Round, direction, and the bytes that the ledger has beyond the metrics, below 0 where it
            has fewer; nothing where both say the same. Answers that came late are left out.
        """
        return [gap for gap in self._surplus() if not _came_late(gap)]

    def late_bytes(self) -> dict[int, int]:
        """Return by finished round the bytes of answers that came after it was measured.

        They are in the ledger and not in the metrics, and nothing is wrong with that.
        """
        return {gap[0]: gap[2] for gap in self._surplus() if _came_late(gap)}

    def _surplus(self) -> list[tuple[int, str, int]]:
        sums: dict[tuple[int, str], int] = {}
        for row in self.settled_payloads():
            key = row["round"], row["direction"]
            sums[key] = sums.get(key, 0) + row["bytes"]
        gaps = [
            (idx, way, sums.get((idx, way), 0) - int(metrics.get(f"comm/{way}_bytes", 0)))
            for metrics in self.rounds
            for idx in [int(metrics["round"])]
            for way in ("up", "down")
        ]
        return [gap for gap in gaps if gap[2]]

    def settings(self) -> dict[str, Any]:
        """Return the configuration by options as a user types them, seeds and folder left out."""
        flat = flatten_config(self.config)
        return {
            name: value
            for name, value in flat.items()
            if name not in ("seed_everything", "trainer.run_dir") and not name.endswith(".seed")
        }


def _came_late(gap: tuple[int, str, int]) -> bool:
    """Whether more was sent than measured, and by clients: a server sends in time."""
    return gap[1] == "up" and gap[2] > 0


def find_runs(path: Path) -> list[Path]:
    """Return the run folders that a user means: the folder itself, or those of a comparison.

    Args:
        path: A run's folder, or one that holds `METHOD/seed-N` folders.

    Raises:
        ValueError: If it is neither.
    """
    if _is_run(path):
        return [path]
    found = [run for run in sorted(path.glob(f"*/{SEED_FOLDER}*"), key=_by_seed) if _is_run(run)]
    if not found:
        state = "which holds none of these" if path.is_dir() else "which is no folder"
        raise ValueError(
            "`RUN_DIR` must be the folder of a run, with config.yaml, ledger.jsonl or "
            f"results.json in it, or one that `fedsp compare` filled, got {path}, {state}."
        )
    return found


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Args:
        path: A folder that `find_runs` returned.

    Raises:
        ValueError: If a file in it is damaged.
        OSError: If a file cannot be read.
    """
    folder = RunFolder(path)
    missing = []
    results = _json(folder.results) if folder.results.exists() else {}
    if not results:
        missing.append("The run is not finished: there is no results.json, so nothing is tested.")
    rounds = _read_metrics(folder.metrics) or results.get("rounds", [])
    if not rounds and not results:
        missing.append("No round is finished: there is nothing in csv/metrics.csv.")
    records = read_records(folder.rounds)
    if rounds and not any(int(metrics["round"]) in records for metrics in rounds):
        missing.append("No rounds.jsonl: no participation, prompt drift and similarity.")
    if not folder.ledger.exists():
        missing.append("No ledger.jsonl: payloads cannot be listed.")
    if not folder.config.exists():
        missing.append("No config.yaml: the run was started from Python, settings are unknown.")
    return Run(
        path=path,
        method=_method(path.resolve()),
        config=_yaml(folder.config) if folder.config.exists() else {},
        rounds=rounds,
        records=records,
        payloads=read_ledger(folder.ledger) if folder.ledger.exists() else [],
        results=results,
        missing=tuple(missing),
    )


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """Read `rounds.jsonl`: by round, its last whole line.

    Args:
        path: The file; a missing one holds nothing, a half-written last line is left out.

    Raises:
        ValueError: If a line is damaged.
    """
    if not path.exists():
        return {}
    records = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            records[int(record["round"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a round's JSON: {error}") from error
    return records


def flatten_config(node: Any, name: str = "") -> dict[str, Any]:
    """Return a configuration's values by dotted option, as the command line takes them.

    Args:
        node: The configuration or a part of it; `class_path` and `init_args` leave no trace in
            the names.
        name: Option of that part.
    """
    if isinstance(node, dict) and (node or not name):
        flat: dict[str, Any] = {}
        for key, value in node.items():
            silent = key in ("class_path", "init_args")
            flat |= flatten_config(value, name if silent else f"{name}.{key}".lstrip("."))
        return flat
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        return {
            key: value
            for idx, item in enumerate(node)
            for key, value in flatten_config(item, f"{name}.{idx}").items()
        }
    return {name: node}


def _method(folder: Path) -> str:
    return folder.parent.name if folder.name.startswith(SEED_FOLDER) else folder.name


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return any(file.is_file() for file in (folder.config, folder.ledger, folder.results))


def _by_seed(path: Path) -> tuple[str, int, str]:
    number = path.name.removeprefix(SEED_FOLDER)
    return path.parent.name, int(number) if number.isdecimal() else -1, path.name


def _read_metrics(path: Path) -> list[Metrics]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        try:
            rows = [
                {name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)
            ]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected numbers, {error}") from error
    if any("round" not in row for row in rows):
        raise ValueError(f"{path}: expected a column `round`.")
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    return _mapping(path, content)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML: {error}") from error
    return _mapping(path, content)


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected names with values, got {type(content).__name__}.")
    return content
