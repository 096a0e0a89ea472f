"""How updates become the server's next payload: a mean or a robust rule, a server optimizer.

Axes: C updates of a round, N numbers of an update.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fedsp.messages import ClientUpdate
from fedsp.payload import Payload, Shapes, flatten, shapes_of, unflatten
from fedsp.robust import (
    clip_change,
    coordinate_median,
    krum_selection,
    num_trimmed,
    trimmed_mean,
)
from fedsp.stages import try_optimizer


class Aggregator(ABC):
    """Combines the updates of one round as they arrive.

    Attributes:
        min_updates: Fewest updates that the rule works on; a round with fewer keeps its prompt.
        requirement: Why it is that many, as an error says it.
    """

    min_updates: int = 1
    requirement: str = "a mean"

    def check(self, cohort_size: int) -> None:
        """Refuse a cohort that can never be combined, before any work.

        Args:
            cohort_size: Clients of a round; 0 combines nothing, and only the server trains.

        Raises:
            ValueError: If the rule needs more updates.
        """
        if 0 < cohort_size < self.min_updates:
            raise ValueError(
                f"`trainer.aggregator`: {self.requirement} needs at least {self.min_updates} "
                f"updates a round, the first cohort has {cohort_size} clients. Raise "
                "`trainer.sampler.clients_per_round` (or the number of clients), or change it."
            )

    @abstractmethod
    def reset(self, reference: Payload) -> None:
        """Forget everything of the last round.

        Args:
            reference: What the cohort starts from.
        """

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
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def reset(self, reference: Payload) -> None:
        """Forget everything of the last round."""
        self._sums, self._weight = {}, 0.0

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


class RobustRule(Aggregator):
    """A rule that has to see all updates of a round side by side, and so keeps them in memory.

    The number of examples that a client claims has no weight: it could be a lie.
    """

    def __init__(self) -> None:
        """Start without updates."""
        self._updates: list[Payload] = []

    def reset(self, reference: Payload) -> None:
        """Forget everything of the last round."""
        self._updates = []

    def add(self, update: ClientUpdate) -> None:
        """Keep one checked update."""
        self._updates.append(update.payload)

    def result(self) -> Payload:
        """Return the combined payload; see `Aggregator.result`."""
        if not self._updates:
            raise RuntimeError("expected at least one update to aggregate, got none")
        combined = self.combine(torch.stack([flatten(update) for update in self._updates]))
        return unflatten(combined.float(), shapes_of(self._updates[0]))

    @abstractmethod
    def combine(self, updates: Tensor) -> Tensor:
        """Combine a round's updates.

        Args:
            updates: [C, N] One update a row.

        Returns:
            [N].
        """


class CoordinateMedian(RobustRule):
    """Median of every number over the round's updates, which are all kept in memory.

    Source: Yin et al. 2018, arXiv 1803.01498.
    """

    def combine(self, updates: Tensor) -> Tensor:
        """Return the median of every column; see `fedsp.robust.coordinate_median`."""
        return coordinate_median(updates)


class TrimmedMean(RobustRule):
    """Mean of every number without its largest and smallest values over the round's updates.

    All updates of a round are kept in memory.

    Source: Yin et al. 2018, arXiv 1803.01498.
    """

    def __init__(self, trim_fraction: float = 0.2) -> None:
        """Choose how much is dropped.

        Args:
            trim_fraction: Share of the updates dropped at either end of every number, in
                (0, 0.5), rounded down to whole updates; at least the share of wrong clients.

        Raises:
            ValueError: If nothing or everything would be dropped.
        """
        super().__init__()
        if not 0 < trim_fraction < 0.5:
            raise ValueError(f"`trim_fraction` must be above 0 and below 0.5, got {trim_fraction}.")
        self.trim_fraction = trim_fraction
        # one update or so more than 1 / trim_fraction where that is no whole float
        fewest = int(1 / trim_fraction)
        while not num_trimmed(fewest, trim_fraction):
            fewest += 1
        self.min_updates = fewest
        self.requirement = f"TrimmedMean with `trim_fraction` {trim_fraction} (to drop one)"

    def combine(self, updates: Tensor) -> Tensor:
        """Return the trimmed mean of every column; see `fedsp.robust.trimmed_mean`."""
        return trimmed_mean(updates, self.trim_fraction)


class MultiKrum(RobustRule):
    """Mean of the updates that lie closest to their neighbours; all are kept in memory.

    Source: Blanchard et al. 2017, arXiv 1703.02757.
    """

    def __init__(self, num_malicious: int = 1, num_selected: int = 1) -> None:
        """Choose how many updates are distrusted, and how many are averaged.

        Args:
            num_malicious: f, updates of a round that may be wrong, at least 0. The round needs at
                least 2 f + 3.
            num_selected: m, updates that are averaged, at least 1; 1 is Krum. The round needs at
                least m + f + 2.

        Raises:
            ValueError: If a number is out of its range.
        """
        super().__init__()
        for name, number, low in (
            ("num_malicious", num_malicious, 0),
            ("num_selected", num_selected, 1),
        ):
            if number < low:
                raise ValueError(f"`{name}` must be at least {low}, got {number}.")
        self.num_malicious, self.num_selected = num_malicious, num_selected
        self.min_updates = max(2 * num_malicious + 3, num_selected + num_malicious + 2)
        self.requirement = (
            f"MultiKrum with `num_malicious` {num_malicious} and `num_selected` {num_selected} "
            "(2 num_malicious + 3, and num_selected + num_malicious + 2)"
        )

    def combine(self, updates: Tensor) -> Tensor:
        """Return the mean of the chosen rows; see `fedsp.robust.krum_selection`."""
        chosen = krum_selection(updates, self.num_malicious, self.num_selected)
        return updates[chosen].mean(dim=0, dtype=torch.float64)


class NormClipping(Aggregator):
    """Shortens every update's change to a norm and hands it to another rule.

    No client can pull further than that, and none is left out, as
    `trainer.communication.max_update_norm` would.
    """

    def __init__(self, max_norm: float, aggregator: Aggregator | None = None) -> None:
        """Choose the norm and the rule.

        Args:
            max_norm: Largest L2 norm of (update - broadcast), above 0; longer changes are
                shortened to it.
            aggregator: Combines the shortened updates; null averages them.

        Raises:
            ValueError: If `max_norm` is not above 0.
        """
        if not max_norm > 0:
            raise ValueError(f"`max_norm` must be above 0, got {max_norm}.")
        self.max_norm = max_norm
        self.aggregator = aggregator or StreamingMean()
        self.min_updates = self.aggregator.min_updates
        self.requirement = self.aggregator.requirement
        self._reference: Payload | None = None

    def reset(self, reference: Payload) -> None:
        """Forget everything of the last round and keep what changes are measured from."""
        self._reference = reference
        self.aggregator.reset(reference)

    def add(self, update: ClientUpdate) -> None:
        """Shorten one checked update and pass it on.

        Raises:
            RuntimeError: If no round was begun.
        """
        if self._reference is None:
            raise RuntimeError("expected the broadcast before an update; call `reset()` first")
        sent, came = flatten(self._reference), flatten(update.payload)
        clipped = clip_change(came, sent, self.max_norm).float()
        self.aggregator.add(replace(update, payload=unflatten(clipped, shapes_of(update.payload))))

    def result(self) -> Payload:
        """Return the combined payload; see `Aggregator.result`."""
        return self.aggregator.result()


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
            try_optimizer("trainer.server_optimizer", optimizer)
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
