"""Sides that take turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def take_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 0
) -> dict[str, float]:
    """Return the median seconds of each side.

    Args:
        sides: What is timed, by name; it has to wait for a device by itself.
        repeats: Timed turns of each.
        warm_up: Turns of each before these.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm_up + repeats):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[warm_up:]) for name, values in seconds.items()}
