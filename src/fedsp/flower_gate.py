"""What the parties of a live federation may do to the server: who gets in, and with how many bytes.

Flower keeps in memory whatever a node announces and uploads, until somebody takes it. Here a party
may upload one answer to each question that it was asked, about as large as that question.
"""

from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

# Flower cuts what is large into pieces of 5 MiB
MAX_BODY_BYTES = 8 * 2**20
# an answer is as large as its question's payload; this is for all that stands around it
ANSWER_OVERHEAD_BYTES = 2**20
# what Flower keeps of a part beside its bytes
_PART_BYTES = 1024

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]


class Gate:
    """Lets the parties through to Flower's routes for clients, and nobody to anything else."""

    def __init__(self, application: Application, keys: Sequence[bytes]) -> None:
        """Take Flower's application in.

        Args:
            application: Flower's.
            keys: The parties' public keys, PEM.
        """
        self._application = application
        self._keys = {b64encode(key) for key in keys}
        self._header = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._is_welcome(scope)):
            await self._application(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"not a party of this federation"})

    def _is_welcome(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        return (
            str(scope["path"]).startswith("/v1/fleet/")
            and headers.get(self._header) in self._keys
            # a body in chunks has no length that could be held against it
            and b"transfer-encoding" not in headers
            and length.isdigit()
            and int(length) <= MAX_BODY_BYTES
        )


class _Refusal(Exception):  # noqa: N818 - a verdict, not an error
    """Why an upload is not taken."""


@dataclass
class _Question:
    party: str
    limit: int
    reply_id: str = ""
    # by part, so that one sent again after a lost connection counts once
    uploaded: dict[str, int] = field(default_factory=dict)

    def count(self, part: str, num_bytes: int) -> None:
        self.uploaded[part] = max(num_bytes, self.uploaded.get(part, 0))

    @property
    def is_too_much(self) -> bool:
        return sum(self.uploaded.values()) > self.limit


class Intake:
    """Knows the questions that are open, and what has been uploaded as an answer to each."""

    def __init__(self, state: Any, nodes: Mapping[str, int], tell: Callable[[str], None]) -> None:
        """Start with nobody asked.

        Args:
            state: Flower's, which keeps messages and their parts.
            nodes: Flower's number of every party.
            tell: Called with a line for the operator.
        """
        self._state, self._tell = state, tell
        self._party_of = {node_id: name for name, node_id in nodes.items()}
        self._questions: dict[str, _Question] = {}
        self._told: set[str] = set()

    @property
    def open(self) -> dict[str, str]:
        """The party of every message that may still be answered."""
        with self._state.lock:
            return {message_id: it.party for message_id, it in self._questions.items()}

    def ask(self, message_id: str, party: str, num_bytes: int) -> None:
        """Open a question.

        Of the party's earlier ones only the newest stays open: a client works on one at a time, and
        who comes back works on the last.

        Args:
            message_id: Flower's name of the message.
            party: Who was asked.
            num_bytes: Size of the question.
        """
        limit = num_bytes + ANSWER_OVERHEAD_BYTES
        with self._state.lock:
            earlier = [name for name, it in self._questions.items() if it.party == party]
            for stale in earlier[:-1]:
                self.forget(stale)
            self._questions[message_id] = _Question(party, limit)
            self._told.discard(party)

    def limit(self, message_id: str) -> int:
        """Return how many bytes an answer may take; 0 for a question that is not open."""
        with self._state.lock:
            question = self._questions.get(message_id)
            return 0 if question is None else question.limit

    def forget(self, message_id: str) -> None:
        """Close a question; the message, and what has come as its answer, leave Flower's memory."""
        with self._state.lock:
            question = self._questions.pop(message_id, None)
            if question is None:  # it has been already
                return
            reply_id = question.reply_id
            session_id = self._state._object_push_session_by_root.get(reply_id)
            if session_id is not None:
                self._state._cleanup_push_session(session_id, cleanup_messages=False)
            self._state.delete_messages(message_ins_ids={message_id})
            for object_id in (message_id, reply_id):
                self._state.object_store.delete(object_id)

    async def admit(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Pass a request on whose sender Flower has found out, or answer 413."""
        try:
            await run_in_threadpool(self._check, getattr(request.state, "protobuf_request", None))
        except _Refusal as refusal:
            return JSONResponse({"detail": str(refusal)}, 413)
        return await call_next(request)

    def _check(self, request: Any) -> None:
        if not isinstance(request, PushMessagesRequest | PushObjectRequest):
            return
        party = self._party_of[request.node.node_id]
        with self._state.lock:
            if isinstance(request, PushMessagesRequest):
                message_id = self._announce(party, request)
            else:
                message_id = self._underway(party, request.object_id)
                content = request.object_content
                self._questions[message_id].count(request.object_id, len(content))
            question = self._questions[message_id]
            if question.is_too_much:
                self.forget(message_id)
                raise self._refused(
                    party,
                    f"an answer of more than {question.limit} bytes, which is "
                    f"{ANSWER_OVERHEAD_BYTES} more than its question",
                )

    def _announce(self, party: str, request: PushMessagesRequest) -> str:
        """Return the question that a party announces its one answer to."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise self._refused(party, "an announcement of anything else than one answer")
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        message_id: str = metadata.reply_to_message_id
        question = self._questions.get(message_id)
        if question is None or question.party != party or metadata.message_id != tree.object_id:
            raise self._refused(party, "a message that is no answer to an open question of its own")
        if question.reply_id:
            raise self._refused(party, "a second answer to one question")
        question.reply_id = tree.object_id
        question.count("announcement", request.ByteSize() + self._size(party, tree))
        return message_id

    def _size(self, party: str, tree: ObjectTree) -> int:
        """Return what the parts of an answer take, those included that Flower has already.

        A part that Flower has must be announced as it is there: Flower adds what belongs to it, and
        a few announcements would make an answer of any size or depth.
        """
        there: Any = self._state.object_store.store
        parts: dict[str, list[str]] = {}
        size, ahead = 0, [tree]
        while ahead:
            part = ahead.pop()
            children = [child.object_id for child in part.children]
            entry = there.get(part.object_id)
            if entry is not None and part.object_id not in parts:
                parts[part.object_id] = entry.child_object_ids
                size += len(entry.content)
            if parts.setdefault(part.object_id, children) != children:
                raise self._refused(party, "an answer with a part that is not as it was before")
            size += _PART_BYTES
            ahead.extend(part.children)
        return size

    def _underway(self, party: str, part: str) -> str:
        """Return the question whose answer a party uploads: the last one that it announced.

        Flower knows every part that was announced; the name of any other is not kept either.
        """
        if part in self._state.object_store.store:
            for message_id, question in reversed(self._questions.items()):
                if question.party == party and question.reply_id:
                    return message_id
        raise self._refused(party, "a part of an answer that it did not announce")

    def _refused(self, party: str, what: str) -> _Refusal:
        """Tell the operator, once until the party is asked again."""
        if party not in self._told:
            self._told.add(party)
            self._tell(f"{party}: refused {what}")
        return _Refusal(f"refused {what}")


def bound_uploads(application: Any, intake: Intake) -> None:
    """Let an intake see every request after Flower has read it and found out who sends it.

    Args:
        application: Flower's, before its start.
        intake: Looks at the requests.
    """
    application.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=intake.admit))
