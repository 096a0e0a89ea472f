"""How an audit looks in a terminal; what it found is decided elsewhere."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from fedsp.audit import AuditReport, Flow
from fedsp.display import human_bytes, plural

_MOST_NAMES = 2


def print_audit(report: AuditReport, console: Console) -> None:
    """Print what may travel, what did, and what is worth knowing; findings are the caller's.

    Args:
        report: What `fedsp.audit.audit` returned.
        console: Where to.
    """
    console.print("may travel")
    for kind, tensors in report.declared.items():
        console.print(f"  {_kind(kind)}: {_tensors(tensors)}", soft_wrap=True)
    table = Table("party", "rounds", "way", "payload", "tensors", box=None, pad_edge=False)
    for title in ("number", "bytes"):
        table.add_column(title, justify="right")
    for flows in _runs_of_rounds(report.flows):
        first, last = flows[0], flows[-1]
        rounds = f"{first.round_idx}"
        if last is not first:
            rounds += f"-{last.round_idx}"
        count = sum(flow.payloads for flow in flows)
        num_bytes = sum(flow.num_bytes for flow in flows)
        table.add_row(
            *(first.party, rounds, first.direction, _kind(first.kind), _tensors(first.tensors)),
            *(str(count), human_bytes(num_bytes)),
        )
    for way in ("down", "up"):
        flows = [flow for flow in report.flows if flow.direction == way]
        count, num_bytes = sum(it.payloads for it in flows), sum(it.num_bytes for it in flows)
        table.add_row("total", "", way, "", "", str(count), human_bytes(num_bytes))
    console.print()
    console.print(table)
    console.print()
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    both = "" if report.agreed is None else f", {report.agreed} in both sides' ledgers"
    verdict = "all as declared" if report.passed else plural(len(report.findings), "finding")
    total = sum(flow.payloads for flow in report.flows)
    if report.passed and not total:
        verdict = "nothing has travelled yet"
    console.print(f"audit: {plural(total, 'payload')}{both}; {verdict}", soft_wrap=True)


def _runs_of_rounds(flows: Sequence[Flow]) -> Iterator[list[Flow]]:
    """Join what is the same but for rounds that follow each other; in the order of the parties."""
    runs: dict[tuple[str, str, tuple[str, ...]], list[list[Flow]]] = {}
    parties = list(dict.fromkeys(flow.party for flow in flows))
    ordered = sorted(flows, key=lambda it: (parties.index(it.party), it.round_idx))
    for flow in ordered:
        found = runs.setdefault((flow.party, flow.kind, (flow.direction, *flow.tensors)), [])
        if found and flow.round_idx == found[-1][-1].round_idx + 1:
            found[-1].append(flow)
        else:
            found.append([flow])
    for found in runs.values():
        yield from found


def _kind(kind: str) -> str:
    return kind.replace("_", " ")


def _tensors(tensors: Sequence[str]) -> str:
    # brackets would be markup
    texts = [text.replace("[", r"\[") for text in tensors]
    return ", ".join(texts) if len(texts) <= _MOST_NAMES else f"{len(texts)} tensors"
