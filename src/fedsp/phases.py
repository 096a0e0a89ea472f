"""The only inner training loops: a client's round, the server's round, distillation.

A phase trains what it is given; it chooses no client, logs nothing and saves nothing.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedsp.auxiliary import Auxiliary
from fedsp.client import ClientModule
from fedsp.ranks import Ranks
from fedsp.seeding import isolated_rng, seed_for, stream
from fedsp.server import ServerModule
from fedsp.stages import Stage

Batches = Iterable[dict[str, Tensor]]
StepCallback = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class StageResult:
    """What one run of a stage did.

    Args:
        loss: Mean training loss over its batches, in nats a token; NaN without steps.
        steps: Optimizer steps.
        num_tokens: Text tokens read, padding left out.
        seconds: Wall time.
        num_examples: Examples read.
    """

    loss: float
    steps: int
    num_tokens: int
    seconds: float
    num_examples: int


@dataclass
class Optimization:
    """An optimizer, its schedule and how many batches of the stream they have used.

    Args:
        optimizer: With the parameters of a stage.
        scheduler: None keeps the learning rate.
        total_steps: Optimizer steps of the whole run: the schedule's length.
        batches: Used so far.
    """

    optimizer: Optimizer
    scheduler: LRScheduler | None
    total_steps: int
    batches: int = 0

    @classmethod
    def of(cls, stage: Stage, parameters: Iterable[Parameter], total_steps: int) -> "Optimization":
        """Begin a stage's optimization; see `Stage.build`."""
        return cls(*stage.build(parameters, total_steps), total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all three."""
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else None
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
            "total_steps": self.total_steps,
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a schedule of another length goes on by its own."""
        if self.scheduler is None or state["total_steps"] == self.total_steps:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
        else:
            # the run was made longer or shorter: rates as if it had had this length all along
            _forward(self.scheduler, min(state["scheduler"]["last_epoch"], self.total_steps))
            groups = self.optimizer.param_groups
            settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)
        self.batches = state["batches"]


def _forward(scheduler: LRScheduler, steps: int) -> None:
    """Step a fresh schedule; the optimizer stands still, which torch would warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)`")
        for _ in range(steps):
            scheduler.step()


def _optimize(
    fabric: Fabric,
    loss_of: Callable[[dict[str, Tensor], int], Tensor],
    module: nn.Module,
    trained: Sequence[tuple[Stage, Optimization]],
    batches: Batches,
    ranks: Ranks,
    on_step: StepCallback | None = None,
) -> StageResult:
    """Step all optimizers over all batches; every kind of training goes through this loop.

    Where several ranks train together, `loss_of` gives this one's part of the loss.
    """
    started = time.perf_counter()
    optimizers = [
        cast(_FabricOptimizer, fabric.setup_optimizers(optimization.optimizer))
        for _, optimization in trained
    ]
    accumulate = trained[0][0].accumulate_grad_batches
    groups = [group for _, optimization in trained for group in optimization.optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    losses: list[Tensor] = []
    unreduced: list[Tensor] = []
    tokens: list[Tensor] = []
    steps = num_examples = 0
    for batch_idx, batch in enumerate(batches):
        tokens.append(batch["attention_mask"].sum())
        num_examples += len(batch["attention_mask"])
        batch = fabric.to_device(batch)
        # single-device Fabric does not autocast step methods by itself; see docs/footguns.md#3
        with fabric.autocast():
            loss = loss_of(batch, batch_idx)
        fabric.backward(loss if accumulate == 1 else loss / accumulate)
        unreduced.append(loss.detach())
        for _, optimization in trained:
            optimization.batches += 1
        if (batch_idx + 1) % accumulate:
            continue
        ranks.reduce_gradients(parameters, unreduced)
        losses += unreduced
        unreduced = []
        for (stage, optimization), optimizer in zip(trained, optimizers, strict=True):
            _step(fabric, module, stage, optimization, optimizer)
        steps += 1
        if on_step is not None:
            on_step(steps, losses[-1])
    mean = float(torch.stack(losses).mean()) if losses else math.nan
    num_tokens = int(torch.stack(tokens).sum()) if tokens else 0
    seconds = time.perf_counter() - started
    return StageResult(mean, steps, num_tokens, seconds, num_examples)


def _step(
    fabric: Fabric,
    module: nn.Module,
    stage: Stage,
    optimization: Optimization,
    optimizer: _FabricOptimizer,
) -> None:
    if stage.gradient_clip_norm is not None:
        fabric.clip_gradients(
            module, optimizer, max_norm=stage.gradient_clip_norm, error_if_nonfinite=False
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if optimization.scheduler is not None:
        optimization.scheduler.step()


@dataclass(frozen=True)
class ClientTurn:
    """One client's part of a round.

    Args:
        client_id: Who.
        round_idx: 0-based communication round.
        seed: The run's seed.
        participations: How often a client takes part in the whole run, for its schedules' length.
        loader: `(start_batch, num_batches)` to the client's batches.
    """

    client_id: int
    round_idx: int
    seed: int
    participations: int
    loader: Callable[[int, int], Batches]


def train_client(
    fabric: Fabric, client: ClientModule, state: dict[str, Any], turn: ClientTurn
) -> tuple[dict[str, StageResult], dict[str, Any]]:
    """Run a client's two stages: first the auxiliary model, then what travels.

    Both stages draw from one endless stream of the client's batches, each going on where the last
    one stopped.

    Args:
        fabric: Where to run.
        client: A module that has received the round's broadcast and the client's private state.
        state: What the client kept of its optimizers, empty at its first participation.
        turn: Who, when and on which data.

    Returns:
        The results by stage, and the optimizers' new state.
    """
    results: dict[str, StageResult] = {}
    kept: dict[str, Any] = dict(state)
    position = int(kept.get("batches", 0))
    seed = seed_for(turn.seed, "client_dropout", round_idx=turn.round_idx, client_id=turn.client_id)
    with isolated_rng(seed):
        for names in client.passes:
            steps = {name: client.stages[name] for name in names if client.stages[name].steps}
            if not steps:
                continue
            client.set_stages(names)
            trained = [(stage, _resume(client, name, kept, turn)) for name, stage in steps.items()]
            num_batches = trained[0][0].batches
            batches = turn.loader(position, num_batches)
            # of stages that are trained at once the last one tells the loss: it is what travels
            results[names[-1]] = _optimize(
                fabric, client.training_step, client, trained, batches, Ranks()
            )
            position += num_batches
            for name, (_, optimization) in zip(steps, trained, strict=True):
                kept[name] = optimization.state_dict()
                if not client.keep_optimizers:
                    kept[name]["optimizer"]["state"] = {}
    kept["batches"] = position
    client.eval()
    return results, kept


def _resume(
    client: ClientModule, name: str, kept: dict[str, Any], turn: ClientTurn
) -> Optimization:
    """Build a stage's optimizer and schedule, or go on with those of the last participation."""
    stage = client.stages[name]
    parameters = client.stage_parameters(name).values()
    optimization = Optimization.of(stage, parameters, stage.steps * turn.participations)
    if name in kept:
        optimization.load_state_dict(kept[name])
    return optimization


def train_server(
    fabric: Fabric,
    server: ServerModule,
    optimization: Optimization,
    batches: Batches,
    *,
    seed: int,
    round_idx: int,
) -> StageResult:
    """Run the server's own steps of a round on what it tunes; several ranks share each batch.

    Args:
        fabric: Where to run.
        server: The server with the aggregate loaded.
        optimization: The server's optimizer, which lasts over the rounds.
        batches: The server's batches, as many as its stage wants.
        seed: The run's seed.
        round_idx: 0-based communication round.

    Returns:
        The result of the stage.
    """
    prompt = server.require_model()[1]
    prompt.train()
    with isolated_rng(seed_for(seed, "server_dropout", round_idx=round_idx)):
        trained = [(server.training_stage, optimization)]
        ranks = Ranks(fabric)
        step = ranks.split(server.training_step)
        result = _optimize(fabric, step, server, trained, batches, ranks)
    prompt.eval()
    return result


def distill(  # noqa: PLR0913 - what the other phases take, and the pool of prompts
    fabric: Fabric,
    server: ServerModule,
    auxiliary: Auxiliary,
    optimization: Optimization,
    batches: Batches,
    *,
    seed: int,
    prompts: Sequence[Tensor] = (),
    on_step: StepCallback | None = None,
) -> StageResult:
    """Teach the auxiliary model what the global model knows, on public data.

    Dropout is off on both sides: what is to be matched is a function, not a sample of it. Several
    ranks share each batch.

    Args:
        fabric: Where to run.
        server: Holds the frozen global model and the `initial_distillation` that is wanted.
        auxiliary: Trained in place.
        optimization: Optimizer and schedule of `auxiliary.trainable()`, fresh or gone on with.
        batches: Public batches; those of the whole stage, or of a part of it.
        seed: The run's seed.
        prompts: The pool that `initial_distillation.prompts` draws from, each [L, 2, K, P, D].
        on_step: Called with the number of steps done and the last loss.

    Returns:
        The result of the stage.

    Raises:
        RuntimeError: If the server wants no distillation.
    """
    spec, teacher = server.initial_distillation, server.require_model()[0]
    if spec is None:
        raise RuntimeError("expected a server with `initial_distillation`, got null")
    parameters = auxiliary.trainable()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    auxiliary.eval()
    first, ranks = optimization.batches, Ranks(fabric)

    def loss_of(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        positions = stream(seed, "distillation_positions", round_idx=first + batch_idx)
        prefix = None
        if spec.prompts is not None:
            drawn = stream(seed, "distillation_prompts", round_idx=first + batch_idx)
            prefix = spec.prompts.draw(prompts, drawn)
        student, slots = auxiliary.backbone, auxiliary.slots
        return spec.loss(teacher, student, batch, positions, prefix, slots, ranks)

    result = _optimize(
        fabric,
        loss_of,
        auxiliary,
        [(spec.stage, optimization)],
        batches,
        ranks,
        on_step,
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return result
