"""Runs beside each other: one row a run, and means with confidence intervals over seeds.

Runs whose configurations differ in nothing but seeds and folder are one method.
"""

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedsp.display import human_bytes, human_count, human_seconds
from fedsp.run_record import Run
from fedsp.state_files import write_text_atomically

Row = dict[str, Any]
CONFIDENCE = 0.95
SPLITS = ("selection", "test")
# how a metric of `results.json` is named in a row: after what was measured
MODELS = {"best": "", "zero_shot": "zero_shot_", "server_only": "server_only_"}
METRICS = ("loss", "accuracy", "accuracy_norm", "exact_match", "f1", "perplexity")
# test loss above that of the first method of the same experiment, seed by seed
DIFFERENCE = "test_loss_difference"
_PAIRED = {"seed", "test_loss"}
_FACTS = ("experiment", "method", "seed", "rounds", "best_round", "clients")
_COSTS = ("up_bytes", "down_bytes", "handout_bytes", "bytes_per_client", "seconds", "parameters")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Args:
        mean: Of the values.
        half_width: Of the two-sided 95 % Student-t interval; None for a single value.
        count: Number of values.
    """

    mean: float
    half_width: float | None
    count: int


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds only.

    Args:
        name: What tables and charts call it.
        runs: At least one; each has the method's name.
        count: Number of runs that the intervals are over: the finished ones, if there are any.
        intervals: By column of a row, over those of these runs that have it.
    """

    name: str
    runs: list[Run]
    count: int
    intervals: dict[str, Interval]


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % Student-t interval.

    Args:
        values: At least one.

    Raises:
        ModuleNotFoundError: If scipy, part of the extra `report`, is not installed.
    """
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    if count < 2:
        return Interval(float(array.mean()), None, count)
    error = array.std(ddof=1) / math.sqrt(count)
    return Interval(float(array.mean()), float(_quantile(count - 1) * error), count)


def run_row(run: Run) -> Row:
    """Return a run's row of the comparison.

    `down_bytes` leaves out what hands over auxiliary models, which is `handout_bytes`. Metrics are
    `SPLIT_METRIC` for the chosen round, `SPLIT_zero_shot_METRIC` and `SPLIT_server_only_METRIC`
    for what it is compared with.

    Args:
        run: May be unfinished: what is not known is left out.
    """
    clients = len({row["client"] for row in run.settled_payloads()})
    handout = sum(run.handout_bytes().values())
    up, down = int(run.total("comm/up_bytes")), int(run.total("comm/down_bytes")) - handout
    best = run.results.get("selection", {}).get("best", {})
    row = {
        "experiment": run.experiment,
        "method": run.method,
        "seed": run.seed,
        "rounds": len(run.rounds),
        "best_round": best.get("round"),
        "clients": clients,
        "up_bytes": up,
        "down_bytes": down,
        "handout_bytes": handout,
        "bytes_per_client": round((up + down) / clients) if clients else None,
        "seconds": round(run.total("round/seconds"), 1),
        "parameters": max((it["parameters"] for it in run.records.values()), default=None),
        **_measured(run),
    }
    return {name: value for name, value in row.items() if value is not None}


def group_runs(runs: Iterable[Run]) -> list[Method]:
    """Put runs that differ only in their seeds together.

    Args:
        runs: In the order in which their methods are to be shown.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        # without a configuration nothing says that two runs belong together
        key = json.dumps(run.settings(), sort_keys=True) if run.config else str(run.path)
        groups.setdefault(key, []).append(run)
    labels = [group[0].method for group in groups.values()]
    methods, first = [], dict[str, list[Row]]()
    for group, label in zip(groups.values(), labels, strict=True):
        name = label if labels.count(label) == 1 else f"{group[0].experiment}/{label}"
        named = [replace(run, method=name) for run in group]
        # costs of half a run would pull the mean of whole ones down
        rows = [run_row(run) for run in named if run.results] or [run_row(run) for run in named]
        intervals = row_intervals(rows, first.setdefault(group[0].experiment, rows))
        methods.append(Method(name, named, len(rows), intervals))
    return methods


def row_intervals(rows: Sequence[Row], first: Sequence[Row]) -> dict[str, Interval]:
    """Return means with intervals of all columns of numbers, and of the `DIFFERENCE`.

    Args:
        rows: Of one method. A column that holds something else than finite numbers is left out.
        first: Of the method that it is compared with, seed by seed; itself: there is no difference.
    """
    found = {}
    for name in columns(rows):
        values = [row[name] for row in rows if name in row]
        numbers = [value for value in values if isinstance(value, int | float)]
        if name != "seed" and numbers and all(math.isfinite(value) for value in numbers):
            found[name] = interval(numbers)
    differences = [] if rows is first else _differences(rows, first)
    if differences and np.isfinite(differences).all():
        found[DIFFERENCE] = interval(differences)
    return found


def _differences(rows: Sequence[Row], first: Sequence[Row]) -> list[float]:
    """Return how far a method's test loss is above another one's, for every seed that both have.

    A seed draws the data anew, which moves all methods alike: their intervals overlap where the
    differences leave no doubt.
    """
    known = {row["seed"]: row["test_loss"] for row in first if row.keys() >= _PAIRED}
    return [
        row["test_loss"] - known[row["seed"]]
        for row in rows
        if row.keys() >= _PAIRED and row["seed"] in known
    ]


def columns(rows: Iterable[Row]) -> list[str]:
    """Return every column that some row has: facts, metrics by split, costs."""
    present = {name for row in rows for name in row}
    measured = [
        f"{split}_{prefix}{metric}"
        for split in SPLITS
        for prefix in MODELS.values()
        for metric in METRICS
    ]
    known = [*_FACTS, *measured, *_COSTS]
    return [name for name in known if name in present] + sorted(present - set(known))


def write_comparison(runs: Sequence[Run], folder: Path) -> None:
    """Write `comparison.csv`, one row a run, and `comparison.json` with the intervals too.

    Args:
        runs: At least one.
        folder: Where; it must exist.
    """
    rows = [run_row(run) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(folder / "comparison.csv", text.getvalue())
    methods = {
        method.name: {name: asdict(it) for name, it in method.intervals.items()}
        for method in group_runs(runs)
    }
    content = {"confidence": CONFIDENCE, "methods": methods, "runs": rows}
    write_text_atomically(folder / "comparison.json", json.dumps(content, indent=2) + "\n")


def shown_columns(found: Iterable[Mapping[str, Interval]]) -> dict[str, str]:
    """Return what a comparison shows, column by heading: what a reader asks for first.

    Args:
        found: Intervals of every method; what none has is not shown.
    """
    wanted = {
        f"{split} {metric.replace('_', ' ')}": f"{split}_{metric}"
        for split in SPLITS
        for metric in METRICS
        if metric not in ("perplexity", "accuracy_norm")
    }
    wanted = {
        "zero-shot test loss": "test_zero_shot_loss",
        "server only test loss": "test_server_only_loss",
        **wanted,
        "test loss less the first's, by seed": DIFFERENCE,
        "traffic a client": "bytes_per_client",
        "hand-out": "handout_bytes",
        "time of rounds": "seconds",
        "tuned": "parameters",
    }
    present = {name for intervals in found for name in intervals}
    return {title: name for title, name in wanted.items() if name in present}


def cell(name: str, found: Interval | None) -> str:
    """Return a mean with its interval as people read it.

    Args:
        name: Column of a row, which says the unit.
        found: None leaves the cell empty.
    """
    if found is None:
        return ""
    if name.endswith("_bytes") or name == "bytes_per_client":
        return human_bytes(found.mean)
    if name == "seconds":
        return human_seconds(found.mean)
    if name == "parameters":
        return human_count(found.mean)
    percent = not name.endswith(("loss", DIFFERENCE))
    scale, digits = (100.0, 1) if percent else (1.0, 4)
    sign = "+" if name == DIFFERENCE else ""
    text = f"{scale * found.mean:{sign}.{digits}f}"
    if found.half_width is not None:
        text += f" ± {scale * found.half_width:.{digits}f}"
    return f"{text} %" if percent else text


def comparison_table(methods: Sequence[Method]) -> Table:
    """Return the comparison for a terminal: one row a method."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("method", no_wrap=True)
    table.add_column("seeds", justify="right")
    shown = shown_columns(method.intervals for method in methods)
    rows = [
        [cell(name, method.intervals.get(name)) for name in shown.values()] for method in methods
    ]
    for idx, title in enumerate(shown):
        width = max(len(text) for text in (*(row[idx] for row in rows), *title.split()))
        table.add_column(textwrap.fill(title, width), justify="right", overflow="fold")
    for method, row in zip(methods, rows, strict=True):
        table.add_row(method.name, str(method.count), *row)
    return table


def config_differences(methods: Sequence[Method]) -> dict[str, list[Any]]:
    """Return the options in which methods differ, with each method's value in order.

    Args:
        methods: Those whose configuration is unknown have None everywhere.
    """
    settings = [method.runs[0].settings() for method in methods]
    names = sorted({name for values in settings for name in values})
    table = {name: [values.get(name) for values in settings] for name in names}
    return {
        name: values
        for name, values in table.items()
        if any(value != values[0] for value in values)
    }


def _measured(run: Run) -> Row:
    """Metrics of the results by column; those of the chosen round from its metrics."""
    row: Row = {}
    for split in SPLITS:
        for model, prefix in MODELS.items():
            for name, value in run.results.get(split, {}).get(model, {}).items():
                if name != "round":
                    row[f"{split}_{prefix}{name.rpartition('/')[2].removeprefix('val_')}"] = value
    best = run.results.get("selection", {}).get("best", {}).get("round", -1)
    for metrics in run.rounds:
        if int(metrics["round"]) == best:
            for name, value in metrics.items():
                if name.startswith("server/val_"):
                    row[f"selection_{name.removeprefix('server/val_')}"] = value
    return row


def _quantile(degrees: int) -> float:
    try:
        from scipy.special import stdtrit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Intervals over seeds need scipy: pip install "fedsp[report]".', name=error.name
        ) from error
    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))
