"""Memory of each of two processes that share a global model, against one that holds it whole.

Run: OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py

Loads a GPT-2 of 103 M random weights from files and makes three prompt steps, forward and backward,
in one process and in two, started as a run starts them. Prints the bytes of parameters that one
holds between steps, and the peak of its memory in the steps beside what the libraries take. Linux
only: the peak is sampled from /proc. Freed memory is given back at once: what the C library's
allocator keeps would hide what is held.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from figure import Figure
from lightning.fabric import Fabric
from memory import status

from fedsp.backbone import Backbone, load_backbone
from fedsp.memory_probe import tensor_bytes
from fedsp.pretrained import BackboneSpec, hide_loading_bar

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 4096,
    "n_embd": 512,
    "n_layer": 32,
    "n_head": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMALL = {"vocab_size": 128, "n_embd": 32, "n_layer": 1}
RANKS, NUM_VIRTUAL_TOKENS, TOKENS = 2, 20, 32
NUM_STEPS, SAMPLE_SECONDS = 3, 0.002
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
# half, and what does not divide evenly
HELD_TARGET = 0.55
MEASURES = ("parameters held", "peak in a prompt step")


def steps(backbone: Backbone) -> None:
    """Make prompt steps, forward and backward."""
    num_layers, num_heads, head_dim = backbone.kv_shape
    prefix = torch.zeros(num_layers, 2, num_heads, NUM_VIRTUAL_TOKENS, head_dim, requires_grad=True)
    ids = torch.arange(TOKENS)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for _ in range(NUM_STEPS):
        logits, targets, _ = backbone.label_logits(batch, prefix)
        F.cross_entropy(logits, targets).backward()


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """Note the process's memory in kB at a block's start and every few milliseconds in it."""
    seen, done = [status("VmRSS")], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            seen.append(status("VmRSS"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def measure(folder: str, ranks: int) -> None:
    """Make a step as one of some processes; the first prints the largest bytes as JSON."""
    warnings.simplefilter("ignore")
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    # a small model first: it makes the libraries load what they need
    steps(load_backbone(BackboneSpec(f"{folder}/small", sharded=ranks > 1)))
    before = status("VmRSS")
    backbone = load_backbone(BackboneSpec(f"{folder}/large", sharded=ranks > 1))
    with most_memory() as seen:
        steps(backbone)
    held = tensor_bytes([*backbone.model.parameters()])
    mine = torch.tensor([held, 1024 * (max(seen) - before)], dtype=torch.float64)
    largest = fabric.all_gather(mine).reshape(-1, len(mine)).amax(0)
    if fabric.is_global_zero:
        print(json.dumps(largest.tolist()))


def run(folder: str, ranks: int) -> list[float]:
    """Return the largest bytes of any of some processes, in the order of `MEASURES`."""
    words = [sys.executable, __file__, folder, str(ranks)]
    environment = {**os.environ, **GIVE_BACK}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
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
