"""Every configuration that is shipped says on top how it is started, and can be built."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsp.cli import FederatedCLI
from shipped_files import FILES, ROOT, launch, values

TASKS = sorted((ROOT / "configs" / "task").glob("*.yaml"))
SPLITS = ("server", "public", "selection", "test")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_configurations() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_shipped_configuration_parses_and_builds(file: Path) -> None:
    """Overlays with the files that they are laid over. No model, no data, no accelerator yet."""
    arguments, parsed = launch(file), values(file)
    assert isinstance(parsed["seed_everything"], int)
    place = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    cli = FederatedCLI([*arguments[1:], *place], run=False)
    assert cli.trainer.config["trainer"]["run_dir"] == parsed["trainer"]["run_dir"]


def test_every_file_that_a_launch_line_names_exists() -> None:
    for file in FILES:
        arguments = launch(file)
        named = [value for flag, value in pairwise(arguments) if flag == "--config"]
        assert named
        assert all((ROOT / name).is_file() for name in named)


def test_runs_of_shipped_configurations_never_share_a_folder() -> None:
    folders = [yaml.safe_load(file.read_text()).get("trainer", {}).get("run_dir") for file in FILES]
    folders = [folder for folder in folders if folder is not None]
    assert len(set(folders)) == len(folders)


def _owned_rows(data: dict[str, Any], split: str | None) -> tuple[object, ...]:
    """Name the rows of a split (None: of the clients) such that equal rows have equal names.

    What is carved out of the clients' data set is disjoint from all else that is carved and from
    what is left, so that it is named by the split itself.
    """
    clients, source = data["clients"], data[split] if split else data["clients"]
    if isinstance(source, int | float):
        return ("carved", split)
    if isinstance(source, str):
        source = {**clients, "init_args": {**clients["init_args"], "split": source}}
    if source["class_path"] == "fedsp.sources.Hub":
        return tuple(source["init_args"][name] for name in ("name", "subset", "split"))
    return (str(source),)


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_what_selects_what_tests_and_what_is_trained_on_are_disjoint(file: Path) -> None:
    data = values(file)["data"]["init_args"]
    owners = [_owned_rows(data, split) for split in (None, *SPLITS)]
    assert len(set(owners)) == len(owners)
    # a slice such as `train[:10%]` would overlap with `train` under another name
    assert not [owner for owner in owners if "[" in str(owner[-1])]


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_a_task_is_an_overlay_that_says_what_selects_and_what_tests(file: Path) -> None:
    own, text = yaml.safe_load(file.read_text()), file.read_text()
    assert own.keys() <= {"data", "trainer"}
    assert own.get("trainer", {}).keys() <= {"evaluation"}
    comment = text[: text.index("\ndata:")]
    assert "selected on" in comment or "selects on" in comment
    assert "test" in comment


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_accuracy_chooses_where_there_are_choices(file: Path) -> None:
    parsed = values(file)
    evaluation = parsed["trainer"]["evaluation"]
    task = parsed["data"]["init_args"]["task"]["class_path"]
    has_choices = task == "fedsp.tasks.MultipleChoice"
    assert evaluation["monitor"] == ("server/val_accuracy" if has_choices else "server/val_loss")
    assert evaluation["mode"] is None
