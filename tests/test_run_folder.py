import os
from pathlib import Path

import pytest

from fedsp.run_folder import RunFolder


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


# --- may the run use it? ------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_empty_folder_is_taken_and_nothing_is_made_yet(
    tmp_path: Path, exists: bool
) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    if exists:
        folder.path.mkdir(parents=True)
    folder.check(resume=False)
    assert folder.path.exists() == exists


def test_a_used_folder_is_refused_with_the_way_on(tmp_path: Path) -> None:
    touch(tmp_path / "run" / "ledger.jsonl")
    with pytest.raises(FileExistsError, match="must be a new or empty folder") as caught:
        RunFolder(tmp_path / "run").check(resume=False)
    for part in ("`trainer.run_dir`", str(tmp_path / "run"), "--ckpt_path last"):
        assert part in str(caught.value)
    RunFolder(tmp_path / "run").check(resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, resume: bool) -> None:
    touch(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"`trainer\.run_dir` must be"):
        RunFolder(tmp_path / "run").check(resume=resume)


@pytest.mark.parametrize("place", ["run", "a/b/run"])
def test_a_file_above_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    touch(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"`trainer\.run_dir` must be"):
        RunFolder(tmp_path / "file" / place).check(resume=False)


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match=f"no permission to write in {tmp_path}"):
        RunFolder(tmp_path / "a" / "run").check(resume=False)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == tmp_path / "run"


def test_a_relative_folder_is_checked_where_it_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/one")
    folder.check(resume=False)
    folder.create("seed: 0\n")
    assert (tmp_path / "runs" / "one" / "config.yaml").exists()


# --- creating -----------------------------------------------------------------------------------


def test_the_configuration_of_the_first_start_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create("num_rounds: 3\n")
    touch(folder.auxiliary)
    touch(folder.checkpoints / "round-000000.safetensors")
    folder.create("num_rounds: 9\n")
    assert folder.config.read_text() == "num_rounds: 3\n"
    assert folder.auxiliary.exists()


def test_a_start_that_got_nowhere_does_not_leave_its_configuration_behind(tmp_path: Path) -> None:
    """The next start may be of another one; the auxiliary model itself knows what made it."""
    folder = RunFolder(tmp_path / "run")
    folder.create("seed: 0\n")
    touch(folder.auxiliary)
    touch(folder.path / ".auxiliary.safetensors.17.tmp")
    folder.create("seed: 1\n")
    assert folder.config.read_text() == "seed: 1\n"
    assert not any(path.suffix == ".tmp" for path in folder.path.iterdir())


def test_without_a_configuration_none_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create("")
    assert list(folder.path.iterdir()) == []


def test_every_file_has_a_place_of_its_own_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    values = vars(folder).values()
    places = [it for it in values if isinstance(it, Path) and it != folder.path]
    assert len(set(places)) == len(places)
    assert all(folder.path in place.parents for place in places)


# --- killed early -------------------------------------------------------------------------------


def test_a_run_killed_at_any_point_before_its_first_checkpoint_may_start_anew(
    tmp_path: Path,
) -> None:
    """Whatever of its own files was made by then, half-written ones included."""
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_before_first_checkpoint()
    folder.path.mkdir()
    assert folder.is_before_first_checkpoint()
    touch(folder.path / f".config.yaml.{os.getpid()}.tmp")
    assert folder.is_before_first_checkpoint()
    for path in (folder.config, folder.ledger, folder.auxiliary, folder.metrics):
        touch(path)
        assert folder.is_before_first_checkpoint()
    touch(folder.checkpoints / "best.safetensors")
    assert folder.is_before_first_checkpoint()
    touch(folder.checkpoints / ".round-000000.safetensors.1.tmp")
    assert folder.is_before_first_checkpoint()
    touch(folder.checkpoints / "round-000000.safetensors")
    assert not folder.is_before_first_checkpoint()


def test_a_folder_of_other_files_is_no_run_that_was_killed(tmp_path: Path) -> None:
    touch(tmp_path / "run" / "notes.txt")
    assert not RunFolder(tmp_path / "run").is_before_first_checkpoint()
