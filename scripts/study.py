"""What makes a prompt tuned on a small auxiliary model valuable for the global one: a fast harness.

    python scripts/study.py ROWS.yaml results/study/NAME.jsonl

Each row of the YAML file is a name with options of `fedsp fit` that are laid over a configuration.
A row is one line of the JSONL file; rows that are there already are not run again.

A row makes its auxiliary model as `fedsp fit` does (or finds it in the cache), measures it, and
then runs the federation's algorithm with all clients pooled into one that takes their batches in
turn: a round is the client's prompt steps on the auxiliary model, then the server's on the global
one. Its worth is the best loss of the server alone less the best loss with the messenger, both on
the selection split.
"""

import json
import shlex
import sys
import tempfile
import time
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.cli import FederatedCLI
from fedsp.evaluation_loops import evaluate
from fedsp.history import Evaluation
from fedsp.opening import check_run, launch, load, set_up_data
from fedsp.payload import SOFT_PROMPT
from fedsp.phases import Optimization, _optimize
from fedsp.preparation import fill_pool, prepare_auxiliary
from fedsp.prompt_pool import PromptPool
from fedsp.quality import prompt_gradient
from fedsp.ranks import Ranks
from fedsp.soft_prompt import pool_layers, spread_layers

# the prompt's length bounds that of the texts
OF_DATA = ("--data", "--seed", "--config", "--model.soft_prompt")
PLACE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]


class Quiet:
    """Stands in for the trainer while the auxiliary model is made."""

    def __init__(self, seed: int, precision: str) -> None:
        self.seed, self.precision = seed, precision

    def call(self, hook: str, *args: Any) -> None:
        """Print the distillation's loss now and then."""
        if hook == "on_distillation_step" and args[0] % 100 == 0:
            print(f"    step {args[0]}: {float(args[1]):.4f}", flush=True)


class Study:
    """One configuration brought up: models, data and the first prompt."""

    def __init__(self, options: list[str], rounds: int, data: Any = None) -> None:
        """Load the model; `data` is that of another row with the same `--data` options."""
        cli = FederatedCLI([*options, *PLACE], run=False)
        self.server, self.client, self.data = cli.model, cli.client, data or cli.datamodule
        self.rules = cli.trainer.rules
        self.rounds = rounds
        self.fabric: Fabric = cli.trainer.fabric
        launch(self.fabric)
        load(self.fabric, self.server)
        set_up_data(self.fabric, self.server, self.data, "fit")
        check_run(self.server, self.client, self.data, cohort=[0], evaluation=Evaluation())
        self.owner = Quiet(cli.trainer.seed, cli.trainer.precision)
        self.initial = self.server.require_model()[1].prefix()

    def prepare(self) -> Any:
        """Make the auxiliary model, or find it in the cache, and give it to the client."""
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "auxiliary.safetensors"
            made = prepare_auxiliary(
                self.fabric, self.server, self.data, kept=kept, trainer=self.owner
            )
        prompt = self.server.require_model()[1]
        self.client.install(made.auxiliary, prompt.num_virtual_tokens, self.owner.seed)
        self.fabric.to_device(self.client)
        return made

    def loss(self, split: str = "selection") -> float:
        """Return the global model's loss with the server's prompt, in nats a token."""
        self.server.eval()
        data = self.data
        loader = data.val_dataloader() if split == "selection" else data.test_dataloader()
        return evaluate(self.fabric, self.server.validation_step, loader)["loss"]

    def pooled(self, start: int, steps: int) -> Any:
        """Yield the clients' batches in turn."""
        clients = self.data.num_clients
        for step in range(start, start + steps):
            turn, client = divmod(step, clients)
            yield from self.data.client_dataloader(client, start_step=turn, num_steps=1)

    def federate(self, with_clients: bool) -> dict[str, Any]:
        """Run the rounds; the server's own steps and batches are the same either way."""
        prompt = self.server.require_model()[1]
        prompt.load_prefix(self.initial)
        stage = self.server.training_stage
        own = Optimization.of(stage, prompt.parameters(), stage.steps * self.rounds)
        states: dict[str, Any] = {}
        losses, best = [self.loss()], self.initial
        for _ in range(self.rounds):
            if with_clients:
                before = prompt.prefix()
                after = self.client_round(before, states)
                step = self.rules.server_optimizer.step({SOFT_PROMPT: before}, {SOFT_PROMPT: after})
                prompt.load_prefix(step[SOFT_PROMPT])
            if stage.steps:
                prompt.train()
                batches = self.data.server_dataloader(
                    start_step=own.batches, num_steps=stage.batches
                )
                _optimize(
                    self.fabric, self.server.training_step, prompt, [(stage, own)], batches, Ranks()
                )
            losses.append(self.loss())
            if losses[-1] == min(losses):
                best = prompt.prefix()
        prompt.load_prefix(best)
        return {"losses": losses, "best": min(losses), "test": self.loss("test")}

    def client_round(self, prefix: Tensor, states: dict[str, Any]) -> Tensor:
        """Run the stages of the pooled client and return its prompt."""
        client = self.client
        auxiliary, own = client.require_model()
        own.load_prefix(pool_layers(prefix, auxiliary.slots))
        for name in ("auxiliary", "soft_prompt"):
            stage = client.stages[name]
            if not stage.steps:
                continue
            client.set_stages([name])
            if name not in states:
                parameters = client.stage_parameters(name).values()
                states[name] = Optimization.of(stage, parameters, stage.steps * self.rounds)
            start = sum(state.batches for state in states.values())
            batches = self.pooled(start, stage.batches)
            _optimize(
                self.fabric, client.training_step, client, [(stage, states[name])], batches, Ranks()
            )
        client.eval()
        return spread_layers(own.prefix(), auxiliary.slots, prefix)

    def alignments(self) -> dict[str, float]:
        """Cosines of the prompt's gradients, at the initial prompt and further on; by sign, too."""
        auxiliary = self.client.require_model()[0]
        teacher = self.server.require_model()[0]
        pool = fill_pool(self.fabric, self.server, self.data, PromptPool(rounds=3), self.owner.seed)
        measured: dict[str, float] = {}
        for place, prefix in (("start", pool[0]), ("later", pool[-1])):
            batches = self.data.server_dataloader(start_step=0, num_steps=8)
            wanted, got = torch.zeros_like(prefix), torch.zeros_like(prefix)
            for batch in batches:
                own = pool_layers(prefix, auxiliary.slots)
                wanted += prompt_gradient(teacher, batch, prefix)
                part = prompt_gradient(auxiliary.backbone, batch, own)
                got[[slot for (slot,) in auxiliary.slots]] += part
            flat = torch.nn.functional.cosine_similarity
            measured[f"align_{place}"] = float(flat(wanted.flatten(), got.flatten(), dim=0))
            layers = flat(wanted.flatten(1), got.flatten(1), dim=1)
            measured[f"align_layers_{place}"] = float(layers.mean())
            signs = flat(wanted.sign().flatten(), got.sign().flatten(), dim=0)
            measured[f"align_signs_{place}"] = float(signs)
        return measured


def run(study: Study, baseline: dict[str, Any] | None, plan: dict[str, Any]) -> dict[str, Any]:
    """Make, measure and try one auxiliary model."""
    started = time.perf_counter()
    made = study.prepare()
    ready = time.perf_counter()
    line: dict[str, Any] = {
        "share": made.auxiliary.summary()["share_of_global"],
        **(vars(made.after) if made.after is not None else {}),
        **(study.alignments() if plan.get("alignments", True) else {}),
    }
    line["server_only"] = baseline or study.federate(with_clients=False)
    line["fedsp"] = study.federate(with_clients=True)
    line["worth"] = line["server_only"]["best"] - line["fedsp"]["best"]
    line["worth_test"] = line["server_only"]["test"] - line["fedsp"]["test"]
    line["seconds"] = [ready - started, time.perf_counter() - ready]
    return line


def main(rows: Path, results: Path) -> None:
    """Run the rows that have no line yet."""
    warnings.filterwarnings("ignore")
    plan = yaml.safe_load(rows.read_text())
    lines = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    done = {line["name"] for line in lines}
    known = [json.loads(x) for p in results.parent.glob("*.jsonl") for x in p.open()]
    # other files of the folder were written by hand
    baselines = {x["baseline"]: x["server_only"] for x in known if "baseline" in x}
    read: dict[str, Any] = {}
    for index, (name, row) in zip(count(1), plan["rows"].items(), strict=False):
        if name in done:
            continue
        print(f"{index}/{len(plan['rows'])} {name}", flush=True)
        options = [*plan["options"], *shlex.split(row or "")]
        server = [o for o in options if not o.startswith(("--model.aux", "--model.init", "--cl"))]
        key = " ".join(server)
        of_data = " ".join(o for o in options if o.startswith(OF_DATA))
        study = Study(options, plan["rounds"], read.get(of_data))
        read[of_data] = study.data
        line = run(study, baselines.get(key), plan)
        line = {"name": name, "options": row or "", "baseline": key, **line}
        baselines[key] = line["server_only"]
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"    worth {line['worth']:+.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
