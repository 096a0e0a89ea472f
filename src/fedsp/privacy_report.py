"""How much of the global model a client has in its hands, measured: the model-privacy report.

What the figures mean is said in docs/privacy.md. Data privacy is another matter and not here.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsp.callbacks import FederatedCallback
from fedsp.display import human_loss, human_share, plural
from fedsp.evaluation import measure_split, model_subject
from fedsp.preparation import handed_out
from fedsp.soft_prompt import pool_layers
from fedsp.state_files import write_text_atomically

_TITLES = {
    "global_prompt": "global model + prompt",
    "global": "global model alone",
    "auxiliary_prompt": "auxiliary model + prompt",
    "auxiliary": "auxiliary model alone",
}


@dataclass(frozen=True)
class Held:
    """Which of the global model's numbers a client can read in what it was handed.

    Args:
        share_of_global: Parameters of the auxiliary model over those of the global one.
        verbatim: Names of the global model's tensors that the client has exactly.
        verbatim_share: Their share of the global model's parameters.
        changed: By name, other tensors of the auxiliary model: the global tensor of that shape that
            comes nearest, and the distance between the two as a share of its norm, below 1.
        changed_share: Parameters in `changed` over those of the global model.
        unlike: Names of the rest: no global tensor has their shape, as with the factors of a
            projection, or none is nearer than its own norm.
        unlike_share: Parameters in `unlike` over those of the global model.
    """

    share_of_global: float
    verbatim: list[str]
    verbatim_share: float
    changed: dict[str, tuple[str, float]]
    changed_share: float
    unlike: list[str]
    unlike_share: float


def compare_tensors(
    handout: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    kept_rows: Mapping[str, Tensor] | None = None,
) -> Held:
    """Find the global model's tensors among those that a client was handed.

    A tensor that rounds to the global model's number format as one of its tensors counts as that.

    Args:
        handout: The client's tensors by name, each once.
        model: The global model's by name, each once.
        kept_rows: By name, the rows of a table that a client could have been handed; null: tables
            are compared whole.
    """
    total = sum(tensor.numel() for tensor in model.values())
    model = {**model, **{name: model[name][rows] for name, rows in (kept_rows or {}).items()}}
    dtype = next(iter(model.values())).dtype
    own = {name: _digest(tensor.to(dtype)) for name, tensor in handout.items()}
    theirs = {name: _digest(tensor) for name, tensor in model.items()}
    both = set(own.values()) & set(theirs.values())
    verbatim = [name for name, digest in theirs.items() if digest in both]
    rest = {name: tensor for name, tensor in handout.items() if own[name] not in both}
    nearest = {name: _nearest(tensor, model) for name, tensor in rest.items()}
    changed = {name: found for name, found in nearest.items() if found is not None}
    unlike = [name for name in rest if name not in changed]

    def share(tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
        return sum(tensors[name].numel() for name in names) / total

    return Held(
        share_of_global=share(handout, handout),
        verbatim=verbatim,
        verbatim_share=share(model, verbatim),
        changed=changed,
        changed_share=share(handout, changed),
        unlike=unlike,
        unlike_share=share(handout, unlike),
    )


def _digest(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), hashlib.sha256(data.tobytes()).digest()


def _nearest(tensor: Tensor, model: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """Return the name of the nearest tensor of the same shape, and how far it is.

    None where zeros would be as near as any: a distance says nothing then.
    """
    distances: list[tuple[float, str]] = []
    for name, candidate in model.items():
        if candidate.shape == tensor.shape:
            other = candidate.detach().cpu().float()
            distance = (tensor.float() - other).norm() / other.norm().clamp(min=1e-30)
            distances.append((float(distance), name))
    distance, name = min(distances, default=(1.0, ""))
    return (name, distance) if distance < 1 else None


def lead(name: str, value: float, guessing: float) -> float:
    """Return by how much a metric is better than a guess; negative where it is worse.

    Args:
        name: `loss`, which is better the lower, or `accuracy`.
        value: The metric.
        guessing: The same metric of a model that knows nothing.
    """
    return guessing - value if name == "loss" else value - guessing


def leaked_share(client: float, server: float) -> float | None:
    """Return how much of the server's lead over guessing the client has too.

    Args:
        client: Lead of what the client holds.
        server: Lead of what the server holds.

    Returns:
        0: no better than guessing, 1: as good as the server; below or above where it is worse or
        better. None where the server itself is not better than guessing.
    """
    return client / server if server > 0 else None


def _shares(
    report: Mapping[str, Any], side: str, guessing: Mapping[str, float]
) -> dict[str, float | None]:
    """Return the leaked share of every metric that can be guessed, for one of the four sides."""
    metrics, server = report["metrics"][side], report["metrics"]["global_prompt"]
    if report["known_tokens_only"] and side.startswith("auxiliary"):
        return dict.fromkeys(report["guessing"])
    return {
        name: leaked_share(
            lead(name, metrics[name], guessing[name]), lead(name, server[name], guessing[name])
        )
        for name in report["guessing"]
    }


def measure_privacy(trainer: Any) -> dict[str, Any]:
    """Measure on the test split what the server holds, what a client holds, and what is in both.

    Args:
        trainer: A `FederatedTrainer` whose server holds the prompt to report on.

    Returns:
        Plain data; docs/privacy.md says what each figure means.

    Raises:
        ValueError: If the run folder holds no auxiliary model, there is no test split, or
            something else than a soft prompt on the global model was tuned.
    """
    backbone, prompt = trainer.server.require_model()
    if trainer.server.tuned_weights is not None or trainer.server.deploy_auxiliary:
        raise ValueError(
            "The model-privacy report compares a soft prompt on the global model with the same on "
            "the clients' model; `model.tuned_weights` and `model.deploy_auxiliary` tune another."
        )
    made = handed_out(trainer.fabric, trainer.server, trainer.data, trainer.folder.auxiliary)
    auxiliary, prefix = made.auxiliary, prompt.prefix().detach()
    sides = {
        "global_prompt": (backbone, prefix),
        "global": (backbone, None),
        "auxiliary_prompt": (auxiliary.backbone, pool_layers(prefix, auxiliary.slots)),
        "auxiliary": (auxiliary.backbone, None),
    }
    metrics = {
        # nothing is written: an auxiliary model of two number formats cannot
        name: measure_split(trainer, model_subject(model, side_prefix), "test")
        for name, (model, side_prefix) in sides.items()
    }
    guessing = {"loss": math.log(backbone.vocab_size)}
    if "accuracy" in metrics["global"]:
        guessing["accuracy"] = trainer.data.chance("test")
    vocabulary = auxiliary.backbone.vocabulary
    # which tokens a trimmed vocabulary keeps is handed out too, but is no parameter
    maps = {} if vocabulary is None else vocabulary.state_dict(prefix="vocabulary.")
    handout = {name: it for name, it in auxiliary.handout().items() if name not in maps}
    tensors = _tensors(backbone.model, handout)
    tables = {} if vocabulary is None else _tables(tensors, handout, vocabulary.kept.long())
    held = compare_tensors(handout, tensors, tables)
    report: dict[str, Any] = {"split": "test", "metrics": metrics, "guessing": guessing}
    # a trimmed vocabulary gives other tokens no likelihood at all: its figures leave them out
    report["known_tokens_only"] = vocabulary is not None
    report["leaked"] = _shares(report, "auxiliary_prompt", guessing)
    report["gap_closed"] = _shares(report, "auxiliary_prompt", metrics["auxiliary"])
    report["prompt_gain"] = {
        side: metrics[side]["loss"] - metrics[f"{side}_prompt"]["loss"]
        for side in ("global", "auxiliary")
    }
    report["quality"] = None if made.after is None else asdict(made.after)
    report["held"] = asdict(held)
    return report


def _tensors(model: torch.nn.Module, handout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the global model's parameters, and what else of its state is handed out."""
    state = model.state_dict(keep_vars=True)
    buffers = {
        name: buffer for name, buffer in model.named_buffers() if name in state and name in handout
    }
    return {**dict(model.named_parameters()), **buffers}


def _tables(
    model: Mapping[str, Tensor], handout: Mapping[str, Tensor], kept: Tensor
) -> dict[str, Tensor]:
    """Return the rows of each table of tokens of which a client holds a trimmed one."""
    trimmed = {
        name: (len(kept), *tensor.shape[1:])
        for name, tensor in model.items()
        if name in handout and tensor.shape != handout[name].shape
    }
    return {name: kept for name, shape in trimmed.items() if tuple(handout[name].shape) == shape}


def report_privacy(trainer: Any) -> dict[str, Any]:
    """Measure, write `privacy.json` into the run folder, and print a summary.

    Args:
        trainer: As `measure_privacy` takes it.

    Returns:
        What was measured.

    Raises:
        ValueError: As `measure_privacy`.
    """
    report = measure_privacy(trainer)
    text = json.dumps(report, indent=2) + "\n"
    trainer.write(write_text_atomically, trainer.folder.privacy, text)
    trainer.fabric.print(summary(report))
    return report


def summary(report: Mapping[str, Any]) -> str:
    """Return the report as people read it.

    Args:
        report: What `measure_privacy` returned.
    """
    guessing = report["guessing"]
    table = Table("model privacy, test split", box=None, pad_edge=False, header_style="bold")
    for name in guessing:
        table.add_column(name, justify="right")
        table.add_column("worth", justify="right")
    for side, title in _TITLES.items():
        shares = _shares(report, side, guessing)
        cells = []
        for name, share in shares.items():
            worth = "-" if share is None else human_share(share)
            cells += [_figure(name, report["metrics"][side][name]), worth]
        table.add_row(title, *cells)
    guessed = [cell for name, value in guessing.items() for cell in (_figure(name, value), "0 %")]
    table.add_row("guessing", *guessed)
    out = StringIO()
    console = Console(file=out, width=100, color_system=None)
    console.print(table)
    console.print()
    if report["known_tokens_only"]:
        console.print(
            "the auxiliary model's figures leave out tokens that its vocabulary lacks, so"
        )
        console.print("that they cannot be compared with the global model's", highlight=False)
    for line in _held_lines(report["held"]):
        console.print(line, highlight=False)
    return out.getvalue().rstrip()


def _figure(name: str, value: float) -> str:
    return human_loss(value) if name == "loss" else human_share(value)


def _held_lines(held: Mapping[str, Any]) -> list[str]:
    distances = [distance for _, distance in held["changed"].values()]
    lines = [
        f"a client holds {human_share(held['share_of_global'])} as many parameters as the global "
        "model:",
        f"  {human_share(held['verbatim_share'])} are the global model's own, in "
        f"{plural(len(held['verbatim']), 'tensor')}: {_names(held['verbatim'])}",
    ]
    if distances:
        lines.append(
            f"  {human_share(held['changed_share'])} are changed, in "
            f"{plural(len(distances), 'tensor')}, by {human_share(min(distances))} to "
            f"{human_share(max(distances))} of the norm of the nearest tensor"
        )
    if held["unlike"]:
        lines.append(
            f"  {human_share(held['unlike_share'])} are like no tensor of the global model, in "
            f"{plural(len(held['unlike']), 'tensor')}: {_names(held['unlike'])}"
        )
    return lines


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


class ModelPrivacy(FederatedCallback):
    """Ends a run with the model-privacy report of its best prompt: `privacy.json`."""

    def on_fit_start(self, trainer: Any) -> None:
        """Make sure that there is something to measure on.

        Raises:
            ValueError: If there is no test split.
        """
        if not trainer.data.num_examples("test"):
            raise ValueError(
                "`trainer.callbacks`: ModelPrivacy measures on the test split, but `data.test` is "
                "null. Give it data or leave the callback out."
            )
        trainer.server.check_whole("`trainer.callbacks`: ModelPrivacy")

    def on_test_end(self, trainer: Any, results: dict[str, Any]) -> None:
        """Report, and add the leaked shares to the run's results.

        Args:
            trainer: At the end of its run.
            results: What will be written to `results.json`; gets `privacy`.
        """
        report = report_privacy(trainer)
        results["privacy"] = {
            name: report[name] for name in ("leaked", "gap_closed", "prompt_gain")
        }
