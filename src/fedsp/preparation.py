"""Before the first round, once: the auxiliary model is derived, taught, measured and kept."""

import warnings
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.auxiliary import Auxiliary
from fedsp.auxiliary_cache import (
    artefact_path,
    equalize,
    find_state,
    load_artefact,
    making_key,
    store_artefact,
)
from fedsp.data import FederatedDataModule
from fedsp.distillation import Distillation
from fedsp.gathering import gathered
from fedsp.phases import Optimization, distill, train_server
from fedsp.prompt_pool import PromptPool
from fedsp.quality import (
    QUALITY_BATCHES,
    Quality,
    measure_quality,
)
from fedsp.ranks import Ranks
from fedsp.server import ServerModule
from fedsp.state_files import load_state, save_state

SAVE_EVERY_N_STEPS = 250


@dataclass(frozen=True)
class Preparation:
    """The auxiliary model and how it came about.

    Args:
        auxiliary: Ready for the clients.
        before: Quality before the distillation; None without data to measure it on, or where the
            cache had the distilled model.
        after: Quality after it; the same as `before` where there was none.
        cached: The distilled weights were found and not made.
    """

    auxiliary: Auxiliary
    before: Quality | None
    after: Quality | None
    cached: bool


def check_public_data(data: FederatedDataModule, spec: Distillation | None) -> None:
    """Make sure that the distillation has data, and say whether clients' examples are in it.

    Raises:
        ValueError: If public data is wanted and missing, or `strict_public_data` is set and
            examples overlap.
    """
    if spec is None or spec.stage.steps == 0:
        return
    if not data.num_examples("public"):
        raise ValueError(
            "`model.initial_distillation` needs public data, but `data.public` is null. Name a "
            "source, a fraction or a number of rows, or set `model.initial_distillation` to null."
        )
    overlap = data.public_overlap()
    if overlap == 0:
        return
    message = (
        f"`data.public`: {overlap} public examples occur in the clients' data too, so what is "
        "called public is partly theirs."
    )
    if spec.strict_public_data:
        raise ValueError(f"{message} `model.initial_distillation.strict_public_data` forbids that.")
    warnings.warn(f"{message} `strict_public_data: true` makes this an error.", stacklevel=2)


def prepare_auxiliary(
    fabric: Fabric, server: ServerModule, data: FederatedDataModule, *, kept: Path, trainer: Any
) -> Preparation:
    """Derive the auxiliary model and teach it, or find it where an earlier start left it.

    Args:
        fabric: Where to run.
        server: With its model loaded.
        data: Set up.
        kept: The run's own file of the auxiliary model.
        trainer: Its callbacks are told, and its seed and precision are used.

    Returns:
        The auxiliary model on the server's device.
    """
    ranks = Ranks(fabric)
    auxiliary = derive_auxiliary(fabric, server, data)
    key = making_key(server, auxiliary, data, trainer)
    state = find_state(ranks, kept, key)
    if state is not None:
        auxiliary.load(state["weights"])
        before, after = _qualities(state)
        _warn_if_poor(after)
        return Preparation(auxiliary, before, after, cached=True)
    spec = server.initial_distillation
    teaches = spec is not None and spec.stage.steps > 0
    artefact = artefact_path(spec, key) if spec is not None and teaches else None
    cached = artefact is not None and load_artefact(ranks, artefact, auxiliary)
    unfinished = kept.with_suffix(".unfinished")
    before = None
    if not cached:
        _calibrate(fabric, server, auxiliary, data)
        equalize(ranks, auxiliary)
        before = _measure(fabric, server, auxiliary, data)
        if teaches:
            _teach(fabric, server, auxiliary, data, trainer, unfinished=unfinished, key=key)
        if artefact is not None:
            ranks.on_first(store_artefact, artefact, auxiliary)
    # measured, not cached with the weights: the server's data may be another run's
    after = _measure(fabric, server, auxiliary, data) if teaches else before
    qualities = [q and asdict(q) for q in (before, after)]
    state = {"key": key, "weights": auxiliary.state(), "quality": qualities}
    ranks.on_first(save_state, kept, state)
    ranks.on_first(unfinished.unlink, missing_ok=True)
    _warn_if_poor(after)
    return Preparation(auxiliary, before, after, cached)


def handed_out(
    fabric: Fabric, server: ServerModule, data: FederatedDataModule, kept: Path
) -> Preparation:
    """Rebuild the auxiliary model that a run gave its clients.

    Args:
        fabric: Where it will run.
        server: With its model loaded; of the settings that the run had.
        data: Set up; what a trimmed vocabulary was counted on.
        kept: The run's own file of the auxiliary model.

    Raises:
        ValueError: If there is no such file, or it belongs to another `model.auxiliary`.
    """
    check_handed_out(kept)
    auxiliary = derive_auxiliary(fabric, server, data)
    state: Any = load_state(kept)
    auxiliary.load(state["weights"])
    return Preparation(auxiliary, *_qualities(state), cached=True)


def derive_auxiliary(fabric: Fabric, server: ServerModule, data: FederatedDataModule) -> Auxiliary:
    """Build the auxiliary model as it is before any teaching: frozen, on its device."""
    backbone = server.require_model()[0]
    counts = data.token_counts(backbone.vocab_size)
    recipe = server.auxiliary_recipe
    source = gathered(backbone, recipe.sources(backbone.kv_shape.num_layers))
    auxiliary = recipe.build(source, counts).requires_grad_(False)
    fabric.to_device(auxiliary)
    return auxiliary


def _calibrate(
    fabric: Fabric, server: ServerModule, auxiliary: Auxiliary, data: FederatedDataModule
) -> None:
    """Let the recipe fit its model to the global one on public data, behind the initial prompt."""
    recipe = server.auxiliary_recipe
    if not recipe.calibration_batches or not data.num_examples("public"):
        return
    backbone, prompt = server.require_model()
    loader = data.public_dataloader(start_step=0, num_steps=recipe.calibration_batches)
    with torch.no_grad(), fabric.autocast():
        batches = (fabric.to_device(batch) for batch in loader)
        recipe.calibrate(auxiliary, backbone, batches, prompt.prefix())


def check_handed_out(kept: Path) -> None:
    """Refuse a run folder without the auxiliary model.

    Raises:
        ValueError: If there is none.
    """
    if not kept.exists():
        raise ValueError(
            "`privacy` and `model.deploy_auxiliary` need the auxiliary model that a run handed "
            f"out, and there is no {kept}. `trainer.run_dir` must be the folder of a run that "
            "`fedsp fit` has started."
        )


def _teach(
    fabric: Fabric,
    server: ServerModule,
    auxiliary: Auxiliary,
    data: FederatedDataModule,
    trainer: Any,
    *,
    unfinished: Path,
    key: str,
) -> None:
    """Distil in parts, each safe on disk before the next, so that a killed run goes on there."""
    spec = server.initial_distillation
    assert spec is not None
    stage = spec.stage
    prompts: list[Tensor] = []
    if spec.prompts is not None:
        prompts = fill_pool(fabric, server, data, spec.prompts, trainer.seed)
    trainer.call("on_distillation_start", stage.steps)
    accumulate = stage.accumulate_grad_batches
    optimization = Optimization.of(stage, auxiliary.trainable().values(), stage.steps)
    ranks = Ranks(fabric)
    state = find_state(ranks, unfinished, key)
    if state is not None:
        auxiliary.load(state["weights"])
        optimization.load_state_dict(state["optimization"])
    while (done := optimization.batches // accumulate) < stage.steps:
        steps = min(SAVE_EVERY_N_STEPS, stage.steps - done)
        batches = data.public_dataloader(
            start_step=optimization.batches, num_steps=steps * accumulate
        )

        def on_step(step: int, loss: Tensor, done: int = done) -> None:
            trainer.call("on_distillation_step", done + step, loss)

        distill(
            fabric,
            server,
            auxiliary,
            optimization,
            batches,
            seed=trainer.seed,
            prompts=prompts,
            on_step=on_step,
        )
        if done + steps < stage.steps:
            state = {"weights": auxiliary.state(), "optimization": optimization.state_dict()}
            ranks.on_first(save_state, unfinished, {"key": key, **state})


def fill_pool(
    fabric: Fabric, server: ServerModule, data: FederatedDataModule, spec: PromptPool, seed: int
) -> list[Tensor]:
    """Make the prompts of the distillation; the server's own prompt stays as it is.

    Args:
        fabric: Where to run.
        server: With its model loaded and its prompt initialised.
        data: Gives the server's batches and the public texts.
        spec: How many of each.
        seed: The run's seed.

    Returns:
        The initial prompt, then one a round of the server's training, then one a text; each
        [L, 2, K, P, D] on the server's device.
    """
    backbone, prompt = server.require_model()
    pool = [prompt.prefix()]
    stage = server.training_stage
    if data.num_examples("server") and stage.steps:
        twin = server.twin()
        fabric.to_device(twin)
        own = twin.require_model()[1]
        optimization = Optimization.of(stage, own.parameters(), stage.steps * spec.rounds)
        for round_idx in range(spec.rounds):
            batches = data.server_dataloader(
                start_step=optimization.batches, num_steps=stage.batches
            )
            train_server(fabric, twin, optimization, batches, seed=seed, round_idx=round_idx)
            pool.append(own.prefix())
    for batch in islice(data.public_dataloader(start_step=0, num_steps=spec.texts), spec.texts):
        ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
        places = torch.arange(prompt.num_virtual_tokens) % len(ids)
        pool.append(backbone.keys_values(ids[places][None].to(prompt.prefix().device)))
    return pool


def _measure(
    fabric: Fabric, server: ServerModule, auxiliary: Auxiliary, data: FederatedDataModule
) -> Quality | None:
    """On the server's own data, which the distillation does not see; else on public data."""
    if data.num_examples("server"):
        loader = data.server_dataloader(start_step=0, num_steps=QUALITY_BATCHES)
    elif data.num_examples("public"):
        loader = data.public_dataloader(start_step=0, num_steps=QUALITY_BATCHES)
    else:
        return None
    batches = (fabric.to_device(batch) for batch in islice(loader, QUALITY_BATCHES))
    backbone, prompt = server.require_model()
    with fabric.autocast():
        return measure_quality(
            backbone, auxiliary.backbone, batches, prompt.prefix(), auxiliary.slots
        )


def _warn_if_poor(quality: Quality | None) -> None:
    if quality is not None and quality.shortcomings:
        warnings.warn(
            "The auxiliary model is too poor to be useful: prompts tuned on it will hardly help, "
            f"or harm. Behind the initial prompt it has {' and '.join(quality.shortcomings)}. "
            "Raise `model.initial_distillation.stage.steps`, or choose a larger "
            "`model.auxiliary`; see docs/what-makes-it-work.md.",
            stacklevel=3,
        )


def _qualities(state: Any) -> tuple[Quality | None, Quality | None]:
    before, after = (None if entry is None else Quality(**entry) for entry in state["quality"])
    return before, after
