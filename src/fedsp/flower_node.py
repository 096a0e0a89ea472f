"""A client's end of a live federation: Flower's protocol of a SuperNode, in this process.

The client calls out, over HTTPS, to a server that the federation's authority has signed, and signs
every call with its own key; nothing calls in. Flower hands no code to it: all that is done with
what comes is to let `answer` answer it.
"""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsp.federation_settings import Address
from fedsp.flower_records import pack_record, unpack_record
from fedsp.remote import FederationError
from fedsp.wire import Record

POLL_SECONDS = 0.5
RETRY_SECONDS = 2.0
# Flower's lower bound; a client that was killed may come back when its last sign of life is too old
_HEARTBEAT_SECONDS = HEARTBEAT_MIN_INTERVAL
_OLD_SECONDS = HEARTBEAT_PATIENCE * HEARTBEAT_MIN_INTERVAL


class _Lost(Exception):  # noqa: N818 - what happens between machines, not an error
    """The server is not there, or does not know this session any more."""


@contextmanager
def _losing(address: Address) -> Iterator[None]:
    """Take every failure on the way for the end of the session: the server asks again."""
    try:
        yield
    except (httpx.HTTPError, ObjectPullError, ObjectPushError, RuntimeError, KeyError) as error:
        raise _Lost(f"the connection to {address} broke ({error})") from error


class FlowerNode:
    """Answers what a server sends, through restarts of either side."""

    def __init__(self, folder: Path, address: Address, tell: Callable[[str], None]) -> None:
        """Read key and authority; nothing is connected.

        Args:
            folder: The client's folder.
            address: Where the server is.
            tell: Called with a line for whoever runs the client.
        """
        self._address, self._tell = address, tell
        private: Any = load_ssh_private_key((folder / "node.key").read_bytes(), None)
        self._key = public_key_to_bytes(private.public_key())
        self._client = FleetHttpClient.from_server_address(
            str(address),
            False,
            (folder / "ca.crt").read_bytes(),
            interceptors=[NodeAuthHttpInterceptor(private, private.public_key())],
        )
        self._stopped = threading.Event()

    def serve(self, answer: Callable[[Record], Record], has_ended: Callable[[], bool]) -> None:
        """Answer requests until it is over.

        Args:
            answer: Makes the answer to a record.
            has_ended: Asked after every answer that was sent.

        Raises:
            FederationError: If the server, or this client, is not who it should be.
        """
        lost = ""
        try:
            while not has_ended():
                try:
                    node_id = self._activate()
                    self._tell(f"connected to {self._address}")
                    lost = ""
                    self._work(node_id, answer, has_ended)
                except _Lost as reason:
                    if str(reason) != lost:
                        lost = str(reason)
                        self._tell(f"{lost}; tries again")
                    self._stopped.wait(RETRY_SECONDS)
        finally:
            self._client.close()

    def _work(
        self, node_id: int, answer: Callable[[Record], Record], has_ended: Callable[[], bool]
    ) -> None:
        """Fetch, answer and send while the session lasts."""
        node, over = Node(node_id=node_id), threading.Event()
        life = threading.Thread(target=self._show_life, args=(node, over), daemon=True)
        life.start()
        try:
            while not has_ended():
                message = self._fetch(node)
                if message is None:
                    over.wait(POLL_SECONDS)
                    if over.is_set():
                        raise _Lost(f"{self._address} does not know this session any more")
                    continue
                reply = pack_record(answer(unpack_record(message.content)))
                self._send(node, Message(reply, reply_to=message))
        finally:
            over.set()
            self._leave(node_id)

    def _activate(self) -> int:
        """Begin a session.

        Raises:
            _Lost: If the server is not there now.
            FederationError: If it will never take this client.
        """
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=_HEARTBEAT_SECONDS)
        for _ in range(int(_OLD_SECONDS / RETRY_SECONDS) + 1):
            try:
                node_id: int = self._client.ActivateNode(request).node_id
                return node_id
            except httpx.HTTPStatusError as error:
                if error.response.status_code in (401, 403):
                    raise FederationError(self._refusal(error.response)) from error
                if error.response.status_code >= 500:
                    raise _Lost(f"{self._address} answers {error.response.status_code}") from error
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
            self._stopped.wait(RETRY_SECONDS)  # the session before this one is not too old yet
        raise FederationError(
            f"{self._address} has a session with this client's key already: is a second client "
            "running with the same node.key?"
        )

    def _refusal(self, response: httpx.Response) -> str:
        if response.status_code == 403:
            return (
                f"{self._address} does not know this client's key: its operator has to put "
                "node.pub into the server's folder as parties/NAME.pub and start the server again"
            )
        here, there = datetime.now(UTC), response.headers.get("date")
        text = f"{self._address} does not accept this client's signature"
        if there is None:
            return text
        clock = parsedate_to_datetime(there)
        return (
            f"{text}: its clock says {clock:%Y-%m-%d %H:%M:%S} UTC, this machine's "
            f"{here:%Y-%m-%d %H:%M:%S} UTC; they may differ by at most five minutes"
        )

    def _unreachable(self, error: httpx.TransportError) -> Exception:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return _Lost(f"{self._address} cannot be reached ({error})")
        return FederationError(
            f"{self._address} is not the server of this federation, or its certificate is no good: "
            f"{cause.verify_message}"
        )

    def _fetch(self, node: Node) -> Message | None:
        """Fetch a message with all that belongs to it; None where there is none."""
        with _losing(self._address):
            response = self._client.PullMessages(PullMessagesRequest(node=node))
            if not response.messages_list:
                return None
            run_id = response.messages_list[0].metadata.run_id
            tree = response.message_object_trees[0]
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, node, run_id),
                make_confirm_message_received_fn_protobuf(
                    self._client.ConfirmMessageReceived, node, run_id
                ),
                return_type=Message,
            )
        # a message that was taken apart does not hold its own id
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _send(self, node: Node, reply: Message) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute(), _losing(self._address):
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(
                    self._client.PushObject,
                    node,
                    run_id=reply.metadata.run_id,
                    session_id=response.session_id,
                ),
                object_ids_to_push={*response.objects_to_push},
            )

    def _show_life(self, node: Node, over: threading.Event) -> None:
        """Tell the server every few seconds that this session lasts; end it when it is unknown."""
        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=_HEARTBEAT_SECONDS)
        while not over.wait(_HEARTBEAT_SECONDS / 2):
            try:
                if not self._client.SendNodeHeartbeat(request).success:
                    over.set()
            except httpx.HTTPStatusError as error:
                if error.response.status_code in (401, 403):
                    over.set()
            except (httpx.HTTPError, RuntimeError):
                pass  # the next one may get through

    def _leave(self, node_id: int) -> None:
        with suppress(httpx.HTTPError, RuntimeError):  # a server that is gone needs no goodbye
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
