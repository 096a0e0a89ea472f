"""The shipped configuration files, and what their launch lines make of them."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from commands import command

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def launch(file: Path) -> list[str]:
    """Return the arguments of the command in the comment on top, which names the file itself."""
    comment = re.match(r"(?:#.*\n)*", file.read_text())
    assert comment is not None
    lines = re.sub(r"\\\n#", " ", comment[0])
    found = re.search(r"fedsp (fit .*)", lines)
    assert found, f"{file.name} begins with no comment that holds its `fedsp fit --config ...`"
    arguments = shlex.split(found[1])
    assert str(file.relative_to(ROOT)) in arguments
    return arguments


@functools.cache
def values(file: Path) -> Any:
    """Return the configuration that the launch line would run; call it in the root folder."""
    printed = command(*launch(file), "--print_config")
    assert printed.status == 0, printed
    return yaml.safe_load(printed.out)
