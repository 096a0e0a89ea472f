"""A live federation in one process: every party has its own site, the network is a list."""

import json
from pathlib import Path
from typing import Any

from fedsp.auxiliary import Auxiliary
from fedsp.client import ClientModule
from fedsp.executors import Executor
from fedsp.messages import encode_handout
from fedsp.opening import participations
from fedsp.partition import ByColumn, Parties
from fedsp.remote import Deal, Patience, RemoteExecutor
from fedsp.site import ClientSite
from fedsp.sources import Files
from fedsp.terms import terms
from fedsp.trainer import FederatedTrainer
from fedsp.wire import Record
from tiny import make_client, make_data, make_server, make_trainer

NAMES = ["alpha", "beta", "gamma"]


def write_party_rows(folder: Path) -> dict[str, str]:
    """Write additions, a file a party and one of the server's; each row says whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for start, name in enumerate((*NAMES, "server")):
        rows = [
            {"prompt": f"{a}+{b}=", "completion": str(a + b), "party": name}
            for a, b in ((i % 13, i // 13) for i in range(start, 120, 4))
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(path)
    return paths


def server_splits(paths: dict[str, str]) -> dict[str, Any]:
    return {name: Files(paths["server"]) for name in ("server", "public", "selection", "test")}


def simulated_data(folder: Path, paths: dict[str, str]) -> Any:
    clients = Files([paths[name] for name in NAMES])
    return make_data(folder, clients=clients, partitioner=ByColumn("party"), **server_splits(paths))


def server_data(folder: Path, paths: dict[str, str]) -> Any:
    return make_data(folder, clients=None, partitioner=Parties(NAMES), **server_splits(paths))


def make_site(
    folder: Path, run_dir: Path, name: str, path: str, server: Any = None, **client: Any
) -> ClientSite:
    data = make_data(
        folder,
        clients=Files(path),
        partitioner=Parties(NAMES, own=name),
        **dict.fromkeys(("server", "public", "selection", "test")),
    )
    trainer = make_trainer(run_dir)
    server = server or make_server(folder)
    return ClientSite(trainer, server, make_client(**client), data, NAMES.index(name), print)


class LocalLink:
    """Hands every request to a site at once and keeps its answer."""

    def __init__(self, sites: dict[str, ClientSite]) -> None:
        self.sites = sites
        self.answers: list[tuple[str, Record]] = []

    def present(self) -> dict[str, str]:
        return {name: str(id(site)) for name, site in self.sites.items()}

    def send(self, party: str, record: Record) -> None:
        self.answers.append((party, self.sites[party].answer(record)))

    def receive(self, seconds: float) -> list[tuple[str, Record]]:
        came, self.answers = self.answers, []
        return came

    def close(self) -> None:
        pass


IMPATIENT = Patience(join_seconds=0.0, round_seconds=5.0)


def remote(link: Any, patience: Patience = IMPATIENT) -> Any:
    """What makes the executor of a trainer whose clients are behind a link."""

    def make(trainer: FederatedTrainer, client: ClientModule, auxiliary: Auxiliary) -> Executor:
        handout = encode_handout(auxiliary.handout())
        deal = Deal(NAMES, handout, terms(trainer.config), participations(trainer))
        return RemoteExecutor(link, deal, trainer.ledger, patience, print)

    return make
