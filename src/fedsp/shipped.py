"""The configurations that come with fedsp, found by kind and name; none is read here."""

from pathlib import Path
from typing import Literal, get_args

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
    """
    parts = Path(name).parts
    if parts[:1] == ("configs",) and not Path(name).exists():
        file = shipped_folder().joinpath(*parts[1:])
        return str(file) if file.is_file() else name
    return name


def expand_names(arguments: list[str]) -> list[str]:
    """Replace `--task NAME` and `--method NAME` by `--config FILE`, in their places.

    So is `--config configs/...` by the shipped file, away from a checkout.

    Args:
        arguments: A command line as it was typed.

    Returns:
        The command line that LightningCLI understands.

    Raises:
        ValueError: If a name is missing or unknown.
    """
    expanded: list[str] = []
    words = iter(arguments)
    for word in words:
        option, _, value = word.partition("=")
        kind = option.removeprefix("--")
        if not option.startswith("--") or kind not in (*KINDS, "config"):
            expanded.append(word)
            continue
        name = value or next(words, "")
        file = find_config(name) if kind == "config" else str(find_shipped(kind, name))
        expanded += ["--config", file]
    return expanded
