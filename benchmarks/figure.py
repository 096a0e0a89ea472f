"""The line by which a benchmark tells `table.py` a figure; nothing is measured here."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

PREFIX = "figure: "


@dataclass(frozen=True)
class Figure:
    """A ratio and what it should be.

    Args:
        name: What is compared with what.
        ratio: The ratio that was measured.
        at_most: The target; None where there is none.
    """

    name: str
    ratio: float
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the target is met; a figure without one cannot miss it."""
        return self.at_most is None or self.ratio <= self.at_most

    def line(self) -> str:
        """Return the line that `read_figures` reads."""
        return PREFIX + json.dumps(asdict(self))


def against(
    title: str, measured: Mapping[str, Mapping[str, float]], reference: str
) -> list[Figure]:
    """Return the ratios of every way to one of them.

    Args:
        title: What is done in these ways.
        measured: By what was measured, the value of every way.
        reference: The way that the others are compared with.
    """
    return [
        Figure(f"{title} {way} / {reference}: {what}", value / values[reference])
        for what, values in measured.items()
        for way, value in values.items()
        if way != reference
    ]


def read_figures(output: str) -> list[Figure]:
    """Return the figures in a script's output, in their order."""
    lines = [line for line in output.splitlines() if line.startswith(PREFIX)]
    return [Figure(**json.loads(line.removeprefix(PREFIX))) for line in lines]
