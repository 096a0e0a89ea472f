"""What is said of a class, a file or an option that is not there, and what it was meant to be."""

from pathlib import Path
from typing import Any

import pytest

from commands import changed, command, make_config, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_config(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize(
    ("path", "typed", "meant"),
    [
        ("data.init_args.task.class_path", "fedsp.tasks.PromptCompletions", "PromptCompletion"),
        ("trainer.aggregator", "fedsp.aggregation.Median", "CoordinateMedian"),
        ("client.init_args.soft_prompt.optimizer", "torch.optim.Adamw", "AdamW"),
        # several are around it, or none
        ("trainer.aggregator", "fedsp.aggregation.Mean", ""),
        ("trainer.aggregator", "fedsp.aggregation.Zebra", ""),
    ],
)
def test_an_unknown_class_is_told_which_one_was_meant(
    path: str, typed: str, meant: str, config: dict[str, Any], tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.yaml", changed(config, {path: typed}))
    outcome = command("fit", "--config", file)
    assert outcome.status == 2, outcome
    assert f"has no attribute '{typed.rpartition('.')[2]}'" in outcome.err
    assert outcome.err.count("Did you mean") == bool(meant)
    assert not meant or f"Did you mean `{meant}`?" in outcome.err
    assert "Union" not in outcome.err
    assert "Expected a path" not in outcome.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"trainer:\n  num_rounds: 2\n run_dir: x\n", "in line 3, column 2."),
        (b"trainer: \x80\n", "invalid start byte."),
    ],
)
def test_a_file_that_is_no_yaml_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content)
    outcome = command("fit", "--config", file)
    assert outcome.status == 1
    assert f"`--config` must name YAML files, got {file}: " in outcome.err
    assert reason in outcome.err
