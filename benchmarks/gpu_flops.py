"""How many floating-point operations a training step needs, and how many a device can do.

**What is counted.** Matrix products only, two operations (multiply, add) for each pair of numbers;
norms, activations, softmax, loss and optimizer are left out, and so is what is computed in vain:
padding, logits where no label is, key positions that a token does not see. A program that does
more than the maths needs gets a lower utilisation for it.

- Forward, for each token: 2 for every weight of the layers. Attention: 4 E for each layer and each
  pair of a token and a key that it sees, the P virtual ones and the text up to itself. The head:
  2 V E for each label.
- Backward through the activations: as much as forward, but twice as much for the attention, whose
  two products both have two gradients.
- Backward into the weights: as much again for every weight that is trained. **Frozen weights have
  no gradient**: a prompt step costs 2 passes over the weights and not 3, on the server as on a
  client, and a rate of `6 x parameters x tokens` would overstate what was done by half.
- In a prompt step nothing below the first layer's keys and values wants a gradient: the products
  of its query, key and value projections have none, nor have its queries.

A shared cell is computed once a layer and counts once a layer.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, E embedding size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

StageName = Literal["server prompt", "client prompt", "client auxiliary"]

# Dense bf16 operations a second without sparsity, from the makers' data sheets. The first name
# that is part of the device's name counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a model and of a batch without padding.

    Args:
        num_layers: L.
        width: E.
        inner: Width of the MLP.
        vocabulary: V.
        batch: B.
        tokens: T.
        num_virtual_tokens: P.
        labels: Label positions a row.
    """

    num_layers: int
    width: int
    inner: int
    vocabulary: int
    batch: int
    tokens: int
    num_virtual_tokens: int
    labels: int

    @property
    def seen_pairs(self) -> int:
        """Pairs of a token and a key that it sees, in one layer."""
        text = self.tokens * (self.tokens + 1) // 2
        return self.batch * (self.tokens * self.num_virtual_tokens + text)


def step_flops(sizes: StepSizes, stage: StageName, pairs: int | None = None) -> int:
    """Return the operations of one training step, forward and backward.

    Args:
        sizes: Of model and batch.
        stage: What is trained: a prompt, or the layers behind a fixed prompt.
        pairs: Pairs of tokens and keys in a layer; None: those that are seen.
    """
    pairs = sizes.seen_pairs if pairs is None else pairs
    num_tokens, width = sizes.batch * sizes.tokens, sizes.width
    weights = sizes.num_layers * (4 * width**2 + 2 * width * sizes.inner)
    products = 2 * num_tokens * weights
    attention = 4 * sizes.num_layers * pairs * width
    head = 2 * sizes.batch * sizes.labels * sizes.vocabulary * width
    total = 2 * (products + head) + 3 * attention
    if stage == "client auxiliary":
        return total + products
    return total - 2 * num_tokens * 3 * width**2 - 2 * pairs * width


def peak_flops(device_name: str) -> float | None:
    """Return the data sheet's operations a second, None for a device that is not in the table."""
    found = (flops for name, flops in PEAK_FLOPS.items() if name in device_name)
    return next(found, None)
