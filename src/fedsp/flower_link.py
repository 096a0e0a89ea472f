"""The server's end of a live federation: Flower's SuperLink, in this process.

Flower's own application answers the clients over HTTPS and keeps what goes back and forth. Only its
routes for clients are open, and only to the keys of the parties; whatever else Flower can be asked
to do over the network (start runs, register keys, hand out code) is refused to everybody, also on
this machine. No run of Flower executes code here or at a client: there is no application to fetch.
"""

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from secrets import token_bytes
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    ISOLATION_MODE_PROCESS,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    TRANSPORT_TYPE_GRPC_RERE,
)
from flwr.supercore.constant import (
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.runtime import runtime_handlers

from fedsp.federation_settings import Address
from fedsp.flower_gate import Gate, Intake, bound_uploads
from fedsp.flower_records import MESSAGE_TYPE, pack_record, unpack_record, unpacked_bytes
from fedsp.messages import MessageError
from fedsp.remote import FederationError
from fedsp.wire import Record

POLL_SECONDS = 0.2
_START_SECONDS = 60.0
# connections beyond these are turned away; a party needs a handful
_CONNECTIONS = 100
_TTL_SECONDS = 7 * 86400.0
_LOGGERS = ("flwr", "uvicorn")
_LOG_BYTES = 10_000_000


class FlowerLink:
    """Carries records to and from the parties; see `fedsp.remote.Link`."""

    def __init__(
        self, folder: Path, address: Address, parties: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        """Open the port.

        Args:
            folder: The server's folder, with certificates and the parties' public keys.
            address: Where clients reach it; on a loopback address only this machine can.
            parties: Their names.
            tell: Called with a line for the operator.

        Raises:
            FederationError: If the port is taken or the server does not start.
        """
        self._tell = tell
        bound = _bind(address)
        self._log = _log_to(folder / "flower" / "superlink.log")
        try:
            self._start(folder, bound, parties)
        except BaseException:
            bound.close()
            _end_log(self._log)
            raise
        tell(f"listens at {address}")

    def _start(self, folder: Path, bound: socket.socket, parties: Sequence[str]) -> None:
        application = create_app(_settings(folder, bound), SuperLinkLifespan)
        self._state: Any = application.state.linkstate_factory.state()
        keys = {name: _public_key(folder / "parties" / f"{name}.pub") for name in parties}
        self._nodes = {name: self._register(name, key) for name, key in keys.items()}
        self._grid = _LocalGrid(self._state)
        self._intake = Intake(self._state, self._nodes, self._tell)
        bound_uploads(application, self._intake)
        config = uvicorn.Config(
            Gate(application, [*keys.values()]),
            ssl_keyfile=folder / "server.key",
            ssl_certfile=folder / "server.crt",
            ssl_ciphers="ECDHE+AESGCM:ECDHE+CHACHA20",  # of TLS 1.2; 1.3 has no others
            log_config=None,
            access_log=False,
            ws="none",  # Flower has no use for web sockets
            limit_concurrency=_CONNECTIONS + 10 * len(parties),
            proxy_headers=False,  # nobody else may say where a request comes from
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([bound],), name="superlink", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise FederationError("Flower's SuperLink did not start; see the lines above")
            time.sleep(0.05)

    def _register(self, name: str, key: bytes) -> int:
        node_id: int = self._state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name
        )
        return node_id

    def present(self) -> dict[str, str]:
        """Return who is there: its session by party; see `fedsp.remote.Link`."""
        names = {node_id: name for name, node_id in self._nodes.items()}
        there = self._state.get_node_info(node_ids=[*names], statuses=[NodeStatus.ONLINE])
        return {names[node.node_id]: node.last_activated_at for node in there}

    def send(self, party: str, record: Record) -> None:
        """Leave a record for a party to fetch; one that it has not fetched yet is withdrawn."""
        self._withdraw(party)
        message = Message(pack_record(record), self._nodes[party], MESSAGE_TYPE, ttl=_TTL_SECONDS)
        size = sum(len(value) for value in record.values() if isinstance(value, bytes | str))
        self._grid.push(message, lambda message_id: self._intake.ask(message_id, party, size))

    def _withdraw(self, party: str) -> None:
        with self._state.lock:
            for message_id, name in self._intake.open.items():
                message = self._state.message_ins_store.get(message_id)
                if name == party and message is not None and message.metadata.delivered_at == "":
                    self._intake.forget(message_id)

    def receive(self, seconds: float) -> list[tuple[str, Record]]:
        """Return what has come, by party; wait for the first at most so long."""
        deadline = time.monotonic() + seconds
        while True:
            came = self._pull()
            left = deadline - time.monotonic()
            if came or left <= 0:
                return came
            time.sleep(min(POLL_SECONDS, left))

    def _pull(self) -> list[tuple[str, Record]]:
        """Take the answers that have come as a whole.

        They are read where Flower keeps them: its grid waits for one that is still on its way, and
        gives an error in the place of one whose sender has left.
        """
        came = []
        for message_id, party in self._intake.open.items():
            limit = self._intake.limit(message_id)
            try:
                # Flower's handlers lock the state first, then what they need of it: so must we
                with self._state.lock:
                    reply_id, contents = self._take(message_id)
                if not contents:
                    continue
                if unpacked_bytes(contents) > limit:
                    raise MessageError(f"an answer that unpacks to more than {limit} bytes")
                reply: Any = inflate_object_from_contents(reply_id, contents)
                came.append((party, unpack_record(reply.content)))
            except MessageError as error:
                self._tell(f"{party}: {error}")
            except Exception as error:
                # Flower checks nothing of what a party sends, and fails in many ways over it
                self._tell(f"{party}: an answer that Flower cannot read: {error!r:.200}")
                self._intake.forget(message_id)
        return came

    def _take(self, message_id: str) -> tuple[str, dict[str, bytes]]:
        """Take the answer to a message out of Flower's memory; nothing where it is not whole.

        Flower does not compare a reply's sender with the key that signed it: a party is known by
        the message's id, a checksum of what only this party was sent.
        """
        reply_id = self._state.message_ins_id_to_message_res_id.get(message_id, "")
        contents = self._contents(reply_id)
        if contents:
            self._intake.forget(message_id)
        return reply_id, contents

    def _contents(self, reply_id: str) -> dict[str, bytes]:
        """Return all objects of a reply; nothing where one is still on its way."""
        try:
            tree = self._state.object_store.get_object_tree(reply_id)
        except NoObjectInStoreError:  # there is none, or it was given up
            return {}
        contents = {}
        for node in iterate_object_tree(tree):
            # asked this way, Flower gives up what its sender did not finish
            content = self._state.get_object(self._grid.run.run_id, node.object_id)
            if not content:
                return {}
            contents[node.object_id] = content
        return contents

    def close(self) -> None:
        """Close the port."""
        self._grid.stop()
        self._server.should_exit = True
        self._thread.join(timeout=10)
        _end_log(self._log)


class _Runtime:
    """What Flower's grid needs to push messages: handlers, called where they are."""

    def __init__(self, state: Any, task: Any) -> None:
        self._state, self._task = state, task
        self.on_push: Callable[[str], None]

    def PushMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        with self._state.lock:  # who fetches a message may answer it at once
            response = runtime_handlers.push_messages(request, self._state, self._task)
            for message_id in filter(None, response.message_ids):
                self.on_push(message_id)
        return response

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        return runtime_handlers.push_object(request, self._state, self._task)


class _LocalGrid(HttpGrid):
    """Flower's grid over a run of its own, in the process of the SuperLink."""

    def __init__(self, state: Any) -> None:
        super().__init__(token="not used: nothing is sent")
        run_id = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        run = state.get_run_info(run_ids=[run_id])[0]
        task_id = run.primary_task_id
        state.claim_task(task_id)
        state.activate_task(task_id)
        self.set_run(run)
        TaskIdentity.run_id, TaskIdentity.task_id = run_id, task_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._client: Any = _Runtime(state, state.get_tasks(task_ids=[task_id])[0])
        # a run whose task shows no life is ended
        self._life = HeartbeatSender(lambda: bool(state.acknowledge_task_heartbeat(task_id)))
        self._life.start()

    def push(self, message: Message, on_push: Callable[[str], None]) -> None:
        """Leave a message; its id is told before anybody can fetch it."""
        self._client.on_push = on_push
        self.push_messages([message])

    def stop(self) -> None:
        self._life.stop()


def _log_to(path: Path) -> logging.Handler:
    """Keep what Flower says of its own work out of the terminal, and every poll out of the log.

    A client that connects again and again writes a line each time: the log starts anew when it is
    full, and the one before it is kept.
    """
    path.parent.mkdir(exist_ok=True)
    file = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1)
    file.setLevel(logging.INFO)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [file], False
    return file


def _end_log(file: logging.Handler) -> None:
    """Close the log; a handler that is still asked to write would open it again."""
    for name in _LOGGERS:
        logging.getLogger(name).removeHandler(file)
    file.close()


def _bind(address: Address) -> socket.socket:
    """Take the port before anything else is done.

    Raises:
        FederationError: If it cannot be had.
    """
    # a name may lead elsewhere from here, such as to a load balancer: all interfaces are taken
    is_v6 = ":" in address.host
    everywhere = "::" if is_v6 else "0.0.0.0"
    host = address.host if address.is_loopback else everywhere
    bound = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, address.port))
    except OSError as error:
        bound.close()
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had: {error}"
        raise FederationError(
            f"port {address.port} {reason}; free it, or change `address` in every federation.yaml"
        ) from error
    return bound


def _settings(folder: Path, bound: socket.socket) -> SuperLinkLifespanConfig:
    authority, certificate, key = (
        (folder / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key")
    )
    host, port = bound.getsockname()[:2]
    unset: Mapping[str, None] = dict.fromkeys(
        (
            "health_server_address",
            "event_log_plugin",
            "fleet_event_log_plugin",
            "artifact_provider",
            "fleet_api_address",
        )
    )
    return SuperLinkLifespanConfig(
        **unset,
        control_address="",
        host=host,
        port=port,
        insecure=False,
        certificates=(authority, certificate, key),
        superexec_auth_secret=token_bytes(32),
        authn_plugin=load_control_authn_plugin(),
        enable_event_log=False,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        simulation=False,
        ssl_ca_certfile=str(folder / "ca.crt"),
        ssl_certfile=str(folder / "server.crt"),
        ssl_keyfile=str(folder / "server.key"),
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation=ISOLATION_MODE_PROCESS,  # Flower starts no process
        runtime_dependency_install=False,
    )


def _public_key(path: Path) -> bytes:
    """Read a party's public key as Flower keeps it.

    Raises:
        FederationError: If there is none.
    """
    try:
        key: Any = load_ssh_public_key(path.read_bytes())
        return public_key_to_bytes(key)
    except (OSError, ValueError) as error:
        raise FederationError(f"{path}: no public key of a party: {error}") from error
