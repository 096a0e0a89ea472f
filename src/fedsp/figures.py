"""What fedsp's charts are drawn with and look like; the one module that knows plotly."""

from collections.abc import Mapping, Sequence

try:
    import plotly.graph_objects as go
    from plotly.graph_objects import Figure as Figure
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'Reports and charts need plotly: pip install "fedsp[report]".', name=error.name
    ) from error

Values = Sequence[float | None]
# middle tones, told apart by people with colour-blindness too, and readable on white and on black
PALETTE = ("#2f7ed8", "#d9730d", "#1a9e76", "#c2488f", "#8465d9", "#a8861b", "#d1495b", "#2797a8")
_INK = "#777777"
_GRID = "rgba(128,128,128,0.25)"
_CLEAR = "rgba(0,0,0,0)"
_MOST_TICKS = 12


def make_figure(traces: Sequence[go.Scatter], x: str, y: str = "", height: int = 380) -> Figure:
    """Return a figure in the common style; of traces with one name the legend shows the first.

    Args:
        traces: What is drawn.
        x: Title of the axis; `round` makes it one of whole numbers.
        y: Title of the axis; empty for one of names, which begins on top.
        height: In pixels; the width is the page's.
    """
    figure = go.Figure(list(traces))
    seen: set[str] = set()
    for trace in figure.data:
        if trace.name and trace.showlegend is None:
            trace.update(legendgroup=trace.name, showlegend=trace.name not in seen)
            seen.add(trace.name)
    figure.update_layout(
        template="none",
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        margin={"l": 64, "r": 16, "t": 24, "b": 48},
        height=height,
        hovermode="closest",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"},
    )
    for update, title in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        update(title={"text": title}, gridcolor=_GRID, zeroline=False, automargin=True)
    if x == "round":
        last = max((max(trace.x, default=0) for trace in figure.data), default=0)
        figure.update_xaxes(tickformat="d", dtick=1 if last <= _MOST_TICKS else None)
    if not y:
        figure.update_yaxes(autorange="reversed")
    return figure


def line(x: Values, y: Values, name: str, colour: str, *, dash: str = "solid", tip: str) -> object:
    """Return a line with a marker at every point.

    Args:
        x: Where.
        y: What; None leaves a gap.
        name: In the legend.
        colour: Of line and markers.
        dash: `solid`, `dash` or `dot`.
        tip: What the pointer is told beside the value.
    """
    style = {"color": colour, "dash": dash, "width": 2}
    hover = f"{_text(tip)}<br>%{{x}}: %{{y:.4f}}<extra></extra>"
    return go.Scatter(
        x=[*x], y=[*y], name=_text(name), mode="lines+markers", line=style, hovertemplate=hover
    )


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> object:
    """Return the area between two lines."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def bars(names: Sequence[str], values: Sequence[float], name: str, colour: str) -> object:
    """Return lying bars, one a name."""
    return go.Bar(
        y=[_text(it) for it in names],
        x=[*values],
        name=name,
        orientation="h",
        marker_color=colour,
        hovertemplate=f"%{{y}}<br>{name}: %{{x:.1f}}<extra></extra>",
    )


def heat_map(
    x: Sequence[float | str], y: Sequence[str], z: Sequence[Values], title: str, *, signed: bool
) -> object:
    """Return a field of coloured cells.

    Args:
        x: Names or numbers of the columns.
        y: Names of the rows, from the top.
        z: By row; None leaves a cell empty.
        title: Of the colours' scale.
        signed: The values lie from -1 to 1 and zero is in the middle of the colours.
    """
    limits = {"zmin": -1, "zmax": 1, "colorscale": "RdBu"} if signed else {"colorscale": "Viridis"}
    return go.Heatmap(
        x=[*x],
        y=[*y],
        z=[[*row] for row in z],
        colorbar={"title": {"text": title}, "thickness": 12},
        hovertemplate=f"%{{x}}, %{{y}}: {title} %{{z:.4f}}<extra></extra>",
        xgap=1,
        ygap=1,
        **limits,
    )


def crosses(points: Sequence[tuple[float, str, str]], name: str) -> object:
    """Return marks.

    Args:
        points: Number, row's name and text of each.
        name: In the legend.
    """
    marker = {"symbol": "x", "size": 9, "color": PALETTE[6]}
    return go.Scatter(
        x=[x for x, _, _ in points],
        y=[y for _, y, _ in points],
        text=[_text(text) for _, _, text in points],
        mode="markers",
        marker=marker,
        name=name,
    )


def interval_figure(
    names: Sequence[str], means: Sequence[float], half_widths: Values, axis: str
) -> Figure:
    """Draw means with their intervals, a row a method.

    Args:
        names: Of the methods.
        means: One a method.
        half_widths: None where there is a single value.
        axis: What is drawn.
    """
    points = go.Scatter(
        x=[*means],
        y=[_text(name) for name in names],
        mode="markers",
        marker={"size": 11, "color": [PALETTE[i % len(PALETTE)] for i in range(len(names))]},
        error_x={"type": "data", "array": [w or 0.0 for w in half_widths], "color": _INK},
        showlegend=False,
    )
    return make_figure([points], axis, height=max(240, 110 + 34 * len(names)))


def add_choice(figure: Figure, choices: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Let the reader choose between values of the x-axis, whose title says which are shown.

    Args:
        figure: Changed in place.
        choices: By label, the values of every trace.
    """
    title = figure.layout.xaxis.title.text
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [{"x": [[*it] for it in values]}, {"xaxis.title.text": f"{title}, {label}"}],
        }
        for label, values in choices.items()
    ]
    figure.update_xaxes(title={"text": f"{title}, {next(iter(choices))}"})
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "showactive": False}
    # under the axis: above the figure its legend grows with the number of methods
    place = {"x": 0.5, "xanchor": "center", "y": -0.32, "yanchor": "top", "bgcolor": _GRID}
    figure.update_layout(updatemenus=[{**menu, **place}], margin={"b": 104})


def html_part(figure: Figure, name: str) -> str:
    """Return a figure as a part of a page that holds `plotly_script` once.

    Args:
        figure: Any of this module's.
        name: Its element's id on the page.
    """
    config = {"responsive": True, "displayModeBar": False}
    part: str = to_html(figure, config, full_html=False, include_plotlyjs=False, div_id=name)
    return part


def plotly_script() -> str:
    """Return plotly's JavaScript."""
    script: str = get_plotlyjs()
    return script


def _text(text: str) -> str:
    """Escape what plotly would take for HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
