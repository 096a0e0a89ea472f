"""Shipped configurations are found by name, on the command line too."""

from pathlib import Path

import pytest

from commands import command
from fedsp.shipped import expand_names, find_shipped, shipped_folder, shipped_names

METHOD = "fedsp"


def test_names_are_the_files_of_the_folder() -> None:
    for kind in ("method", "task"):
        files = {path.stem for path in (shipped_folder() / kind).iterdir()}
        assert set(shipped_names(kind)) == files


def test_a_name_becomes_the_file_in_its_place() -> None:
    file = str(find_shipped("method", METHOD))
    expected = ["fit", "--config", "mine.yaml", "--config", file, "--trainer.num_rounds", "2"]
    for typed in (["--method", METHOD], [f"--method={METHOD}"]):
        given = ["fit", "--config", "mine.yaml", *typed, "--trainer.num_rounds", "2"]
        assert expand_names(given) == expected


def test_a_shipped_configuration_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "configs/trainer/cpu.yaml"
    shipped = str(shipped_folder() / "trainer" / "cpu.yaml")
    assert expand_names(["--config", name]) == ["--config", shipped]
    assert expand_names([f"--config={name}"]) == ["--config", shipped]
    assert expand_names(["-c", name]) == ["--config", shipped]
    # a file of one's own goes first, and one that nobody has is the parser's to refuse
    for other in ("mine.yaml", "configs/no-such.yaml", "configs"):
        assert expand_names(["--config", other]) == ["--config", other]
    (tmp_path / "configs" / "trainer").mkdir(parents=True)
    (tmp_path / name).write_text("")
    assert expand_names(["--config", name]) == ["--config", name]


@pytest.mark.parametrize(("kind", "name"), [("task", "no-such"), ("method", "no-such")])
def test_an_unknown_name_is_answered_with_the_known_ones(kind: str, name: str) -> None:
    outcome = command("fit", f"--{kind}", name)
    assert outcome.status == 1
    known = ", ".join(shipped_names(kind))
    assert outcome.err == f"fedsp: error: `--{kind}` must be one of {known}, got 'no-such'.\n"


def test_an_option_that_only_begins_alike_stays() -> None:
    assert expand_names(["--taskforce", "x"]) == ["--taskforce", "x"]
