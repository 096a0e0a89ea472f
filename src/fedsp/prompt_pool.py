"""Soft prompts that the auxiliary model learns to read as the global model reads them.

Axes: L layers, K key/value heads, P virtual tokens, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptPool:
    """Which prompts stand before the public texts during the initial distillation.

    Args:
        share: Share of the batches with a prompt, in (0, 1].
        rounds: The pool holds the initial prompt and those that the server's own training makes of
            it in so many rounds, on its own data.
        texts: So many public texts' keys and values are in the pool, too.
        noise: Standard deviation of what is added to a drawn prompt, as a share of its root mean
            square in each layer's keys and values.
    """

    share: float = 1.0
    rounds: int = 8
    texts: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If a number is out of its range.
        """
        where = "model.initial_distillation.prompts"
        if not 0 < self.share <= 1:
            raise ValueError(f"`{where}.share` must be in (0, 1], got {self.share}.")
        for name in ("rounds", "texts", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{where}.{name}` must be at least 0, got {getattr(self, name)}.")

    def draw(self, prompts: Sequence[Tensor], generator: torch.Generator) -> Tensor | None:
        """Draw a prompt: a point between two of the pool, with noise.

        Args:
            prompts: The pool, each [L, 2, K, P, D].
            generator: The only source of random numbers, on the CPU.

        Returns:
            [L, 2, K, P, D], or None where the batch is to be read without one.
        """
        chance, place = torch.rand(2, generator=generator).tolist()
        if chance >= self.share:
            return None
        first, second = torch.randint(len(prompts), (2,), generator=generator).tolist()
        prompt = torch.lerp(prompts[first], prompts[second], place)
        noise = torch.randn(prompt.shape, generator=generator).to(prompt.device)
        scale = prompt.pow(2).mean(dim=(2, 3, 4), keepdim=True).sqrt()
        return prompt + self.noise * scale * noise
