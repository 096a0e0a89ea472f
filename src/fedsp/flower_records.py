"""Records of fedsp as records of Flower and back.

Bytes travel as an array, which Flower cuts into pieces of 5 MB; all else is configuration.
"""

import json
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)

from fedsp.messages import MessageError
from fedsp.wire import Record

# Flower's own kind for what is neither training nor evaluation
MESSAGE_TYPE = "query"
_SERIALIZATION = "fedsp.bytes"


def pack_record(record: Record) -> RecordDict:
    """Return a record as Flower carries it."""
    large = {name: value for name, value in record.items() if isinstance(value, bytes)}
    arrays = {
        name: Array(dtype="uint8", shape=(len(value),), stype=_SERIALIZATION, data=value)
        for name, value in large.items()
    }
    small = ConfigRecord()
    for name, value in record.items():
        if not isinstance(value, bytes):
            small[name] = value
    return RecordDict({"fields": small, "bytes": ArrayRecord(arrays)})


def unpack_record(content: RecordDict) -> Record:
    """Return what `pack_record` packed.

    Raises:
        MessageError: If it is anything else.
    """
    fields, arrays = content.get("fields"), content.get("bytes")
    if not isinstance(fields, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MessageError(f"expected a record of fedsp, got {sorted(content)!r:.200}")
    record: Record = {}
    for name, value in fields.items():
        if not isinstance(value, int | float | str):
            raise MessageError(f"{name!r:.80} must be a number or text, got {type(value).__name__}")
        record[name] = value
    return record | {name: array.data for name, array in arrays.items()}


def unpacked_bytes(contents: Mapping[str, bytes]) -> int:
    """Return how large the arrays of a message will be, before they are put together.

    Flower names the pieces of an array by number and takes as many copies of one as it is named
    often.

    Args:
        contents: The message's parts by Flower's name.
    """
    size = 0
    for content in contents.values():
        kind, pieces, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            size += sum(len(contents[pieces[idx]]) for idx in named)
    return size
