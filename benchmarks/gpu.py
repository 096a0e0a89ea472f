"""What fedsp gets out of a GPU: numerics, the bare loop beside it, utilisation and memory.

Run: python benchmarks/gpu.py [--json PATH] [--only OPT-1.3B] [--batch_sizes 1 4 16]

1. Numerics: logits, prompt gradients and a few prompt steps of small models on the device, in fp32
   and bf16, against the same on the CPU in fp32.
2. Speed: the server's prompt steps, the clients' prompt steps and their auxiliary stage, on models
   of the sizes of OPT-1.3B and GPT2-XL with random weights (`gpu_sides.py`), 1,024 tokens a row of
   which the last 128 are labels, P = 40, bf16. Each stage runs as in a round of fedsp and, in
   turns with it, in the plain PyTorch of `bare_loop.py`, from the same weights and on the same
   batches. Printed for every batch size: tokens of text a second, the ratio of the two times, the
   needed operations a second (`gpu_flops.py` says how they are counted) as a share of the device's
   data sheet and of a large matrix product measured here, and the peak of allocated memory (the
   global model included in the clients' stages, too: a simulation holds both).

"same" is the cosine between what the two sides changed, 1 if the work is the same up to rounding;
below 0.9 the script ends with an error. Without a GPU everything runs through on the CPU in tiny
sizes, to show that it works; those are no figures of a GPU.
"""

import argparse
import json
import logging
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_flops import StageName, peak_flops, step_flops
from gpu_sides import (
    PUBLISHED,
    Architecture,
    BareSide,
    Batch,
    FedspSide,
    Text,
    load,
    sgd,
    step_sizes,
)
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.losses import token_cross_entropy

STAGES: tuple[StageName, ...] = ("server prompt", "client prompt", "client auxiliary")
# largest norm of a difference, relative to that of what is compared; bf16 has 8 bits, and a ReLU
# near 0 passes a gradient or does not
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.15}
SAME_WORK = 0.9


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Args:
        architectures: Models of the speed runs, by name.
        batch_sizes: Rows of a batch.
        tokens: T.
        labels: Label positions a row.
        num_virtual_tokens: P.
        steps: Of one timed run.
        repeats: Timed runs of each side, after one that warms up.
        matmul: Side of the square matrices whose product is measured.
    """

    architectures: dict[str, Architecture]
    batch_sizes: Sequence[int]
    tokens: int
    labels: int
    num_virtual_tokens: int
    steps: int
    repeats: int
    matmul: int


GPU_PLAN = Plan(PUBLISHED, (1, 2, 4, 8, 16), 1_024, 128, 40, 5, 3, 8_192)
TINY = {
    "OPT, tiny": Architecture("opt", 4, 4, 128, 512),
    "GPT-2, tiny": Architecture("gpt2", 4, 4, 128, 512),
}
CPU_PLAN = Plan(TINY, (1, 4), 64, 16, 8, 3, 3, 512)
SMALLEST = {
    "OPT, tiny": Architecture("opt", 2, 2, 32, 64),
    "GPT-2, tiny": Architecture("gpt2", 2, 2, 32, 64),
}
SMALLEST_PLAN = Plan(SMALLEST, (2,), 16, 4, 4, 2, 1, 64)


@dataclass(frozen=True)
class Row:
    """What one model, stage and batch size gave; seconds and memory are None where it did not fit.

    Args:
        model: Name of the architecture.
        stage: What was trained.
        batch_size: B.
        fedsp_seconds: Median of a step in fedsp.
        bare_seconds: Median of a step in the bare loop.
        flops: Operations that a step needs.
        tokens: Tokens of text a step.
        peak_bytes: Most memory allocated while fedsp ran; None on the CPU.
        same: Cosine between what the two sides changed.
    """

    model: str
    stage: StageName
    batch_size: int
    flops: int
    tokens: int
    fedsp_seconds: float | None = None
    bare_seconds: float | None = None
    peak_bytes: int | None = None
    same: float | None = None


def wait_for(fabric: Fabric) -> None:
    """Wait until the device has done all that it was given."""
    if fabric.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(fabric: Fabric, work: Callable[[], Any]) -> float:
    """Return the wall time of some work on the device."""
    wait_for(fabric)
    started = time.perf_counter()
    work()
    wait_for(fabric)
    return time.perf_counter() - started


def describe(fabric: Fabric) -> str:
    """Return the device's name, with what `nvidia-smi` says of it."""
    if fabric.device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = "without nvidia-smi"
    return f"{torch.cuda.get_device_name()} (nvidia-smi: {said}), torch {torch.__version__}"


def matmul_flops(fabric: Fabric, size: int) -> float:
    """Return the operations a second of a large square product in bf16, the best of some runs."""
    left = fabric.to_device(torch.randn(size, size, dtype=torch.bfloat16))
    runs = [seconds_of(fabric, lambda: left @ left) for _ in range(10)]
    return 2 * size**3 / min(runs)


# --- numerics -------------------------------------------------------------------------------------


def measure_numerics(
    architecture: Architecture, fabric: Fabric, batches: list[Batch], num_virtual_tokens: int
) -> dict[str, Tensor]:
    """Return on the CPU: logits and prompt gradient of a batch, and the prompt after some steps."""
    backbone, prefix = load(architecture, num_virtual_tokens, fabric, "float32")
    leaf = fabric.to_device(prefix).requires_grad_(True)
    with fabric.autocast():
        logits, targets, _ = backbone.label_logits(fabric.to_device(batches[0]), leaf)
        loss = token_cross_entropy(logits, targets).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    side = FedspSide(fabric, backbone, prefix, "server prompt", len(batches), sgd)
    side.run(batches)
    measured = {"logits": logits, "prompt gradient": gradient}
    measured["prompt steps"] = side.trained() - side.initial
    return {name: tensor.detach().float().cpu() for name, tensor in measured.items()}


def check_numerics(accelerator: str) -> list[dict[str, Any]]:
    """Compare the device with the CPU in fp32.

    Returns:
        A record for each model and precision, with relative differences and whether they are small.
    """
    records = []
    on_cpu = Fabric(accelerator="cpu", devices=1, precision="32-true")
    for name, architecture in TINY.items():
        batches = Text(4, 64, 16).draw(architecture.vocabulary, 5, seed=0)
        expected = measure_numerics(architecture, on_cpu, batches, 8)
        for precision, tolerance in TOLERANCE.items():
            fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
            got = measure_numerics(architecture, fabric, batches, 8)
            differences = {
                part: float((got[part] - tensor).norm() / tensor.norm())
                for part, tensor in expected.items()
            }
            is_close = max(differences.values()) <= tolerance
            records.append(
                {"model": name, "precision": precision, "close": is_close, **differences}
            )
            parts = ", ".join(f"{part} {value:.1e}" for part, value in differences.items())
            verdict = "ok" if is_close else f"MORE THAN {tolerance}"
            print(f"  {name:12} {precision:11} {parts}: {verdict}", flush=True)
    return records


# --- speed ----------------------------------------------------------------------------------------


def peak_bytes(side: FedspSide, batches: list[Batch]) -> int | None:
    """Return the most memory allocated while fedsp runs without the bare loop; None on the CPU."""
    if side.fabric.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    side.run(batches)
    return torch.cuda.max_memory_allocated()


def race(plan: Plan, name: str, stage: StageName, batch_size: int, loaded: Any) -> Row:
    """Time a stage in fedsp and in the bare loop.

    Args:
        plan: Sizes.
        name: Architecture.
        stage: Which stage.
        batch_size: B.
        loaded: Fabric, backbone and prompt.
    """
    fabric, backbone, prefix = loaded
    architecture, text = plan.architectures[name], Text(batch_size, plan.tokens, plan.labels)
    sizes = step_sizes(architecture, text, plan.num_virtual_tokens)
    empty = Row(name, stage, batch_size, step_flops(sizes, stage), batch_size * plan.tokens)
    warm_up, *timed = (
        text.draw(architecture.vocabulary, plan.steps, seed=repeat)
        for repeat in range(plan.repeats + 1)
    )
    seconds: dict[str, list[float]] = {"fedsp": [], "bare": []}
    try:
        peak = peak_bytes(FedspSide(fabric, backbone, prefix, stage, plan.steps), warm_up)
        ours = FedspSide(fabric, backbone, prefix, stage, plan.steps)
        sides: dict[str, FedspSide | BareSide] = {"fedsp": ours, "bare": BareSide(ours, bf16=True)}
        for side in sides.values():
            side.run(warm_up)
        for batches in timed:
            for key, side in sides.items():
                taken = seconds_of(fabric, partial(side.run, batches))
                seconds[key].append(taken / plan.steps)
        change = [(side.trained() - ours.initial).flatten() for side in sides.values()]
        same = float(F.cosine_similarity(*change, dim=0))
    except torch.OutOfMemoryError:
        return empty
    medians = {f"{key}_seconds": statistics.median(taken) for key, taken in seconds.items()}
    return Row(**asdict(empty) | medians | {"peak_bytes": peak, "same": same})


def show(row: Row, peak: float | None, matmul: float) -> str:
    """Return a line of the table."""
    head = f"  {row.model:12} {row.stage:16} {row.batch_size:3}"
    if row.fedsp_seconds is None or row.bare_seconds is None or row.same is None:
        return f"{head}  out of memory"
    rate = row.flops / row.fedsp_seconds
    of_peak = f"{rate / peak:7.1%}" if peak else f"{'-':>7}"
    memory = f"{row.peak_bytes / 2**30:6.1f}" if row.peak_bytes else f"{'-':>6}"
    ratio = row.fedsp_seconds / row.bare_seconds
    return (
        f"{head} {row.tokens / row.fedsp_seconds:10,.0f} {ratio:7.3f} {rate / 1e12:8.2f} "
        f"{of_peak} {rate / matmul:7.1%} {memory} {row.same:6.3f}"
    )


def run(plan: Plan, accelerator: str, peak: float | None) -> dict[str, Any]:
    """Measure all and print it on the way.

    Args:
        plan: Sizes.
        accelerator: `cuda` or `cpu`.
        peak: Operations a second of the data sheet; None looks the device up.

    Returns:
        All that was measured.
    """
    fabric = Fabric(accelerator=accelerator, devices=1, precision="bf16-mixed")
    device = describe(fabric)
    print(device)
    if accelerator == "cpu":
        print("no CUDA GPU here: tiny models on the CPU. These are no figures of a GPU.")
    print("numerics, relative to the CPU in fp32:", flush=True)
    numerics = check_numerics(accelerator)
    peak = peak or (peak_flops(device) if accelerator == "cuda" else None)
    matmul = matmul_flops(fabric, plan.matmul)
    sheet = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown (--peak_tflops)"
    print(f"bf16 peak by data sheet: {sheet}; a product measured here: {matmul / 1e12:.2f} TFLOP/s")
    print(f"speed at {plan.tokens} tokens, {plan.labels} labels, P = {plan.num_virtual_tokens}:")
    print(
        f"  {'model':12} {'stage':16} {'B':>3} {'tokens/s':>10} {'/ bare':>7} {'TFLOP/s':>8} "
        f"{'MFU':>7} {'of prod':>7} {'GiB':>6} {'same':>6}",
        flush=True,
    )
    rows = []
    for name, architecture in plan.architectures.items():
        loaded = (fabric, *load(architecture, plan.num_virtual_tokens, fabric, "bfloat16"))
        for stage in STAGES:
            for batch_size in plan.batch_sizes:
                rows.append(race(plan, name, stage, batch_size, loaded))
                print(show(rows[-1], peak, matmul), flush=True)
        del loaded
    measured = {"device": device, "is_gpu": accelerator == "cuda", "peak_flops": peak}
    measured |= {"matmul_flops": matmul, "numerics": numerics}
    return measured | {"plan": asdict(plan), "speed": [asdict(row) for row in rows]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; a difference that is too large ends in an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    parser.add_argument("--only", choices=PUBLISHED, help="one of the models, on a GPU")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="rows of a batch")
    parser.add_argument("--peak_tflops", type=float, help="of a device that is not in the table")
    parser.add_argument("--cpu", action="store_true", help="the CPU mode, even beside a GPU")
    parser.add_argument("--smallest", action="store_true", help="the CPU mode, as a test has it")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    on_gpu = torch.cuda.is_available() and not (args.cpu or args.smallest)
    plan = GPU_PLAN if on_gpu else SMALLEST_PLAN if args.smallest else CPU_PLAN
    settings = asdict(plan) | {"architectures": plan.architectures}
    if on_gpu and args.only:
        settings["architectures"] = {args.only: PUBLISHED[args.only]}
    settings["batch_sizes"] = args.batch_sizes or plan.batch_sizes
    peak = args.peak_tflops * 1e12 if args.peak_tflops else None
    measured = run(Plan(**settings), "cuda" if on_gpu else "cpu", peak)
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=2) + "\n")
    differs = [record for record in measured["numerics"] if not record["close"]]
    differs += [
        row for row in measured["speed"] if row["same"] is not None and row["same"] < SAME_WORK
    ]
    if differs:
        raise SystemExit(f"not the same numbers on both sides: {differs}")


if __name__ == "__main__":
    main()
