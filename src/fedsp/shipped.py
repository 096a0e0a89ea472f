"""The configurations that come with fedsp, found by kind and name."""

from pathlib import Path
from typing import Literal, get_args

import yaml

Kind = Literal["method", "task"]
KINDS: tuple[str, ...] = get_args(Kind)


def shipped_folder() -> Path:
    """Return the folder of the configurations: in the package, or beside it in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_names(kind: str) -> list[str]:
    """Return the names of all shipped configurations of a kind, sorted.

    Args:
        kind: `method` or `task`.
    """
    return sorted(path.stem for path in (shipped_folder() / kind).glob("*.yaml"))


def find_shipped(kind: str, name: str) -> Path:
    """Return the file of a shipped configuration.

    Args:
        kind: `method` or `task`.
        name: Its name, such as `fedsp` or `sciq`.

    Raises:
        ValueError: If there is none of that name.
    """
    known = shipped_names(kind)
    if name not in known:
        raise ValueError(f"`--{kind}` must be one of {', '.join(known)}, got {name!r}.")
    return shipped_folder() / kind / f"{name}.yaml"


def find_config(name: str) -> str:
    """Return a configuration's file: `configs/...` is the shipped one where there is no such file.

    Args:
        name: What `--config` was given.

    Raises:
        ValueError: If the file is no YAML.
    """
    parts, file = Path(name).parts, Path(name)
    if parts[:1] == ("configs",) and not file.exists():
        shipped = shipped_folder().joinpath(*parts[1:])
        return str(shipped) if shipped.is_file() else name
    if file.is_file():
        _check_yaml(file)
    return name


def _check_yaml(file: Path) -> None:
    """Say which file is no YAML, and where: the parser that reads it later does not know."""
    try:
        yaml.safe_load(file.read_bytes())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(
            f"`--config` must name YAML files, got {file}: {error.problem}{place}."
        ) from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`--config` must name YAML files, got {file}: {reason}.") from error


def expand_names(arguments: list[str]) -> list[str]:
    """Replace `--task NAME` and `--method NAME` by `--config FILE`, in their places.

    So is `--config configs/...` by the shipped file, away from a checkout.

    Args:
        arguments: A command line as it was typed.

    Returns:
        The command line that LightningCLI understands.

    Raises:
        ValueError: If a name is missing or unknown, or a file is no YAML.
    """
    expanded: list[str] = []
    words = iter(arguments)
    for word in words:
        option, _, value = word.partition("=")
        kind = option.removeprefix("--")
        if option in ("--config", "-c"):
            expanded += ["--config", find_config(value or next(words, ""))]
        elif option.startswith("--") and kind in KINDS:
            expanded += ["--config", str(find_shipped(kind, value or next(words, "")))]
        else:
            expanded.append(word)
    return expanded
