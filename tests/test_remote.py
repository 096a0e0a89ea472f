"""The loop over a link gives what the simulation gives, and survives what happens to parties."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.ledger import read_ledger
from fedsp.pretrained import load_model
from fedsp.state_files import load_state
from fedsp.trainer import FederatedTrainer
from fedsp.wire import Record
from parties import (
    NAMES,
    LocalLink,
    make_site,
    remote,
    server_data,
    simulated_data,
    write_party_rows,
)
from tiny import fit, make_client, make_server, make_trainer


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_party_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def simulated(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, paths: dict[str, str]
) -> FederatedTrainer:
    run_dir = tmp_path_factory.mktemp("simulated") / "run"
    return fit(folder, run_dir, data=simulated_data(folder, paths))


def sites_in(folder: Path, root: Path, paths: dict[str, str]) -> dict[str, Any]:
    return {name: make_site(folder, root / name, name, paths[name]) for name in NAMES}


def run_remotely(
    folder: Path, run_dir: Path, paths: dict[str, str], link: Any, **options: Any
) -> FederatedTrainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(run_dir, **options)
    trainer.make_executor = remote(link)
    trainer.fit(make_server(folder), make_client(), server_data(folder, paths), ckpt_path=ckpt_path)
    return trainer


def same_payload(one: FederatedTrainer, other: FederatedTrainer) -> bool:
    mine, theirs = one.federation.broadcast, other.federation.broadcast
    return all(torch.equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())


def lines(path: Path, client_id: int) -> list[tuple[Any, ...]]:
    rows = (row for row in read_ledger(path) if row["client"] == client_id)
    return [(row["round"], row["direction"], row["kind"], row["sha256"]) for row in rows]


def test_over_a_link_the_prompt_is_that_of_the_simulation(
    tmp_path: Path,
    folder: Path,
    paths: dict[str, str],
    simulated: FederatedTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites = sites_in(folder, tmp_path, paths)
    loaded = []
    monkeypatch.setattr(
        "fedsp.backbone.load_model", lambda spec: loaded.append(spec) or load_model(spec)
    )
    trainer = run_remotely(folder, tmp_path / "server", paths, LocalLink(sites))
    assert len(loaded) == 1  # the server's; no site ever loads the global model
    assert same_payload(trainer, simulated)
    for client_id, name in enumerate(NAMES):
        mine = lines(tmp_path / name / "ledger.jsonl", client_id)
        assert mine == lines(tmp_path / "server" / "ledger.jsonl", client_id)
        assert mine == lines(simulated.folder.ledger, client_id)
        kept = load_state(
            sites[name].folder.clients / f"{client_id:06d}" / "round-000002.safetensors"
        )
        assert kept["training"]


class CutOff(LocalLink):
    """A link that breaks after so many requests, in the middle of a round."""

    def __init__(self, sites: dict[str, Any], after: int) -> None:
        super().__init__(sites)
        self.left = after

    def send(self, party: str, record: Record) -> None:
        if not self.left:
            raise ConnectionError("the plug was pulled")
        self.left -= 1
        super().send(party, record)


def test_server_and_clients_that_start_again_come_to_the_same_prompt(
    tmp_path: Path, folder: Path, paths: dict[str, str], simulated: FederatedTrainer
) -> None:
    sites = sites_in(folder, tmp_path, paths)
    with pytest.raises(ConnectionError):
        run_remotely(folder, tmp_path / "server", paths, CutOff(sites, after=8))
    # the last round is asked for again: its checkpoint is lost, the clients' states are not
    newest = max((tmp_path / "server" / "checkpoints").glob("round-*"))
    newest.unlink()
    for site in sites.values():
        site.close()
    again = sites_in(folder, tmp_path, paths)
    trainer = run_remotely(folder, tmp_path / "server", paths, LocalLink(again), ckpt_path="last")
    assert same_payload(trainer, simulated)
