"""How much of a step the server takes: as much as its own measurement bears out."""

import math
from collections.abc import Sequence
from itertools import islice

from lightning.fabric import Fabric

from fedsp.data import FederatedDataModule
from fedsp.evaluation_loops import evaluate
from fedsp.payload import Payload
from fedsp.server import ServerModule


class Acceptance:
    """A line search along what the cohort made of the broadcast, and what the server makes of that.

    Clients with a small auxiliary model pull the prompt towards what suits that model: a help at
    first and a hindrance near the end. A server with few examples learns them by heart. The global
    model on the selection split tells what helps.
    """

    def __init__(
        self,
        fractions: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
        num_batches: int | None = None,
        server_training: bool = False,
    ) -> None:
        """Choose the points of the search.

        Args:
            fractions: Shares of the step that are measured, in [0, 1]; of equals the first wins.
            num_batches: Batches of the selection split that each is measured on; null takes all.
            server_training: Search along what the server's own steps of a round made of the prompt,
                too.

        Raises:
            ValueError: If a fraction lies outside [0, 1], none is given, or `num_batches` is below
                1.
        """
        if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(
                "`trainer.acceptance.fractions` must be numbers in [0, 1], at least one, got "
                f"{list(fractions)}."
            )
        if num_batches is not None and num_batches < 1:
            raise ValueError(
                f"`trainer.acceptance.num_batches` must be at least 1 or null, got {num_batches}."
            )
        self.fractions, self.num_batches = tuple(fractions), num_batches
        self.server_training = server_training

    def check(self, data: FederatedDataModule) -> None:
        """Refuse data that nothing can be measured on.

        Raises:
            ValueError: If there is no selection split.
        """
        if not data.num_examples("selection"):
            raise ValueError(
                "`trainer.acceptance` measures on the selection split, but `data.selection` is "
                "null. Give one, or set `trainer.acceptance` to null."
            )

    def choose(
        self,
        fabric: Fabric,
        server: ServerModule,
        data: FederatedDataModule,
        before: Payload,
        after: Payload,
    ) -> tuple[Payload, float]:
        """Measure every point and return the one with the lowest loss.

        Args:
            fabric: Where to run.
            server: Measures; it is left with the last point loaded.
            data: Gives the selection split.
            before: Where the step starts.
            after: Where it would lead.

        Returns:
            The chosen payload and its fraction of the step; `before` and 0 where no point has a
            finite loss.
        """
        server.eval()
        points = []
        for fraction in self.fractions:
            payload = {name: before[name].lerp(after[name], fraction) for name in before}
            server.load_payload(payload)
            batches = islice(data.val_dataloader(), self.num_batches)
            loss = evaluate(fabric, server.validation_step, batches)["loss"]
            if math.isfinite(loss):
                points.append((loss, payload, fraction))
        # a step that diverged leads nowhere, not even at fraction 0: 0 * NaN is NaN
        if not points:
            return before, 0.0
        _, payload, fraction = min(points, key=lambda point: point[0])
        return payload, fraction
