import torch

from fedsp.seeding import isolated_rng, numpy_stream, seed_for, stream


def test_streams_of_different_names_differ_and_of_equal_names_agree() -> None:
    names = [
        seed_for(seed, purpose, round_idx=round_idx, client_id=client_id)
        for seed in (0, 1)
        for purpose in ("cohort", "dropout")
        for round_idx in (0, 1, 11)
        for client_id in (0, 1, 11)
    ]
    assert len(set(names)) == len(names)
    assert all(0 <= name < 2**63 for name in names)
    assert torch.equal(
        torch.rand(4, generator=stream(3, "x")), torch.rand(4, generator=stream(3, "x"))
    )
    assert numpy_stream(3, "x").integers(2**60) == numpy_stream(3, "x").integers(2**60)


def test_streams_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(4, generator=stream(0, "cohort"))
    assert torch.equal(torch.get_rng_state(), before)


def test_isolated_rng_repeats_within_and_restores_outside() -> None:
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with isolated_rng(7):
            draws.append(torch.rand(4))
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
