"""Every configuration that is shipped says on top how it is started, and can be built."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from commands import command
from fedsp.cli import FederatedCLI

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def _launch(file: Path) -> list[str]:
    """Return the arguments of the command in the comment on top, which names the file itself."""
    comment = re.match(r"(?:#.*\n)*", file.read_text())
    assert comment is not None
    lines = re.sub(r"\\\n#", " ", comment[0])
    found = re.search(r"fedsp (fit .*)", lines)
    assert found, f"{file.name} begins with no comment that holds its `fedsp fit --config ...`"
    arguments = shlex.split(found[1])
    assert str(file.relative_to(ROOT)) in arguments
    return arguments


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_configurations() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_shipped_configuration_parses_and_builds(file: Path) -> None:
    """Overlays with the files that they are laid over. No model, no data, no accelerator yet."""
    arguments = _launch(file)
    printed = command(*arguments, "--print_config")
    assert printed.status == 0, printed
    values = yaml.safe_load(printed.out)
    assert isinstance(values["seed_everything"], int)
    place = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    cli = FederatedCLI([*arguments[1:], *place], run=False)
    assert cli.trainer.config["trainer"]["run_dir"] == values["trainer"]["run_dir"]


def test_every_file_that_a_launch_line_names_exists() -> None:
    for file in FILES:
        arguments = _launch(file)
        named = [value for flag, value in pairwise(arguments) if flag == "--config"]
        assert named
        assert all((ROOT / name).is_file() for name in named)


def test_runs_of_shipped_configurations_never_share_a_folder() -> None:
    folders = [yaml.safe_load(file.read_text()).get("trainer", {}).get("run_dir") for file in FILES]
    folders = [folder for folder in folders if folder is not None]
    assert len(set(folders)) == len(folders)
