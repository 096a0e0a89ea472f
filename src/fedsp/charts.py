"""Figures of runs, each a function from runs to a plotly figure; where they are shown is not known.

The one module that knows plotly.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedsp.run_record import Run

try:
    import plotly.graph_objects as go
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'Reports and charts need plotly: pip install "fedsp[report]".', name=error.name
    ) from error

# middle tones, told apart by people with colour-blindness too, and readable on white and on black
PALETTE = ("#2f7ed8", "#d9730d", "#1a9e76", "#c2488f", "#8465d9", "#a8861b", "#d1495b", "#2797a8")
Record = dict[str, Any]
GRID = "rgba(128,128,128,0.25)"
PHASES = {
    "round/client_seconds": "clients",
    "round/server_seconds": "server training",
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
    draw: Callable[[Sequence[Run]], go.Figure | None]


def metric_by_round(runs: Sequence[Run], metric: str) -> go.Figure | None:
    """Draw a selection metric of the server and the baseline, and the clients' training loss.

    Args:
        runs: Each in its method's colour.
        metric: `loss`, `accuracy`, `exact_match` or `f1`.
    """
    traces: list[go.Scatter] = []
    for run, colour in zip(runs, _colours(runs), strict=True):
        traces += _line(run, f"server/val_{metric}", f"{run.name}: server", colour)
        baseline = f"baseline/val_{metric}"
        traces += _line(run, baseline, f"{run.name}: without clients", colour, dash="dash")
        if metric == "loss" and traces:
            traces += _clients(run, colour)
    if not traces:
        return None
    return _figure(traces, "round", _METRIC_AXES[metric])


def communication(runs: Sequence[Run], metric: str) -> go.Figure | None:
    """Draw a selection metric over the bytes sent so far in both directions.

    Args:
        runs: Each in its method's colour.
        metric: `loss`, `accuracy`, `exact_match` or `f1`.
    """
    traces = []
    for run, colour in zip(runs, _colours(runs), strict=True):
        sent, points = 0.0, []
        for metrics in run.rounds:
            sent += metrics.get("comm/up_bytes", 0.0) + metrics.get("comm/down_bytes", 0.0)
            if f"server/val_{metric}" in metrics:
                points.append((sent, metrics[f"server/val_{metric}"]))
        if points and sent:
            x, y = zip(*points, strict=True)
            traces.append(_scatter(x, y, run.name, colour))
    if not traces:
        return None
    figure = _figure(traces, "bytes sent so far, hand-out included", _METRIC_AXES[metric])
    figure.update_xaxes(tickformat="~s", ticksuffix="B", rangemode="tozero")
    return figure


def time_by_phase(runs: Sequence[Run]) -> go.Figure | None:
    """Draw the seconds of all rounds by phase, a bar a run."""
    names = [run.name for run in runs]
    phases = {title: [_total(run, name) for run in runs] for name, title in PHASES.items()}
    whole = [_total(run, "round/seconds") for run in runs]
    if not any(whole):
        return None
    known = [sum(values) for values in zip(*phases.values(), strict=True)]
    phases["evaluation and the rest"] = [
        max(all_ - part, 0.0) for all_, part in zip(whole, known, strict=True)
    ]
    bars = [
        go.Bar(y=names, x=values, name=title, orientation="h", marker_color=colour)
        for (title, values), colour in zip(phases.items(), PALETTE, strict=False)
    ]
    figure = _figure(bars, "seconds", "")
    figure.update_layout(barmode="stack", height=max(260, 150 + 32 * len(runs)))
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def prompt_drift(runs: Sequence[Run]) -> go.Figure | None:
    """Draw how far a round moved the server's prompt, relative to its norm."""
    traces = []
    dashes = {"total": "solid", "clients": "dot", "server": "dash"}
    titles = {"total": "whole round", "clients": "by the clients", "server": "by the server"}
    for run, colour in zip(runs, _colours(runs), strict=True):
        records = _records(run)
        for part, dash in dashes.items():
            x = [record["round"] for record in records]
            y = [record["relative_drift"][part] for record in records]
            if any(y):
                traces.append(_scatter(x, y, f"{run.name}: {titles[part]}", colour, dash))
    return _figure(traces, "round", "change of the prompt / its norm") if traces else None


def similarity_by_round(runs: Sequence[Run]) -> go.Figure | None:
    """Draw the mean cosine between the updates of two clients, round by round."""
    traces = []
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = [(it["round"], it["similarity"]["mean"]) for it in _records(run)]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            x, y = zip(*known, strict=True)
            traces.append(_scatter(x, y, run.name, colour))
    return _figure(traces, "round", "mean cosine of two updates") if traces else None


def participation(runs: Sequence[Run]) -> go.Figure | None:
    """Draw who took part in which round of the first run, coloured by training loss."""
    records = _records(runs[0])
    clients = sorted({client for record in records for client in record["cohort"]})
    if not clients:
        return None
    losses = [[_loss(record, client) for record in records] for client in clients]
    without = all(value is None for row in losses for value in row)
    z = [
        [
            None if client not in it["cohort"] else 1.0 if without else _loss(it, client)
            for it in records
        ]
        for client in clients
    ]
    rounds = [record["round"] for record in records]
    heat = go.Heatmap(
        x=rounds,
        y=[f"client {client}" for client in clients],
        z=z,
        colorscale="Viridis",
        showscale=not without,
        colorbar={"title": {"text": "loss"}, "thickness": 12},
        hovertemplate="round %{x}, %{y}: loss %{z:.4f}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure = _figure([heat, *_rejections(records)], "round", "")
    figure.update_layout(height=max(300, 120 + 18 * len(clients)))
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(showgrid=False)
    return figure


def similarity_matrix(runs: Sequence[Run]) -> go.Figure | None:
    """Draw the cosine between clients' updates in the first run, averaged over the rounds."""
    sums: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in _records(runs[0]):
        similarity = record["similarity"]
        for one, row in zip(similarity["clients"], similarity["cosine"], strict=True):
            for other, value in zip(similarity["clients"], row, strict=True):
                if value is not None:
                    sums[one, other].append(value)
    clients = sorted({client for pair in sums for client in pair})
    if len(clients) < 2:
        return None
    means = {pair: sum(values) / len(values) for pair, values in sums.items()}
    names = [f"client {client}" for client in clients]
    heat = go.Heatmap(
        x=names,
        y=names,
        z=[[means.get((one, other)) for other in clients] for one in clients],
        colorscale="RdBu",
        zmin=-1,
        zmax=1,
        colorbar={"title": {"text": "cosine"}, "thickness": 12},
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
    )
    figure = _figure([heat], "", "")
    figure.update_layout(height=max(340, 140 + 18 * len(clients)))
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(showgrid=False, automargin=True)
    return figure


def intervals(
    names: Sequence[str], means: Sequence[float], half_widths: Sequence[float | None], axis: str
) -> go.Figure:
    """Draw means with their intervals, a row a method.

    Args:
        names: Of the methods.
        means: One a method.
        half_widths: None where there is a single value.
        axis: What is drawn.
    """
    error = {"type": "data", "array": [width or 0.0 for width in half_widths], "thickness": 2}
    colours = [PALETTE[idx % len(PALETTE)] for idx in range(len(names))]
    points = go.Scatter(
        x=[*means],
        y=[*names],
        mode="markers",
        marker={"size": 11, "color": colours},
        error_x=error,
        showlegend=False,
    )
    figure = _figure([points], axis, "")
    figure.update_layout(height=max(240, 130 + 34 * len(names)))
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


_METRIC_AXES = {
    "loss": "loss, nats a token",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "f1": "F1",
}
BY_ROUND = [
    Chart(
        metric,
        f"{axis.partition(',')[0].capitalize()} by round",
        "Selection split: the server's model, and beside it the same server steps without clients."
        + (" The band is the clients' mean training loss ± its deviation." * (metric == "loss")),
        partial(metric_by_round, metric=metric),
    )
    for metric, axis in _METRIC_AXES.items()
]
BY_BYTES = [
    Chart(
        f"communication_{metric}",
        f"{axis.partition(',')[0].capitalize()} against communication",
        "All payloads of both directions, added up round by round.",
        partial(communication, metric=metric),
    )
    for metric, axis in _METRIC_AXES.items()
]
COMPARING = [
    *BY_ROUND,
    *BY_BYTES,
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
        "Who took part in which round, coloured by training loss; a cross marks a rejected update.",
        participation,
    ),
    Chart(
        "similarity_matrix",
        "Similarity of clients",
        "Cosine between two clients' updates, averaged over the rounds in which both took part.",
        similarity_matrix,
    ),
]


def draw_all(charts: Sequence[Chart], runs: Sequence[Run]) -> list[tuple[Chart, go.Figure]]:
    """Draw those charts for which the runs hold something."""
    drawn = [(chart, chart.draw(runs)) for chart in charts]
    return [(chart, figure) for chart, figure in drawn if figure is not None]


def html_part(figure: go.Figure, name: str) -> str:
    """Return a figure as a part of a page that holds `plotly_script` once.

    Args:
        figure: Any of this module's.
        name: Its element's id on the page.
    """
    config = {"responsive": True, "displaylogo": False}
    part: str = to_html(figure, config, full_html=False, include_plotlyjs=False, div_id=name)
    return part


def plotly_script() -> str:
    """Return plotly's JavaScript."""
    script: str = get_plotlyjs()
    return script


def _figure(traces: Sequence[go.Scatter], x: str, y: str) -> go.Figure:
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#777777"},
        margin={"l": 64, "r": 16, "t": 16, "b": 56},
        height=380,
        hovermode="closest",
        legend={"orientation": "h", "y": -0.22, "x": 0},
    )
    for update, title in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        update(title={"text": title}, gridcolor=GRID, zeroline=False, automargin=True)
    if x == "round":
        figure.update_xaxes(tickformat="d", rangemode="nonnegative")
    return figure


def _scatter(
    x: Sequence[float], y: Sequence[float | None], name: str, colour: str, dash: str = "solid"
) -> go.Scatter:
    line = {"color": colour, "dash": dash, "width": 2}
    return go.Scatter(x=[*x], y=[*y], name=name, mode="lines+markers", line=line)


def _line(run: Run, metric: str, name: str, colour: str, dash: str = "solid") -> list[go.Scatter]:
    points = [(it["round"], it[metric]) for it in run.rounds if metric in it]
    if not points:
        return []
    x, y = zip(*points, strict=True)
    return [_scatter(x, y, name, colour, dash)]


def _clients(run: Run, colour: str) -> list[go.Scatter]:
    """The clients' training loss: its mean as a thin line in a band of one deviation."""
    points = [
        (it["round"], it["client/train_loss"], it.get("client/train_loss_std", 0.0))
        for it in run.rounds
        if "client/train_loss" in it
    ]
    if not points:
        return []
    x, mean, spread = (list(values) for values in zip(*points, strict=True))
    upper = [m + s for m, s in zip(mean, spread, strict=True)]
    lower = [m - s for m, s in zip(mean, spread, strict=True)]
    band = go.Scatter(
        x=x + x[::-1],
        y=upper + lower[::-1],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    return [band, _scatter(x, mean, f"{run.name}: clients, training", colour, "dot")]


def _rejections(records: Sequence[Record]) -> list[go.Scatter]:
    points = [(it["round"], f"client {c}", why) for it in records for c, why in _rejected(it)]
    if not points:
        return []
    x, y, text = zip(*points, strict=True)
    marker = {"symbol": "x", "size": 9, "color": "#d1495b"}
    return [
        go.Scatter(x=[*x], y=[*y], text=[*text], mode="markers", marker=marker, name="rejected")
    ]


def _rejected(record: Record) -> list[tuple[int, str]]:
    return [(int(client), reason) for client, reason in record["rejected"].items()]


def _records(run: Run) -> list[Record]:
    """Records of finished rounds, in order."""
    indices = [int(metrics["round"]) for metrics in run.rounds]
    return [run.records[idx] for idx in indices if idx in run.records]


def _loss(record: Record, client: int) -> float | None:
    stages = record["clients"].get(str(client), {})
    return stages.get("soft_prompt", {}).get("loss")


def _total(run: Run, metric: str) -> float:
    values = [metrics.get(metric, 0.0) for metrics in run.rounds]
    return sum(value for value in values if math.isfinite(value))


def _colours(runs: Sequence[Run]) -> list[str]:
    methods = list(dict.fromkeys(run.method for run in runs))
    return [PALETTE[methods.index(run.method) % len(PALETTE)] for run in runs]
