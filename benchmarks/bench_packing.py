"""Time prompt steps whose texts share rows behind a block mask, against padding every text's row.

Run: OMP_NUM_THREADS=1 python benchmarks/bench_packing.py [--repeats 5] [--width 256]

Packing saves what padding costs, so it is measured twice: against batches drawn at random, and
against batches of texts of similar length, as fedsp makes them (`data.batching.length_grouping`).
The texts are definition lines of installed packages. Every text is computed as if it were alone in
each case; the losses are compared first. Prints ratios of medians within this run; the sides take
turns.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from figure import Figure
from torch import Tensor
from turns import take_turns

from fedsp.backbone import Backbone, load_backbone
from fedsp.batching import Batching, StepBatches
from fedsp.collate import collate
from fedsp.examples import Example
from fedsp.losses import token_cross_entropy
from fedsp.pretrained import BackboneSpec, load_tokenizer
from fedsp.sources import Docstrings

NUM_VIRTUAL_TOKENS, NUM_TEXTS, MAX_TOKENS = 20, 192, 128
# a row may be so many times as long as the batch's longest text: 2 was best of 1, 2 and 4
ROW_PER_LONGEST = 2
PAD = 0
Batch = dict[str, Tensor]


def read_texts() -> list[list[int]]:
    """Return the token ids of texts, each of two tokens or more."""
    tokenizer = load_tokenizer(BackboneSpec("fedsp://docstring-nano"))
    rows = Docstrings(["numpy", "torch"], NUM_TEXTS // 2).load()
    texts = [f"{row['prompt']}{row['completion']}" for row in rows]
    return [ids[:MAX_TOKENS] for ids in tokenizer(texts)["input_ids"] if len(ids) > 1]


def pad(texts: Sequence[list[int]]) -> Batch:
    """Put every text into a row of its own; each token but its first is to be predicted."""
    return collate([Example(ids[:1], [ids[1:]], 0, [1]) for ids in texts], PAD)


def pack(texts: Sequence[list[int]]) -> Batch:
    """Put as many texts into a row as fit, the longest first."""
    longest = max(map(len, texts))
    rows: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        size = len(texts[index])
        fits = (at for at, used in enumerate(filled) if used + size <= ROW_PER_LONGEST * longest)
        row = next(fits, None)
        if row is None:
            row = len(rows)
            rows.append([])
            filled.append(0)
        rows[row].append(index)
        filled[row] += size
    ids = torch.full((len(rows), max(filled)), PAD)
    owner = torch.full_like(ids, -1)
    for at, members in enumerate(rows):
        start = 0
        for index in members:
            end = start + len(texts[index])
            ids[at, start:end] = torch.tensor(texts[index])
            owner[at, start:end] = index
            start = end
    is_answer = torch.ones(len(texts), dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": (owner >= 0).long(), "choice": owner} | {
        "is_answer": is_answer
    }


def step(backbone: Backbone, prefix: Tensor, batches: Sequence[Batch]) -> float:
    """Run forward and backward passes and return the sum of the losses."""
    total = 0.0
    for batch in batches:
        # texts behind one soft prompt see it and themselves, as choices without a question do
        run = backbone.choice_logits if "choice" in batch else backbone.label_logits
        logits, targets, _ = run(batch, prefix)
        loss = token_cross_entropy(logits, targets).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def main() -> None:
    """Compare the losses, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    config = {
        "model_type": "llama",
        "vocab_size": 16_384,
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": 12,
        "num_attention_heads": args.width // 32,
    }
    backbone = load_backbone(BackboneSpec(config=config))
    num_layers, num_heads, head_dim = backbone.kv_shape
    prefix = torch.randn(num_layers, 2, num_heads, NUM_VIRTUAL_TOKENS, head_dim) * 0.1
    prefix.requires_grad_()
    texts = read_texts()
    lengths = np.array([len(ids) for ids in texts])
    print(
        f"{len(texts)} texts of {lengths.mean():.0f} tokens, standard deviation {lengths.std():.0f}"
    )
    sides = {}
    for order, grouped in (("random", False), ("grouped", True)):
        drawn = StepBatches(lengths, Batching(length_grouping=grouped), seed=0, owner="client")
        chosen = [[texts[index] for index in batch] for batch in drawn]
        for name, make in (("padded", pad), ("packed", pack)):
            batches = [make(batch) for batch in chosen]
            cells = sum(batch["input_ids"].numel() for batch in batches)
            print(f"  {order}, {name}: {1 - lengths.sum() / cells:.1%} padding")
            sides[f"{order}, {name}"] = partial(step, backbone, prefix, batches)
    losses = {name: run() for name, run in sides.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4 * min(losses.values()):
        raise SystemExit(f"the sides do not compute the same: {losses}")
    medians = take_turns(sides, args.repeats)
    for one, other in (
        ("random, packed", "random, padded"),
        ("grouped, padded", "random, padded"),
        ("grouped, packed", "grouped, padded"),
    ):
        print(Figure(f"prompt steps: {one} / {other}", medians[one] / medians[other]).line())


if __name__ == "__main__":
    main()
