"""Certificates and keys of a live federation: made, and checked before anything connects.

The only module that knows `cryptography`, part of the extra `flower`. A folder of the server holds
`ca.crt`, `server.crt` and `server.key`, one of a client `ca.crt`, `node.key` and `node.pub`; the
authority's own folder, `ca.key` and `ca.crt`, stays with the operator.
"""

import ipaddress
import os
import re
import shutil
import ssl
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
        load_ssh_private_key,
        load_ssh_public_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'Certificates and keys of a federation need cryptography: pip install "fedsp[flower]".',
        name=error.name,
    ) from error

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.crt"
SERVER_KEY, SERVER_CERTIFICATE = "server.key", "server.crt"
NODE_KEY, NODE_PUBLIC_KEY = "node.key", "node.pub"

_AUTHORITY_DAYS = 3652
_SERVER_DAYS = 397
_BACKDATED = timedelta(hours=1)  # for clients whose clock is a little late
_HOST_MISMATCH = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_Loaded = TypeVar("_Loaded")


class CredentialError(ValueError):
    """A certificate or key that a federation cannot start with: one line says which and why."""


def create_authority(folder: Path) -> None:
    """Make the authority that signs the server's certificate: `ca.key` and `ca.crt`, for 10 years.

    Args:
        folder: Where to, a new or empty folder; it is there only once both files are.

    Raises:
        FileExistsError: If the folder is in use.
        OSError: If it cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedsp federation authority")
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = _certificate(name, name, key.public_key(), _AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())
    _publish(
        folder,
        {CA_KEY: _private_pem(key), CA_CERTIFICATE: certificate.public_bytes(Encoding.PEM)},
    )


def issue_server_certificate(
    authority: Path, folder: Path, hosts: Sequence[str], *, days: int = _SERVER_DAYS
) -> None:
    """Make the server's `server.key` and `server.crt`, with a copy of the authority's `ca.crt`.

    Args:
        authority: Folder that `create_authority` made.
        folder: Where to, a new or empty folder; it is there only once all files are.
        hosts: Names and IP addresses under which clients reach the server, at least one.
        days: How long the certificate is valid, at least 1.

    Raises:
        CredentialError: If a host is none, `days` is below 1 or beyond the authority's end, or
            the authority's files are damaged, expired or open to others.
        FileExistsError: If the folder is in use.
        OSError: If it cannot be written.
    """
    if not hosts:
        raise CredentialError("`hosts` must name at least one host of the server, got none.")
    names = [_general_name(host) for host in hosts]
    if days < 1:
        raise CredentialError(f"`days` must be at least 1, got {days}.")
    ca_data = _read(authority / CA_CERTIFICATE)
    ca = _load_certificate(authority / CA_CERTIFICATE, ca_data)
    ca_key = _load_key(authority / CA_KEY, load_pem_private_key)
    _check_dates(authority / CA_CERTIFICATE, ca)
    if ca_key.public_key() != ca.public_key():
        raise CredentialError(f"{authority / CA_KEY} does not belong to {CA_CERTIFICATE}.")
    if datetime.now(UTC) + timedelta(days=days) > ca.not_valid_after_utc:
        raise CredentialError(
            f"`days` must end before the authority does, on {_day(ca.not_valid_after_utc)}, "
            f"got {days}."
        )
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _certificate(_name("fedsp server"), ca.subject, key.public_key(), days)
    server_auth = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    extensions: list[tuple[Any, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(digital_signature=True), True),
        (server_auth, False),
        (x509.SubjectAlternativeName(names), False),
        (signer, False),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    certificate = builder.sign(ca_key, hashes.SHA384())
    _publish(
        folder,
        {
            SERVER_KEY: _private_pem(key),
            SERVER_CERTIFICATE: certificate.public_bytes(Encoding.PEM),
            CA_CERTIFICATE: ca_data,
        },
    )


def create_node_key(folder: Path) -> None:
    """Make the key by which the server knows a client: `node.key` and `node.pub`.

    Args:
        folder: Where to, a new or empty folder; it is there only once both files are.

    Raises:
        FileExistsError: If the folder is in use.
        OSError: If it cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _publish(folder, {NODE_KEY: private, NODE_PUBLIC_KEY: public + b"\n"})


def check_server(folder: Path, address: str) -> None:
    """Make sure that a server may start with what its folder holds.

    The last word is TLS's own: the files have to pass a handshake, which takes place in memory.

    Args:
        folder: With `ca.crt`, `server.crt` and `server.key`.
        address: HOST:PORT under which clients reach the server.

    Raises:
        CredentialError: If a file is missing, unreadable or damaged, the key is open to others or
            of another certificate, a certificate is out of its time, not signed by `ca.crt`, or
            not for the address.
    """
    host = _host_of(address)
    ca_path, path, key_path = (
        folder / name for name in (CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY)
    )
    _check_authority(ca_path)
    certificate = _load_certificate(path, _read(path))
    key = _load_key(key_path, load_pem_private_key)
    _check_dates(path, certificate)
    if key.public_key() != certificate.public_key():
        raise CredentialError(f"{key_path} does not belong to {SERVER_CERTIFICATE} beside it.")
    try:
        _shake_hands(ca_path, path, key_path, host)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _HOST_MISMATCH:
            raise CredentialError(
                f"{path} is for {', '.join(_hosts(certificate)) or 'no host'} and not for "
                f"{host}, the host of the address {address}. Issue a certificate that names it."
            ) from error
        raise CredentialError(
            f"{path} is not signed by {CA_CERTIFICATE} beside it: {error.verify_message}."
        ) from error
    except ssl.SSLError as error:
        raise CredentialError(f"TLS does not work with {path} and its key: {error}.") from error


def check_client(folder: Path, address: str) -> None:
    """Make sure that a client may start with what its folder holds; nothing is asked of the server.

    Args:
        folder: With `ca.crt`, `node.key` and `node.pub`.
        address: HOST:PORT of the server.

    Raises:
        CredentialError: If a file is missing, unreadable or damaged, the key is open to others, no
            EC key on the curve P-384 or not that of `node.pub`, `ca.crt` is out of its time or no
            authority's, or the address is none.
    """
    _host_of(address)
    _check_authority(folder / CA_CERTIFICATE)
    path, public_path = folder / NODE_KEY, folder / NODE_PUBLIC_KEY
    key = _load_key(path, load_ssh_private_key)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != ec.SECP384R1.name:
        raise CredentialError(f"{path} must be an EC key on the curve P-384, got {_kind(key)}.")
    if _load(public_path, load_ssh_public_key, _read(public_path)) != key.public_key():
        raise CredentialError(f"{public_path} does not belong to {NODE_KEY} beside it.")


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    # a last label of digits is a mistyped IP address
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise CredentialError(
            f"`hosts` must be names or IP addresses, without port, got {host!r:.80}."
        )
    return x509.DNSName(host)


def _host_of(address: str) -> str:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.path or parts.username is not None:
        raise CredentialError(f"the address must be HOST:PORT, got {address!r:.80}.")
    return host


def _publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files into a new folder that gets its name when they are whole."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"keys and certificates need a new or empty folder, got {folder}, which is in use; "
            "none is ever overwritten."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        for name, data in files.items():
            mode = 0o600 if name.endswith(".key") else 0o644
            with open(os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as it:
                it.write(data)
                it.flush()
                os.fsync(it.fileno())
        # takes the place of an empty folder, and of nothing else
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made)
        raise


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CredentialError(f"{path} is missing.") from error
    except OSError as error:
        raise CredentialError(f"{path} cannot be read: {error.strerror}.") from error


def _load(path: Path, load: Callable[[bytes], _Loaded], data: bytes) -> _Loaded:
    try:
        return load(data)
    except TypeError as error:
        raise CredentialError(
            f"{path} is encrypted, and nobody is there to type its password. Store it without."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CredentialError(f"{path} is damaged or of another kind: {error}") from error


def _load_certificate(path: Path, data: bytes) -> x509.Certificate:
    return _load(path, x509.load_pem_x509_certificate, data)


def _load_key(path: Path, load: Callable[[bytes, None], Any]) -> Any:
    data = _read(path)
    status = path.stat()
    # as ssh does: a key of somebody else's, such as a mounted secret, has that owner's mode
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise CredentialError(
            f"{path} is open to others, its mode is {stat.S_IMODE(status.st_mode):04o}. "
            f"Close it: chmod 600 {path}"
        )
    return _load(path, lambda pem: load(pem, None), data)


def _check_authority(path: Path) -> None:
    certificate = _load_certificate(path, _read(path))
    _check_dates(path, certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        is_authority = constraints.value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        raise CredentialError(f"{path} must be an authority's certificate, and is not.")


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CredentialError(
            f"{path} expired on {_day(certificate.not_valid_after_utc)}. Issue a new certificate."
        )
    if now < certificate.not_valid_before_utc:
        raise CredentialError(
            f"{path} is valid from {_day(certificate.not_valid_before_utc)}, and this machine's "
            f"clock says {_day(now)}. Set the clock, or wait."
        )


def _day(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _hosts(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _kind(key: Any) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return f"one on {key.curve.name}"
    return type(key).__name__.removesuffix("PrivateKey").lstrip("_")


def _shake_hands(ca: Path, certificate: Path, key: Path, host: str) -> None:
    """Let a TLS client that trusts `ca` meet a server with this certificate, without a network."""
    at_client, at_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_side = ssl.create_default_context(cafile=ca)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    client = client_side.wrap_bio(at_client, at_server, server_hostname=host)
    server = server_side.wrap_bio(at_server, at_client, server_side=True)
    waiting = [client, server]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass  # for what the other side says in its turn
