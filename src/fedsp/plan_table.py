"""A plan as people read it: the same kind of list as a run's summary before its first round."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from fedsp.display import (
    Rows,
    human_bytes,
    human_count,
    human_seconds,
    human_share,
    plural,
    sections,
)
from fedsp.plan import ALLOCATOR_SHARE, Plan
from fedsp.spending import budget_rows, spending_texts

_COMPONENTS = {
    "weights": "weights",
    "gathered": "gathered for a step",
    "trained_and_optimizer": "trained with optimizer state",
    "activations_and_gradients": "activations and gradients",
    "logits": "logits",
}
_STEPS = {
    "distillation": "distillation",
    "client_auxiliary": "clients, auxiliary",
    "client_soft_prompt": "clients, prompt",
    "server": "server",
}


def print_plan(plan: Plan, trainer: Any, *, as_json: bool) -> None:
    """Print a plan on standard output, once where there are several processes.

    Args:
        plan: What is printed.
        trainer: Gives Fabric and the run's folder.
        as_json: Print one JSON object in plain units (bytes, seconds), not a table.
    """
    if not trainer.fabric.is_global_zero:
        return
    if as_json:
        print(json.dumps(asdict(plan), indent=2))
    else:
        Console(highlight=False).print(plan_table(plan, trainer))


def plan_table(plan: Plan, trainer: Any) -> RenderableType:
    """Return a plan as headed lists.

    Args:
        plan: What is shown.
        trainer: Gives Fabric, folder and the number of rounds.
    """
    content = [
        ("Parameters", parameter_rows(plan)),
        ("Memory", memory_rows(plan, trainer.fabric.world_size)),
        ("Traffic", traffic_rows(plan)),
        ("Disk", disk_rows(plan)),
        ("Steps", [(name, human_count(plan.steps[key])) for key, name in _STEPS.items()]),
        ("Time", time_rows(plan, trainer)),
        *([("Privacy", rows)] if (rows := privacy_rows(plan, trainer)) else []),
    ]
    title = Rule(Text(f"Plan  {trainer.folder.path}", "bold"), align="left", style="dim")
    return Group(title, sections(content))


def parameter_rows(plan: Plan) -> Rows:
    """Return the sizes of the models and what is trained."""
    count = plan.parameters
    return [
        ("global", human_count(count["global"])),
        ("auxiliary", human_count(count["auxiliary"])),
        ("prompt", human_count(count["prompt"])),
        (
            "trained",
            f"server {human_count(count['trained_on_server'])}, "
            f"client {human_count(count['trained_on_client'])}",
        ),
    ]


def memory_rows(plan: Plan, num_processes: int = 1) -> Rows:
    """Return the estimated peaks: of server and client alone, and of this process.

    Args:
        plan: What is shown.
        num_processes: Of the simulating run.
    """
    playing = f"each of {num_processes} processes that play all"
    if num_processes == 1:
        playing = "a process that plays all"
    busiest = max(plan.process_memory, key=lambda phase: plan.process_memory[phase])
    return [
        ("server", _components(plan.server_memory)),
        ("client", _components(plan.client_memory)),
        (
            "simulated",
            f"{human_bytes(plan.peak_memory)} in {playing}, in {busiest!r}, "
            f"with {human_share(ALLOCATOR_SHARE)} for the allocator",
        ),
        ("", "estimates for the largest batch, beside Python and its libraries"),
    ]


def traffic_rows(plan: Plan) -> Rows:
    """Return what a round, the hand-out and the whole run send."""
    traffic = plan.traffic
    return [
        ("a round", f"{human_bytes(traffic['up'])} up, {human_bytes(traffic['down'])} down"),
        ("hand-out", f"{human_bytes(traffic['handout'])} once a client"),
        (
            "in all",
            f"{human_bytes(traffic['total_up'])} up, {human_bytes(traffic['total_down'])} down "
            "with the hand-out",
        ),
    ]


def disk_rows(plan: Plan) -> Rows:
    """Return what the clients' states take on disk."""
    states = plan.client_states
    if not states["each"]:
        return [("clients", "nothing is kept between rounds")]
    return [
        ("a client", f"{human_bytes(states['each'])} kept between rounds"),
        ("all clients", f"{human_bytes(states['peak'])} at most, with older checkpoints' states"),
    ]


def time_rows(plan: Plan, trainer: Any) -> Rows:
    """Return where the time goes."""
    rows = [(name, human_seconds(seconds)) for name, seconds in plan.seconds.items() if seconds]
    total = human_seconds(sum(plan.seconds.values()))
    rounds = plural(plan.rounds, "round")
    return [*rows, ("in all", f"about {total} for {rounds} on {trainer.fabric.device}")]


def privacy_rows(plan: Plan, trainer: Any) -> Rows:
    """Return what noise will have cost, and how far the budget goes; empty without noise."""
    sides = {"central": "server", "local": "client"}
    rows = [(sides[where], text) for where, text in spending_texts(plan.privacy).items()]
    return [*rows, *budget_rows(plan.rounds, trainer.num_rounds)]


def _components(memory: dict[str, int]) -> str:
    # only a sharded model gathers weights
    shown = [key for key in _COMPONENTS if key != "gathered" or memory.get(key)]
    parts = [f"{human_bytes(memory[key])} {_COMPONENTS[key]}" for key in shown]
    return f"{human_bytes(sum(memory.values()))}: {', '.join(parts)}"
