"""Who takes part in a round: a function of seed and round, so that all processes agree unasked."""

from abc import ABC, abstractmethod

import torch

from fedsp.seeding import stream

SECRET_BITS = 64


class ClientSampler(ABC):
    """Chooses the cohort of a round."""

    @abstractmethod
    def cohort(self, num_clients: int, *, seed: int, round_idx: int) -> list[int]:
        """Return the clients of a round.

        Args:
            num_clients: Clients in the population.
            seed: The run's seed.
            round_idx: 0-based communication round.

        Returns:
            Distinct client ids in ascending order.
        """


class UniformSampler(ClientSampler):
    """Draws clients uniformly without replacement."""

    def __init__(self, clients_per_round: int | None = None) -> None:
        """Set the size of the cohort.

        Args:
            clients_per_round: Clients of a round; null takes all of them, 0 none (the server trains
                alone).

        Raises:
            ValueError: If the number is negative.
        """
        if clients_per_round is not None and clients_per_round < 0:
            raise ValueError(
                f"`trainer.sampler.clients_per_round` must be at least 0, got {clients_per_round}."
            )
        self.clients_per_round = clients_per_round

    def cohort(self, num_clients: int, *, seed: int, round_idx: int) -> list[int]:
        """Return the clients of a round; see `ClientSampler.cohort`.

        Raises:
            ValueError: If more clients are wanted than there are.
        """
        size = num_clients if self.clients_per_round is None else self.clients_per_round
        if size > num_clients:
            raise ValueError(
                f"`trainer.sampler.clients_per_round` must be in [0, num_clients={num_clients}], "
                f"got {size}. Lower it or raise `data.partitioner.num_clients`."
            )
        generator = stream(seed, "cohort", round_idx=round_idx)
        return sorted(torch.randperm(num_clients, generator=generator)[:size].tolist())


class SingleClient(ClientSampler):
    """The same client in every round: what one party reaches alone."""

    def __init__(self, client_id: int | None = None) -> None:
        """Choose the client.

        Args:
            client_id: Index of the client; null draws one with the run's seed.
        """
        self.client_id = client_id

    def cohort(self, num_clients: int, *, seed: int, round_idx: int) -> list[int]:
        """Return the client; see `ClientSampler.cohort`.

        Raises:
            ValueError: If there is no such client.
        """
        if self.client_id is None:
            generator = stream(seed, "single_client")
            return [int(torch.randint(num_clients, (1,), generator=generator))]
        if not 0 <= self.client_id < num_clients:
            raise ValueError(
                f"`trainer.sampler.client_id` must be in [0, {num_clients - 1}] for {num_clients} "
                f"clients, got {self.client_id}."
            )
        return [self.client_id]


def check_secret_cohorts(sampler: ClientSampler, seed: int) -> None:
    """Refuse amplification of noise where the cohorts are no secret uniform samples.

    Args:
        sampler: The trainer's.
        seed: The run's seed, from which the cohorts follow.

    Raises:
        ValueError: If the sampler is another one, or the seed can be guessed.
    """
    if type(sampler) is not UniformSampler:
        raise ValueError(
            "`trainer.privacy.amplification` sampling needs fedsp.sampling.UniformSampler, got "
            f"{type(sampler).__name__}. Set it to none."
        )
    if seed.bit_length() < SECRET_BITS:
        raise ValueError(
            "`trainer.privacy.amplification` sampling needs a `trainer.seed` that nobody can "
            f"guess, of at least {SECRET_BITS} bits, got {seed}: the cohorts follow from it. Make "
            'one by `python -c "import secrets; print(secrets.randbits(127))"` and keep it to '
            "yourself, or set amplification to none."
        )
