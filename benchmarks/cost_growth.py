"""How time and memory of a round grow with clients, prompt length, layers and text length.

Run: OMP_NUM_THREADS=1 python benchmarks/cost_growth.py [--rounds 3]

One factor at a time, on a small GPT-2 with random weights: whole rounds of `FederatedTrainer.fit`
without evaluation. The time is this process's CPU time, the median of some rounds; the memory is
the most bytes of tensors that one further round holds at once beyond what was there before it.
Prints a table of ratios to a factor's first value and draws docs/images/cost-*.svg.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from fedsp.auxiliary import SharedCell
from fedsp.batching import Batching
from fedsp.callbacks import FederatedCallback
from fedsp.client import ClientModule
from fedsp.data import FederatedDataModule
from fedsp.memory_probe import LiveTensors
from fedsp.partition import IID
from fedsp.pretrained import BackboneSpec
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.sources import Files
from fedsp.stages import Stage
from fedsp.tasks import PromptCompletion
from fedsp.trainer import FederatedTrainer

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NANO = "fedsp://docstring-nano"
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 4096,
    "n_positions": 512,
    "n_embd": 128,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BATCH_SIZE, ROWS_PER_CLIENT = 4, 8


@dataclass(frozen=True)
class Setting:
    """What a round's cost depends on.

    Args:
        clients: Clients of the round, one after the other.
        prompt: Virtual tokens.
        layers: Layers of the global model; the auxiliary model shares one for all of them.
        tokens: Tokens of every text.
    """

    clients: int = 2
    prompt: int = 16
    layers: int = 4
    tokens: int = 64


FACTORS = {
    "clients": ("clients a round", [2, 4, 8, 16]),
    "prompt": ("virtual tokens", [4, 16, 64, 256]),
    "layers": ("layers", [2, 4, 8, 16]),
    "tokens": ("tokens of a text", [32, 64, 128, 256]),
}


class RoundCost(FederatedCallback):
    """Times all rounds but the first, which warms up, and the last, whose memory it watches.

    Args:
        num_rounds: Rounds of the run.
    """

    def __init__(self, num_rounds: int) -> None:
        """Wait for the first round."""
        self.num_rounds = num_rounds
        self.seconds: list[float] = []
        self.memory = LiveTensors()
        self.started = 0.0

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Start the clock, or the watch: it makes every operation slower."""
        if round_idx == self.num_rounds - 1:
            self.memory.__enter__()
        self.started = time.process_time()

    def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
        """Stop it."""
        if round_idx == self.num_rounds - 1:
            self.memory.__exit__(None, None, None)
        elif round_idx > 0:
            self.seconds.append(time.process_time() - self.started)


def measure(setting: Setting, timed_rounds: int) -> tuple[float, int]:
    """Run some rounds and return a round's CPU seconds and its peak of tensor bytes."""
    cost = RoundCost(timed_rounds + 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        # longer than any setting's texts, which are cut
        text = {"prompt": "def " * max(FACTORS["tokens"][1]), "completion": " Return it."}
        count = ROWS_PER_CLIENT * (setting.clients + 1)
        rows.write_text("".join(json.dumps(text) + "\n" for _ in range(count)))
        spec = BackboneSpec(NANO, config={**GPT2, "n_layer": setting.layers}, tokenizer=NANO)
        server = ServerModule(spec, SoftPromptSpec(setting.prompt), Stage(2), SharedCell())
        data = FederatedDataModule(
            Files(str(rows)),
            PromptCompletion(),
            IID(setting.clients),
            server=ROWS_PER_CLIENT,
            selection=None,
            test=None,
            batching=Batching(BATCH_SIZE),
            max_tokens=setting.tokens,
            cache_dir="",
        )
        trainer = FederatedTrainer(
            accelerator="cpu",
            num_rounds=cost.num_rounds,
            run_dir=str(folder / "run"),
            callbacks=[cost],
            enable_progress_bar=False,
        )
        trainer.fit(server, ClientModule(Stage(1), Stage(2)), data)
    return statistics.median(cost.seconds), cost.memory.peak_bytes


def draw(factor: str, values: Sequence[int], ratios: dict[str, list[float]]) -> None:
    """Draw a factor's ratios, and proportional growth to compare with."""
    figure, axis = plt.subplots(figsize=(4.2, 3.2))
    for (name, of_values), style in zip(ratios.items(), ("o-", "s-"), strict=True):
        axis.plot(values, of_values, style, label=name)
    proportional = [value / values[0] for value in values]
    axis.plot(values, proportional, color="black", linestyle=":", label="proportional")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_xlabel(FACTORS[factor][0])
    axis.set_ylabel(f"a round, ratio to {values[0]}")
    axis.legend(fontsize=8)
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"cost-{factor}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure every factor, print the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each setting")
    timed_rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    mpl.rcParams["svg.hashsalt"] = "fedsp"
    base = Setting()
    print(f"CPU time and peak tensor memory of a round; else {base}")
    print("| | value | CPU time, ratio | memory, ratio | memory, MB |\n|---|---|---|---|---|")
    measured: dict[Setting, tuple[float, int]] = {}
    for factor, (label, values) in FACTORS.items():
        settings = [replace(base, **{factor: value}) for value in values]
        ratios: dict[str, list[float]] = {"CPU time": [], "memory": []}
        for setting, value in zip(settings, values, strict=True):
            if setting not in measured:
                measured[setting] = measure(setting, timed_rounds)
            cost, first = measured[setting], measured[settings[0]]
            for name, one, other in zip(ratios, cost, first, strict=True):
                ratios[name].append(one / other)
            cells = " | ".join(f"{of_values[-1]:.2f}" for of_values in ratios.values())
            print(f"| {label} | {value} | {cells} | {cost[1] / 1e6:.1f} |", flush=True)
        draw(factor, values, ratios)


if __name__ == "__main__":
    main()
