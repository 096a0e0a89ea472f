"""Poisoned clients against every aggregation rule, on the quickstart's model, text and clients.

Run: OMP_NUM_THREADS=1 python benchmarks/poisoned.py [--poisoned 2] [--rounds 3] [--steps 5]

The first clients of ten train as they should, and then forge what they send: a valid message with
the mirrored change, with ten times that, or with noise ten times as long as the honest change.
Every pair of rule and attack is one run, of one seed. Prints the selection loss after the last
round, and the test loss of the best round's prompt, which is what a run exports.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.aggregation import (
    Aggregator,
    CoordinateMedian,
    MultiKrum,
    NormClipping,
    StreamingMean,
    TrimmedMean,
)
from fedsp.baseline import ServerOnlyBaseline
from fedsp.callbacks import FederatedCallback
from fedsp.cli import FederatedCLI
from fedsp.client import ClientModule
from fedsp.messages import ClientUpdate
from fedsp.payload import Payload, flatten, norm, shapes_of, subtract, unflatten
from fedsp.seeding import stream

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
NUM_CLIENTS = 10
Attack = Callable[[Tensor, torch.Generator], Tensor]


class Scaled:
    """Sends the honest change times a factor."""

    def __init__(self, factor: float) -> None:
        """Choose the factor.

        Args:
            factor: -1 mirrors the change at the broadcast.
        """
        self.factor = factor

    def __call__(self, change: Tensor, generator: torch.Generator) -> Tensor:
        """Return the forged change, [N] as the honest one."""
        return self.factor * change


class Noise:
    """Sends Gaussian noise in the change's place."""

    def __init__(self, factor: float) -> None:
        """Choose the length.

        Args:
            factor: Length of the noise over that of the honest change.
        """
        self.factor = factor

    def __call__(self, change: Tensor, generator: torch.Generator) -> Tensor:
        """Return the forged change, [N] as the honest one."""
        noise = torch.randn(change.shape, generator=generator)
        return noise * (self.factor * change.norm() / noise.norm())


ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "sign flip": Scaled(-1),
    "scaled sign flip": Scaled(-10),
    "random": Noise(10),
}


class PoisonedClient(ClientModule):
    """Plays honest clients and a few that forge their update after an honest training.

    A subclass, not an executor around another one: what is forged has to be encoded, checked and
    written into the ledger as any client's update is.
    """

    def __init__(
        self, attack: Attack, poisoned: Collection[int], *, seed: int = 0, **options: Any
    ) -> None:
        """Choose who forges, and how.

        Args:
            attack: Makes the forged change of the honest one.
            poisoned: Ids of the clients that forge.
            seed: Seed of what the attack draws.
            options: As `ClientModule` takes them.
        """
        super().__init__(**options)
        self.attack, self.poisoned, self.seed = attack, frozenset(poisoned), seed

    def update(self, client_id: int, num_examples: int) -> ClientUpdate:
        """Return what leaves the client; see `ClientModule.update`."""
        honest = super().update(client_id, num_examples)
        if client_id not in self.poisoned or self._received is None:
            return honest
        reference = self._received.payload
        generator = stream(self.seed, "poison", round_idx=honest.round_idx, client_id=client_id)
        change = self.attack(flatten(subtract(honest.payload, reference)), generator)
        return replace(honest, payload=unflatten(flatten(reference) + change, shapes_of(reference)))


class Norms(FederatedCallback):
    """Notes how far every accepted update went."""

    def __init__(self) -> None:
        """Wait for the first update."""
        self.norms: list[float] = []

    def on_update_accepted(
        self, trainer: Any, round_idx: int, client_id: int, update: Payload, reference: Payload
    ) -> None:
        """Note the L2 norm of the change."""
        self.norms.append(norm(subtract(update, reference)))


@dataclass(frozen=True)
class Settings:
    """What the runs share.

    Args:
        folder: For the runs' folders.
        poisoned: How many of the clients forge, the first ones.
        rounds: Communication rounds.
        steps: Steps of a client in a round.
        server_steps: Steps of the server in a round.
        seed: The only seed.
    """

    folder: Path
    poisoned: int
    rounds: int
    steps: int
    server_steps: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to, losses in nats a token.

    Args:
        results: The run's `results.json`.
        norms: L2 norms of the changes that clients sent, in the order of the updates.
    """

    results: dict[str, Any]
    norms: list[float]

    @property
    def last(self) -> float:
        """Selection loss after the last round."""
        return float(self.results["rounds"][-1]["server/val_loss"])

    @property
    def test(self) -> float:
        """Test loss of the best round's prompt."""
        return float(self.results["test"]["best"]["loss"])


def rules(num_poisoned: int, max_norm: float) -> dict[str, Aggregator]:
    """Return the rules by name, each told how many clients of ten forge.

    Args:
        num_poisoned: Clients that forge.
        max_norm: Length to which changes are clipped.
    """
    share = num_poisoned / NUM_CLIENTS
    trusted = NUM_CLIENTS - num_poisoned - 2  # the most that Multi-Krum can average
    return {
        "mean": StreamingMean(),
        "coordinate median": CoordinateMedian(),
        f"trimmed mean, {share:g}": TrimmedMean(share),
        "Krum": MultiKrum(num_poisoned),
        f"Multi-Krum, {trusted} kept": MultiKrum(num_poisoned, trusted),
        "clipped mean": NormClipping(max_norm),
    }


def run(
    name: str,
    aggregator: Aggregator,
    attack: Attack | None,
    settings: Settings,
    *callbacks: FederatedCallback,
) -> Outcome:
    """Run the quickstart with one rule and one attack.

    Args:
        name: Of the run's folder.
        aggregator: The rule.
        attack: What poisoned clients send; None leaves all honest.
        settings: What the runs share.
        callbacks: Of the run.
    """
    folder = settings.folder / name
    options = {
        "seed_everything": settings.seed,
        "trainer.run_dir": folder,
        "trainer.num_rounds": settings.rounds,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "null",
        "model.init_args.training.steps": settings.server_steps,
        "client.init_args.soft_prompt.steps": settings.steps,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    parts = FederatedCLI(["--config", str(CONFIG), *arguments], run=False)
    trainer: Any = parts.trainer
    trainer.rules = replace(trainer.rules, aggregator=aggregator)
    lengths = Norms()
    trainer.callbacks += [lengths, *callbacks]
    client = PoisonedClient(
        attack or Scaled(1),
        range(settings.poisoned if attack else 0),
        seed=settings.seed,
        **parts.client.stages,
    )
    with redirect_stdout(StringIO()):
        trainer.fit(parts.model, client, parts.datamodule)
    return Outcome(json.loads((folder / "results.json").read_text()), lengths.norms)


def table(title: str, cells: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table, a row for every rule and a column for every attack.

    Args:
        title: Head of the first column.
        cells: Losses by rule and attack; NaN where a prompt had none.
    """
    attacks = list(next(iter(cells.values())))
    lines = [f"| {title} | {' | '.join(attacks)} |", f"|---|{'---:|' * len(attacks)}"]
    for rule, row in cells.items():
        lines.append(f"| {rule} | {' | '.join(f'{row[name]:.3f}' for name in attacks)} |")
    return "\n".join(lines)


def main() -> None:
    """Run every pair and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--poisoned", type=int, default=2, help="clients of ten that forge")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a client in a round")
    parser.add_argument("--server-steps", type=int, default=10, help="of the server in a round")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(folder=Path(scratch), **vars(arguments))
        peace = run("peace", StreamingMean(), None, settings, ServerOnlyBaseline())
        # a server that clips knows from earlier rounds how far clients go
        max_norm = round(statistics.median(peace.norms), 1)
        outcomes: dict[str, dict[str, Outcome]] = {}
        for rule, aggregator in rules(settings.poisoned, max_norm).items():
            for name, attack in ATTACKS.items():
                is_peace = (rule, name) == ("mean", "none")
                outcome = peace if is_peace else run(f"{rule} {name}", aggregator, attack, settings)
                print(f"{rule}, {name}: {outcome.last:.3f} {outcome.test:.3f}", flush=True)
                outcomes.setdefault(rule, {})[name] = outcome
    selection, test = peace.results["selection"], peace.results["test"]
    print(f"\n{time.perf_counter() - started:.0f} s; changes are clipped to {max_norm}")
    print(f"no prompt: selection {selection['zero_shot']['server/val_loss']:.3f}, ", end="")
    print(f"test {test['zero_shot']['loss']:.3f}; without clients: ", end="")
    print(f"selection {peace.results['rounds'][-1]['baseline/val_loss']:.3f}, ", end="")
    print(f"test {test['server_only']['loss']:.3f}")
    for title, measure in (("selection loss, last round", "last"), ("test loss, kept", "test")):
        cells = {
            rule: {name: getattr(outcome, measure) for name, outcome in row.items()}
            for rule, row in outcomes.items()
        }
        print(f"\n{table(title, cells)}")


if __name__ == "__main__":
    main()
