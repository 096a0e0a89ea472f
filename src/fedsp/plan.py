"""What a run will need and send, before it: sizes, memory, bytes, disk, steps and time.

The sizes are counted, the memory and the time of a step come from a few real ones; the rest is
arithmetic. Nothing is printed here, and no file is written.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedsp.baseline import ServerOnlyBaseline
from fedsp.client import ClientModule
from fedsp.memory_probe import tensor_bytes
from fedsp.messages import ClientUpdate, ServerBroadcast, encode, encode_handout
from fedsp.opening import install, participations
from fedsp.preparation import derive_auxiliary
from fedsp.rehearsal import (
    ClientCost,
    Cost,
    rehearse_client,
    rehearse_distillation,
    rehearse_evaluation,
    rehearse_quality,
    rehearse_server,
)
from fedsp.server import ServerModule
from fedsp.shards import gathered_bytes
from fedsp.spending import plan_spending

# what allocators keep of freed memory, in parts of the tensors; docs/plan.md has what was measured
ALLOCATOR_SHARE = 0.1


@dataclass(frozen=True)
class Plan:
    """The figures of a run, in plain units.

    Args:
        rounds: Rounds that are run: fewer than were asked for where the server's budget ends.
        privacy: By `central` and `local` noise, where there is any: `epsilon` at the end of the
            run, its `delta`, the budget `max_epsilon` and the `releases` that count.
        parameters: Entries of `global`, `auxiliary`, `prompt` and what is trained of them
            (`trained_on_server`, `trained_on_client`).
        server_memory: Bytes by component, for a machine of its own, or for each of the processes
            that a sharded global model is divided among.
        client_memory: The same for one client.
        process_memory: Bytes by what a simulating process does at the time, all beside Python and
            its libraries.
        peak_memory: The largest of them, with `ALLOCATOR_SHARE` for what the allocator holds.
        traffic: Bytes: `up` and `down` of a round for the whole cohort without the hand-out,
            `handout` of one client, `first_round_down` and the run's `total_up`, `total_down`.
        client_states: Bytes on disk of what clients keep: `each`, `peak` over the whole run and at
            its `end`.
        steps: Optimizer steps of the whole run by who makes them.
        seconds: Estimated time of the whole run by what it goes into, on this machine.
    """

    rounds: int
    privacy: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    server_memory: dict[str, int]
    client_memory: dict[str, int]
    process_memory: dict[str, int]
    peak_memory: int
    traffic: dict[str, int]
    client_states: dict[str, int]
    steps: dict[str, int]
    seconds: dict[str, float]


def make_plan(trainer: Any, client: ClientModule) -> Plan:
    """Try a few steps of every kind and work out what the whole run comes to.

    Args:
        trainer: With server and data set up and checked; both are trained for a few steps.
        client: Plays every client.
    """
    server, data = trainer.server, trainer.data
    auxiliary = derive_auxiliary(trainer.fabric, server, data)
    quality_bytes = rehearse_quality(trainer, auxiliary)
    distillation = rehearse_distillation(trainer, auxiliary)
    server.start_tuning(auxiliary)
    trainer.fabric.to_device(server)
    install(trainer, client, auxiliary)
    cohorts, spent = plan_spending(trainer, client)
    costs = Costs(
        quality_bytes,
        distillation,
        rehearse_client(trainer, client, participations(trainer)),
        rehearse_server(trainer),
        {split: rehearse_evaluation(trainer, split) for split in ("selection", "test")},
    )
    handout = len(encode_handout(auxiliary.handout()))
    process_memory = _process_memory(trainer, client, costs, handout)
    return Plan(
        rounds=len(cohorts),
        privacy=spent,
        parameters=_parameters(trainer, client),
        server_memory=_server_memory(trainer, costs),
        client_memory=_client_memory(client, costs.client),
        process_memory=process_memory,
        peak_memory=round(max(process_memory.values()) * (1 + ALLOCATOR_SHARE)),
        traffic=_traffic(trainer, cohorts, handout),
        client_states=_client_states(trainer, cohorts, costs.client.state_bytes),
        steps=_steps(trainer, client, cohorts),
        seconds=_seconds(trainer, client, cohorts, costs),
    )


@dataclass(frozen=True)
class Costs:
    """What the kinds of work cost; None where a run has none of a kind."""

    quality_bytes: int
    distillation: Cost | None
    client: ClientCost
    server: Cost | None
    evaluations: dict[str, tuple[Cost, int] | None]

    def on_server(self) -> list[Cost]:
        """Return those of the server's steps and evaluations."""
        found = [entry[0] for entry in self.evaluations.values() if entry is not None]
        return [*([self.server] if self.server is not None else []), *found]


def _parameters(trainer: Any, client: ClientModule) -> dict[str, int]:
    backbone, prompt = trainer.server.require_model()
    trained = {p for stage in client.stages for p in _trained(client, stage)}
    return {
        "global": _count(backbone.model.parameters()),
        "auxiliary": client.require_model()[0].num_parameters(),
        "prompt": prompt.prefix().numel(),
        "trained_on_server": _count(trainer.server.tuned_parameters()),
        "trained_on_client": _count(trained),
    }


def _server_memory(trainer: Any, costs: Costs) -> dict[str, int]:
    """Components at the server's largest step; its weights beside what it trains."""
    server = trainer.server
    trained = server.tuned_parameters()
    largest = max(costs.on_server(), key=lambda cost: cost.step_bytes, default=None)
    return {
        "weights": _resident([server]) - tensor_bytes(trained),
        "gathered": _gathered(server),
        "trained_and_optimizer": tensor_bytes(trained) + _optimizer(costs.server),
        **_step(largest),
    }


def _client_memory(client: ClientModule, cost: ClientCost) -> dict[str, int]:
    trained = [p for stage in client.stages for p in _trained(client, stage)]
    moments = sum(stage.optimizer_bytes for stage in cost.stages.values())
    largest = max(cost.stages.values(), key=lambda stage: stage.step_bytes, default=None)
    return {
        "weights": _resident([client]) - tensor_bytes(trained),
        "trained_and_optimizer": tensor_bytes(trained) + moments,
        **_step(largest),
    }


def _process_memory(
    trainer: Any, client: ClientModule, costs: Costs, handout: int
) -> dict[str, int]:
    """Return the memory of a process that plays all sides, by what it does."""
    cost = costs.client
    # the models, once where they share weights, the auxiliary model as handed out, the server's
    # optimizer
    held = _resident([trainer.server, client]) + cost.model_bytes + _optimizer(costs.server)
    moments = sum(stage.optimizer_bytes for stage in cost.stages.values())
    # where the global model works
    working = held + _gathered(trainer.server)
    phases = {"between steps": held}
    for name, stage in cost.stages.items():
        phases[f"client: {name}"] = held + moments + stage.step_bytes
    if costs.server is not None:
        phases["server training"] = working + costs.server.step_bytes
    for split, entry in costs.evaluations.items():
        if entry is not None:
            phases[f"evaluation: {split}"] = working + entry[0].step_bytes
    if costs.quality_bytes:
        phases["the auxiliary model's quality"] = working + costs.quality_bytes
    if costs.distillation is not None:
        phases["distillation"] = (
            working + costs.distillation.optimizer_bytes + costs.distillation.step_bytes
        )
    if trainer.fabric.device.type == "cpu":
        # packing is done in the host's memory: a copy of the tensors and the packed bytes
        phases["hand-out"] = held + 2 * handout
        if cost.state_bytes:
            phases["client: keeping its state"] = (
                held + cost.model_bytes + moments + cost.state_bytes
            )
    return phases


def _traffic(trainer: Any, cohorts: list[list[int]], handout: int) -> dict[str, int]:
    """Return the bytes of all messages; those of equally long numbers are equally long."""
    payload, wire_dtype = trainer.server.payload(), trainer.rules.communication.wire_dtype
    known: dict[tuple[int, ...], int] = {}

    def size(message: ServerBroadcast | ClientUpdate, *numbers: int) -> int:
        key = tuple(len(str(number)) for number in numbers)
        if key not in known:
            known[key] = len(encode(message, wire_dtype))
        return known[key]

    ups, downs, new = [], [], []
    seen: set[int] = set()
    for round_idx, cohort in enumerate(cohorts):
        downs.append(len(cohort) * size(ServerBroadcast(round_idx, payload), round_idx))
        counts = {client_id: trainer.data.client_num_examples(client_id) for client_id in cohort}
        ups.append(
            sum(
                size(ClientUpdate(round_idx, *pair[:1], payload, pair[1]), round_idx, *pair)
                for pair in counts.items()
            )
        )
        new.append(len(set(cohort) - seen))
        seen |= set(cohort)
    return {
        "up": max(ups, default=0),
        "down": max(downs, default=0),
        "handout": handout,
        "first_round_down": downs[0] + new[0] * handout if downs else 0,
        "total_up": sum(ups),
        "total_down": sum(downs) + sum(new) * handout,
    }


def _client_states(trainer: Any, cohorts: list[list[int]], each: int) -> dict[str, int]:
    """Return the disk that states take; older ones stay as long as a checkpoint names them."""
    newest: dict[int, int] = {}
    window: list[dict[int, int]] = [{}]
    most = 0
    for round_idx, cohort in enumerate(cohorts):
        newest = newest | dict.fromkeys(cohort, round_idx)
        files = {file for versions in [*window, newest] for file in versions.items()}
        most = max(most, len(files))
        window = [*window, newest][-trainer.checkpoints.keep :]
    files = {file for versions in window for file in versions.items()}
    return {"each": each, "peak": most * each, "end": len(files) * each}


def _steps(trainer: Any, client: ClientModule, cohorts: list[list[int]]) -> dict[str, int]:
    turns = sum(map(len, cohorts))
    spec, server = trainer.server.initial_distillation, trainer.server.training_stage
    server_steps = server.steps * len(cohorts) if trainer.data.num_examples("server") else 0
    return {
        "distillation": spec.stage.steps if spec is not None else 0,
        "client_auxiliary": turns * client.stages["auxiliary"].steps,
        "client_soft_prompt": turns * client.stages["soft_prompt"].steps,
        "server": server_steps,
    }


def _seconds(
    trainer: Any, client: ClientModule, cohorts: list[list[int]], costs: Costs
) -> dict[str, float]:
    spec, stage = trainer.server.initial_distillation, trainer.server.training_stage
    # the same again for a server without clients beside it
    sides = 1 + any(isinstance(callback, ServerOnlyBaseline) for callback in trainer.callbacks)
    turns = sum(-(-len(cohort) // trainer.fabric.world_size) for cohort in cohorts)
    a_turn = costs.client.state_seconds + sum(
        client.stages[name].batches * cost.seconds for name, cost in costs.client.stages.items()
    )
    rounds = len(cohorts)
    measured = sum(trainer.history.is_due(idx, rounds) for idx in range(rounds))
    # beside the rounds: the global model alone, and the first or the best prompt
    runs = {"selection": 2 + sides * measured, "test": 1 + sides}
    evaluations = {split: entry for split, entry in costs.evaluations.items() if entry is not None}
    a_server_round = stage.batches * costs.server.seconds if costs.server is not None else 0.0
    taught = 0.0
    if costs.distillation is not None:
        taught = spec.stage.batches * costs.distillation.seconds
        taught += (spec.prompts.rounds if spec.prompts is not None else 0) * a_server_round
    measuring = sum(
        runs[split] * batches * cost.seconds for split, (cost, batches) in evaluations.items()
    )
    acceptance = trainer.rules.acceptance
    if acceptance is not None and "selection" in evaluations:
        cost, batches = evaluations["selection"]
        searches = sum(map(bool, cohorts))
        if trainer.rules.training_search is not None and costs.server is not None:
            searches += sides * rounds
        at_a_point = min(batches, acceptance.num_batches or batches)
        measuring += searches * len(acceptance.fractions) * at_a_point * cost.seconds
    return {
        "distillation": taught,
        "clients": turns * a_turn,
        "server": sides * rounds * a_server_round,
        "evaluation": measuring,
    }


def _step(cost: Cost | None) -> dict[str, int]:
    logits = 0 if cost is None else cost.logits_bytes
    rest = 0 if cost is None else cost.step_bytes - logits
    return {"activations_and_gradients": rest, "logits": logits}


def _gathered(server: ServerModule) -> int:
    """Bytes of a sharded model's weights that a step holds beside this process' own."""
    backbone = server.require_model()[0]
    return gathered_bytes(backbone.model, backbone.layers)


def _optimizer(cost: Cost | None) -> int:
    return 0 if cost is None else cost.optimizer_bytes


def _trained(client: ClientModule, stage: str) -> list[nn.Parameter]:
    return list(client.stage_parameters(stage).values()) if client.stages[stage].steps else []


def _resident(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors: list[Tensor] = []
    for module in modules:
        tensors += [*module.parameters(), *module.buffers()]
    return tensor_bytes(tensors)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in set(parameters))
