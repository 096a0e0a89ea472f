"""The soft prompt: parameters, key/value form, initialisers, resizing between depths.

No model is run here and neither Lightning nor transformers is known.

Axis letters: P virtual tokens, L layers, K key/value heads, D head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """P virtual tokens' keys and values at every layer, as trainable float32 parameters.

    Only the key/value form travels, is averaged and is saved. With a reparameterisation the prompt
    is `base + (mlp(embedding) - origin)`, where `origin` is the network's output when `base` was
    loaded: a loaded prompt comes back bit for bit, and the network stays private to its owner.

    Source: Li and Liang 2021, arXiv 2101.00190, section 4.3 (the reparameterisation).
    """

    values: nn.Parameter
    base: Tensor
    origin: Tensor

    def __init__(
        self,
        kv_shape: tuple[int, int, int],
        num_virtual_tokens: int,
        *,
        dropout: float = 0.0,
        reparameterization_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start as zeros; `load_prefix` gives the prompt its first values.

        Args:
            kv_shape: (L, K, D) of the model that will read the prompt.
            num_virtual_tokens: P, at least 0; 0 is the model without a prompt.
            dropout: Probability in [0, 1) with which an entry of the prompt is dropped in training.
            reparameterization_size: Width of the two-layer tanh network that makes the prompt; None
                trains the keys and values themselves.
            generator: Source of the network's first weights; None draws from torch's global stream.

        Raises:
            ValueError: If an argument is out of its range.
        """
        super().__init__()
        _check_sizes(kv_shape)
        check_options("", num_virtual_tokens, dropout, reparameterization_size)
        num_layers, num_kv_heads, head_dim = kv_shape
        self.shape = (num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim)
        self.num_virtual_tokens = num_virtual_tokens
        self.dropout = dropout
        self.network: _PromptNetwork | None = None
        if reparameterization_size is None:
            self.values = nn.Parameter(torch.zeros(self.shape))
        else:
            self.network = _PromptNetwork(self.shape, reparameterization_size, generator)
            self.register_buffer("base", torch.zeros(self.shape))
            self.register_buffer("origin", self.network().detach().clone())

    def forward(self) -> Tensor:
        """Return the prompt as a model reads it.

        Returns:
            [L, 2, K, P, D] float32 keys and values; in training mode with dropout.
        """
        return F.dropout(self.dense(), self.dropout, training=self.training)

    def prefix(self) -> Tensor:
        """Return what travels.

        Returns:
            [L, 2, K, P, D] float32 copy without gradient and without dropout.
        """
        return self.dense().detach().clone()

    @torch.no_grad()
    def load_prefix(self, prefix: Tensor) -> None:
        """Become exactly `prefix`; trained parameters of the reparameterisation are kept.

        Args:
            prefix: [L, 2, K, P, D] keys and values of any float dtype.

        Raises:
            ValueError: If the shape is another one.
        """
        if tuple(prefix.shape) != self.shape:
            raise ValueError(
                f"a soft prompt of shape [L, 2, K, P, D] = {list(self.shape)} was expected, got "
                f"{list(prefix.shape)}. Load one made for this model and number of virtual tokens."
            )
        if self.network is None:
            self.values.copy_(prefix)
        else:
            self.base.copy_(prefix)
            self.origin.copy_(self.network())

    def dense(self) -> Tensor:
        """Return the prompt itself, with gradient and without dropout.

        Returns:
            [L, 2, K, P, D] float32.
        """
        if self.network is None:
            return self.values
        # The difference is exactly zero until the network is trained: no rounding of `base`.
        return self.base + (self.network() - self.origin)


class _PromptNetwork(nn.Module):
    """Two-layer tanh network over one embedding per virtual token."""

    def __init__(
        self, shape: tuple[int, int, int, int, int], size: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        num_layers, _, num_kv_heads, num_virtual_tokens, head_dim = shape
        self.per_token = (num_layers, 2, num_kv_heads, head_dim)
        width = num_layers * 2 * num_kv_heads * head_dim
        self.embedding = nn.Parameter(torch.empty(num_virtual_tokens, size))
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, width)
        with torch.no_grad():
            self.embedding.normal_(generator=generator)
            for linear in (self.hidden, self.output):
                bound = size**-0.5
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.zero_()

    def forward(self) -> Tensor:
        """Return [L, 2, K, P, D] float32, also inside autocast."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            flat = self.output(torch.tanh(self.hidden(self.embedding)))
        return flat.unflatten(1, self.per_token).permute(1, 2, 3, 0, 4)


class PromptInitializer(ABC):
    """How a prompt gets its first values."""

    @abstractmethod
    def __call__(
        self,
        kv_shape: tuple[int, int, int],
        num_virtual_tokens: int,
        generator: torch.Generator,
        keys_values: Callable[[Tensor], Tensor],
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Make the first prompt.

        Args:
            kv_shape: (L, K, D) of the model that will read the prompt.
            num_virtual_tokens: P, at least 0.
            generator: The only source of random numbers.
            keys_values: Runs the model: [1, P] int64 token ids to [L, 2, K, P, D] keys and values.
            sample_ids: Token ids of a piece of text of the task.

        Returns:
            [L, 2, K, P, D] float32 prompt.
        """


class NormalInit(PromptInitializer):
    """Independent normal entries around zero."""

    def __init__(self, std: float = 0.02) -> None:
        """Keep the spread.

        Args:
            std: Standard deviation of every entry, at least 0.

        Raises:
            ValueError: If `std` is negative.
        """
        if std < 0:
            raise ValueError(f"`std` of NormalInit must be at least 0, got {std}.")
        self.std = std

    def __call__(
        self,
        kv_shape: tuple[int, int, int],
        num_virtual_tokens: int,
        generator: torch.Generator,
        keys_values: Callable[[Tensor], Tensor],
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Draw the prompt from `generator`; see `PromptInitializer`."""
        shape = _prefix_shape(kv_shape, num_virtual_tokens)
        return torch.randn(shape, generator=generator, device=generator.device) * self.std


class ZerosInit(PromptInitializer):
    """Zero keys and values: every virtual token is a place of score zero that says nothing."""

    def __call__(
        self,
        kv_shape: tuple[int, int, int],
        num_virtual_tokens: int,
        generator: torch.Generator,
        keys_values: Callable[[Tensor], Tensor],
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Return zeros; see `PromptInitializer`."""
        return torch.zeros(_prefix_shape(kv_shape, num_virtual_tokens))


class TextInit(PromptInitializer):
    """Keys and values of real tokens: the prompt starts as a text that the model has read."""

    def __call__(
        self,
        kv_shape: tuple[int, int, int],
        num_virtual_tokens: int,
        generator: torch.Generator,
        keys_values: Callable[[Tensor], Tensor],
        sample_ids: Sequence[int],
    ) -> Tensor:
        """Run the model over the first P of `sample_ids`, repeated where there are fewer.

        Raises:
            ValueError: If there is no token to start from.
        """
        if num_virtual_tokens == 0:
            return torch.zeros(_prefix_shape(kv_shape, 0))
        if len(sample_ids) == 0:
            raise ValueError(
                "TextInit needs at least one token of text to start the prompt from, got none. "
                "Give it a text (`data.server`, `data.public` or `data.selection`), or choose "
                "NormalInit or ZerosInit for `model.soft_prompt.initializer`."
            )
        ids = [sample_ids[i % len(sample_ids)] for i in range(num_virtual_tokens)]
        return keys_values(torch.tensor([ids], dtype=torch.long)).float()


def pool_layers(prefix: Tensor, slots: Sequence[Sequence[int]]) -> Tensor:
    """Make the prompt that a model of other depth reads.

    Args:
        prefix: [L, 2, K, P, D] prompt of the global model.
        slots: Global layers whose slots each of the other model's layers stands for; it reads
            their mean.

    Returns:
        [len(slots), 2, K, P, D].

    Raises:
        ValueError: If a layer is out of range or named twice.
    """
    _check_slots(slots, len(prefix))
    return torch.stack([prefix[list(group)].mean(dim=0) for group in slots])


def spread_layers(small: Tensor, slots: Sequence[Sequence[int]], full: Tensor) -> Tensor:
    """Put the slots of a model of other depth back to where `pool_layers` took them from.

    Args:
        small: [len(slots), 2, K, P, D] slots to write, each to all layers of its group.
        slots: Global layers of each of them.
        full: [L, 2, K, P, D] prompt whose other layers stay as they are; it is not changed.

    Returns:
        [L, 2, K, P, D] new prompt.

    Raises:
        ValueError: If a layer is out of range or named twice, or the shapes do not fit.
    """
    _check_slots(slots, len(full))
    expected = (len(slots), *full.shape[1:])
    if tuple(small.shape) != expected:
        raise ValueError(
            f"prompt slots of shape {list(expected)} were expected, got {list(small.shape)}."
        )
    targets = [layer for group in slots for layer in group]
    origins = [index for index, group in enumerate(slots) for _ in group]
    return full.index_copy(0, torch.tensor(targets, device=full.device), small[origins])


def _prefix_shape(
    kv_shape: tuple[int, int, int], num_virtual_tokens: int
) -> tuple[int, int, int, int, int]:
    num_layers, num_kv_heads, head_dim = kv_shape
    return num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim


def _check_slots(slots: Sequence[Sequence[int]], num_layers: int) -> None:
    layers = [layer for group in slots for layer in group]
    if any(not 0 <= layer < num_layers for layer in layers) or not all(slots):
        raise ValueError(
            f"slots must stay in [0, {num_layers - 1}] for {num_layers} layers, got {list(slots)}."
        )
    if len(set(layers)) != len(layers):
        raise ValueError(f"slots must name every layer at most once, got {list(slots)}.")


def _check_sizes(kv_shape: tuple[int, int, int]) -> None:
    if min(kv_shape) < 1:
        raise ValueError(f"`kv_shape` must be three positive sizes (L, K, D), got {kv_shape}.")


def check_options(
    owner: str, num_virtual_tokens: int, dropout: float, reparameterization_size: int | None
) -> None:
    """Check what a user sets of a prompt, before there is a model.

    Args:
        owner: What stands before the names in a message, such as `client.`.
        num_virtual_tokens: P.
        dropout: Probability.
        reparameterization_size: Width of the network, or None.

    Raises:
        ValueError: If a number is out of its range.
    """
    if num_virtual_tokens < 0:
        raise ValueError(
            f"`{owner}num_virtual_tokens` must be at least 0, got {num_virtual_tokens}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"`{owner}dropout` of the soft prompt must be in [0, 1), got {dropout}.")
    if reparameterization_size is not None and reparameterization_size < 1:
        raise ValueError(
            f"`{owner}reparameterization_size` must be at least 1, or null for none, got "
            f"{reparameterization_size}."
        )
