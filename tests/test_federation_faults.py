"""A real SuperLink and three clients with TLS and keys, which are killed, stopped and refused."""

import json
import os
import signal
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from federation_processes import (
    Party,
    run_tiny_client,
    run_tiny_server,
    stopping,
    tiny_client,
    write_federation,
)
from fedsp.audit import audit
from fedsp.checkpoint import Checkpoints
from fedsp.credentials import create_authority, create_node_key, issue_server_certificate
from fedsp.run_folder import RunFolder
from parties import NAMES, simulated_data, write_party_rows
from tiny import fit

ROUNDS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_party_rows(tmp_path_factory.mktemp("rows"))


def rounds_done(root: Path) -> int:
    file = RunFolder(root / "server" / "run").rounds
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_rounds(root: Path, count: int, server: Party) -> None:
    deadline = time.monotonic() + 240
    while rounds_done(root) < count:
        assert time.monotonic() < deadline, server.text()
        time.sleep(0.05)


def last_prompt(run_dir: Path) -> Any:
    tree = Checkpoints(RunFolder(run_dir).checkpoints).load("last").tree
    return tree["federation"]["broadcast"]["soft_prompt"]


@pytest.mark.timeout(900)  # it waits most of the time, and much longer on a busy machine
def test_kills_cost_no_round_and_change_no_bit(
    tmp_path: Path, folder: Path, paths: dict[str, str]
) -> None:
    root = tmp_path / "federation"
    write_federation(root, join_seconds=240.0, round_seconds=240.0)
    server = Party(tmp_path / "server.log", run_tiny_server, folder, root, paths, ROUNDS)
    clients = {
        name: Party(tmp_path / f"{name}.log", run_tiny_client, folder, root, paths, name)
        for name in NAMES
    }
    with stopping(server, *clients.values()):
        # a client dies while it trains, and is started again
        clients["beta"].wait_for("round 0: works")
        clients["beta"].kill()
        clients["beta"].start()
        # the server dies while clients train, and is started again
        wait_for_rounds(root, 2, server)
        clients["alpha"].wait_for("round 2: works")
        server.kill()
        clients["alpha"].wait_for("tries again")
        server.start()
        # a client is cut off for longer than the server believes in its life, and comes back
        wait_for_rounds(root, 3, server)
        os.kill(clients["gamma"].process.pid, signal.SIGSTOP)
        time.sleep(22)
        os.kill(clients["gamma"].process.pid, signal.SIGCONT)
        assert server.join(240) == 0, server.text()
        assert [client.join(60) for client in clients.values()] == [0, 0, 0]
    lines = RunFolder(root / "server" / "run").rounds.read_text().splitlines()
    assert [int(json.loads(line)["round"]) for line in lines] == list(range(ROUNDS))
    simulated = fit(
        folder,
        tmp_path / "simulated",
        data=simulated_data(folder, paths),
        client=tiny_client(),
        num_rounds=ROUNDS,
    )
    expected = simulated.federation.broadcast["soft_prompt"]
    assert torch.equal(last_prompt(root / "server" / "run"), expected)
    report = audit(root)
    assert report.passed, report.findings


def test_strangers_and_wrong_servers_are_refused(
    tmp_path: Path, folder: Path, paths: dict[str, str]
) -> None:
    root = tmp_path / "federation"
    settings = write_federation(root, min_clients=1, join_seconds=60.0)
    # alpha lost its key and made another one; beta was given the authority of somebody else
    for name, made in (("alpha", create_node_key), ("beta", create_authority)):
        made(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            if (root / "clients" / name / file.name).exists():
                file.replace(root / "clients" / name / file.name)
    server = Party(tmp_path / "server.log", run_tiny_server, folder, root, paths, 1)
    with stopping(server):
        server.wait_for("listens at")
        clients = {
            name: Party(tmp_path / f"{name}.log", run_tiny_client, folder, root, paths, name)
            for name in ("alpha", "beta")
        }
        with stopping(*clients.values()):
            assert [client.join() for client in clients.values()] == [1, 1]
        assert "does not know this client's key" in clients["alpha"].text()
        assert "is not the server of this federation" in clients["beta"].text()
        # the port is taken
        second = Party(tmp_path / "second.log", run_tiny_server, folder, root, paths, 1)
        with stopping(second):
            assert second.join() == 1
        assert f"port {settings.meeting_point.port} is taken" in second.text()
        # nobody is let in to what Flower could be asked to do otherwise
        verify = ssl.create_default_context(cafile=root / "server" / "ca.crt")
        with httpx.Client(verify=verify, base_url=f"https://{settings.address}") as stranger:
            for path in ("/", "/docs", "/v1/control/register-node", "/v1/runtime/acquire-task"):
                assert stranger.post(path, content=b"").status_code == 403
            assert stranger.post("/v1/fleet/register-node", content=b"").status_code == 403


def test_a_server_without_clients_gives_up_and_can_go_on(
    tmp_path: Path, folder: Path, paths: dict[str, str]
) -> None:
    root = tmp_path / "federation"
    write_federation(root, min_clients=1, join_seconds=1.0)
    server = Party(tmp_path / "server.log", run_tiny_server, folder, root, paths, 1)
    with stopping(server):
        assert server.join() == 1
        assert "`min_clients` wants 1 clients of the cohort" in server.text()
        issue_server_certificate(root / "authority", root / "new", ["127.0.0.1"])
        settings = root / "server" / "federation.yaml"
        settings.write_text(settings.read_text().replace("join_seconds: 1.0", "join_seconds: 60"))
        client = Party(tmp_path / "gamma.log", run_tiny_client, folder, root, paths, "gamma")
        with stopping(client):
            server.start()
            assert server.join() == 0, server.text()
            assert client.join() == 0, client.text()
    assert rounds_done(root) == 1
