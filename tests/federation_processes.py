"""A live federation of tiny parties: server and clients as processes, over TLS on loopback.

They are forked from a server that has paid for the imports once.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fedsp.credentials import create_authority, create_node_key, issue_server_certificate
from fedsp.federation_settings import FederationSettings
from fedsp.partition import Parties
from fedsp.sources import Files
from fedsp.stages import Stage
from parties import NAMES, server_data
from processes import PRELOADED, free_port
from tiny import make_client, make_data, make_server, make_trainer

STEP_SECONDS = 0.4


class SlowAdamW(torch.optim.AdamW):
    """AdamW with time to be killed in."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return super().step(*args, **kwargs)


def slow(parameters: Any) -> SlowAdamW:
    return SlowAdamW(parameters, lr=1e-2, weight_decay=0.0)


def tiny_client() -> Any:
    return make_client(soft_prompt=Stage(steps=2, optimizer=slow))


def write_federation(root: Path, **patience: Any) -> FederationSettings:
    """Write the folders of a server and three clients, as `fedsp federation init` does."""
    settings = FederationSettings(f"127.0.0.1:{free_port()}", NAMES, **patience)
    create_authority(root / "authority")
    issue_server_certificate(root / "authority", root / "server", ["127.0.0.1"])
    settings.save(root / "server")
    (root / "server" / "parties").mkdir()
    for name in NAMES:
        client = root / "clients" / name
        create_node_key(client)
        (client / "ca.crt").write_bytes((root / "authority" / "ca.crt").read_bytes())
        key = (client / "node.pub").read_bytes()
        (root / "server" / "parties" / f"{name}.pub").write_bytes(key)
        FederationSettings(settings.address, NAMES, party=name).save(client)
    return settings


def run_tiny_server(folder: Path, root: Path, paths: dict[str, str], num_rounds: int) -> None:
    from fedsp.federation_settings import read_settings
    from fedsp.server_app import run_server

    run: Any = SimpleNamespace(
        trainer=make_trainer(root / "server" / "run", num_rounds=num_rounds),
        model=make_server(folder),
        client=tiny_client(),
        datamodule=server_data(folder, paths),
    )
    run_server(run, root / "server", read_settings(root / "server", "server"))


def run_tiny_client(folder: Path, root: Path, paths: dict[str, str], name: str) -> None:
    from fedsp.client_app import run_client
    from fedsp.federation_settings import read_settings

    client = root / "clients" / name
    data = make_data(
        folder,
        clients=Files(paths[name]),
        partitioner=Parties(NAMES, own=name),
        **dict.fromkeys(("server", "public", "selection", "test")),
    )
    run: Any = SimpleNamespace(
        trainer=make_trainer(client / "run"),
        model=make_server(folder),
        client=tiny_client(),
        datamodule=data,
    )
    run_client(run, client, read_settings(client, "client"))


class Party:
    """A process that plays one side, and its log."""

    def __init__(self, log: Path, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, "fedsp.flower_link", "fedsp.flower_node"])
        self.log, self._function, self._args, self._context = log, function, args, context
        self.start()

    def start(self) -> None:
        self.process = self._context.Process(
            target=_run, args=(self.log, self._function, self._args)
        )
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 240.0) -> None:
        """Wait until the log has a text; all parties' logs lie in one folder."""
        deadline = time.monotonic() + seconds
        while text not in self.text():
            if time.monotonic() > deadline or not self.process.is_alive():
                logs = [f"{log.name}:\n{log.read_text()}" for log in self.log.parent.glob("*.log")]
                raise AssertionError(f"no {text!r} in {self.log.name}\n" + "\n".join(logs))
            time.sleep(0.05)

    def join(self, seconds: float = 90.0) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


def _run(log: Path, function: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        try:
            function(*args)
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", flush=True)
            os._exit(1)


@contextlib.contextmanager
def stopping(*parties: Party) -> Any:
    try:
        yield
    finally:
        for party in parties:
            party.kill()
