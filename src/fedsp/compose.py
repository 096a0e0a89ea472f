"""The Compose file of a live federation: its parties in containers on one machine."""

import ipaddress
from collections.abc import Sequence

from jinja2 import Environment, FileSystemLoader

from fedsp.federation_settings import Address
from fedsp.pretrained import ASSETS


def render_compose(names: Sequence[str], host: str, port: int) -> str:
    """Write the Compose file that lies beside the folders `server` and `clients`.

    Args:
        names: The clients, as `fedsp.federation_settings.check_names` lets them be.
        host: Name or IP address under which the clients reach the server. Within the file's network
            a name leads to the server's container; for a loopback address all of them use the
            machine's own network.
        port: TCP port of the server.

    Returns:
        YAML.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    environment = Environment(
        loader=FileSystemLoader(ASSETS), keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template("compose.yaml.j2").render(
        names=[*names],
        host=host,
        port=port,
        is_name=address is None,
        is_loopback=Address(host, port).is_loopback,
        own="::1" if address is not None and address.version == 6 else "127.0.0.1",
    )
