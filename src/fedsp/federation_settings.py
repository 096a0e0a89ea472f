"""Who takes part in a live federation, where they meet, and how long is waited for whom.

`federation.yaml` in a party's folder; `fedsp federation init` writes it.
"""

import ipaddress
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsp.remote import Patience
from fedsp.state_files import write_text_atomically

FILE = "federation.yaml"
# a party's name is a folder, a file and part of a container's name
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True)
class Address:
    """Where the server is reached.

    Args:
        host: Name or IP address.
        port: TCP port.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, option: str) -> "Address":
        """Read HOST:PORT.

        Args:
            text: What the user typed; an IPv6 address stands in brackets.
            option: Its name, for the error.

        Raises:
            ValueError: If it is anything else.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"`{option}` must be HOST:PORT, such as fed.example.org:8443, got {text!r}."
            )
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        """Return HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class FederationSettings:
    """A party's `federation.yaml`.

    Args:
        address: HOST:PORT of the server, as the clients reach it.
        parties: Clients' names, in the order of their ids.
        party: Whose folder it is; null at the server.
        min_clients: Clients of the cohort that must be there before a round starts; null: all.
        join_seconds: How long the server waits for them before it gives up.
        round_seconds: How long a round waits for answers; later ones are left out.
    """

    address: str
    parties: list[str]
    party: str | None = None
    min_clients: int | None = None
    join_seconds: float = 600.0
    round_seconds: float = 3600.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one of them is not as it should be.
        """
        Address.parse(self.address, "address")
        check_names(self.parties, "parties")
        if self.party is not None and self.party not in self.parties:
            raise ValueError(f"`party` must be one of {self.parties} or null, got {self.party!r}.")
        if self.min_clients is not None and not 0 < self.min_clients <= len(self.parties):
            raise ValueError(
                f"`min_clients` must be in [1, {len(self.parties)}] or null, "
                f"got {self.min_clients}."
            )
        for name in ("join_seconds", "round_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")

    @property
    def meeting_point(self) -> Address:
        """The address, read."""
        return Address.parse(self.address, "address")

    @property
    def patience(self) -> Patience:
        """How long the server waits."""
        return Patience(self.min_clients, self.join_seconds, self.round_seconds)

    def save(self, folder: Path) -> None:
        """Write the file; a client's holds only what is its own."""
        values = asdict(self)
        if self.party is not None:
            values = {name: values[name] for name in ("address", "parties", "party")}
        else:
            del values["party"]
        write_text_atomically(folder / FILE, yaml.safe_dump(values, sort_keys=False))


def check_names(names: list[str], option: str) -> None:
    """Refuse names that are no good for folders, or that two parties have.

    Args:
        names: The parties' names.
        option: What gives them, for the error.

    Raises:
        ValueError: If a name will not do.
    """
    bad = [name for name in names if not _NAME.fullmatch(str(name))]
    if bad or not names:
        raise ValueError(
            f"`{option}` must name parties by up to 32 of a-z, 0-9 and inner hyphens, got "
            f"{bad or names}."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"`{option}` must name every party once, got {names}.")


def read_settings(folder: Path, role: str) -> FederationSettings:
    """Read the settings in a party's folder.

    Args:
        folder: As `fedsp federation init` made it.
        role: `server` or `client`, whose folder it has to be.

    Raises:
        ValueError: If it is no such folder, or a value is not as it should be.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"`fedsp federation {role}` needs a {role}'s folder, got {folder}, which holds no "
            f"{FILE}. Make one with `fedsp federation init`."
        )
    try:
        values: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    known = FederationSettings.__dataclass_fields__
    if not isinstance(values, dict) or not {"address", "parties"} <= set(values) <= set(known):
        raise ValueError(f"{path}: expected address, parties and others of {', '.join(known)}.")
    try:
        settings = FederationSettings(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    is_client = settings.party is not None
    if is_client != (role == "client"):
        other = "client" if is_client else "server"
        raise ValueError(f"{folder} is a {other}'s folder: start `fedsp federation {other}` there.")
    return settings
