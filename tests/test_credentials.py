"""Oracles: TLS over a real socket, the `openssl` and `ssh-keygen` programs, and hand-made files."""

import ipaddress
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from fedsp.credentials import (
    CredentialError,
    check_client,
    check_server,
    create_authority,
    create_node_key,
    issue_server_certificate,
)

ADDRESS = "127.0.0.1:8000"
HOSTS = ["federation.example.org", "127.0.0.1", "localhost", "::1"]
NOW = datetime.now(UTC)
USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@pytest.fixture
def authority(tmp_path):
    create_authority(tmp_path / "authority")
    return tmp_path / "authority"


@pytest.fixture
def server(authority, tmp_path):
    issue_server_certificate(authority, tmp_path / "server", HOSTS)
    return tmp_path / "server"


@pytest.fixture
def client(authority, tmp_path):
    folder = tmp_path / "clients" / "alpha"
    create_node_key(folder)
    shutil.copy(authority / "ca.crt", folder)
    return folder


def meet(server: Path, ca: Path, host: str) -> str:
    """Connect to a TLS server on the loopback; return what it says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            try:
                with context.wrap_socket(connection, server_side=True) as tls:
                    tls.sendall(b"welcome")
            except OSError:
                pass  # the client hung up: its side of the story counts

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            trusting = ssl.create_default_context(cafile=ca)
            trusting.verify_flags |= ssl.VERIFY_X509_STRICT
            plain = socket.create_connection(listener.getsockname())
            with trusting.wrap_socket(plain, server_hostname=host) as tls:
                return tls.recv(7).decode()
        finally:
            thread.join()


def certificate(
    folder: Path,
    name: str,
    *,
    begins: timedelta = timedelta(hours=-1),
    ends: timedelta = timedelta(days=10),
    key=None,
    issuer: tuple | None = None,
    hosts: tuple[str, ...] = ("127.0.0.1",),
):
    """Write a certificate and its key by hand; return both."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} by hand")])
    signer, signer_key = issuer or (None, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer.subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW + begins)
        .not_valid_after(NOW + ends)
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
            critical=False,
        )
    )
    if signer is None:
        uses = dict.fromkeys(USES, False) | {"key_cert_sign": True}
        builder = builder.add_extension(x509.KeyUsage(**uses), critical=True)
    else:
        names = [x509.IPAddress(ipaddress.ip_address(host)) for host in hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = builder.sign(signer_key, hashes.SHA256())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.crt").write_bytes(made.public_bytes(forms.Encoding.PEM))
    write_key(folder / f"{name}.key", key, forms.PrivateFormat.PKCS8)
    return made, key


def write_key(path: Path, key, form, encryption=None) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    encryption = encryption or forms.NoEncryption()
    path.write_bytes(key.private_bytes(forms.Encoding.PEM, form, encryption))


def by_hand(folder: Path, **changes) -> Path:
    """A server's folder made without the package; `changes` go to its certificate."""
    certificate(folder, "server", issuer=certificate(folder, "ca"), **changes)
    return folder


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "federation.example.org", "::1"])
def test_tls_over_a_socket_takes_the_issued_files(authority, server, host):
    assert meet(server, authority / "ca.crt", host) == "welcome"
    check_server(server, f"[{host}]:8000" if ":" in host else f"{host}:8000")


def test_tls_refuses_the_hosts_that_check_server_refuses(authority, server):
    with pytest.raises(ssl.SSLCertVerificationError):
        meet(server, authority / "ca.crt", "127.0.0.2")
    wanted = (
        f"{server}/server.crt is for federation.example.org, localhost, 127.0.0.1, ::1 and not "
        "for 127.0.0.2, the host of the address 127.0.0.2:8000. Issue a certificate that names it."
    )
    with pytest.raises(CredentialError, match=f"^{re.escape(wanted)}$"):
        check_server(server, "127.0.0.2:8000")
    with pytest.raises(CredentialError, match=r"and not for example\.org, the host of the address"):
        check_server(server, "example.org:8000")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_openssl_verifies_the_chain_strictly_and_reads_dates_of_397_days_and_10_years(
    authority, server
):
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    subprocess.run([*verify, "-CAfile", authority / "ca.crt", server / "server.crt"], check=True)
    for path, days in ((server / "server.crt", 397), (authority / "ca.crt", 3652)):
        for margin, status in ((-60, 0), (60, 1)):
            seconds = str(days * 86400 + margin)
            check = ["openssl", "x509", "-noout", "-checkend", seconds, "-in", path]
            assert subprocess.run(check, stdout=subprocess.DEVNULL).returncode == status


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs the ssh-keygen program")
def test_ssh_keygen_derives_the_public_node_key_of_384_bits(client):
    listed = subprocess.run(
        ["ssh-keygen", "-l", "-f", client / "node.pub"], check=True, capture_output=True, text=True
    )
    assert listed.stdout.startswith("384 SHA256:")
    assert listed.stdout.endswith("(ECDSA)\n")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", client / "node.key"], check=True, capture_output=True, text=True
    )
    assert derived.stdout.split()[:2] == (client / "node.pub").read_text().split()
    check_client(client, ADDRESS)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs the ssh-keygen program")
def test_a_node_key_that_the_partner_made_with_ssh_keygen_passes(client):
    (client / "node.key").unlink()
    make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", client / "node.key"]
    subprocess.run(make, check=True)
    with pytest.raises(CredentialError, match=r"node\.pub does not belong to node\.key beside it"):
        check_client(client, ADDRESS)
    (client / "node.key.pub").rename(client / "node.pub")
    check_client(client, ADDRESS)


def test_private_keys_are_the_owners_alone_and_nothing_else_is_written(authority, server, client):
    modes = {
        str(path.relative_to(path.parents[1])): path.stat().st_mode & 0o777
        for folder in (authority, server, client)
        for path in sorted(folder.iterdir())
    }
    private = {name for name, mode in modes.items() if mode == 0o600}
    assert private == {"authority/ca.key", "server/server.key", "alpha/node.key"}
    assert set(modes) == private | {
        *("authority/ca.crt", "server/ca.crt", "server/server.crt"),
        *("alpha/ca.crt", "alpha/node.pub"),
    }
    assert {path.name for path in authority.parent.iterdir()} == {"authority", "server", "clients"}


def test_an_empty_folder_is_filled_and_a_used_one_left_alone(authority, tmp_path):
    (tmp_path / "empty").mkdir()
    create_node_key(tmp_path / "empty")
    before = {path.name: path.read_bytes() for path in authority.iterdir()}
    for make in (
        create_authority,
        create_node_key,
        lambda folder: issue_server_certificate(authority, folder, HOSTS),
    ):
        with pytest.raises(FileExistsError, match=r"authority, which is in use; none is ever"):
            make(authority)
    assert {path.name: path.read_bytes() for path in authority.iterdir()} == before


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedsp.credentials.os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        create_authority(tmp_path / "authority")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("hosts", "days", "message"),
    [
        ([], 1, "`hosts` must name at least one host of the server, got none."),
        (["localhost:8000"], 1, "names or IP addresses, without port, got 'localhost:8000'."),
        (["10.0.0.300"], 1, "names or IP addresses, without port, got '10.0.0.300'."),
        (["a..b"], 1, "got 'a..b'."),
        (["bücher.de"], 1, "got 'bücher.de'."),
        (["localhost"], 0, "`days` must be at least 1, got 0."),
        (["localhost"], 4000, "`days` must end before the authority does, on 20"),
    ],
)
def test_a_certificate_that_cannot_be_is_not_issued(authority, tmp_path, hosts, days, message):
    with pytest.raises(CredentialError, match=re.escape(message)):
        issue_server_certificate(authority, tmp_path / "server", hosts, days=days)
    assert not (tmp_path / "server").exists()


def test_an_authority_with_a_foreign_or_open_key_issues_nothing(authority, tmp_path):
    create_authority(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.key", authority)
    with pytest.raises(CredentialError, match=r"authority/ca\.key does not belong to ca\.crt\.$"):
        issue_server_certificate(authority, tmp_path / "server", HOSTS)
    (authority / "ca.key").chmod(0o640)
    with pytest.raises(CredentialError, match=r"ca\.key is open to others, its mode is 0640\. "):
        issue_server_certificate(authority, tmp_path / "server", HOSTS)


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_a_missing_unreadable_or_damaged_file_of_the_server_is_named(server, name):
    data = (server / name).read_bytes()
    (server / name).unlink()
    with pytest.raises(CredentialError, match=f"^{server}/{name} is missing.$"):
        check_server(server, ADDRESS)
    (server / name).mkdir()
    with pytest.raises(CredentialError, match=f"{name} cannot be read: Is a directory.$"):
        check_server(server, ADDRESS)
    (server / name).rmdir()
    (server / name).touch(mode=0o600)
    (server / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CredentialError, match=f"{name} is damaged or of another kind: "):
        check_server(server, ADDRESS)


@pytest.mark.parametrize(("name", "check"), [("server.key", check_server), ("node.key", None)])
def test_a_key_that_others_can_read_is_refused_as_ssh_does(server, client, name, check):
    folder = server if check else client
    (folder / name).chmod(0o604)
    wanted = f"{folder}/{name} is open to others, its mode is 0604. Close it: chmod 600 {folder}/"
    with pytest.raises(CredentialError, match=f"^{re.escape(wanted + name)}$"):
        (check or check_client)(folder, ADDRESS)


def test_a_key_of_another_owner_may_have_that_owners_mode(server, monkeypatch):
    (server / "server.key").chmod(0o640)
    monkeypatch.setattr("fedsp.credentials.os.getuid", lambda: (server.stat().st_uid) + 1)
    check_server(server, ADDRESS)


def test_certificates_made_by_hand_pass(tmp_path):
    check_server(by_hand(tmp_path / "server"), ADDRESS)


def test_an_expired_certificate_says_when(tmp_path):
    folder = by_hand(tmp_path / "server", begins=timedelta(days=-9), ends=timedelta(days=-2))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        meet(folder, folder / "ca.crt", "127.0.0.1")
    day = f"{NOW - timedelta(days=2):%Y-%m-%d %H:%M} UTC"
    with pytest.raises(CredentialError, match=rf"server\.crt expired on {day}\. Issue a new"):
        check_server(folder, ADDRESS)


def test_an_expired_authority_is_named_on_both_sides(server, client, tmp_path):
    certificate(tmp_path, "ca", begins=timedelta(days=-9), ends=timedelta(days=-2))
    for folder, check in ((server, check_server), (client, check_client)):
        shutil.copy(tmp_path / "ca.crt", folder)
        with pytest.raises(CredentialError, match=f"^{folder}/ca.crt expired on "):
            check(folder, ADDRESS)


def test_a_certificate_of_tomorrow_names_the_clock(tmp_path):
    folder = by_hand(tmp_path / "server", begins=timedelta(days=1))
    begins = f"{NOW + timedelta(days=1):%Y-%m-%d %H:%M} UTC"
    today = f"{NOW:%Y-%m-%d}"
    with pytest.raises(
        CredentialError,
        match=rf"server\.crt is valid from {begins}, and this machine's clock says {today} \d\d:"
        r"\d\d UTC\. Set the clock, or wait\.$",
    ):
        check_server(folder, ADDRESS)


def test_a_certificate_of_another_authority_is_refused(server, tmp_path):
    create_authority(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.crt", server)
    with pytest.raises(ssl.SSLCertVerificationError):
        meet(server, server / "ca.crt", "127.0.0.1")
    with pytest.raises(CredentialError, match=r"server\.crt is not signed by ca\.crt beside it: "):
        check_server(server, ADDRESS)


def test_a_key_of_another_certificate_is_refused(server, authority, tmp_path):
    issue_server_certificate(authority, tmp_path / "second", HOSTS)
    shutil.copy(tmp_path / "second" / "server.key", server)
    with pytest.raises(CredentialError, match=r"server\.key does not belong to server\.crt besi"):
        check_server(server, ADDRESS)


def test_an_encrypted_key_is_told_of_without_a_prompt_for_its_password(server, client):
    secret = forms.BestAvailableEncryption(b"secret")
    key = ec.generate_private_key(ec.SECP384R1())
    write_key(server / "server.key", key, forms.PrivateFormat.PKCS8, secret)
    with pytest.raises(CredentialError, match=r"server\.key is encrypted, and nobody is there"):
        check_server(server, ADDRESS)


def test_a_servers_certificate_is_no_authority(server, client):
    shutil.copy(server / "server.crt", client / "ca.crt")
    with pytest.raises(CredentialError, match=r"alpha/ca\.crt must be an authority's certificate"):
        check_client(client, ADDRESS)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "one on secp256r1"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
    ],
    ids=["P-256", "Ed25519"],
)
def test_a_node_key_on_another_curve_is_refused(client, key, kind):
    write_key(client / "node.key", key, forms.PrivateFormat.OpenSSH)
    with pytest.raises(CredentialError, match=f"EC key on the curve P-384, got {kind}.$"):
        check_client(client, ADDRESS)


def test_a_node_key_that_is_not_that_of_the_public_one_is_refused(client, tmp_path):
    create_node_key(tmp_path / "second")
    shutil.copy(tmp_path / "second" / "node.pub", client)
    with pytest.raises(CredentialError, match=r"node\.pub does not belong to node\.key beside it"):
        check_client(client, ADDRESS)


@pytest.mark.parametrize("name", ["ca.crt", "node.key", "node.pub"])
def test_a_missing_or_foreign_file_of_the_client_is_named(client, name):
    (client / name).write_bytes(b"nothing")
    with pytest.raises(CredentialError, match=f"^{client}/{name} is damaged or of another kind"):
        check_client(client, ADDRESS)
    (client / name).unlink()
    with pytest.raises(CredentialError, match=f"^{client}/{name} is missing.$"):
        check_client(client, ADDRESS)


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":8000", "localhost:70000", "http://localhost:80"]
)
def test_an_address_without_host_or_port_is_refused(server, client, address):
    for folder, check in ((server, check_server), (client, check_client)):
        with pytest.raises(CredentialError, match=f"address must be HOST:PORT, got '{address}'"):
            check(folder, address)


def test_without_cryptography_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "fedsp.credentials")
    with pytest.raises(ModuleNotFoundError, match=r'need cryptography: pip install "fedsp\[flower'):
        import fedsp.credentials  # noqa: F401
