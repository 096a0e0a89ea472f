"""How updates become the server's next payload: a streaming mean and a server optimizer."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fedsp.messages import ClientUpdate
from fedsp.payload import Payload, Shapes, shapes_of


class Aggregator(ABC):
    """Combines the updates of one round as they arrive."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything of the last round."""

    @abstractmethod
    def add(self, update: ClientUpdate) -> None:
        """Take one checked update in."""

    @abstractmethod
    def result(self) -> Payload:
        """Return the combined payload in fp32.

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
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, update: ClientUpdate) -> None:
        """Take one checked update in."""
        weight = float(update.num_examples) if self.weight_by_examples else 1.0
        for name, tensor in update.payload.items():
            # float64: the sum of a thousand prompts must not depend on the order to fp32 accuracy
            weighted = tensor.to("cpu", torch.float64) * weight
            self._sums[name] = self._sums[name].add_(weighted) if name in self._sums else weighted
        self._weight += weight

    def result(self) -> Payload:
        """Return the mean; see `Aggregator.result`."""
        if not self._weight:
            raise RuntimeError("expected at least one update to aggregate, got none")
        return {name: (total / self._weight).float() for name, total in self._sums.items()}


class ServerOptimizer:
    """Steps what the server tunes with any `torch.optim` class.

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
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def _build(self, shapes: Shapes) -> None:
        if self._factory is not None and self._optimizer is None:
            # in the order of the names: the state of a resumed run is told apart by place
            self._parameters = {
                name: torch.nn.Parameter(torch.zeros(shapes[name])) for name in sorted(shapes)
            }
            self._optimizer = self._factory(self._parameters.values())

    def step(self, payload: Payload, aggregate: Payload) -> Payload:
        """Return what the server tunes from here.

        Args:
            payload: What was broadcast.
            aggregate: What the cohort made of it.

        Returns:
            float32 tensors of its own.
        """
        self._build(shapes_of(payload))
        if self._optimizer is None:
            return {name: tensor.clone() for name, tensor in aggregate.items()}
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(payload[name])
            parameter.grad = payload[name].detach().float().cpu() - aggregate[name]
        self._optimizer.step()
        return {name: it.detach().clone() for name, it in self._parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, empty before the first step."""
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], shapes: Shapes) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The saved state; empty leaves the optimizer fresh.
            shapes: Shape of every tensor of the payload.
        """
        if state:
            self._build(shapes)
            if self._optimizer is not None:
                self._optimizer.load_state_dict(state)
