"""Measure what a prompt step costs in time and memory where activations are not simply kept.

Run: OMP_NUM_THREADS=1 python benchmarks/bench_activations.py [--repeats 5] [--tokens 256]

Three ways: keep the activations, compute them again in the backward pass
(`model.backbone.gradient_checkpointing`), and move them to the host's memory, as
`torch.autograd.graph.save_on_cpu` does. Moving needs a GPU to mean anything: without one only the
first two are measured. The prompt's gradients are compared first; the ways take turns.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from figure import against
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from turns import take_turns

from fedsp.backbone import Backbone, load_backbone
from fedsp.losses import token_cross_entropy
from fedsp.memory_probe import LiveTensors
from fedsp.pretrained import BackboneSpec

BATCH, NUM_VIRTUAL_TOKENS, LABELS = 4, 40, 16
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
Keep = Callable[[], AbstractContextManager[object]]


def gradient(backbone: Backbone, prefix: Tensor, batch: dict[str, Tensor], keep: Keep) -> Tensor:
    """Return the prompt's gradient of one step."""
    with keep():
        logits, targets, _ = backbone.label_logits(batch, prefix)
        loss = token_cross_entropy(logits, targets).mean()
    found = torch.autograd.grad(loss, prefix)[0]
    if found.is_cuda:
        torch.cuda.synchronize()
    return found


def peak_bytes(run: Callable[[], Tensor], device: torch.device) -> int:
    """Return the most memory that one step takes beyond what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with LiveTensors() as live:
        run()
    return live.peak_bytes


def main() -> None:
    """Compare the gradients, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = load_backbone(BackboneSpec(config=CONFIG)).to(device)
    again = Backbone(kept.model, replace(kept.spec, gradient_checkpointing=True))
    num_layers, num_heads, head_dim = kept.kv_shape
    prefix = torch.randn(num_layers, 2, num_heads, NUM_VIRTUAL_TOKENS, head_dim, device=device)
    prefix = (prefix * 0.1).requires_grad_()
    ids = torch.randint(CONFIG["vocab_size"], (BATCH, args.tokens), device=device)
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    ways = {
        "kept": lambda: gradient(kept, prefix, batch, nullcontext),
        "computed again": lambda: gradient(again, prefix, batch, nullcontext),
    }
    if device.type == "cuda":
        ways["moved to the host"] = lambda: gradient(
            kept, prefix, batch, lambda: save_on_cpu(pin_memory=True)
        )
    wanted = ways["kept"]()
    for name, run in ways.items():
        torch.testing.assert_close(run(), wanted, msg=f"{name}: another gradient")
    memory = {name: peak_bytes(run, device) for name, run in ways.items()}
    medians = take_turns(ways, args.repeats)
    print(f"{BATCH} texts of {args.tokens} tokens, {num_layers} layers on {device}")
    for name, num_bytes in memory.items():
        print(f"  {name}: {num_bytes / 1e6:.0f} MB")
    for figure in against("prompt step, activations", {"time": medians, "memory": memory}, "kept"):
        print(figure.line())


if __name__ == "__main__":
    main()
