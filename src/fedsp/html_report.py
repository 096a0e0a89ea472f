"""One HTML page about runs, complete in itself: nothing is fetched when it is opened."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedsp.charts import BY_ROUND, COMPARING, OF_ONE_RUN, Chart, draw_all
from fedsp.comparison import Method, cell, config_differences, group_runs, run_row, shown_columns
from fedsp.display import human_bytes, human_count, human_seconds, plural
from fedsp.figures import html_part, interval_figure, plotly_script
from fedsp.ledger import summarize
from fedsp.run_record import Run
from fedsp.state_files import write_text_atomically

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5c6670; --line: #d9dee3;
  --paper: #ffffff; --card: #f7f8fa; --good: #12805c; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #333a42;
  --paper: #14171a; --card: #1c2024; --good: #4cc38a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-top: 18px;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 2px; }
p, figcaption { color: var(--soft); margin: 0 0 10px; }
figcaption { font-size: 0.86rem; }
.grid { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; padding: 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; min-width: 0; }
.scroll { overflow-x: auto; }
.grid + .scroll, .scroll + .grid { margin-top: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
td.text { white-space: normal; overflow-wrap: anywhere; }
.note { border-left: 3px solid var(--bad); padding: 2px 0 2px 12px; margin: 8px 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
"""
# plotly's texts follow the page: a figure itself knows one colour only
SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--soft").trim();
  for (const plot of document.querySelectorAll(".plotly-graph-div"))
    Plotly.relayout(plot, {"font.color": ink}).then(Plotly.Plots.resize);
}
dark.addEventListener("change", paint);
paint();
"""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page.

    Args:
        runs: At least one; unfinished ones show what they have and say what is missing.
        path: The file; its folder must exist.

    Raises:
        OSError: If it cannot be written.
    """
    write_text_atomically(path, page(runs))


def page(runs: Sequence[Run]) -> str:
    """Return the page.

    Args:
        runs: At least one.
    """
    methods = group_runs(runs)
    runs = [run for method in methods for run in method.runs]
    of_one_run = OF_ONE_RUN if len(runs) == 1 else [BY_ROUND["loss"], *OF_ONE_RUN]
    title = ", ".join(dict.fromkeys(method.name for method in methods))
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{_summary(runs)}</p>",
        *_missing(runs),
        _comparison(methods),
        "<h2>Rounds</h2>",
        _grid(draw_all(COMPARING, runs), ""),
        _differences(methods),
        *(_run_section(run, idx, of_one_run) for idx, run in enumerate(runs)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)} - fedsp</title>
<style>{STYLE}</style>
<script>{plotly_script()}</script>
</head>
<body>
<main>
{"".join(body)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _summary(runs: Sequence[Run]) -> str:
    rounds = sum(len(run.rounds) for run in runs)
    seconds = sum(metrics.get("round/seconds", 0.0) for run in runs for metrics in run.rounds)
    return f"{plural(len(runs), 'run')}, {plural(rounds, 'round')} in {human_seconds(seconds)}"


def _missing(runs: Sequence[Run]) -> list[str]:
    return [
        f'<p class="note">{escape(f"{run.path}: {gap}")}</p>' for run in runs for gap in run.missing
    ]


def _comparison(methods: Sequence[Method]) -> str:
    shown = shown_columns(method.intervals for method in methods)
    rows = [
        [
            escape(method.name),
            str(method.count),
            *(cell(name, method.intervals.get(name)) for name in shown.values()),
        ]
        for method in methods
    ]
    caption = (
        "Mean over seeds ± half of the 95 % Student-t interval, for methods with two seeds or more."
    )
    figures = [_interval_figure(methods, metric) for metric in ("loss", "accuracy", "f1")]
    return (
        f"<h2>Comparison</h2>{_table(['method', 'seeds', *shown], rows, caption)}"
        f'<div class="grid">{"".join(figures)}</div>'
    )


def _interval_figure(methods: Sequence[Method], metric: str) -> str:
    """Only where there is something to compare: two methods or more."""
    column = f"test_{metric}"
    known = [method for method in methods if column in method.intervals]
    if len(known) < 2:
        return ""
    found = [method.intervals[column] for method in known]
    figure = interval_figure(
        [method.name for method in known],
        [it.mean for it in found],
        [it.half_width for it in found],
        f"test {metric}",
    )
    caption = "Chosen round, measured once; bars are 95 % intervals."
    chart = Chart(f"test_{metric}", f"Test {metric}", caption, lambda runs: figure)
    return _figure(chart, figure, chart.name)


def _differences(methods: Sequence[Method]) -> str:
    if len(methods) < 2:
        return ""
    table = config_differences(methods)
    rows = [
        [f"<code>{escape(name)}</code>", *(_value(value) for value in values)]
        for name, values in table.items()
    ]
    if not rows:
        return "<h2>Configuration</h2><p>No options differ, or none are known.</p>"
    caption = "Options in which the methods differ; seeds and folders are left out."
    heads = ["option", *(method.name for method in methods)]
    return f"<h2>Configuration</h2>{_table(heads, rows, caption)}"


def _run_section(run: Run, idx: int, charts: Sequence[Chart]) -> str:
    facts = run_row(run)
    parts = [f"<code>{escape(str(run.path))}</code>", plural(len(run.rounds), "round")]
    if "best_round" in facts:
        parts.append(f"best round {facts['best_round']}")
    if "parameters" in facts:
        parts.append(f"{human_count(facts['parameters'])} parameters tuned")
    return (
        f"<h2>{escape(run.name)}</h2><p>{', '.join(parts)}</p>"
        f"{_grid(draw_all(charts, [run]), f'_{idx}')}{_ledger(run)}"
    )


def _ledger(run: Run) -> str:
    if not run.payloads:
        return ""
    rows = [
        [
            escape(kind.replace("_", " ")),
            f"{sums['payloads']:,}",
            human_bytes(sums["up_bytes"]),
            human_bytes(sums["down_bytes"]),
        ]
        for kind, sums in sorted(summarize(run.payloads).items())
    ]
    caption = "Ledger: every payload that was sent, those of repeated rounds too."
    heads = ["payload", "number", "to the server", "to clients"]
    return f"{_table(heads, rows, caption)}{_check(run)}"


def _check(run: Run) -> str:
    """Say whether the ledger's sums are the metrics', round by round."""
    wrong = sorted({round_idx for round_idx, _, _ in run.ledger_gaps()})
    if wrong:
        rounds = ", ".join(map(str, wrong))
        return f'<p class="bad">The ledger and the metrics differ in round {rounds}.</p>'
    late = ", ".join(map(str, run.late_bytes()))
    told = (
        f" Answers that came late, after round {late} was measured, are beyond them."
        if late
        else ""
    )
    return f'<p class="good">In every finished round the ledger adds up to the metrics.{told}</p>'


def _grid(drawn: Iterable[tuple[Chart, Any]], suffix: str) -> str:
    figures = (_figure(chart, figure, f"{chart.name}{suffix}") for chart, figure in drawn)
    return f'<div class="grid">{"".join(figures)}</div>'


def _figure(chart: Chart, figure: Any, name: str) -> str:
    return (
        f'<figure aria-labelledby="{name}_title"><h3 id="{name}_title">{escape(chart.title)}</h3>'
        f"<figcaption>{escape(chart.caption)}</figcaption>{html_part(figure, name)}</figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table; the cells are HTML, heads and caption are text."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{text}</td>" for text in others)}</tr>'
        for first, *others in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _value(value: Any) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))
