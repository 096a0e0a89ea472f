"""Noise at the server and at the clients, and what it costs by dp-accounting alone."""

from typing import Any

import dp_accounting
from dp_accounting import rdp

from fedsp.clipping import FixedClipping
from fedsp.privacy import CentralPrivacy, LocalPrivacy

DELTA = 1e-2
SECRET = 2**100 + 7


def central(**options: Any) -> CentralPrivacy:
    defaults = {"noise_multiplier": 1.0, "clipping": FixedClipping(0.1), "delta": DELTA}
    return CentralPrivacy(**{**defaults, **options})


def local(**options: Any) -> LocalPrivacy:
    return LocalPrivacy(
        **{"noise_multiplier": 4.0, "clip_norm": 0.1, "delta": DELTA, **options}  # type: ignore[arg-type]
    )


def by_hand(noise_multiplier: float, releases: int) -> float:
    """Epsilon of a repeated Gaussian release, by dp-accounting alone."""
    accountant = rdp.RdpAccountant()
    for _ in range(releases):
        accountant.compose(dp_accounting.GaussianDpEvent(noise_multiplier))
    return float(accountant.get_epsilon(DELTA))
