"""Charts of runs, each a function from runs to a figure; where they are shown is not known."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from fedsp.figures import (
    PALETTE,
    Figure,
    add_choice,
    band,
    bars,
    crosses,
    heat_map,
    line,
    make_figure,
)
from fedsp.run_record import Run

Runs = Sequence[Run]
Record = dict[str, Any]
METRICS = {
    "loss": "loss, nats a token",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "F1",
}
PHASES = {"round/client_seconds": "clients", "round/server_seconds": "server training"}
DRIFT = {
    "total": ("whole round", "solid"),
    "clients": ("clients", "dot"),
    "server": ("server", "dash"),
}


@dataclass(frozen=True)
class Chart:
    """One kind of figure.

    Args:
        name: Short name, for addresses and trackers.
        title: Heading.
        caption: What is seen.
        draw: Makes the figure; None where the runs hold nothing for it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Runs], Figure | None]


def metric_by_round(runs: Runs, metric: str) -> Figure | None:
    """Draw a selection metric of server and baseline, and of a single run the clients' losses.

    Args:
        runs: Each in its method's colour.
        metric: A key of `METRICS`.
    """
    traces: list[object] = []
    for run, colour in _coloured(runs):
        for source, label, dash in (
            ("server", "server", "solid"),
            ("baseline", "no clients", "dash"),
        ):
            x, y = run.series(f"{source}/val_{metric}")
            if x:
                name = f"{run.method}: {label}"
                traces.append(line(x, y, name, colour, dash=dash, tip=f"{run.name}: {label}"))
    if not traces:
        return None
    if metric == "loss" and len(runs) == 1:
        traces += _client_losses(runs[0])
    return make_figure(traces, "round", METRICS[metric])


def communication(runs: Runs, metric: str) -> Figure | None:
    """Draw a selection metric over the bytes of both directions so far.

    Args:
        runs: Each in its method's colour.
        metric: A key of `METRICS`.
    """
    traces, with_handout, without = [], [], []
    for run, colour in _coloured(runs):
        x, y = run.series(f"server/val_{metric}")
        sent = _cumulated_bytes(run, handout=False)
        if not x or not any(sent.values()):
            continue
        without.append([sent[idx] for idx in x])
        with_handout.append([_cumulated_bytes(run, handout=True)[idx] for idx in x])
        traces.append(line(without[-1], y, run.method, colour, tip=run.name))
    if not traces:
        return None
    figure = make_figure(traces, "bytes sent so far", METRICS[metric])
    figure.update_xaxes(tickformat="~s", ticksuffix="B", rangemode="tozero")
    add_choice(figure, {"without hand-out": without, "with hand-out": with_handout})
    return figure


def time_by_phase(runs: Runs) -> Figure | None:
    """Draw the seconds of all rounds by phase, a bar a run."""
    whole = [run.total("round/seconds") for run in runs]
    if not any(whole):
        return None
    phases = {title: [run.total(name) for run in runs] for name, title in PHASES.items()}
    known = [sum(values) for values in zip(*phases.values(), strict=True)]
    rest = [max(all_ - part, 0.0) for all_, part in zip(whole, known, strict=True)]
    phases["evaluation and the rest"] = rest
    names = [run.name for run in runs]
    traces = [
        bars(names, values, title, colour)
        for (title, values), colour in zip(phases.items(), PALETTE, strict=False)
    ]
    figure = make_figure(traces, "seconds", height=max(240, 140 + 32 * len(runs)))
    figure.update_layout(barmode="stack")
    return figure


def prompt_drift(runs: Runs) -> Figure | None:
    """Draw how far a round moved the server's prompt, relative to its norm."""
    traces = []
    for run, colour in _coloured(runs):
        records = [record for record in run.finished_records() if record["relative_drift"]]
        x = [record["round"] for record in records]
        for part, (label, dash) in DRIFT.items():
            y = [record["relative_drift"][part] for record in records]
            if any(y):
                name = f"{run.method}: {label}"
                traces.append(line(x, y, name, colour, dash=dash, tip=f"{run.name}: {label}"))
    return make_figure(traces, "round", "change / norm") if traces else None


def similarity_by_round(runs: Runs) -> Figure | None:
    """Draw the mean cosine between the updates of two clients, round by round."""
    traces = []
    for run, colour in _coloured(runs):
        points = [(it["round"], it["similarity"]["mean"]) for it in run.finished_records()]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            x, y = zip(*known, strict=True)
            traces.append(line(x, y, run.method, colour, tip=run.name))
    return make_figure(traces, "round", "mean cosine") if traces else None


def participation(runs: Runs) -> Figure | None:
    """Draw who took part in which round of the first run, coloured by training loss."""
    records = runs[0].finished_records()
    clients = sorted({client for record in records for client in record["cohort"]})
    if not clients:
        return None
    z = [[_loss(record, client) for record in records] for client in clients]
    if all(value is None for row in z for value in row):  # clients that train no prompt
        z = [[1.0 if c in record["cohort"] else None for record in records] for c in clients]
    rounds = [record["round"] for record in records]
    traces = [heat_map(rounds, _names(clients), z, "loss", signed=False)]
    rejected = [
        (record["round"], f"client {client}", reason)
        for record in records
        for client, reason in record["rejected"].items()
    ]
    if rejected:
        traces.append(crosses(rejected, "rejected"))
    return _without_grid(make_figure(traces, "round", height=_height(len(clients))))


def similarity_matrix(runs: Runs) -> Figure | None:
    """Draw the cosine between clients' updates in the first run, averaged over the rounds."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in runs[0].finished_records():
        similarity = record["similarity"]
        for one, row in zip(similarity["clients"], similarity["cosine"], strict=True):
            for other, value in zip(similarity["clients"], row, strict=True):
                if value is not None:
                    found[one, other].append(value)
    clients = sorted({client for pair in found for client in pair})
    if len(clients) < 2:
        return None
    means = {pair: sum(values) / len(values) for pair, values in found.items()}
    z = [[means.get((one, other)) for other in clients] for one in clients]
    names = _names(clients)
    field = heat_map(names, names, z, "cosine", signed=True)
    return _without_grid(make_figure([field], "", height=_height(len(clients))))


def draw_all(charts: Sequence[Chart], runs: Runs) -> list[tuple[Chart, Figure]]:
    """Draw those charts for which the runs hold something."""
    drawn = [(chart, chart.draw(runs)) for chart in charts]
    return [(chart, figure) for chart, figure in drawn if figure is not None]


def _title(metric: str) -> str:
    name = METRICS[metric].partition(",")[0]
    return name[0].upper() + name[1:]


BY_ROUND = {
    metric: Chart(
        metric,
        f"{_title(metric)} by round",
        "Selection split: the server's model, and the same server steps without clients."
        + (" Beside a single run: the clients' training loss, ± 1 deviation." * (metric == "loss")),
        partial(metric_by_round, metric=metric),
    )
    for metric in METRICS
}
COMPARING = [
    *BY_ROUND.values(),
    *(
        Chart(
            f"communication_{metric}",
            f"{_title(metric)} against communication",
            "Payloads of both directions, added up; the hand-out is that of auxiliary models.",
            partial(communication, metric=metric),
        )
        for metric in METRICS
    ),
    Chart("time", "Time by phase", "Seconds of all rounds together.", time_by_phase),
    Chart(
        "drift",
        "Prompt drift",
        "L2 norm of a round's change of the server's prompt, over the norm before it.",
        prompt_drift,
    ),
    Chart(
        "similarity",
        "Agreement of the clients",
        "Mean cosine between the updates of two clients of a round; 1 is the same direction.",
        similarity_by_round,
    ),
]
OF_ONE_RUN = [
    Chart(
        "participation",
        "Participation",
        "Who took part in which round, coloured by training loss; a cross is a rejected update.",
        participation,
    ),
    Chart(
        "similarity_matrix",
        "Similarity of clients",
        "Cosine between two clients' updates, averaged over the rounds in which both took part.",
        similarity_matrix,
    ),
]


def _client_losses(run: Run) -> list[object]:
    """The clients' training loss: its mean in a band of one deviation."""
    x, mean = run.series("client/train_loss")
    if not x:
        return []
    spread = dict(zip(*run.series("client/train_loss_std"), strict=True))
    low = [value - spread.get(idx, 0.0) for idx, value in zip(x, mean, strict=True)]
    high = [value + spread.get(idx, 0.0) for idx, value in zip(x, mean, strict=True)]
    name = "clients, training"
    return [band(x, low, high, PALETTE[2]), line(x, mean, name, PALETTE[2], dash="dot", tip=name)]


def _cumulated_bytes(run: Run, *, handout: bool) -> dict[float, float]:
    """By round: all bytes so far."""
    left_out = {} if handout else run.handout_bytes()
    sent = [
        metrics.get("comm/up_bytes", 0.0)
        + metrics.get("comm/down_bytes", 0.0)
        - left_out.get(int(metrics["round"]), 0)
        for metrics in run.rounds
    ]
    rounds = [metrics["round"] for metrics in run.rounds]
    return dict(zip(rounds, accumulate(sent), strict=True))


def _loss(record: Record, client: int) -> float | None:
    """The client's loss in its last stage, which is the prompt's where there is one."""
    stages = list(record["clients"].get(str(client), {}).values())
    return stages[-1]["loss"] if stages else None


def _names(clients: Sequence[int]) -> list[str]:
    return [f"client {client}" for client in clients]


def _height(rows: int) -> int:
    """A row a client that can be read, until the figure would not fit a screen."""
    return min(max(340, 140 + 18 * rows), 900)


def _without_grid(figure: Figure) -> Figure:
    return figure.update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def _coloured(runs: Runs) -> list[tuple[Run, str]]:
    """Runs with the colour of their method."""
    methods = list(dict.fromkeys(run.method for run in runs))
    return [(run, PALETTE[methods.index(run.method) % len(PALETTE)]) for run in runs]
