"""How updates become one soft prompt: a streaming mean and a server optimizer.

Axes: the prefix is [L, 2, K, P, D].
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fedsp.messages import ClientUpdate


class Aggregator(ABC):
    """Combines the updates of one round as they arrive."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything of the last round."""

    @abstractmethod
    def add(self, update: ClientUpdate) -> None:
        """Take one checked update in."""

    @abstractmethod
    def result(self) -> Tensor:
        """Return the combined prefix, [L, 2, K, P, D] fp32.

        Raises:
            RuntimeError: If no update was added.
        """


class StreamingMean(Aggregator):
    """Mean of the updates as a running sum, so that memory does not grow with the cohort."""

    def __init__(self, weight_by_examples: bool = False) -> None:
        """Choose the weights.

        Args:
            weight_by_examples: Weigh each client by its number of examples; otherwise all count
                alike.
        """
        self.weight_by_examples = weight_by_examples
        self.reset()

    def reset(self) -> None:
        """Forget everything of the last round."""
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, update: ClientUpdate) -> None:
        """Take one checked update in."""
        weight = float(update.num_examples) if self.weight_by_examples else 1.0
        # float64: the sum of a thousand prompts must not depend on the order to fp32 accuracy
        weighted = update.prefix.to("cpu", torch.float64) * weight
        self._sum = weighted if self._sum is None else self._sum.add_(weighted)
        self._weight += weight

    def result(self) -> Tensor:
        """Return the mean prefix, [L, 2, K, P, D] fp32; see `Aggregator.result`."""
        if self._sum is None:
            raise RuntimeError("expected at least one update to aggregate, got none")
        return (self._sum / self._weight).float()


class ServerOptimizer:
    """Steps the server's prefix with any `torch.optim` class.

    The gradient it sees is the pseudo-gradient `old - aggregate`.

    Source: Reddi et al. 2021, arXiv 2003.00295, algorithm 2 (FedOpt).
    """

    def __init__(self, optimizer: OptimizerCallable | None) -> None:
        """Choose the optimizer.

        Args:
            optimizer: Called with a list of one parameter. None takes the aggregate as it is
                (FedAvg).

        Raises:
            ValueError: If torch refuses its settings.
        """
        if optimizer is not None:
            try:
                optimizer([torch.nn.Parameter(torch.zeros(1))])
            except (TypeError, ValueError) as error:
                raise ValueError(f"`trainer.server_optimizer` cannot be built: {error}") from error
        self._factory = optimizer
        self._optimizer: torch.optim.Optimizer | None = None
        self._prefix: torch.nn.Parameter | None = None

    def _build(self, shape: torch.Size) -> None:
        if self._factory is not None and self._optimizer is None:
            self._prefix = torch.nn.Parameter(torch.zeros(shape))
            self._optimizer = self._factory([self._prefix])

    def step(self, prefix: Tensor, aggregate: Tensor) -> Tensor:
        """Return the server's new prefix.

        Args:
            prefix: [L, 2, K, P, D] What was broadcast.
            aggregate: [L, 2, K, P, D] What the cohort made of it.

        Returns:
            [L, 2, K, P, D] fp32.
        """
        self._build(prefix.shape)
        if self._optimizer is None or self._prefix is None:
            return aggregate.clone()
        with torch.no_grad():
            self._prefix.copy_(prefix)
        self._prefix.grad = prefix.detach().float().cpu() - aggregate
        self._optimizer.step()
        return self._prefix.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, empty before the first step."""
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], shape: tuple[int, ...]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The saved state; empty leaves the optimizer fresh.
            shape: Shape of the prefix, (L, 2, K, P, D).
        """
        if state:
            self._build(torch.Size(shape))
            if self._optimizer is not None:
                self._optimizer.load_state_dict(state)
