"""What a run says before its first round: what it is made of, what it trains and will send.

Only reads what the trainer holds; when and where it is printed is not known here.
"""

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from torch import Tensor
from torch.nn import Parameter

from fedsp.display import (
    Rows,
    human_bytes,
    human_count,
    human_ratio,
    human_share,
    plural,
    sections,
)
from fedsp.messages import ClientUpdate, ServerBroadcast, encode
from fedsp.spending import budget_rows, plan_spending, spending_texts

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def start_summary(trainer: Any) -> RenderableType:
    """Return what the run is made of and what it will cost.

    Args:
        trainer: With its models loaded and its federation ready.
    """
    content = [
        ("Models", model_rows(trainer)),
        ("Trained", trained_rows(trainer)),
        ("Auxiliary", quality_rows(trainer.preparation)),
        ("Data", data_rows(trainer.data.describe())),
        ("Traffic", traffic_rows(trainer)),
        *([("Privacy", rows)] if (rows := privacy_rows(trainer)) else []),
        ("Run", run_rows(trainer)),
    ]
    title = Rule(Text(f"FedSP  {trainer.folder.path}", "bold"), align="left", style="dim")
    return Group(title, sections(content))


def model_rows(trainer: Any) -> Rows:
    """Return the sizes of global model, auxiliary model and prompt."""
    backbone = trainer.server.require_model()[0]
    auxiliary = trainer.preparation.auxiliary.summary()
    own = trainer.server.auxiliary_recipe.train_embeddings
    size = num_parameters(backbone.model.parameters())
    spec = trainer.server.backbone_spec
    name = spec.name_or_path if spec.config is None else f"random {spec.config['model_type']}"
    return [
        ("global", f"{human_count(size)} parameters, frozen, {_dtype(backbone.dtype)}: {name}"),
        (
            "auxiliary",
            f"{human_count(auxiliary['total'])} parameters, "
            f"{human_share(auxiliary['share_of_global'])} of the global model",
        ),
        (
            "",
            f"{plural(auxiliary['num_layers'], 'layer')} deep, embeddings and head "
            f"{'of its own' if own else 'shared and frozen'}",
        ),
        *_tuned_rows(trainer, size),
    ]


def _tuned_rows(trainer: Any, size: int) -> Rows:
    """What is tuned and travels: a soft prompt, weights, or both."""
    prompt = trainer.server.require_model()[1]
    rows = []
    if trainer.server.tunes_prompt:
        count = prompt.prefix().numel()
        tokens = plural(prompt.num_virtual_tokens, "virtual token")
        text = f"{human_count(count)} parameters, {human_share(count / size)}: {tokens} a layer"
        rows.append(("prompt", text))
    if trainer.server.tuned_weights is not None:
        count = sum(tensor.numel() for tensor in trainer.server.weights().values())
        kind = type(trainer.server.tuned_weights).__name__
        text = f"{human_count(count)} parameters, {human_share(count / size)}: {kind}"
        rows.append(("weights", text))
    return rows


def trained_rows(trainer: Any) -> Rows:
    """Return what either side trains in a round, as a share of what it runs."""
    backbone = trainer.server.require_model()[0]
    auxiliary, client_prompt = trainer.client.require_model()
    frozen = num_parameters(backbone.model.parameters())
    own = trainer.server.tuned_parameters()
    on_server = _trained(own, frozen + num_parameters(own), trainer.server.training_stage.steps)
    total = auxiliary.num_parameters() + num_parameters(client_prompt.parameters())
    on_client = {
        stage: _trained(
            list(trainer.client.stage_parameters(stage).values()),
            total,
            trainer.client.stages[stage].steps,
        )
        for stage in ("auxiliary", "soft_prompt")
    }
    server = trainer.server
    tuned = [("prompt", server.tunes_prompt), ("weights", server.tuned_weights is not None)]
    label = " and ".join(name for name, is_tuned in tuned if is_tuned) or "prompt"
    return [
        ("client", f"auxiliary: {on_client['auxiliary']}"),
        ("", f"{label}: {on_client['soft_prompt']}"),
        ("server", f"{label}: {on_server}"),
    ]


def quality_rows(preparation: Any) -> Rows:
    """Return how well the auxiliary model does beside the global one, before and after.

    Args:
        preparation: The trainer's `Preparation`.
    """
    before, after = preparation.before, preparation.after
    if after is None:
        return [("quality", "not measured: `data.server` and `data.public` are null")]
    distilled = before != after
    names = {
        "LM loss": "lm_loss",
        "hidden error": "hidden_error",
        "KL to global": "divergence",
        "KL with prompt": "prompted_divergence",
        "alignment": "alignment",
    }
    rows = []
    for label, name in names.items():
        first, last = getattr(before, name, None), getattr(after, name)
        if last is None:
            continue
        text = f"{last:.4f}" if first is None or not distilled else f"{first:.4f} -> {last:.4f}"
        rows.append((label, text))
    rows[0] = ("LM loss", f"{rows[0][1]}   (global model: {after.global_lm_loss:.4f})")
    how = "no" if not distilled else "found in the cache" if preparation.cached else "just now"
    return [*rows, ("distilled", how)]


def data_rows(counts: dict[str, Any]) -> Rows:
    """Return how many examples every party has.

    Args:
        counts: What `FederatedDataModule.describe` returned.
    """
    sizes = list(counts["clients"].values())
    low, high = min(sizes, default=0), max(sizes, default=0)
    spread = f" ({low if low == high else f'{low} to {high}'} each)" if len(sizes) > 1 else ""
    clients = f"{plural(len(sizes), 'client')}, {plural(sum(sizes), 'example')}{spread}"
    splits = ("server", "public", "selection", "test")
    numbers = [f"{name} {human_count(counts[name]) if counts[name] else '-'}" for name in splits]
    rows = [
        ("clients", clients if sizes else "with the parties of the federation"),
        ("splits", ", ".join(numbers)),
    ]
    for key, name in (("num_cut", "cut to fit"), ("num_left_out", "left out")):
        total = sum(counts[key].values())
        if total:
            rows.append((name, plural(total, "example")))
    return rows


def traffic_rows(trainer: Any) -> Rows:
    """Return what a round and the hand-out send, beside FedAvg of the whole model."""
    up, down = message_bytes(trainer)
    backbone = trainer.server.require_model()[0]
    fedavg = 2 * num_bytes(backbone.model.parameters())
    auxiliary = trainer.preparation.auxiliary.backbone
    maps = {} if auxiliary.vocabulary is None else auxiliary.vocabulary.state_dict()
    handout = num_bytes([*auxiliary.model.parameters(), *maps.values()])
    size = len(trainer.cohort(0))
    return [
        (
            "a round",
            f"{human_bytes(size * (up + down))} for {plural(size, 'client')}: "
            f"{human_bytes(down)} down + {human_bytes(up)} up each",
        ),
        (
            "FedAvg",
            f"{human_bytes(size * fedavg)} with the full model, "
            f"{human_ratio(fedavg / (up + down))} as much",
        ),
        ("hand-out", f"{human_bytes(handout)} once a client: the auxiliary model"),
    ]


def privacy_rows(trainer: Any) -> Rows:
    """Return what noise hides a client, and what the whole run may cost; empty without noise."""
    rows: Rows = []
    central, local = trainer.rules.privacy, trainer.client.privacy
    cohorts, spent = plan_spending(trainer, trainer.client)
    costs = spending_texts(spent)
    if central is not None:
        noise = f"noise {central.noise_multiplier:g} x clipping norm {central.clipping.norm:g}"
        rows.append(("server", f"{noise} on the sum of {central.mean.cohort_size} changes"))
        rows.append(("", f"{costs['central']}, amplification: {central.amplification}"))
    if local is not None:
        noise = f"noise {local.noise_multiplier:g} x clipping norm {local.clip_norm:g}"
        rows.append(("client", f"{noise} on each change"))
        rows.append(("", costs["local"]))
    return [*rows, *budget_rows(len(cohorts), trainer.num_rounds)]


def run_rows(trainer: Any) -> Rows:
    """Return how long the run is and what picks its best round."""
    evaluation = trainer.history.evaluation
    direction = "lowest" if evaluation.lower_is_better else "highest"
    rounds = f"{trainer.num_rounds}, the best has the {direction} {evaluation.monitor}"
    if evaluation.every_n_rounds > 1:
        rounds += f", measured every {evaluation.every_n_rounds}"
    if evaluation.patience is not None:
        rounds += f", patience {evaluation.patience}"
    wire_dtype = trainer.rules.communication.wire_dtype
    numbers = f"{trainer.precision}, prompts travel as {wire_dtype}, seed {trainer.seed}"
    fabric = trainer.fabric
    processes = f"{fabric.world_size} processes, " if fabric.world_size > 1 else ""
    return [("rounds", rounds), ("device", f"{processes}{fabric.device}, {numbers}")]


def message_bytes(trainer: Any) -> tuple[int, int]:
    """Return the bytes of an update and of a broadcast, as encoded."""
    payload = trainer.federation.broadcast
    wire_dtype = trainer.rules.communication.wire_dtype
    update = encode(ClientUpdate(0, 0, payload, 1), wire_dtype)
    return len(update), len(encode(ServerBroadcast(0, payload), wire_dtype))


def num_parameters(parameters: Iterable[Parameter]) -> int:
    """Return the number of entries of all parameters."""
    return sum(parameter.numel() for parameter in parameters)


def num_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the size of all parameters in their own number formats."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _trained(parameters: list[Parameter], total: int, steps: int) -> str:
    if not steps:
        return "not trained (0 steps)"
    count = num_parameters(parameters)
    share = human_share(count / total) if total else "-"
    of_all = f"{human_count(count)} of {human_count(total)} ({share})"
    return f"{of_all}, {plural(steps, 'step')} a round"


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
