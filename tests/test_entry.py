"""The entry of the `fedsp` command: what needs no model is answered at once."""

import re
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

from fedsp import federation_commands
from fedsp.__main__ import HELP
from fedsp.cli import SUBCOMMANDS, FederatedCLI, chat
from fedsp.report_commands import COMMANDS
from fedsp.trainer import FederatedTrainer

FEDERATION = federation_commands.COMMANDS
HEAVY = ("torch", "lightning", "transformers", "datasets", "peft", "wandb", "numpy", "jsonargparse")


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the entry in a process of its own that prints which heavy packages it imported."""
    code = (
        "import sys, fedsp.__main__ as entry\n"
        "try: entry.main()\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    # without the environment's start-up hooks, which may import on their own
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_answers_without_the_heavy_imports(args: tuple[str, ...]) -> None:
    process = _run(*args)
    assert process.stdout == HELP
    assert process.stderr.splitlines()[-1] == "[]"


def test_the_version_is_the_packages() -> None:
    process = _run("--version")
    assert process.stdout == f"fedsp {version('fedsp')}\n"
    assert process.stderr.splitlines()[-1] == "[]"


def test_help_lists_exactly_the_commands_with_their_own_words() -> None:
    listed = dict(re.findall(r"^  (\w+) {2,}(.*)$", HELP, re.MULTILINE))
    assert listed.pop("chat") == (chat.__doc__ or "").splitlines()[0]
    assert listed.pop("federation") == (federation_commands.main.__doc__ or "").splitlines()[0]
    assert tuple(FederatedCLI.subcommands()) == SUBCOMMANDS
    assert tuple(listed) == (*SUBCOMMANDS, *COMMANDS)
    assert "{" + ",".join(SUBCOMMANDS) + "}" in HELP
    for name, line in listed.items():
        command = COMMANDS.get(name) or getattr(FederatedTrainer, name)
        assert command.__doc__.splitlines()[0] == line


@pytest.mark.parametrize("name", [*COMMANDS, *map("federation {}".format, FEDERATION)])
def test_commands_explain_themselves_at_once(name: str) -> None:
    process = _run(*name.split(), "--help")
    assert process.stdout.startswith(f"usage: fedsp {name} ")
    assert process.stderr.splitlines()[-1] == "[]"


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="fedsp")
    assert script.value == "fedsp.__main__:main"


def test_everything_else_goes_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsp import __main__ as entry

    monkeypatch.setattr("sys.argv", ["fedsp", "fitt"])
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 2


def test_help_of_a_command_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    """The words are the docstrings', of dataclass fields too."""
    from fedsp.cli import main

    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Communication rounds, at least 0." in text
    assert "Number format of a prompt on its way, in both directions." in text
    assert "--ckpt_path" in text
