"""Measure a large vocabulary's loss computed in chunks of positions against all of it at once.

Run: OMP_NUM_THREADS=1 python benchmarks/bench_cross_entropy.py [--repeats 5] [--labels 256]

The head and the cross-entropy of one prompt step over a vocabulary of 262,144 tokens, backward to
the hidden states, as the server computes it: logits at label positions only. In chunks, each
chunk's logits are computed again in the backward pass, so that those of one chunk are there at a
time. The gradients are compared first; the ways take turns.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from figure import against
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from turns import take_turns

from fedsp.losses import token_cross_entropy
from fedsp.memory_probe import LiveTensors

VOCABULARY, WIDTH = 262_144, 640
CHUNKS = (16, 64)


def gradient(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
    """Return the gradient of the mean loss with respect to the hidden states.

    Args:
        hidden: [N, E] At label positions.
        head: [V, E], frozen.
        targets: [N] Token ids.
        chunk: Positions a chunk; None takes all at once.
    """

    def summed(part: Tensor, of_part: Tensor) -> Tensor:
        return token_cross_entropy(F.linear(part, head), of_part).sum()

    if chunk is None:
        loss = summed(hidden, targets)
    else:
        parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        losses = [checkpoint(summed, *part, use_reentrant=False) for part in parts]
        loss = torch.stack(losses).sum()
    return torch.autograd.grad(loss / len(targets), hidden)[0]


def main() -> None:
    """Compare the gradients, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--labels", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(args.labels, WIDTH, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH) * WIDTH**-0.5
    targets = torch.randint(VOCABULARY, (args.labels,))
    chunks = {"at once": None, **{f"in chunks of {size}": size for size in CHUNKS}}
    ways = {name: partial(gradient, hidden, head, targets, size) for name, size in chunks.items()}
    wanted = ways["at once"]()
    memory = {}
    for name, run in ways.items():
        with LiveTensors() as live:
            torch.testing.assert_close(run(), wanted, msg=f"{name}: another gradient")
        memory[name] = live.peak_bytes
    medians = take_turns(ways, args.repeats)
    print(f"{args.labels} label positions, {VOCABULARY} tokens")
    for name, num_bytes in memory.items():
        print(f"  {name}: {num_bytes / 1e6:.0f} MB")
    for figure in against(
        "loss over a large vocabulary,", {"time": medians, "memory": memory}, "at once"
    ):
        print(figure.line())


if __name__ == "__main__":
    main()
