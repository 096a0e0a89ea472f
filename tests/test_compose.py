"""The Compose file of a federation: valid, as `init` writes it, and nobody sees too much."""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsp.compose import render_compose
from fedsp.credentials import create_authority, issue_server_certificate
from fedsp.federation_commands import COMMANDS
from shipped_files import ROOT
from stand_ins import ended, linter

NAMES = ("alpha", "beta", "gamma")
HOSTS = ("server", "fed.example.org", "10.1.2.3", "2001:db8::7", "127.0.0.1", "::1", "localhost")


def resolved(text: str, folder: Path, **variables: str) -> dict[str, Any]:
    """Return what Docker Compose understands; no engine is asked."""
    file = folder / "compose.yaml"
    file.write_text(text)
    words = [linter("docker-compose"), "--file", file, "config", "--format", "json"]
    done = ended(words, {**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def test_the_file_of_the_checkout_is_what_init_writes_for_three() -> None:
    assert (ROOT / "compose.yaml").read_text() == render_compose(NAMES, "server", 8443)


@pytest.mark.parametrize("host", HOSTS)
def test_docker_compose_understands_it(host: str, tmp_path: Path) -> None:
    services = resolved(render_compose(NAMES, host, 9000), tmp_path)["services"]
    assert services.keys() == {"server", *(f"client-{name}" for name in NAMES)}


def test_docker_compose_would_find_a_misspelt_key(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(render_compose(NAMES, "server", 8443).replace("read_only", "readonly"))
    done = ended([linter("docker-compose"), "--file", file, "config", "--quiet"])
    assert done.returncode != 0
    assert "readonly" in done.stderr


def test_no_container_has_rights_that_it_does_not_need(tmp_path: Path) -> None:
    config = resolved((ROOT / "compose.yaml").read_text(), tmp_path, FEDSP_UID="7", FEDSP_GID="8")
    for service in config["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "7:8"
        assert service["restart"] == "on-failure"
        assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & service.keys()


def test_a_party_sees_its_own_folder_and_writes_only_what_it_works_with(tmp_path: Path) -> None:
    services = resolved((ROOT / "compose.yaml").read_text(), tmp_path)["services"]
    folders = {f"client-{name}": tmp_path / "clients" / name for name in NAMES}
    folders["server"] = tmp_path / "server"
    caches = set()
    for name, service in services.items():
        mounts = {mount["target"]: mount for mount in service["volumes"]}
        bound = {
            target: (Path(mount["source"]), mount.get("read_only", False))
            for target, mount in mounts.items()
            if mount["type"] == "bind"
        }
        assert bound == {
            "/federation": (folders[name], True),
            "/federation/run": (folders[name] / "run", False),
            "/federation/flower": (folders[name] / "flower", False),
        }
        caches.add(mounts["/cache"]["source"])
        program, role, folder = service["command"]
        assert program == "federation"
        assert role == name.partition("-")[0]
        assert role in COMMANDS
        assert folder == "/federation"
    assert len(caches) == len(services)


def test_only_the_server_has_an_open_port() -> None:
    services = yaml.safe_load(render_compose(NAMES, "fed.example.org", 9000))["services"]
    assert services["server"]["ports"] == ["9000:9000"]
    assert services["server"]["networks"] == {"default": {"aliases": ["fed.example.org"]}}
    assert not any("ports" in services[f"client-{name}"] for name in NAMES)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_a_loopback_address_all_share_the_machines_network(host: str) -> None:
    services = yaml.safe_load(render_compose(NAMES, host, 9000))["services"]
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert "ports" not in services["server"]


def test_a_client_called_server_is_not_taken_for_it() -> None:
    services = yaml.safe_load(render_compose(["server"], "fed.example.org", 9000))["services"]
    assert services["server"]["command"][1] == "server"
    assert services["client-server"]["command"][1] == "client"


# --- health ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def tls_server(folder: Path) -> Iterator[int]:
    """Answer handshakes on a port of the loopback interface."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def health(host: str, port: int, ca: Path) -> "subprocess.CompletedProcess[str]":
    """Carry out the server's health check, on this machine."""
    server = yaml.safe_load(render_compose(NAMES, host, port))["services"]["server"]
    kind, program, option, text = server["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c")
    assert "/federation/ca.crt" in text
    return ended([sys.executable, "-I", "-c", text.replace("/federation/ca.crt", str(ca))])


def test_a_server_is_healthy_where_its_certificate_is_good_for_the_address(tmp_path: Path) -> None:
    create_authority(tmp_path / "authority")
    issue_server_certificate(tmp_path / "authority", tmp_path / "server", ["fed.example.org"])
    ca = tmp_path / "server" / "ca.crt"
    with tls_server(tmp_path / "server") as port:
        assert health("fed.example.org", port, ca).returncode == 0
        other = health("elsewhere.example.org", port, ca)
    assert other.returncode == 1
    assert "Hostname mismatch" in other.stderr


def test_a_server_that_another_authority_signed_is_not_healthy(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        create_authority(tmp_path / name)
    issue_server_certificate(tmp_path / "theirs", tmp_path / "server", ["fed.example.org"])
    with tls_server(tmp_path / "server") as port:
        done = health("fed.example.org", port, tmp_path / "ours" / "ca.crt")
    assert done.returncode == 1
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr


def test_a_server_that_does_not_listen_is_not_healthy(tmp_path: Path) -> None:
    create_authority(tmp_path / "authority")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = health("fed.example.org", port, tmp_path / "authority" / "ca.crt")
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stderr
