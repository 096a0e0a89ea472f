import errno
import os
import random
import resource
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from fedsp.checkpoint import Checkpoints, RunState
from fedsp.state_files import save_state

CONFIG = {
    "trainer": {"num_rounds": 10, "callbacks": [{"class_path": "Early", "init_args": {"n": 3}}]},
    "data": {"files": ["a.jsonl", "b.jsonl"], "fractions": (0.5, 0.5), "seed": None},
}


def run_state(round_idx, config=CONFIG):
    generator = torch.Generator().manual_seed(round_idx)
    tree = {
        "prefix": torch.randn(2, 2, 1, 3, 4, generator=generator),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.999)},
        "versions": {0: round_idx, 7: 0},
        "stream": generator.get_state(),
        "history": [{"round": 0, "loss": float("nan")}],
    }
    return RunState(round_idx, tree, config)


def assert_same(came, wanted):
    assert came.round_idx == wanted.round_idx
    assert came.config == wanted.config
    assert torch.equal(came.tree["prefix"], wanted.tree["prefix"])
    assert torch.equal(came.tree["stream"], wanted.tree["stream"])
    assert came.tree["versions"] == wanted.tree["versions"]
    assert repr(came.tree) == repr(wanted.tree)


def truncate(path):
    os.truncate(path, path.stat().st_size - 5)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


# --- saving and loading ----------------------------------------------------------------------


def test_a_saved_run_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    path = checkpoints.save(run_state(3))
    assert path == tmp_path / "run" / "checkpoints" / "round-000003.safetensors"
    for name in ("last", path, str(path), path.parent):
        assert_same(checkpoints.load(name, config=CONFIG), run_state(3))
    assert checkpoints.last() == path


def test_best_is_apart_from_the_rounds(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save_best({"prefix": torch.ones(2)}, round_idx=1, config=CONFIG)
    for round_idx in range(1, 5):
        checkpoints.save(run_state(round_idx))
    best = checkpoints.load("best", config=CONFIG)
    assert best.round_idx == 1
    assert best.tree["prefix"].tolist() == [1.0, 1.0]
    assert checkpoints.last().name == "round-000004.safetensors"
    checkpoints.save_best({"prefix": torch.zeros(2)})
    assert checkpoints.load("best", config=CONFIG).tree["prefix"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
def test_the_newest_rounds_stay(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for round_idx in range(1, 6):
        checkpoints.save(run_state(round_idx))
        kept = range(max(1, round_idx - keep + 1), round_idx + 1)
        assert sorted(os.listdir(tmp_path)) == [f"round-{idx:06d}.safetensors" for idx in kept]


def test_a_round_may_be_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    checkpoints.save(run_state(1, config={"a": 1}))
    assert checkpoints.load("last").config == {"a": 1}
    assert len(os.listdir(tmp_path)) == 1


def test_rounds_beyond_the_one_resumed_from_do_not_come_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for round_idx in (4, 5, 6):
        checkpoints.save(run_state(round_idx))
    resumed = checkpoints.load(tmp_path / "round-000004.safetensors")
    checkpoints.save(run_state(resumed.round_idx + 1))
    names = ["round-000004.safetensors", "round-000005.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path):
    (tmp_path / "round-notes.txt").touch()
    (tmp_path / "round-x.safetensors").touch()
    (tmp_path / ".round-000001.safetensors.99.tmp").touch()
    checkpoints = Checkpoints(tmp_path, keep=1)
    for round_idx in range(3):
        checkpoints.save(run_state(round_idx))
    kept = ["round-000002.safetensors", "round-notes.txt", "round-x.safetensors"]
    assert sorted(os.listdir(tmp_path)) == kept


def test_more_than_a_million_rounds_sort_by_number(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for round_idx in (999_999, 1_000_000):
        checkpoints.save(run_state(round_idx))
    assert checkpoints.load("last").round_idx == 1_000_000


def test_keeping_no_round_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`trainer\.keep_checkpoints` must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


# --- missing, damaged, foreign ---------------------------------------------------------------


def test_a_missing_file_names_the_option(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`ckpt_path` must be .*got 'runs/7', but there is"
    ):
        Checkpoints(tmp_path).load("runs/7")


def test_best_before_there_is_one_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`ckpt_path` .*'best'.*best.safetensors"):
        Checkpoints(tmp_path).load("best")


@pytest.mark.parametrize("folder", [".", "absent"])
def test_last_without_a_checkpoint_says_what_to_do(tmp_path, folder):
    checkpoints = Checkpoints(tmp_path / folder)
    wanted = r"`ckpt_path` last: there is no checkpoint in .*leave `ckpt_path` out to start"
    for look in (checkpoints.last, lambda: checkpoints.load("last")):
        with pytest.raises(FileNotFoundError, match=wanted):
            look()


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_newest_file_falls_back_to_the_one_before(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    damage(checkpoints.save(run_state(2)))
    for look in (checkpoints.last, lambda: checkpoints.load("last")):
        with pytest.warns(
            UserWarning, match=r"round-000002.* falling back to the checkpoint before"
        ):
            look()
    with pytest.warns(UserWarning, match="falling back"):
        assert_same(checkpoints.load("last"), run_state(1))


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_file_that_was_asked_for_is_refused(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(run_state(2))
    damage(path)
    with pytest.raises(
        ValueError, match=r"`ckpt_path`: .*round-000002.safetensors is not a readable"
    ):
        checkpoints.load(path)


def test_a_folder_of_damaged_files_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    truncate(checkpoints.save(run_state(2)))
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.raises(ValueError, match=r"`ckpt_path`: none of the checkpoints in .* is readable"),
    ):
        checkpoints.load("last")


@pytest.mark.parametrize("content", [{"prefix": torch.ones(1)}, [1, 2], None, {"kind": "other"}])
def test_fedsp_state_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "state.safetensors"
    save_state(path, content)
    with pytest.raises(ValueError, match="holds fedsp state, but is not a run's checkpoint"):
        Checkpoints(tmp_path).load(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04\x95 a pickle, which nobody loads")
    with pytest.raises(
        ValueError, match=r"`ckpt_path`: .*weights.bin is not a readable fedsp state"
    ):
        Checkpoints(tmp_path).load(path)


@pytest.mark.parametrize("name", ["last", "round-000001.safetensors"])
def test_another_format_version_is_named_and_not_fallen_back_from(tmp_path, monkeypatch, name):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(0))
    with monkeypatch.context() as patch:
        patch.setattr("fedsp.checkpoint.FORMAT_VERSION", 99)
        checkpoints.save(run_state(1))
    path = name if name == "last" else tmp_path / name
    with pytest.raises(ValueError, match="format version 99, this fedsp reads version 3"):
        checkpoints.load(path)


# --- another configuration -------------------------------------------------------------------


def changed(**leaves):
    config = {
        "trainer": {
            "num_rounds": 10,
            "callbacks": [{"class_path": "Early", "init_args": {"n": 3}}],
        },
        "data": {"files": ["a.jsonl", "b.jsonl"], "fractions": [0.5, 0.5], "seed": None},
    }
    for key, value in leaves.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def test_the_same_configuration_passes_whether_lists_or_tuples(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    checkpoints.load("last", config=changed())


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (changed(trainer__num_rounds=20), "trainer.num_rounds: 10 in the checkpoint, 20 now"),
        (changed(data__seed=0), "data.seed: None in the checkpoint, 0 now"),
        (changed(data__seed=False), "data.seed: None in the checkpoint, False now"),
        (changed(data__files=["a.jsonl"]), "data.files.1: 'b.jsonl' in the checkpoint, '(absent)'"),
        (changed(data__files=[]), r"data.files: '(absent)' in the checkpoint, [] now"),
        (changed(data__new=1.5), "data.new: '(absent)' in the checkpoint, 1.5 now"),
        (
            changed(trainer__callbacks=[{"class_path": "Early", "init_args": {"n": 4}}]),
            "trainer.callbacks.0.init_args.n: 3 in the checkpoint, 4 now",
        ),
    ],
)
def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path, config, line):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    with pytest.raises(ValueError, match="comes from another configuration") as error:
        checkpoints.load("last", config=config)
    assert f"  {line}" in str(error.value)
    assert "Set these back to resume" in str(error.value)


def test_every_key_that_differs_is_listed_and_no_other(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    with pytest.raises(ValueError, match="another configuration") as error:
        checkpoints.load("last", config=changed(trainer__num_rounds=20, data__seed=1))
    lines = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in lines] == ["data.seed", "trainer.num_rounds"]


@pytest.mark.parametrize("ignore", [("trainer.num_rounds",), ("trainer",), ("x", "trainer")])
def test_ignored_keys_may_differ_with_everything_below(tmp_path, ignore):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    checkpoints.load("last", config=changed(trainer__num_rounds=20), ignore=ignore)


@pytest.mark.parametrize("ignore", [("train",), ("trainer.num",), ("num_rounds",), ("",)])
def test_an_ignored_key_is_a_whole_name(tmp_path, ignore):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    with pytest.raises(ValueError, match=r"trainer.num_rounds"):
        checkpoints.load("last", config=changed(trainer__num_rounds=20), ignore=ignore)


def test_nan_and_equal_numbers_do_not_count_as_a_change(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1, config={"a": float("nan"), "b": 1, "c": True}))
    checkpoints.load("last", config={"a": float("nan"), "b": 1.0, "c": True})
    with pytest.raises(ValueError, match="c: True in the checkpoint, 1 now"):
        checkpoints.load("last", config={"a": float("nan"), "b": 1, "c": 1})


# --- crashes ---------------------------------------------------------------------------------

WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from fedsp.checkpoint import Checkpoints, RunState

    checkpoints = Checkpoints(Path(sys.argv[1]))
    start = 0 if sys.argv[2] == "new" else checkpoints.load("last").round_idx + 1
    for round_idx in range(start, 10**9):
        tree = {"prefix": torch.full((300_000,), float(round_idx))}
        checkpoints.save(RunState(round_idx, tree, {}))
        print(round_idx, flush=True)
    """
)


def test_a_killed_writer_always_leaves_a_checkpoint_to_resume_from(tmp_path):
    moments = random.Random(0)
    start = "new"
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, start], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        saved = [int(line) for line in process.stdout.read().split()]
        process.stdout.close()
        assert process.wait() == -9
        state = Checkpoints(tmp_path).load("last")
        assert state.round_idx >= max(saved, default=0)
        assert torch.equal(state.tree["prefix"], torch.full((300_000,), float(state.round_idx)))
        start = "resume"


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run_state(1))
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import torch
        from fedsp.checkpoint import Checkpoints, RunState

        checkpoints = Checkpoints(Path(sys.argv[1]))
        try:
            checkpoints.save(RunState(2, {"prefix": torch.zeros(1_000_000)}, {}))
        except OSError as error:
            print(error)
        """
    )
    small = (100_000, 100_000)
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write" in result.stdout
    assert "File too large; what was there before is unchanged" in result.stdout
    assert os.listdir(tmp_path) == ["round-000001.safetensors"]
    assert_same(checkpoints.load("last"), run_state(1))


@pytest.mark.parametrize("function", ["open", "write", "fsync", "replace"])
def test_a_failing_save_deletes_no_round(tmp_path, monkeypatch, function):
    checkpoints = Checkpoints(tmp_path)
    for round_idx in (1, 2):
        checkpoints.save(run_state(round_idx))

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(
            OSError, match=r"cannot write .*round-000003.safetensors: No space left"
        ):
            checkpoints.save(run_state(3))
    names = ["round-000001.safetensors", "round-000002.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
    assert_same(checkpoints.load("last"), run_state(2))
