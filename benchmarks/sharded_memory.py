"""Memory of each of two processes that share a global model, against one that holds it whole.

Run: OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py

Loads a GPT-2 of 34 M random weights from files and makes one prompt step, forward and backward, in
one process and in two, started as a run starts them. Prints the bytes of parameters that a process
holds between steps, and the peak of its memory beside the libraries. Linux only: the peak comes
from /proc.
"""

import json
import subprocess
import sys
import tempfile
import warnings

import torch
import torch.nn.functional as F
from figure import Figure
from lightning.fabric import Fabric
from memory import status

from fedsp.backbone import load_backbone
from fedsp.pretrained import BackboneSpec, hide_loading_bar
from fedsp.shards import own_bytes

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 16_384,
    "n_embd": 512,
    "n_layer": 8,
    "n_head": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMALL = {"vocab_size": 128, "n_embd": 32, "n_layer": 1}
RANKS, NUM_VIRTUAL_TOKENS, TOKENS = 2, 20, 64
# half, and what does not divide evenly
HELD_TARGET = 0.55
MEASURES = ("parameters held", "peak of the process")


def step(folder: str, sharded: bool) -> int:
    """Load a model, make one prompt step and return the bytes of parameters held after it."""
    backbone = load_backbone(BackboneSpec(folder, sharded=sharded))
    num_layers, num_heads, head_dim = backbone.kv_shape
    prefix = torch.zeros(num_layers, 2, num_heads, NUM_VIRTUAL_TOKENS, head_dim, requires_grad=True)
    ids = torch.arange(TOKENS)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    logits, targets, _ = backbone.label_logits(batch, prefix)
    F.cross_entropy(logits, targets).backward()
    return own_bytes(backbone.model)


def measure(folder: str, ranks: int) -> None:
    """Make a step as one of some processes; the first prints the largest bytes as JSON."""
    warnings.simplefilter("ignore")
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    # a small model first: it makes the libraries load what they need
    step(f"{folder}/small", ranks > 1)
    before = status("VmRSS")
    held = step(f"{folder}/large", ranks > 1)
    mine = torch.tensor([held, 1024 * (status("VmHWM") - before)], dtype=torch.float64)
    largest = fabric.all_gather(mine).reshape(-1, len(mine)).amax(0)
    if fabric.is_global_zero:
        print(json.dumps(largest.tolist()))


def run(folder: str, ranks: int) -> list[float]:
    """Return the largest bytes of any of some processes, in the order of `MEASURES`."""
    words = [sys.executable, __file__, folder, str(ranks)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    largest: list[float] = json.loads(done.stdout.splitlines()[-1])
    return largest


def main() -> None:
    """Measure both sides and print the ratios."""
    hide_loading_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, config in {"large": CONFIG, "small": {**CONFIG, **SMALL}}.items():
            load_backbone(BackboneSpec(config=config)).model.save_pretrained(f"{folder}/{name}")
        whole, divided = run(folder, 1), run(folder, RANKS)
    for name, one, other in zip(MEASURES, whole, divided, strict=True):
        print(f"{name}: {one / 1e6:.1f} MB alone, {other / 1e6:.1f} MB each of {RANKS}")
    for name, one, other, target in zip(MEASURES, whole, divided, (HELD_TARGET, 1.0), strict=True):
        print(Figure(f"sharded, a rank of {RANKS} / alone: {name}", other / one, target).line())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main()
