"""The folder of a new live federation: everything that the parties need, written in one go.

DIR/README.md, compose.yaml   for the operator
DIR/authority/                the key that signs; it stays with the operator
DIR/server/                   the server's
DIR/clients/NAME/             a package for each partner
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from fedsp.compose import render_compose
from fedsp.credentials import (
    CA_CERTIFICATE,
    NODE_PUBLIC_KEY,
    create_authority,
    create_node_key,
    issue_server_certificate,
)
from fedsp.division import SPLITS
from fedsp.federation_settings import Address, FederationSettings, check_names, read_settings
from fedsp.pretrained import ASSETS, BackboneSpec, save_outline

# of a run and of Flower; there before a container mounts them
_WORKING = ("run", "flower")
# what a client needs to know of the global model and of the run; the rest is the server's own
_CLIENT_TRAINER = ("precision", "num_rounds", "sampler", "communication", "seed")
_CLIENT_MODEL = ("auxiliary", "tuned_weights")
_CLIENT_DATA = ("task", "batching", "tokenizer", "max_tokens", "seed")


def create_federation(
    folder: Path, config: Mapping[str, Any], names: Sequence[str], address: str, spec: BackboneSpec
) -> None:
    """Write a federation's folder.

    Args:
        folder: New or empty folder.
        config: The configuration as `fedsp fit --print_config` shows it; its clients' data and its
            partitioner are left out.
        names: The clients.
        address: HOST:PORT where they reach the server.
        spec: Names the global model, whose configuration and tokenizer every client gets.

    Raises:
        FileExistsError: If the folder is in use.
        ValueError: If a name or the address will not do, a split would be carved out of the data of
            the clients, or the model cannot be found.
    """
    point = Address.parse(address, "--address")
    check_names([*names], "--clients")
    _check_splits(config["data"]["init_args"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"`fedsp federation init` needs a new or empty folder, got {folder}.")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        _write(unfinished, config, names, point, spec)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_splits(data: Mapping[str, Any]) -> None:
    """Refuse what the server would learn only when it starts: it has no rows to carve out of."""
    for role in SPLITS:
        split = data[role]
        is_own = (
            split is None or isinstance(split, Mapping) or (role, split) == ("public", "server")
        )
        if not is_own:
            raise ValueError(
                f"`data.{role}` must be a source of its own or null in a live federation, got "
                f"{split!r}: the data that it would be carved out of is with the clients."
            )


def renew_certificate(folder: Path) -> Path:
    """Sign a new certificate and key for the server of a federation.

    Args:
        folder: The operator's folder, with `authority` and `server`.

    Returns:
        A new folder `renewed` with what takes the place of the server's files.

    Raises:
        CredentialError: If the authority's files are missing, damaged or expired.
        FileExistsError: If `renewed` is in use.
        ValueError: If it is no operator's folder.
    """
    host = read_settings(folder / "server", "server").meeting_point.host
    renewed = folder / "renewed"
    issue_server_certificate(folder / "authority", renewed, [host])
    return renewed


def _write(
    root: Path, config: Mapping[str, Any], names: Sequence[str], point: Address, spec: BackboneSpec
) -> None:
    server, clients, authority = root / "server", root / "clients", root / "authority"
    create_authority(authority)
    issue_server_certificate(authority, server, [point.host])
    for name in ("parties", *_WORKING):
        (server / name).mkdir()
    FederationSettings(str(point), [*names]).save(server)
    _dump(server / "config.yaml", server_config(config, names))
    for name in names:
        client = clients / name
        create_node_key(client)
        for working in _WORKING:
            (client / working).mkdir()
        shutil.copy(authority / CA_CERTIFICATE, client)
        shutil.copy(client / NODE_PUBLIC_KEY, server / "parties" / f"{name}.pub")
        FederationSettings(str(point), [*names], party=name).save(client)
        _dump(client / "config.yaml", client_config(config, names, name))
        save_outline(spec, client / "model")
        (client / "README.md").write_text(_render("partner", name=name, address=point, names=names))
    (root / "README.md").write_text(_render("operator", name=None, address=point, names=names))
    (root / "compose.yaml").write_text(render_compose(names, point.host, point.port))


def server_config(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the server's configuration: the given one, whose clients are elsewhere."""
    trainer = {name: value for name, value in config["trainer"].items() if name != "run_dir"}
    data = _data(config, config["data"]["init_args"], names, None)
    return {**config, "trainer": trainer, "data": data}


def client_config(config: Mapping[str, Any], names: Sequence[str], own: str) -> dict[str, Any]:
    """Return a client's configuration: what it needs to know, and a place for its data."""
    trainer = _pick(config["trainer"], _CLIENT_TRAINER)
    if config["trainer"]["privacy"] is not None:
        del trainer["seed"]  # who takes part must be a secret: see docs/differential-privacy.md
    model = dict(config["model"]["init_args"])
    arguments = {
        **_pick(model, _CLIENT_MODEL),
        "soft_prompt": _pick(model["soft_prompt"], ("num_virtual_tokens",)),
    }
    # found beside this file, in `model`, as configuration and tokenizer without weights
    backbone = ("name_or_path", "config", "tokenizer", "sharded", "quantization")
    arguments["backbone"] = {
        name: value for name, value in model["backbone"].items() if name not in backbone
    }
    data = _data(config, _pick(config["data"]["init_args"], _CLIENT_DATA), names, own)
    data["init_args"] |= dict.fromkeys(("server", "public", "selection", "test"))
    return {
        "seed_everything": config["seed_everything"],
        "trainer": trainer,
        "model": {"class_path": config["model"]["class_path"], "init_args": arguments},
        "client": config["client"],
        "data": data,
    }


def _data(
    config: Mapping[str, Any], arguments: Mapping[str, Any], names: Sequence[str], own: str | None
) -> dict[str, Any]:
    parties = {
        "class_path": "fedsp.partition.Parties",
        "init_args": {"parties": [*names], "own": own},
    }
    elsewhere = {"clients": None, "partitioner": parties}
    return {"class_path": config["data"]["class_path"], "init_args": {**arguments, **elsewhere}}


def _pick(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _dump(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))


def _render(template: str, **values: Any) -> str:
    environment = Environment(loader=FileSystemLoader(ASSETS), keep_trailing_newline=True)
    return environment.get_template(f"{template}_readme.md.j2").render(**values)
