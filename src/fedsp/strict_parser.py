"""The command line's manners: no abbreviations, a few lines on what is wrong and what was meant."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

# what jsonargparse says of the null that stands beside every class in its schema
_NOISE = (
    "Does not validate against any of",
    "- Does not validate against any of",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    # a class that is not there could have been a file
    "- Expected a path but",
)
_NEAREST = ". Did you mean"


class StrictParser(LightningArgumentParser):
    """Takes no abbreviated option, on no level, and says in a few lines what is wrong.

    jsonargparse makes a parser of the same class, without any options, for every `class_path`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Switch abbreviations off; everything else is passed on.

        The program is `fedsp` also where `python -m fedsp` or torchrun started it.
        """
        super().__init__(*args, **{"allow_abbrev": False, "prog": "fedsp", **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the reason, without all options and the whole configuration, and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        if not self.exit_on_error:
            super().error(_with_nearest(message, parser), ex)
        lines = re.split(r"\n +Given value type:", message)[0].splitlines()
        kept = [x for x in lines if x.strip() and not x.strip().startswith(_NOISE)]
        program = parser.prog.replace(" [options]", "")
        reason = _with_nearest("\n".join(kept), parser)
        if "arguments are required" in reason:
            reason += "\nA configuration names what is required: --config configs/quickstart.yaml"
        self.exit(2, f"fedsp: error: {reason}\nAll options: {program} --help\n")


def _with_nearest(message: str, parser: ArgumentParser) -> str:
    """Add the name that an unknown one was probably meant to be, unless an inner parser has."""
    if _NEAREST in message:
        return message
    if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not", message):
        module, _, name = found[1].rpartition(".")
        known = inspect.signature(getattr(import_module(module), name)).parameters
        nearest = _nearest(found[2], [*known])
    elif found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        classes = inspect.getmembers(import_module(found[1]), inspect.isclass)
        nearest = _nearest(found[2], [name for name, _ in classes])
    elif found := re.search(r"(?:unrecognized arguments: --|accept option ')([\w.]+)", message):
        options = parser._option_string_actions
        nearest = _nearest(found[1], [option.removeprefix("--") for option in options])
    else:
        nearest = None
    return f"{message}{_NEAREST} `{nearest}`?" if nearest else message


def _nearest(unknown: str, known: Sequence[str]) -> str | None:
    """Return the name that is most like another, whatever its case, or the only one around it."""
    by_lower = {name.lower(): name for name in known}
    if alike := get_close_matches(unknown.lower(), by_lower, n=1, cutoff=0.8):
        return by_lower[alike[0]]
    around = [name for lower, name in by_lower.items() if unknown.lower() in lower]
    return around[0] if len(around) == 1 and len(unknown) > 3 else None


@contextmanager
def full_names(config: Namespace) -> Iterator[None]:
    """Say what a part found wrong by the option's full name, without a list of alternatives.

    A part knows not where it is used: what begins with a bare `name` gets the rest of it here.
    """
    try:
        yield
    except ValueError as error:
        reason: BaseException = error
        while str(reason).startswith(_NOISE) and (reason.__cause__ or reason.__context__):
            reason = reason.__cause__ or reason.__context__ or reason
        text = str(reason)
        bare = re.match(r"`(\w+)`.* got ([^ ]+?)\.?$", text, re.DOTALL)
        paths = [
            key.replace(".init_args", "")
            for key, value in config.items()
            if bare and key.endswith(f".{bare[1]}") and str(value) == bare[2]
        ]
        if bare and paths:
            text = f"`{'` or `'.join(paths)}`{text[len(bare[1]) + 2 :]}"
        if text == str(error):
            raise
        raise ValueError(text) from error
