"""Client-level differential privacy of what travels: noise at the server, or at every client.

A client's whole share in a round, its change of the payload over all tensors together, is shortened
to a norm and hidden by Gaussian noise.
"""

import json
import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedsp.accounting import Accountant, check_budget, require_accounting
from fedsp.aggregation import Aggregator, StreamingMean
from fedsp.clipping import Clipping, noised_change
from fedsp.noise import NoiseSource
from fedsp.payload import Payload
from fedsp.private_mean import PrivateMean
from fedsp.ranks import Ranks
from fedsp.sampling import ClientSampler, check_secret_cohorts
from fedsp.state_files import write_text_atomically

ACCOUNTANT = "dp-accounting, Renyi differential privacy"
_NEIGHBOURS = {
    "none": "one client's changes, all of them, are there or zero; who takes part is known",
    "sampling": "one client is replaced by another; who takes part is secret",
}


class CentralPrivacy:
    """Noise at the server: whoever sees the prompts learns next to nothing of a single client.

    The server itself sees every update. Takes the place of `trainer.aggregator`, which has to be
    the plain mean.

    Source: McMahan et al. 2018, arXiv 1710.06963, with a fixed divisor.
    """

    def __init__(
        self,
        noise_multiplier: float,
        clipping: Clipping,
        delta: float,
        max_epsilon: float | None = None,
        amplification: Literal["none", "sampling"] = "none",
        noise_seed: int | None = None,
    ) -> None:
        """Choose noise and budget.

        Args:
            noise_multiplier: Standard deviation of the noise on the sum of the clipped changes, in
                units of the clipping norm, above 0.
            clipping: How long a client's change may be: fedsp.clipping.FixedClipping or
                fedsp.clipping.AdaptiveClipping.
            delta: The delta at which epsilon is told, in (0, 1); well below 1 / number of clients.
            max_epsilon: The run ends before the round that would cost more; null never ends it.
            amplification: `none` counts every round of a client as if all knew that it took part.
                `sampling` takes into account that nobody knows: with fedsp.sampling.UniformSampler
                and a secret `trainer.seed`, for clients that are replaced, not left out.
            noise_seed: For tests only: noise that can be drawn again protects nobody. Null takes
                the operating system's randomness.

        Raises:
            ValueError: If a number is out of its range.
        """
        check_budget("trainer.privacy", noise_multiplier, delta, max_epsilon)
        self.noise_multiplier, self.clipping, self.delta = noise_multiplier, clipping, delta
        self.max_epsilon, self.amplification = max_epsilon, amplification
        self._noise = NoiseSource(noise_seed)
        self._is_repeatable = noise_seed is not None
        self._participations: Counter[int] = Counter()
        self._attempts: Counter[int] = Counter()
        self._cohort: tuple[int, Sequence[int]] = (0, ())
        self._ranks, self._path = Ranks(), Path()
        self._started: tuple[Accountant, PrivateMean] | None = None

    # --- before the first round -------------------------------------------------------------------

    def check(
        self,
        *,
        aggregator: Aggregator,
        min_updates: int,
        sampler: ClientSampler,
        seed: int,
        sizes: tuple[int, int],
    ) -> None:
        """Refuse a run that would not be private, before any work.

        Args:
            aggregator: The trainer's.
            min_updates: `trainer.communication.min_updates`.
            sampler: The trainer's.
            seed: The run's seed, from which the cohorts follow.
            sizes: Clients of the first cohort and of the population.

        Raises:
            ModuleNotFoundError: If dp-accounting is not installed.
            ValueError: If the run cannot be made private, or its budget does not last for a round.
        """
        cohort_size, num_clients = sizes
        if type(aggregator) is not StreamingMean or aggregator.weight_by_examples:
            raise ValueError(
                "`trainer.privacy` takes the place of `trainer.aggregator`, which must be null or "
                f"StreamingMean with `weight_by_examples: false`, got {type(aggregator).__name__}: "
                "the noise is right for the plain mean only."
            )
        if min_updates != 1:
            raise ValueError(
                "`trainer.communication.min_updates` must be 1 with `trainer.privacy`, got "
                f"{min_updates}: whether a round takes its step must not depend on the updates."
            )
        if not cohort_size:
            raise ValueError(
                "`trainer.privacy` hides clients' updates, and a round has none. Set it to null, "
                "or raise `trainer.sampler.clients_per_round`."
            )
        if self.amplification == "sampling":
            check_secret_cohorts(sampler, seed)
        self.clipping.check(self.noise_multiplier, cohort_size)
        require_accounting("trainer.privacy")
        accountant = self._make_accountant(*sizes)
        if not accountant.most_releases(self.max_epsilon):
            raise ValueError(
                f"`trainer.privacy.max_epsilon` must be at least {accountant.epsilon(1):.4g}, "
                f"which one round costs at delta {self.delta:.4g}, got {self.max_epsilon}. Raise "
                "it, or `trainer.privacy.noise_multiplier`."
            )
        if self.delta * num_clients > 1:
            warnings.warn(
                f"`trainer.privacy.delta` {self.delta:.4g} is above 1 / {num_clients} clients: "
                "that allows to give away one of them altogether",
                stacklevel=2,
            )
        _warn_if_repeatable("trainer.privacy", self._is_repeatable)

    def start(self, cohort_size: int, num_clients: int, ranks: Ranks, path: Path) -> None:
        """Get ready for the first round.

        Args:
            cohort_size: m, clients of the first cohort.
            num_clients: Clients of the population.
            ranks: The first one draws the noise and writes the file.
            path: File of the budget, which no checkpoint takes back; it may not exist yet.
        """
        mean = PrivateMean(self.clipping, self.noise_multiplier, cohort_size, self._release)
        self._started = self._make_accountant(cohort_size, num_clients), mean
        self._ranks, self._path = ranks, path
        if path.exists():
            self._count_at_least(json.loads(path.read_text()))

    def _make_accountant(self, cohort_size: int, num_clients: int) -> Accountant:
        if self.amplification == "none":
            return Accountant(self.noise_multiplier, self.delta)
        # one client in the place of another moves the sum by twice the norm
        sampled = (cohort_size, num_clients)
        return Accountant(self.noise_multiplier / 2, self.delta, sampled)

    # --- in the rounds ----------------------------------------------------------------------------

    def begin(self, round_idx: int, cohort: Sequence[int]) -> PrivateMean:
        """Return what combines a round's updates.

        Args:
            round_idx: 0-based communication round.
            cohort: Client ids; all of them pay, whether they answer or not.
        """
        self._cohort = (round_idx, cohort)
        return self.mean

    def affords(self, round_idx: int, cohort: Sequence[int]) -> bool:
        """Whether a round with such a cohort stays within the budget."""
        counts = self._attempts + Counter([round_idx]), self._participations + Counter(cohort)
        return self.max_epsilon is None or self._epsilon(*counts) <= self.max_epsilon

    @property
    def mean(self) -> PrivateMean:
        """What combines the updates, once the run has been started."""
        return self._require()[1]

    @property
    def epsilon(self) -> float:
        """What has been spent so far."""
        return self._epsilon(self._attempts, self._participations)

    @property
    def releases(self) -> int:
        """Rounds that count so far for the client who has the most of them."""
        return self._releases(self._attempts.total(), self._participations)

    def planned(
        self, cohorts: Sequence[Sequence[int]], sizes: tuple[int, int]
    ) -> tuple[int, int, float]:
        """Return how many rounds with such cohorts are paid for, their releases and their epsilon.

        Args:
            cohorts: Of all rounds from the first one on.
            sizes: Clients of the first cohort and of the population.
        """
        accountant = self._make_accountant(*sizes)
        drawn = accumulate(map(Counter, cohorts), initial=Counter[int]())
        releases = [self._releases(rounds, each) for rounds, each in enumerate(drawn)]
        rounds = bisect_right(releases, accountant.most_releases(self.max_epsilon)) - 1
        return rounds, releases[rounds], accountant.epsilon(releases[rounds])

    def metrics(self) -> dict[str, float]:
        """Return the round's figures; the clipped fraction is the server's own, without noise."""
        mean = self.mean
        metrics = {"privacy/epsilon": self.epsilon, "privacy/clip_norm": mean.used_norm}
        if math.isfinite(mean.clipped_fraction):
            metrics["privacy/clipped_fraction"] = mean.clipped_fraction
        return metrics

    def report(self) -> dict[str, Any]:
        """Return what was spent, and what that figure assumes."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "max_epsilon": self.max_epsilon,
            "noise_multiplier": self.noise_multiplier,
            "clipping": type(self.clipping).__name__,
            "clip_norm": self.clipping.norm,
            "releases": self.releases,
            "amplification": self.amplification,
            "neighbours": _NEIGHBOURS[self.amplification],
            "accountant": ACCOUNTANT,
            "repeatable_noise": self._is_repeatable,
        }

    def _releases(self, rounds: int, participations: Counter[int]) -> int:
        most = max(participations.values(), default=0)
        return rounds if self.amplification == "sampling" else most

    def _epsilon(self, attempts: Counter[int], participations: Counter[int]) -> float:
        accountant = self._require()[0]
        if self.amplification == "sampling":
            # a round that is done again has the same cohort: no fresh sample
            return accountant.epsilon_of(Counter(attempts.values()))
        return accountant.epsilon(self._releases(attempts.total(), participations))

    def _release(self, count: int) -> Tensor:
        """Pay for a round, on disk before any noise is drawn, and return the noise."""
        round_idx, cohort = self._cohort
        self._attempts[round_idx] += 1
        self._participations.update(cohort)
        self._write()
        own = b""
        if self._ranks.rank == 0:
            own = self._noise.draw(count, round_idx=round_idx).numpy().tobytes()
        return torch.frombuffer(bytearray(self._ranks.of_first(own)), dtype=torch.float64)

    def _require(self) -> tuple[Accountant, PrivateMean]:
        if self._started is None:
            raise RuntimeError("expected a started run; call `start()` first")
        return self._started

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what has been spent, and the clipping's state."""
        return {**self._counts(), "clipping": self.clipping.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, but for the budget that was spent since then."""
        self.clipping.load_state_dict(state["clipping"])
        self._count_at_least(state)
        self._write()

    def _counts(self) -> dict[str, Any]:
        counts = {"rounds": self._attempts, "participations": self._participations}
        return {name: {str(key): n for key, n in count.items()} for name, count in counts.items()}

    def _count_at_least(self, counts: Mapping[str, Any]) -> None:
        self._attempts |= _by_number(counts["rounds"])
        self._participations |= _by_number(counts["participations"])

    def _write(self) -> None:
        text = json.dumps(self._counts()) + "\n"
        self._ranks.on_first(write_text_atomically, self._path, text)


def _by_number(counts: Mapping[str, int]) -> Counter[int]:
    return Counter({int(key): count for key, count in counts.items()})


class LocalPrivacy:
    """Noise at the client: not even the server learns much of a single client's data.

    The client's change is shortened and noised before it is encoded, and its number of examples is
    told as 1. Every client pays for its own answers, and sits out when its budget is spent.
    """

    def __init__(
        self,
        noise_multiplier: float,
        clip_norm: float,
        delta: float,
        max_epsilon: float | None = None,
        noise_seed: int | None = None,
    ) -> None:
        """Choose noise and budget.

        Args:
            noise_multiplier: Standard deviation of the noise on every number, in units of
                `clip_norm`, above 0.
            clip_norm: Largest L2 norm of a client's change over all tensors, above 0; longer
                changes are shortened to it.
            delta: The delta at which epsilon is told, in (0, 1).
            max_epsilon: A client does not answer any more when this would cost more; null lets it
                answer always.
            noise_seed: For tests only: noise that can be drawn again protects nobody. Null takes
                the operating system's randomness.

        Raises:
            ValueError: If a number is out of its range.
        """
        check_budget("client.privacy", noise_multiplier, delta, max_epsilon)
        if not 0 < clip_norm < math.inf:
            raise ValueError(f"`client.privacy.clip_norm` must be above 0, got {clip_norm}.")
        self.noise_multiplier, self.clip_norm, self.delta = noise_multiplier, clip_norm, delta
        self.max_epsilon = max_epsilon
        self._noise = NoiseSource(noise_seed)
        self._is_repeatable = noise_seed is not None

    def check(self) -> None:
        """Refuse a budget that does not last for an answer, before any work.

        Raises:
            ModuleNotFoundError: If dp-accounting is not installed.
            ValueError: If it does not.
        """
        require_accounting("client.privacy")
        if not self.affords(0):
            raise ValueError(
                f"`client.privacy.max_epsilon` must be at least {self.epsilon(1):.4g}, which one "
                f"answer costs at delta {self.delta:.4g}, got {self.max_epsilon}. Raise it, or "
                "`client.privacy.noise_multiplier`."
            )
        _warn_if_repeatable("client.privacy", self._is_repeatable)

    @cached_property
    def _accountant(self) -> Accountant:
        # two data sets that a client could have lie up to twice the norm apart
        return Accountant(self.noise_multiplier / 2, self.delta)

    def epsilon(self, answers: int) -> float:
        """Return what a client has spent that answered so many times."""
        return self._accountant.epsilon(answers)

    def affords(self, answers: int) -> bool:
        """Whether a client that answered so many times may do so once more."""
        return answers < self._accountant.most_releases(self.max_epsilon)

    def privatize(
        self, payload: Payload, reference: Payload, *, round_idx: int, client_id: int
    ) -> Payload:
        """Return what may leave the client.

        Args:
            payload: What the client made of the reference.
            reference: What it received.
            round_idx: 0-based communication round.
            client_id: Who.
        """
        size = sum(tensor.numel() for tensor in payload.values())
        noise = self._noise.draw(size, round_idx=round_idx, client_id=client_id)
        scale = self.noise_multiplier * self.clip_norm
        return noised_change(payload, reference, self.clip_norm, scale * noise)

    def report(self, answers: int) -> dict[str, Any]:
        """Return what the client with the most answers has spent, and what that assumes."""
        return {
            "epsilon": self.epsilon(answers),
            "delta": self.delta,
            "max_epsilon": self.max_epsilon,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "releases": answers,
            "amplification": "none",
            "neighbours": "any two data sets that one client could have",
            "accountant": ACCOUNTANT,
            "repeatable_noise": self._is_repeatable,
        }


def _warn_if_repeatable(option: str, is_repeatable: bool) -> None:
    if is_repeatable:
        warnings.warn(
            f"`{option}.noise_seed` is set: THE NOISE CAN BE DRAWN AGAIN AND PROTECTS NOBODY, "
            "whatever epsilon says. Set it to null outside of tests",
            stacklevel=3,
        )
