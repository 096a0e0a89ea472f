from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsp.opening import participations
from fedsp.sampling import ClientSampler, SingleClient, UniformSampler
from tiny import make_trainer


def test_every_client_takes_part_by_default() -> None:
    assert UniformSampler().cohort(5, seed=0, round_idx=3) == [0, 1, 2, 3, 4]


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    sampler = UniformSampler(clients_per_round=3)
    cohorts = [sampler.cohort(10, seed=0, round_idx=r) for r in range(20)]
    assert cohorts == [sampler.cohort(10, seed=0, round_idx=r) for r in range(20)]
    assert len({tuple(cohort) for cohort in cohorts}) > 10
    assert cohorts != [sampler.cohort(10, seed=1, round_idx=r) for r in range(20)]
    assert all(len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in cohorts)


def test_clients_are_drawn_uniformly() -> None:
    sampler = UniformSampler(clients_per_round=3)
    counts = Counter(c for r in range(2000) for c in sampler.cohort(10, seed=0, round_idx=r))
    # binomial(2000, 0.3): mean 600, standard deviation 20.5; five deviations
    assert all(abs(counts[client] - 600) < 103 for client in range(10))


def test_no_clients_at_all_are_allowed() -> None:
    assert UniformSampler(clients_per_round=0).cohort(4, seed=0, round_idx=0) == []


def test_more_clients_than_there_are_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"clients_per_round` must be in \[0, num_clients=10\], got 12"
    ):
        UniformSampler(clients_per_round=12).cohort(10, seed=0, round_idx=0)


def test_a_single_client_is_the_same_in_every_round_and_drawn_by_the_seed() -> None:
    cohorts = [SingleClient().cohort(50, seed=3, round_idx=r) for r in range(4)]
    assert cohorts == [cohorts[0]] * 4
    drawn = {SingleClient().cohort(5, seed=seed, round_idx=0)[0] for seed in range(60)}
    assert drawn == set(range(5))
    assert SingleClient(2).cohort(5, seed=0, round_idx=9) == [2]


def test_a_single_client_must_be_one_of_them() -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 4\] for 5 clients, got 5"):
        SingleClient(5).cohort(5, seed=0, round_idx=0)


@pytest.mark.parametrize("sampler", [SingleClient(1), SingleClient(), UniformSampler(2)])
def test_participations_are_counted_client_by_client(
    sampler: ClientSampler, tmp_path: Path
) -> None:
    trainer: Any = make_trainer(tmp_path, sampler=sampler, num_rounds=5)
    trainer.data = SimpleNamespace(num_clients=4)
    counted = participations(trainer)
    for client_id in range(4):
        taken = [client_id in sampler.cohort(4, seed=0, round_idx=idx) for idx in range(5)]
        assert counted[client_id] == sum(taken)
    if isinstance(sampler, SingleClient):
        assert list(counted.values()) == [5], "it takes part in every round"
