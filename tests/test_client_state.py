import contextlib
import errno
import os
import random

import pytest
import torch

from fedsp.client_state import ClientStateStore


def state(client_id, round_idx, numel=8):
    value = float(100 * client_id + round_idx)
    return {"prompt": torch.full((numel,), value), "steps": {0: (round_idx, -0.0)}, "lr": [0.1]}


def equal(a, b):
    return (
        a is not None
        and torch.equal(a["prompt"], b["prompt"])
        and repr({k: v for k, v in a.items() if k != "prompt"})
        == repr({k: v for k, v in b.items() if k != "prompt"})
    )


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("max_in_memory_bytes", [0, 10**6])
def test_a_state_comes_back_until_a_newer_one_is_put(tmp_path, max_in_memory_bytes):
    store = ClientStateStore(tmp_path, max_in_memory_bytes)
    assert store.get(3) is None
    store.put(3, 0, state(3, 0))
    assert equal(store.get(3), state(3, 0))
    store.put(3, 2, state(3, 2))
    assert equal(store.get(3), state(3, 2))
    assert store.get(4) is None
    assert store.versions() == {3: 2}


@pytest.mark.parametrize("max_in_memory_bytes", [0, 10**6])
def test_neither_side_can_change_what_the_other_holds(tmp_path, max_in_memory_bytes):
    store = ClientStateStore(tmp_path, max_in_memory_bytes)
    mine = state(0, 0)
    store.put(0, 0, mine)
    mine["prompt"] += 1
    theirs = store.get(0)
    theirs["prompt"] += 1
    assert equal(store.get(0), state(0, 0))


def test_files_are_named_by_client_and_round(tmp_path):
    store = ClientStateStore(tmp_path / "clients")
    store.put(7, 12, state(7, 12))
    store.put(1234567, 12, state(1, 12))
    assert files(tmp_path / "clients") == [
        "000007/round-000012.safetensors",
        "1234567/round-000012.safetensors",
    ]
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert store.disk_bytes() == on_disk > 0


def test_nothing_is_made_before_a_state_is_put(tmp_path):
    store = ClientStateStore(tmp_path / "clients")
    assert store.disk_bytes() == 0
    store.commit()
    store.restore({})
    assert os.listdir(tmp_path) == []


# --- memory ----------------------------------------------------------------------------------


def test_ram_is_bounded_and_the_states_used_last_stay(tmp_path, monkeypatch):
    store = ClientStateStore(tmp_path, max_in_memory_bytes=13_000)
    for client_id in range(20):
        store.put(client_id, 0, state(client_id, 0, numel=1000))  # 4000 bytes and a header
        assert store.memory_bytes() <= 13_000
    assert store.memory_bytes() > 12_000
    for client_id in range(20):
        assert equal(store.get(client_id), state(client_id, 0, numel=1000))
        assert store.memory_bytes() <= 13_000
    store.get(17)
    store.get(5)  # pushes out 18, the one used least recently
    monkeypatch.setattr("fedsp.client_state.load_state", None)
    for client_id in (19, 17, 5):
        store.get(client_id)
    with pytest.raises(TypeError):
        store.get(18)


def test_a_state_larger_than_the_bound_is_kept_on_disk_only(tmp_path):
    store = ClientStateStore(tmp_path, max_in_memory_bytes=1000)
    store.put(0, 0, state(0, 0))
    assert store.memory_bytes() > 0
    store.put(0, 1, state(0, 1, numel=1000))
    assert store.memory_bytes() == 0
    assert equal(store.get(0), state(0, 1, numel=1000))


def test_without_a_bound_no_state_is_held_in_ram(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 0, state(0, 0))
    store.get(0)
    assert store.memory_bytes() == 0


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_in_memory_bytes", [0, 10**7])
@pytest.mark.parametrize("numel", [8, 600_000])
def test_a_state_that_did_not_change_is_not_written_again(tmp_path, max_in_memory_bytes, numel):
    store = ClientStateStore(tmp_path, max_in_memory_bytes)
    store.put(0, 0, state(0, 0, numel))
    store.commit()
    store.put(0, 1, state(0, 0, numel))
    assert store.versions() == {0: 0}
    assert files(tmp_path) == ["000000/round-000000.safetensors"]
    changed = state(0, 0, numel)
    changed["prompt"][-1] += 1
    store.put(0, 2, changed)
    assert store.versions() == {0: 2}
    assert equal(store.get(0), changed)


def test_a_state_whose_file_vanished_is_written_again(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 0, state(0, 0))
    (tmp_path / "000000" / "round-000000.safetensors").unlink()
    store.put(0, 1, state(0, 0))
    assert equal(store.get(0), state(0, 0))


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    store = ClientStateStore(tmp_path, max_in_memory_bytes=10**6)
    store.put(0, 0, state(0, 0))

    def fail(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(
            OSError, match=r"cannot write .*round-000001.safetensors: No space left"
        ):
            store.put(0, 1, state(0, 1))
    assert store.versions() == {0: 0}
    assert equal(store.get(0), state(0, 0))
    assert files(tmp_path) == ["000000/round-000000.safetensors"]


def test_a_committed_state_is_not_overwritten(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 3, state(0, 3))
    store.put(0, 3, state(0, 4))  # not committed yet
    store.commit()
    with pytest.raises(
        RuntimeError, match=r"client 0 has a committed state of round 3; .* round 3"
    ):
        store.put(0, 3, state(0, 5))
    assert equal(store.get(0), state(0, 4))


@pytest.mark.parametrize(("option", "value"), [("max_in_memory_bytes", -1), ("keep", 0)])
def test_a_number_out_of_range_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be at least .*, got {value}"):
        ClientStateStore(tmp_path, **{option: value})


# --- rounds and resuming ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_states_stay_for_as_many_commits_as_checkpoints_are_kept(tmp_path, keep):
    store = ClientStateStore(tmp_path, keep=keep)
    checkpoints = []
    for round_idx in range(12):
        for client_id in random.Random(round_idx).sample(range(5), k=2):
            store.put(client_id, round_idx, state(client_id, round_idx))
        checkpoints = [*checkpoints, store.versions()][-keep:]
        store.commit()
        named = {
            f"{c:06d}/round-{r:06d}.safetensors" for saved in checkpoints for c, r in saved.items()
        }
        assert set(files(tmp_path)) == named


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_newest_and_the_checkpoint_before_it_can_be_restored(tmp_path, chosen):
    store = ClientStateStore(tmp_path)
    saved = []
    for round_idx in range(4):
        for client_id in (0, 1 + round_idx % 2):
            store.put(client_id, round_idx, state(client_id, round_idx))
        saved = [store.versions(), *saved]
        store.commit()
    resumed = ClientStateStore(tmp_path)
    resumed.restore(saved[chosen])
    assert resumed.versions() == saved[chosen]
    for client_id, round_idx in saved[chosen].items():
        assert equal(resumed.get(client_id), state(client_id, round_idx))
    later = ClientStateStore(tmp_path)
    with pytest.raises(RuntimeError) if chosen else contextlib.nullcontext():
        later.restore(saved[0])
    # until there is a newer checkpoint the older one may be needed: this one may be damaged
    later.restore(saved[1])
    for client_id, round_idx in saved[1].items():
        assert equal(later.get(client_id), state(client_id, round_idx))


def test_what_only_older_checkpoints_named_goes_with_the_next_one(tmp_path):
    store = ClientStateStore(tmp_path)
    for round_idx in range(3):
        for client_id in (0, 1 + round_idx % 2):
            store.put(client_id, round_idx, state(client_id, round_idx))
        saved = store.versions()
        store.commit()
    resumed = ClientStateStore(tmp_path)
    resumed.restore(saved)
    resumed.put(0, 3, state(0, 3))
    resumed.commit()
    named = {*saved.items(), (0, 3)}
    assert files(tmp_path) == sorted(f"{c:06d}/round-{r:06d}.safetensors" for c, r in named)


def test_superseded_states_of_rounds_without_a_checkpoint_are_deleted(tmp_path):
    store = ClientStateStore(tmp_path, keep=1)
    for round_idx in range(5):
        store.put(0, round_idx, state(0, round_idx))
    assert len(files(tmp_path)) == 5
    store.commit()
    assert files(tmp_path) == ["000000/round-000004.safetensors"]


class Killed(BaseException):
    """Stands for a kill: nothing of the program catches it."""


def die_at(patch, step):
    """Let the disk's calls fail from the given one on, those that would clean up included."""
    calls = iter(range(step))

    def mortal(function):
        def call(*args, **kwargs):
            if next(calls, None) is None:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("open", "write", "fsync", "replace", "unlink"):
        patch.setattr(os, name, mortal(getattr(os, name)))


def run_round(store, round_idx, checkpoint):
    for client_id in (0, 2, round_idx + 3):
        store.put(client_id, round_idx, state(client_id, round_idx))
    checkpoint[:] = [store.versions()]
    store.commit()


def test_a_kill_at_any_step_of_a_round_restores_what_the_checkpoint_names(tmp_path, monkeypatch):
    outcomes = []
    while "survived" not in outcomes:
        directory, checkpoint = tmp_path / f"{len(outcomes)}", []
        store = ClientStateStore(directory)
        for round_idx in range(3):
            run_round(store, round_idx, checkpoint)
        with monkeypatch.context() as patch:
            die_at(patch, step=len(outcomes))
            try:
                run_round(store, 3, checkpoint)
                outcomes.append("survived")
            except Killed:
                outcomes.append(checkpoint[0][0])
        resumed = ClientStateStore(directory)
        resumed.restore(checkpoint[0])
        for client_id, round_idx in checkpoint[0].items():
            assert equal(resumed.get(client_id), state(client_id, round_idx))
        before = checkpoint[0]
        run_round(resumed, 4, checkpoint)
        assert equal(resumed.get(0), state(0, 4))
        named = {*before.items(), *checkpoint[0].items()}
        assert files(directory) == sorted(f"{c:06d}/round-{r:06d}.safetensors" for c, r in named)
    # Kills before the checkpoint gave the round before, kills after it the round itself.
    assert set(outcomes) == {2, 3, "survived"}


def test_a_client_that_the_checkpoint_does_not_know_is_forgotten(tmp_path):
    store = ClientStateStore(tmp_path, max_in_memory_bytes=10**6)
    store.put(0, 0, state(0, 0))
    store.put(1, 0, state(1, 0))
    store.restore({0: 0})
    assert store.get(1) is None
    assert store.versions() == {0: 0}
    assert sorted(os.listdir(tmp_path)) == ["000000"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 0, state(0, 0))
    (tmp_path / "000000" / ".round-000001.safetensors.99.tmp").touch()
    (tmp_path / "000005").mkdir()
    (tmp_path / "000005" / ".round-000001.safetensors.99.tmp").touch()
    (tmp_path / "notes.txt").touch()
    store.restore({0: 0})
    assert files(tmp_path) == ["000000/round-000000.safetensors", "notes.txt"]


def test_a_missing_state_is_named_and_nothing_is_deleted(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 0, state(0, 0))
    store.put(1, 1, state(1, 1))
    with pytest.raises(
        RuntimeError, match=r"client 1 cannot be resumed from .*000001/round-000000.*`ckpt_path`"
    ):
        store.restore({0: 0, 1: 0})
    assert len(files(tmp_path)) == 2


def test_a_truncated_state_is_named_on_restoring(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 0, state(0, 0))
    os.truncate(tmp_path / "000000" / "round-000000.safetensors", 300)
    with pytest.raises(RuntimeError, match=r"state of client 0 cannot be resumed from .*truncated"):
        ClientStateStore(tmp_path).restore({0: 0})


@pytest.mark.parametrize("max_in_memory_bytes", [0, 10**6])
def test_a_state_with_a_flipped_bit_is_named_when_it_is_used(tmp_path, max_in_memory_bytes):
    ClientStateStore(tmp_path).put(0, 0, state(0, 0))
    path = tmp_path / "000000" / "round-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = ClientStateStore(tmp_path, max_in_memory_bytes)
    store.restore({0: 0})
    with pytest.raises(RuntimeError, match=r"state of client 0 cannot be .* match its checksum"):
        store.get(0)


# --- answers ----------------------------------------------------------------------------------


def test_answers_are_counted_on_disk_and_no_restore_takes_them_back(tmp_path):
    store = ClientStateStore(tmp_path)
    store.put(0, 0, state(0, 0))
    store.count_answer(0)
    store.count_answer(0)
    store.count_answer(5)
    assert store.answers() == {0: 2, 5: 1}
    assert (tmp_path / "000000" / "answers.txt").read_text() == "2\n"
    other = ClientStateStore(tmp_path)
    other.restore({})
    assert other.answers() == {0: 2, 5: 1}
    assert files(tmp_path) == ["000000/answers.txt", "000005/answers.txt"]
    other.count_answer(5)
    other.restore({})
    assert other.answers() == {0: 2, 5: 2}


def test_of_two_counts_of_answers_the_larger_one_stays(tmp_path):
    store = ClientStateStore(tmp_path)
    store.count_answer(0)
    store.adopt_answers({0: 3, 1: 1})
    assert store.answers() == {0: 3, 1: 1}
    store.adopt_answers({0: 2})
    store.count_answer(0)
    assert store.answers() == {0: 4, 1: 1}
    assert (tmp_path / "000000" / "answers.txt").read_text() == "4\n"


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_after_a_resume_every_checkpoint_that_is_kept_can_be_restored(tmp_path, keep):
    def run(store, rounds):
        for round_idx in rounds:
            for client_id in random.Random(round_idx).sample(range(4), k=2):
                store.put(client_id, round_idx, state(client_id, round_idx))
            saved.append(store.versions())
            store.commit()

    saved = []
    run(ClientStateStore(tmp_path, keep=keep), range(6))
    for stop in (6, 7, 9):
        resumed = ClientStateStore(tmp_path, keep=keep)
        resumed.restore(saved[-1])
        run(resumed, range(stop, stop + 1))
        for versions in saved[-keep:]:
            for client_id, round_idx in versions.items():
                assert f"{client_id:06d}/round-{round_idx:06d}.safetensors" in files(tmp_path)
    run(resumed, range(10, 10 + keep + 1))
    kept = {item for versions in saved[-keep:] for item in versions.items()}
    named = {f"{c:06d}/round-{r:06d}.safetensors" for c, r in kept}
    assert set(files(tmp_path)) == named, "and nothing is left behind"
