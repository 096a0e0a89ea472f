"""A real SuperLink and real parties over TLS on loopback, all in one process."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsp.credentials import create_authority, create_node_key, issue_server_certificate
from fedsp.federation_settings import Address
from fedsp.flower_link import FlowerLink
from fedsp.flower_node import FlowerNode
from fedsp.remote import FederationError
from fedsp.wire import Record
from processes import free_port

NAMES = ["alpha", "beta"]
SECONDS = 30.0
Answer = Callable[[Record], Record]


def echo(record: Record) -> Record:
    return record


class Federation:
    """A server's folder, its link while it is open, and parties that are threads."""

    def __init__(self, root: Path) -> None:
        self.root, self.address = root, Address("127.0.0.1", free_port())
        self.told: dict[str, list[str]] = {name: [] for name in ("server", *NAMES)}
        self.failures: dict[str, Exception] = {}
        self.threads: dict[str, threading.Thread] = {}
        self._ended = {name: threading.Event() for name in NAMES}
        self._link: FlowerLink | None = None
        create_authority(root / "authority")
        issue_server_certificate(root / "authority", root / "server", ["127.0.0.1"])
        (root / "server" / "parties").mkdir()
        for name in NAMES:
            create_node_key(root / name)
            shutil.copy(root / "authority" / "ca.crt", root / name)
            shutil.copy(root / name / "node.pub", root / "server" / "parties" / f"{name}.pub")

    def open(self) -> FlowerLink:
        told = self.told["server"].append
        self._link = FlowerLink(self.root / "server", self.address, NAMES, told)
        return self._link

    def start(self, name: str, answer: Answer = echo, has_ended: Any = None) -> None:
        """Start a party; it ends when the test does, or after an answer that ends it."""
        node = FlowerNode(self.root / name, self.address, self.told[name].append)

        def serve() -> None:
            try:
                node.serve(answer, has_ended or self._ended[name].is_set)
            except FederationError as error:
                self.failures[name] = error

        self.threads[name] = threading.Thread(target=serve, name=name)
        self.threads[name].start()

    def close(self) -> None:
        for ended in self._ended.values():
            ended.set()
        if self._link is None and self.threads:  # who waits for a server would do so for ever
            self.open()
        for thread in self.threads.values():
            thread.join(SECONDS)
        if self._link is not None:
            self._link.close()
        assert not any(thread.is_alive() for thread in self.threads.values())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def meet(federation: Federation, **answers: Answer) -> FlowerLink:
    """Open the port and wait for both parties; those that are not named echo."""
    link = federation.open()
    for name in NAMES:
        federation.start(name, answers.get(name, echo))
    wait_until(lambda: sorted(link.present()) == NAMES)
    return link


def receive(link: FlowerLink, count: int) -> list[tuple[str, Record]]:
    came: list[tuple[str, Record]] = []
    deadline = time.monotonic() + SECONDS
    while len(came) < count and time.monotonic() < deadline:
        came += link.receive(1.0)
    return came
