"""What goes back and forth between server and clients of a live federation, around the messages.

A record is flat: text, whole numbers and bytes by name. The typed messages (`fedsp.messages`) lie
in it as the very bytes that the ledgers hash; nothing else that is learned has a place here.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any, Literal, TypeVar

from fedsp.display import printable
from fedsp.messages import MessageError

Record = dict[str, int | float | str | bytes]
AnswerKind = Literal["update", "handout_missing", "refusal", "done"]

PROTOCOL = 1
MAX_REASON = 1000
_MAX_TEXT = 20_000
_T = TypeVar("_T", "Request", "Answer")


@dataclass(frozen=True)
class Request:
    """What the server asks of a client.

    Args:
        request_id: Names the request; its answer repeats it.
        kind: `round`: work on the broadcast; `finish`: the federation is over.
        round_idx: 0-based communication round.
        client_id: The client's place in the cohorts.
        participations: How often a client takes part in the whole run.
        terms: Checksums of the settings that both sides must share (`fedsp.terms`).
        handout_sha256: Checksum of the auxiliary model's hand-out.
        handout: The hand-out itself, where the server thinks that the client lacks it; else empty.
        broadcast: The encoded `ServerBroadcast`.
    """

    request_id: str
    kind: Literal["round", "finish"]
    round_idx: int = 0
    client_id: int = 0
    participations: int = 1
    terms: dict[str, str] = field(default_factory=dict)
    handout_sha256: str = ""
    handout: bytes = b""
    broadcast: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What a client answers.

    Args:
        request_id: The request that it answers; empty where that could not be read.
        kind: `update`: it worked; `handout_missing`: it needs the auxiliary model first; `refusal`:
            it cannot or will not work; `done`: it has ended.
        update: The encoded `ClientUpdate`.
        reason: Why it refuses, in one line that tells nothing of its data.
    """

    request_id: str
    kind: AnswerKind
    update: bytes = b""
    reason: str = ""


def to_record(message: Request | Answer) -> Record:
    """Return a message as a flat record, with the version of fedsp that wrote it."""
    record: Record = {"protocol": PROTOCOL, "fedsp": version("fedsp")}
    for name, value in asdict(message).items():
        record[name] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
    return record


def read_request(record: Record) -> Request:
    """Read what a server asks, trusting nothing.

    Raises:
        MessageError: If it is anything else than a request of this version of the protocol.
    """
    request = _read(record, Request, "server")
    if request.kind not in ("round", "finish"):
        raise MessageError(f"request: unknown kind {request.kind!r:.80}")
    if min(request.round_idx, request.client_id) < 0 or request.participations < 1:
        raise MessageError("request: a number is below what it can be")
    return request


def read_answer(record: Record) -> Answer:
    """Read what a client answers, trusting nothing; its update is read by `decode_update`.

    Raises:
        MessageError: If it is anything else than an answer of this version of the protocol.
    """
    answer = _read(record, Answer, "client")
    if answer.kind not in ("update", "handout_missing", "refusal", "done"):
        raise MessageError(f"answer: unknown kind {answer.kind!r:.80}")
    if len(answer.reason) > MAX_REASON or not answer.reason.isprintable():
        # an operator's terminal must not obey what a client writes
        raise MessageError(f"answer: `reason` must be one short line, got {answer.reason!r:.80}")
    return answer


def _read(record: Record, kind: type[_T], sender: str) -> _T:
    came = record.get("protocol")
    if came != PROTOCOL:
        theirs = f"{printable(str(record.get('fedsp'))):.40}"
        raise MessageError(
            f"the {sender} runs fedsp {theirs} (protocol {printable(str(came)):.20}), this "
            f"side fedsp {version('fedsp')} (protocol {PROTOCOL}): install the same release on both"
        )
    defaults: dict[str, Any] = {each.name: each.default for each in fields(kind)}
    # what has no default is text
    types: dict[str, type] = {
        name: str if default is MISSING else type(default) for name, default in defaults.items()
    }
    if set(record) != {"protocol", "fedsp", *types}:
        raise MessageError(f"{kind.__name__.lower()}: got the fields {sorted(record)!r:.300}")
    values: dict[str, Any] = {name: record[name] for name in types}
    if "terms" in types:
        types["terms"], values["terms"] = dict, _texts(values["terms"])
    for name, wanted in types.items():
        value = values[name]
        if type(value) is not wanted or (isinstance(value, str) and len(value) > _MAX_TEXT):
            raise MessageError(
                f"{kind.__name__.lower()}: `{name}` must be {wanted.__name__}, "
                f"got {type(value).__name__}"
            )
    return kind(**values)


def _texts(value: Any) -> dict[str, str]:
    """Read texts by name."""
    try:
        read = json.loads(value) if isinstance(value, str) and len(value) <= _MAX_TEXT else None
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict) or not all(isinstance(text, str) for text in read.values()):
        raise MessageError("request: `terms` must be texts by name")
    return read
