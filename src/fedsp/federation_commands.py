"""`fedsp federation init|server|client|renew`: a live federation from the command line.

Everything that takes long to import is imported only when a command's words are understood.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp.report_commands import Parser
from fedsp.shipped import expand_names

if TYPE_CHECKING:
    from fedsp.cli import FederatedCLI

_REST = "Any other option is one of `fedsp fit` and goes over what the folder's config.yaml says."


def init(arguments: Sequence[str]) -> None:
    """Write all that a live federation needs: certificates, keys, configurations, packages.

    Args:
        arguments: The words after `fedsp federation init`.

    Raises:
        FileExistsError: If the folder is in use.
        ValueError: If an option or the configuration is wrong.
    """
    parser = _parser("init", init, "Any other option is one of `fedsp fit`, over the FILEs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="configuration as for `fedsp fit`, whose clients are simulated; may be repeated",
    )
    parser.add_argument(
        "--clients", nargs="+", required=True, metavar="NAME", help="names of the partners"
    )
    parser.add_argument(
        "--address",
        required=True,
        metavar="HOST:PORT",
        help="where the partners reach the server; its certificate is for this host",
    )
    given, options = parser.parse_known_args(expand_names([*arguments]))
    from fedsp.cli import FederatedCLI
    from fedsp.federation_folder import create_federation

    files = [word for file in given.config for word in ("--config", file)]
    run: Any = FederatedCLI([*files, *options], run=False)
    config, spec = run.trainer.config, run.model.backbone_spec
    create_federation(given.folder, config, given.clients, given.address, spec)
    print(f"federation: {given.folder} (start with its README.md)")


def server(arguments: Sequence[str]) -> None:
    """Run the server of a live federation; started again, it goes on from its last checkpoint.

    Args:
        arguments: The words after `fedsp federation server`.

    Raises:
        ValueError: If the folder, a certificate or a setting is wrong.
        FederationError: If too few clients come, or the port is taken.
    """
    given, options = _of_folder("server", server, arguments)
    from fedsp.credentials import check_server
    from fedsp.federation_settings import read_settings

    settings = read_settings(given.folder, "server")
    check_server(given.folder, settings.address)
    run = _configure(given.folder, options)
    _prepare_flower(given.folder)
    from fedsp.server_app import run_server

    run_server(run, given.folder, settings)


def client(arguments: Sequence[str]) -> None:
    """Run a client of a live federation: it works for the server until the federation is over.

    Args:
        arguments: The words after `fedsp federation client`.

    Raises:
        ValueError: If the folder, a key or a setting is wrong.
        FederationError: If the server refuses this client.
    """
    given, options = _of_folder("client", client, arguments)
    from fedsp.credentials import check_client
    from fedsp.federation_settings import read_settings

    settings = read_settings(given.folder, "client")
    check_client(given.folder, settings.address)
    # the outline is beside the configuration, wherever the package was put
    outline = f"--model.init_args.backbone.name_or_path={given.folder / 'model'}"
    run = _configure(given.folder, [outline, *options])
    _prepare_flower(given.folder)
    from fedsp.client_app import run_client

    run_client(run, given.folder, settings)


def renew(arguments: Sequence[str]) -> None:
    """Sign a new certificate for the server, before the present one ends.

    Args:
        arguments: The words after `fedsp federation renew`.

    Raises:
        FileExistsError: If the folder `renewed` is in use.
        ValueError: If it is no operator's folder.
    """
    parser = _parser("renew", renew, None)
    parser.add_argument("folder", type=Path, metavar="DIR", help="as `init` made it")
    given = parser.parse_args(arguments)
    from fedsp.federation_folder import renew_certificate

    renewed = renew_certificate(given.folder)
    print(f"renewed: copy server.key and server.crt of {renewed} into the server's folder")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "init": init,
    "server": server,
    "client": client,
    "renew": renew,
}


def main(arguments: Sequence[str]) -> None:
    """Run a live federation of separate machines: its folder, its server, its clients.

    Errors that the user can mend are one line, as with `fedsp fit`.

    Args:
        arguments: The command line after `fedsp federation`.
    """
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(f"usage: fedsp federation {{{','.join(COMMANDS)}}} DIR [--OPTION VALUE]\n")
        for command, function in COMMANDS.items():
            print(f"  {command:<8}{(function.__doc__ or '').splitlines()[0]}")
        return
    if name not in COMMANDS:
        Parser(prog="fedsp federation").error(f"expected {', '.join(COMMANDS)}, got {name!r}")
    if any(word in ("-h", "--help") for word in arguments[1:]):
        COMMANDS[name](arguments[1:])  # prints and exits, without the long imports
    from fedsp.cli import reporting

    with reporting():
        COMMANDS[name](arguments[1:])


def _configure(folder: Path, options: Sequence[str]) -> "FederatedCLI":
    """Parse the folder's configuration, with its own place for the run."""
    from fedsp.cli import FederatedCLI

    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.yaml; `fedsp federation init` writes it.")
    return FederatedCLI(
        ["--config", str(file), f"--trainer.run_dir={folder / 'run'}", *options], run=False
    )


def _prepare_flower(folder: Path) -> None:
    """Switch off what Flower would send to its makers, before it is imported."""
    if find_spec("flwr") is None:
        raise ModuleNotFoundError(
            'A live federation needs Flower, which is not installed: pip install "fedsp[flower]".'
        )
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["FLWR_HOME"] = str(folder / "flower")


def _of_folder(
    name: str, command: Callable[..., Any], arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser(name, command, _REST)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help=f"the {name}'s folder, as `init` made it"
    )
    return parser.parse_known_args(expand_names([*arguments]))


def _parser(name: str, command: Callable[..., Any], rest: str | None) -> Parser:
    return Parser(
        prog=f"fedsp federation {name}",
        description=(command.__doc__ or "").splitlines()[0],
        epilog=rest,
        allow_abbrev=False,
    )
