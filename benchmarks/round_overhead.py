"""Time fedsp's own rounds against the same rounds hand-written in plain PyTorch.

Run: OMP_NUM_THREADS=1 python benchmarks/round_overhead.py [--quick] [--rounds 5] [--only nano]

`--quick` leaves bf16 out where the CPU has no instructions for it: a round takes minutes there.

fedsp runs as it does for a user, `FederatedTrainer.fit` with messages, ledger, client states,
metrics and a checkpoint every round; only the evaluation is left out, which the bare loop does not
have. The two take turns, round by round in one process, so that a machine that slows down slows
both. After every round their prompts are compared: the work must be the same.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from bare_loop import Batches, Gpt2, Party, Training, cast_once, read_gpt2, run_round
from figure import Figure
from torch import Tensor
from torch.optim import AdamW, Optimizer

from fedsp.auxiliary import AuxiliaryRecipe, SharedCell
from fedsp.backbone import Backbone
from fedsp.callbacks import FederatedCallback
from fedsp.client import ClientModule
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.data import FederatedDataModule
from fedsp.opening import is_slow_at_bf16
from fedsp.partition import ByColumn
from fedsp.pretrained import BackboneSpec
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.soft_prompt import TextInit
from fedsp.sources import Docstrings
from fedsp.stages import Stage
from fedsp.tasks import PromptCompletion
from fedsp.trainer import FederatedTrainer

NANO = "fedsp://docstring-nano"
# GPT-2's size and shape; its activation is the fused tanh approximation on both sides
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 16_384,
    "activation_function": "gelu_pytorch_tanh",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
RATES = {"model": 1e-3, "prompt": 0.05, "server": 0.02}
# of CPU time: the wall clock also counts other programs and the disk
RATIO_TARGET = 1.10
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
PACKAGES = ["numpy", "pandas", "datasets", "huggingface_hub"]


@dataclass(frozen=True)
class Case:
    """One model and its round.

    Args:
        config: Random weights of this configuration; None takes the embedded nano model.
        recipe: Makes the clients' model.
        clients: Number of clients.
        auxiliary_steps: Of a client's first stage.
        prompt_steps: Of its second stage.
        server_steps: Of the server.
    """

    config: dict[str, Any] | None
    recipe: Callable[[], AuxiliaryRecipe]
    clients: int
    auxiliary_steps: int
    prompt_steps: int
    server_steps: int


def _small() -> AuxiliaryRecipe:
    return TrimmedVocabulary(LowRank(rank=12, calibration_batches=0), num_tokens=512)


CASES = {
    "nano": Case(None, _small, 4, 0, 20, 10),
    "nano, auxiliary stage": Case(None, SharedCell, 4, 10, 10, 10),
    "98M": Case(GPT2, SharedCell, 2, 0, 2, 2),
}


def adamw(lr: float) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return a maker of AdamW without weight decay."""
    return lambda parameters: AdamW(parameters, lr=lr, weight_decay=0.0)


class Clocks(NamedTuple):
    """Seconds of the wall clock, waiting for the disk included, and of this process's CPU time."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> "Clocks":
        """Read both."""
        return Clocks(time.perf_counter(), time.process_time())

    def since(self) -> "Clocks":
        """Return what has gone by on each."""
        now = Clocks.now()
        return Clocks(now.wall - self.wall, now.cpu - self.cpu)


@dataclass
class Race(FederatedCallback):
    """Runs the bare round beside every round of a trainer and times both.

    Args:
        case: The round.
        bf16: Whether both autocast.
        rates: Learning rates of the bare loop; the run's own stages must have the same.
    """

    case: Case
    bf16: bool
    rates: dict[str, float] = field(default_factory=lambda: dict(RATES))
    seconds: dict[str, list[Clocks]] = field(default_factory=lambda: {"fedsp": [], "bare": []})
    difference: float = 0.0

    def on_fit_start(self, trainer: Any) -> None:
        """Read the models' weights, the texts and the prompt that both start from."""
        auxiliary, data, case = trainer.client.require_model()[0], trainer.data, self.case
        trains = case.auxiliary_steps > 0
        self.initial = prompt = trainer.server.payload()["soft_prompt"]
        models = [_read(trainer.server.require_model()[0]), _read(auxiliary.backbone)]
        if self.bf16:
            models = [cast_once(models[0]), models[1] if trains else cast_once(models[1])]
        texts = _texts(data.server_dataloader(start_step=0, num_steps=1))
        self.server = Party(models[0], *texts, prompt)
        self.clients = [
            Party(models[1], *_texts(self._loader(trainer, idx, 0, 1)), prompt, trains)
            for idx in range(case.clients)
        ]
        self.started: Clocks | None = None

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Sequence[int]) -> None:
        """Start fedsp's clock."""
        self.round_idx = round_idx
        self.started = Clocks.now()

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        """Stop fedsp's clock, run the same round bare and compare the prompts."""
        if self.started is None:
            return  # the checkpoint before the first round
        self.seconds["fedsp"].append(self.started.since())
        batches = self._batches(trainer)
        trainings = {name: Training(adamw(lr), bf16=self.bf16) for name, lr in self.rates.items()}
        started = Clocks.now()
        prompt = run_round(self.server, self.clients, batches, trainings)
        self.seconds["bare"].append(started.since())
        fedsp = trainer.server.payload()["soft_prompt"]
        self.difference = max(self.difference, (prompt - fedsp).abs().max().item())

    def _batches(self, trainer: Any) -> Batches:
        """Look up which examples fedsp's batches of this round hold."""
        case = self.case
        start = self.round_idx * (case.auxiliary_steps + case.prompt_steps)
        model = [
            _batches(self._loader(trainer, c, start, case.auxiliary_steps))
            for c in range(case.clients)
        ]
        start += case.auxiliary_steps
        prompt = [
            _batches(self._loader(trainer, c, start, case.prompt_steps))
            for c in range(case.clients)
        ]
        loader = trainer.data.server_dataloader(
            start_step=self.round_idx * case.server_steps, num_steps=case.server_steps
        )
        return Batches(model, prompt, _batches(loader))

    def _loader(self, trainer: Any, client_id: int, start: int, steps: int) -> Any:
        return trainer.data.client_dataloader(client_id, start_step=start, num_steps=steps)


def _read(backbone: Backbone) -> Gpt2:
    named = dict(backbone.model.named_parameters(remove_duplicate=False))
    vocabulary = backbone.vocabulary
    maps = () if vocabulary is None else (vocabulary.row_of.long(), vocabulary.kept.long())
    return read_gpt2(named, backbone.kv_shape.num_kv_heads, *maps)


def _texts(loader: Any) -> tuple[list[Tensor], list[int]]:
    examples = list(loader.dataset)
    texts = [torch.tensor(ex.prompt_ids + ex.completions[ex.answer]) for ex in examples]
    return texts, [len(ex.prompt_ids) for ex in examples]


def _batches(loader: Any) -> list[list[int]]:
    return [list(batch) for batch in loader.batch_sampler]


def race(case: Case, precision: str, rounds: int) -> Race:
    """Run fedsp and the bare loop for some rounds.

    Args:
        case: The round.
        precision: `fp32`, or `bf16`: weights of the global model and autocast.
        rounds: How many.
    """
    result = Race(case, precision == "bf16")
    fit(case, result, rounds, bf16=result.bf16)
    return result


def fit(case: Case, callback: FederatedCallback, rounds: int, *, bf16: bool = False) -> None:
    """Run fedsp as a user does, without evaluation.

    Args:
        case: The round.
        callback: Sees the run.
        rounds: How many.
        bf16: Whether the global model's weights and the arithmetic are bfloat16.
    """
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if bf16 else "float32"
    packages = PACKAGES[: case.clients]
    with tempfile.TemporaryDirectory() as folder:
        server = ServerModule(
            BackboneSpec(NANO, config=case.config, tokenizer=NANO, dtype=dtype),
            SoftPromptSpec(num_virtual_tokens=8, initializer=TextInit()),
            Stage(case.server_steps, adamw(RATES["server"])),
            case.recipe(),
        )
        client = ClientModule(
            Stage(case.auxiliary_steps, adamw(RATES["model"])),
            Stage(case.prompt_steps, adamw(RATES["prompt"])),
        )
        data = FederatedDataModule(
            Docstrings(packages, max_rows_per_package=100),
            PromptCompletion(),
            ByColumn("package"),
            server=Docstrings(["asyncio", "email", "json", "logging", "xml"], 12),
            selection=None,
            test=None,
            cache_dir="",
        )
        trainer = FederatedTrainer(
            accelerator="cpu",
            precision="bf16-mixed" if bf16 else "32-true",
            num_rounds=rounds,
            callbacks=[callback],
            run_dir=f"{folder}/run",
            enable_progress_bar=False,
        )
        trainer.fit(server, client, data)


def report(name: str, precision: str, result: Race) -> str:
    """Return a line of the table; the first round warms up and is left out."""
    if not result.difference <= TOLERANCE[precision]:
        raise SystemExit(f"{name} {precision}: the prompts differ by {result.difference:.3g}")
    fedsp, bare = (result.seconds[side][1:] for side in ("fedsp", "bare"))
    cells = [f"{name:22} {precision:4}"]
    for ours, theirs in zip(zip(*fedsp, strict=True), zip(*bare, strict=True), strict=True):
        ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
        cells.append(
            f"{statistics.median(ours):7.3f} {statistics.median(theirs):7.3f} "
            f"{statistics.median(ratios):6.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        )
    return " | ".join([*cells, f"{result.difference:.1e}"])


def figure(name: str, precision: str, result: Race) -> Figure:
    """Return the median ratio of CPU time; the first round warms up and is left out."""
    rounds = zip(result.seconds["fedsp"][1:], result.seconds["bare"][1:], strict=True)
    ratio = statistics.median(ours.cpu / theirs.cpu for ours, theirs in rounds)
    return Figure(f"round, CPU time, {name} {precision}: fedsp / bare loop", ratio, RATIO_TARGET)


def main() -> None:
    """Print a line for every model and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    parser.add_argument("--quick", action="store_true", help="nano only")
    parser.add_argument("--only", choices=CASES, help="one of the models")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [args.only] if args.only else ["nano"] if args.quick else list(CASES)
    precisions = ["fp32"] if args.quick and is_slow_at_bf16() else list(TOLERANCE)
    columns = "fedsp, bare, fedsp / bare [range]"
    print(f"a round: wall seconds of {columns} | CPU seconds of {columns} | difference", flush=True)
    figures = []
    for name in names:
        for precision in precisions:
            result = race(CASES[name], precision, args.rounds + 1)
            print(report(name, precision, result), flush=True)
            figures.append(figure(name, precision, result))
    for found in figures:
        print(found.line())


if __name__ == "__main__":
    main()
