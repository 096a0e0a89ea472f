"""What a run says after its last round: what it reached and cost, where it lies, what to do next.

Only reads what the trainer holds; when and where it is printed is not known here.
"""

import json
import math
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fedsp.display import (
    Rows,
    human_bytes,
    human_change,
    human_count,
    human_loss,
    human_seconds,
    plural,
    sections,
)
from fedsp.spending import spending_texts

Metrics = Mapping[str, float]


def end_report(trainer: Any, results: Mapping[str, Any], initial: Metrics) -> RenderableType:
    """Return what the run reached, what it cost and where it lies.

    Args:
        trainer: At the end of its run.
        results: What `results.json` holds.
        initial: Metrics of the first prompt on the selection split, empty where unknown.
    """
    parts: list[RenderableType] = [Rule(Text("Result", "bold"), align="left", style="dim")]
    splits = {"selection": selection_results(trainer, initial), "test": results.get("test", {})}
    splits = {name: found for name, found in splits.items() if found.get("zero_shot")}
    if splits:
        parts += [result_table(splits, best_label(trainer)), Text()]
    parts.append(
        sections(
            [
                ("Cost", [*cost_rows(trainer.history.rounds), *privacy_rows(results)]),
                ("Files", file_rows(trainer.folder)),
            ]
        )
    )
    return Group(*parts)


def selection_results(trainer: Any, initial: Metrics) -> dict[str, Metrics]:
    """Return the selection split's metrics of zero-shot, FedSP's best round and the baseline's."""
    history = trainer.history
    found: dict[str, Metrics] = {"zero_shot": _without_prefix(history.zero_shot, "server/val_")}
    if history.best is not None:
        index = history.best.round_idx
        metrics = history.rounds[index] if index >= 0 else initial
        found["best"] = _without_prefix(metrics, "server/val_")
    monitor = history.evaluation.monitor.replace("server/", "baseline/", 1)
    measured = [
        metrics for metrics in history.rounds if math.isfinite(metrics.get(monitor, math.nan))
    ]
    if measured:
        choose = min if history.evaluation.lower_is_better else max
        best = choose(measured, key=lambda metrics: metrics[monitor])
        found["server_only"] = _without_prefix(best, "baseline/val_")
    return found


def best_label(trainer: Any) -> str:
    """Return what the run's chosen prompt is called."""
    best = trainer.history.best
    if best is None:
        return "FedSP, last round"
    return "FedSP, initial" if best.round_idx < 0 else f"FedSP, round {best.round_idx}"


def result_table(splits: Mapping[str, Mapping[str, Metrics]], label: str) -> Table:
    """Return losses and accuracies on every split, and how far they lie from zero-shot.

    Args:
        splits: By split, then by `zero_shot`, `server_only` and `best`.
        label: What `best` is called.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    columns = [
        (split, name)
        for split, found in splits.items()
        for name in ("loss", "accuracy")
        if name in found["zero_shot"]
    ]
    for split, name in columns:
        # the split's name stands over its first column only: both splits fit 80 columns
        table.add_column(f"{split if name == 'loss' else ''}\n{name}", justify="right")
        if name == "loss":
            table.add_column("\nchange", justify="right")
    labels = {"zero_shot": "zero-shot", "server_only": "server only", "best": label}
    for key, title in labels.items():
        if not any(key in found for found in splits.values()):
            continue
        cells: list[str] = []
        for split, name in columns:
            reference = splits[split]["zero_shot"][name] if key != "zero_shot" else None
            cells += _cells(name, splits[split].get(key, {}).get(name), reference)
        table.add_row(title, *cells, style="bold green" if key == "best" else "")
    _add_comparison(table, splits, columns)
    return table


def cost_rows(rounds: list[dict[str, float]]) -> Rows:
    """Return what the rounds took in time and traffic.

    Args:
        rounds: Metrics of every round.
    """
    total = {
        name: sum(metrics.get(name, 0.0) for metrics in rounds)
        for name in ("round/seconds", "comm/up_bytes", "comm/down_bytes", "round/rejected_updates")
    }
    up, down = human_bytes(total["comm/up_bytes"]), human_bytes(total["comm/down_bytes"])
    rows = [
        ("rounds", f"{len(rounds)} in {human_seconds(total['round/seconds'])}"),
        ("traffic", f"{up} up, {down} down with the hand-out"),
    ]
    speeds = [speed_text(rounds, who) for who in ("client", "server", "evaluation")]
    # a line each: a table would break a long one inside a number
    rows += zip(("speed", "", ""), filter(None, speeds), strict=False)
    if total["round/rejected_updates"]:
        rows.append(("rejected", plural(int(total["round/rejected_updates"]), "update")))
    return rows


def privacy_results(trainer: Any) -> dict[str, Any]:
    """Return what noise promises and what it has cost, for `results.json`; empty without noise.

    Args:
        trainer: At the end of its run.
    """
    central, local = trainer.rules.privacy, trainer.client.privacy
    found = {}
    if central is not None:
        found["central"] = central.report()
    if local is not None:
        found["local"] = local.report(trainer.federation.executor.most_answers())
    return {"differential_privacy": found} if found else {}


def privacy_rows(results: Mapping[str, Any]) -> Rows:
    """Return what was spent of either budget.

    Args:
        results: What `results.json` holds.
    """
    texts = spending_texts(results.get("differential_privacy", {}))
    return [("privacy", text) for text in texts.values()]


def spent_text(rounds_done: int) -> str:
    """Return why a run ends before its last round where the server's budget is spent."""
    return (
        f"The run ends after {plural(rounds_done, 'round')}: another one would cost more than "
        "`trainer.privacy.max_epsilon`."
    )


def speed_text(rounds: list[dict[str, float]], who: str) -> str:
    """Return the median throughput of the rounds, such as `client 1.2 k tokens/s`; empty if none.

    Args:
        rounds: Metrics of every round.
        who: `client`, `server` or `evaluation`.
    """
    rates = [metrics[name] for metrics in rounds if (name := f"{who}/tokens_per_second") in metrics]
    return f"{who} {human_count(statistics.median(rates))} tokens/s" if rates else ""


def file_rows(folder: Any) -> Rows:
    """Return where the run's files are, those that exist.

    Args:
        folder: The run's `RunFolder`.
    """
    places = {
        "checkpoints": folder.checkpoints,
        "adapter" if _is_peft(folder) else "weights": folder.adapter,
        "ledger": folder.ledger,
        "logs": folder.metrics,
        "tensorboard": folder.path / "tensorboard",
        "wandb": folder.path / "wandb",
        "results": folder.results,
        "config": folder.config,
    }
    rows = [
        (name, f"{path}/" if path.is_dir() else str(path))
        for name, path in places.items()
        if path.exists()
    ]
    sizes = [path.stat().st_size for path in folder.clients.rglob("*.safetensors")]
    if sizes:
        rows.append(("client states", f"{folder.clients}/, {human_bytes(sum(sizes))}"))
    return rows


def next_commands(folder: Any) -> Rows:
    """Return what one would do with a finished run: a purpose and a command each.

    Args:
        folder: The run's `RunFolder`.
    """
    commands = []
    if folder.config.exists():
        config = shlex.quote(str(folder.config))
        results = json.loads(folder.results.read_text()) if folder.results.exists() else {}
        tested = "test" in results
        measure, rows = ("test", "") if tested else ("validate", " --input FILE")
        commands.append(("measure the best prompt again", f"fedsp {measure} --config {config}"))
        commands.append(("let it write", f"fedsp predict --config {config}{rows}"))
        commands.append(("talk to it", f"fedsp chat {shlex.quote(str(folder.path))}"))
    if _is_peft(folder):
        call = f"peft.PeftModel.from_pretrained(model, {str(folder.adapter)!r})"
        commands.append(("use it in Python", call))
    return commands


def _is_peft(folder: Any) -> bool:
    """Whether the export is an adapter that peft reads, and not the tuned weights alone."""
    return bool((folder.adapter / "adapter_config.json").exists())


def resume_command(folder: Any) -> str:
    """Return how to go on with a run that stopped.

    Args:
        folder: The run's `RunFolder`.
    """
    if folder.started_by:
        return str(folder.started_by)
    if not folder.config.exists():
        return "trainer.fit(..., ckpt_path='last')"
    return f"fedsp fit --config {shlex.quote(str(folder.config))} --ckpt_path last"


def _without_prefix(metrics: Metrics, prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix)
    }


def _cells(name: str, value: float | None, reference: float | None) -> list[str]:
    if name == "accuracy":
        return ["" if value is None else f"{100 * value:.1f} %"]
    if value is None:
        return ["", ""]
    return [human_loss(value), "" if reference is None else human_change(value, reference)]


def _add_comparison(
    table: Table, splits: Mapping[str, Mapping[str, Metrics]], columns: list[tuple[str, str]]
) -> None:
    """Add FedSP against the server alone, where both were measured: what the clients are worth."""
    cells: list[str] = []
    for split, name in columns:
        best, alone = (splits[split].get(key, {}).get(name) for key in ("best", "server_only"))
        if best is None or alone is None:
            cells += [""] if name == "accuracy" else ["", ""]
        elif name == "accuracy":
            cells.append(f"{100 * (best - alone):+.1f}")
        else:
            cells += ["", human_change(best, alone)]
    if any(cells):
        table.add_row("vs. server only", *cells)
