"""Ways to spoil a valid message, for `fuzz.py`: each takes a random stream and gives bytes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NUMBERS = ("round_idx", "client_id", "num_examples")
FOREIGN_DTYPES = ("F64", "I64", "I32", "I16", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", "C64")
ODD_NUMBERS = (
    "-1",
    "+1",
    " 5",
    "5 ",
    "05",
    "5.0",
    "5e0",
    "0x5",
    "\u0665",
    "\u096b",
    "\u2075",
    "",
    "nan",
    "1_0",
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 1.0, -1, "", "F32", [], {}, [[]], 2**31, 2**63, 2**64, 10**30, -(2**63)
)  # fmt: skip


@dataclass(frozen=True)
class Message:
    """A valid message.

    Args:
        kind: As its header says.
        wire_dtype: Number format of its payload, empty for a hand-out.
        data: Its bytes.
    """

    kind: str
    wire_dtype: str
    data: bytes

    @property
    def start(self) -> int:
        """Where the numbers begin."""
        return 8 + int.from_bytes(self.data[:8], "little")

    def header(self) -> dict[str, Any]:
        """Return a copy of the header."""
        fields: dict[str, Any] = json.loads(self.data[8 : self.start])
        return fields

    def numbers(self) -> bytearray:
        """Return a copy of the numbers' bytes."""
        return bytearray(self.data[self.start :])

    def framed(
        self, header: dict[str, Any] | bytes | None = None, body: bytes | None = None
    ) -> bytes:
        """Put a header and numbers together; None takes the message's own."""
        header = self.header() if header is None else header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + (self.numbers() if body is None else body)


def flip(random: Random, data: bytes, start: int, stop: int) -> bytes:
    """Flip one to four bits between two places."""
    changed = bytearray(data)
    for bit in random.sample(range(8 * start, 8 * stop), random.randint(1, 4)):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flipped_length(random: Random, message: Message) -> bytes:
    """Flip bits of the header's length."""
    return flip(random, message.data, 0, 8)


def flipped_header(random: Random, message: Message) -> bytes:
    """Flip bits of the header."""
    return flip(random, message.data, 8, message.start)


def flipped_numbers(random: Random, message: Message) -> bytes:
    """Flip bits of the numbers: other numbers, which may be in the contract."""
    return flip(random, message.data, message.start, len(message.data))


def truncated(random: Random, message: Message) -> bytes:
    """Cut at the end, at the start or both."""
    start = random.choice((0, 0, 1, 8, random.randrange(len(message.data))))
    stop = random.randrange(len(message.data)) if not start else len(message.data)
    return message.data[start:stop]


def extended(random: Random, message: Message) -> bytes:
    """Add bytes before, behind or within."""
    extra = random.randbytes(random.choice((1, 4, 8, 192, 1024, 5000)))
    place = random.choice(
        (0, message.start, len(message.data), random.randrange(len(message.data)))
    )
    return message.data[:place] + extra + message.data[place:]


def noise(random: Random, message: Message) -> bytes:
    """Random bytes, some behind a plausible header length."""
    body = random.randbytes(random.choice((0, 1, 7, 8, 9, 64, len(message.data), 3000)))
    return random.choice((b"", (len(body) // 2).to_bytes(8, "little"))) + body


def _metadata(random: Random, message: Message, change: Callable[[dict[str, Any]], None]) -> bytes:
    header = message.header()
    change(header["__metadata__"])
    return message.framed(header)


def metadata_missing(random: Random, message: Message) -> bytes:
    """Drop one field, or all."""
    header = message.header()
    if random.random() < 0.2:
        del header["__metadata__"]
    else:
        del header["__metadata__"][random.choice(list(header["__metadata__"]))]
    return message.framed(header)


def metadata_extra(random: Random, message: Message) -> bytes:
    """Add a field."""
    name = random.choice(("x", "", "kind ", "Kind", "__metadata__", "a" * random.randrange(2000)))
    return _metadata(random, message, lambda fields: fields.update({name: "1"}))


def metadata_type(random: Random, message: Message) -> bytes:
    """Give a field, or the metadata, a value that is no text."""
    header, value = message.header(), random.choice(ODD_VALUES)
    if random.random() < 0.3:
        header["__metadata__"] = value
    else:
        name = random.choice(list(header["__metadata__"]))
        header["__metadata__"][name] = 5 if isinstance(value, str) else value
    return message.framed(header)


def other_version(random: Random, message: Message) -> bytes:
    """Claim another version."""
    version = random.choice(("0", "2", "1.0", "", "1 ", "\u0661", "1" * 400))
    return _metadata(random, message, lambda fields: fields.update(fedsp_version=version))


def other_kind(random: Random, message: Message) -> bytes:
    """Claim to be of another kind."""
    kinds = {
        "server_broadcast",
        "client_update",
        "auxiliary_handout",
        "gradient",
        "",
        "CLIENT_UPDATE",
    }
    kind = random.choice(sorted(kinds - {message.kind}))
    return _metadata(random, message, lambda fields: fields.update(kind=kind))


def replayed_round(random: Random, message: Message) -> bytes:
    """Tell another round; what has no round gets one."""

    def change(fields: dict[str, Any]) -> None:
        own = int(fields.get("round_idx", 0))
        fields["round_idx"] = str(random.choice([own - 1, own + 1, 0, own + 2**32, 2**53 - 1]))

    return _metadata(random, message, change)


def forged_client(random: Random, message: Message) -> bytes:
    """Tell another client; what comes from no client gets one."""

    def change(fields: dict[str, Any]) -> None:
        own = int(fields.get("client_id", 0))
        fields["client_id"] = str(random.choice([own + 1, own + 2**40, 2**53 - 1, -own - 1]))

    return _metadata(random, message, change)


def odd_number(random: Random, message: Message) -> bytes:
    """Write a number in a way that others may read."""

    def change(fields: dict[str, Any]) -> None:
        present = [name for name in NUMBERS if name in fields] or ["round_idx"]
        huge = random.choice((str(2**53), str(2**63), "9" * 400, "9" * 5000))
        fields[random.choice(present)] = random.choice((*ODD_NUMBERS, huge))

    return _metadata(random, message, change)


def _entry(random: Random, header: dict[str, Any], *, filled: bool = False) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    if filled:
        names = [n for n in names if header[n]["data_offsets"][0] < header[n]["data_offsets"][1]]
    entry: dict[str, Any] = header[random.choice(names)]
    return entry


def offsets(random: Random, message: Message) -> bytes:
    """Make a tensor overlap another, leave a gap, end early, run backwards or below zero."""
    header = message.header()
    entry = _entry(random, header, filled=True)
    start, stop = entry["data_offsets"]
    step = random.choice((1, 2, 4, 8, 64, 2**40))
    entry["data_offsets"] = random.choice((
        [start + step, stop + step], [start - step, stop - step], [start, stop + step],
        [start, stop - step], [start - step, stop], [stop, start], [start + step, stop],
    ))  # fmt: skip
    return message.framed(header)


def same_place(random: Random, message: Message) -> bytes:
    """Let a second tensor lie where the first one is."""
    header = message.header()
    header["twin"] = dict(_entry(random, header))
    return message.framed(header)


def odd_field(random: Random, message: Message) -> bytes:
    """Give a field of an entry, or one of its numbers, a value that it cannot have."""
    header = message.header()
    entry = _entry(random, header)
    name = random.choice(("dtype", "shape", "data_offsets"))
    numbers = entry[name] if name != "dtype" else []
    if numbers and random.random() < 0.7:
        place = random.randrange(len(numbers))
        number = numbers[place]
        odd = (float(number), str(number), [number], None, -number - 1, number + 2**64, 10**300)
        numbers[place] = random.choice(odd)
    else:
        entry[name] = random.choice([value for value in ODD_VALUES if value != entry[name]])
    return message.framed(header)


def other_shape(random: Random, message: Message) -> bytes:
    """Lay the same or other numbers out in another shape."""
    header = message.header()
    entry = _entry(random, header, filled=True)
    shape = entry["shape"]
    count = 1
    for size in shape:
        count *= size
    entry["shape"] = random.choice((
        [count], [1, *shape], [*shape, 1], [0, *shape], [2**31, 2**31], [2**62],
        [count, *[1] * 63], [1] * random.choice((64, 65, 100)), [-1 * s for s in shape],
    ))  # fmt: skip
    if entry["shape"] == shape:
        entry["shape"] = [*shape, 2]
    return message.framed(header)


def huge_claim(random: Random, message: Message) -> bytes:
    """Claim a tensor of any size with offsets that fit it."""
    header = message.header()
    entry = _entry(random, header)
    count = random.choice((2**20, 2**31, 2**40, 2**60, 2**62, 10**100))
    entry |= {"shape": [count], "data_offsets": [0, 4 * count], "dtype": "F32"}
    return message.framed(header)


def other_dtype(random: Random, message: Message) -> bytes:
    """Claim other numbers, or send them: the same tensor twice as wide."""
    header = message.header()
    entry = _entry(random, header)
    same_width = {"F32": "I32", "F16": "BF16", "BF16": "F16", "I8": "U8"}
    entry["dtype"] = random.choice((*FOREIGN_DTYPES, same_width[entry["dtype"]]))
    return message.framed(header)


def renamed(random: Random, message: Message) -> bytes:
    """Give a tensor another name."""
    header = message.header()
    name = random.choice([name for name in header if name != "__metadata__"])
    other = random.choice(("lm_head.weight", "", name + " ", name.upper(), "\ud800", "a" * 900))
    header[other] = header.pop(name)
    return message.framed(header)


def tensor_missing(random: Random, message: Message) -> bytes:
    """Leave a tensor out, with its numbers or without."""
    header = message.header()
    name = random.choice([name for name in header if name != "__metadata__"])
    start, stop = header.pop(name)["data_offsets"]
    body = message.numbers()
    if random.random() < 0.5:
        del body[start:stop]
        for entry in (entry for name, entry in header.items() if name != "__metadata__"):
            if entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [place - (stop - start) for place in entry["data_offsets"]]
    return message.framed(header, bytes(body))


def tensor_extra(random: Random, message: Message) -> bytes:
    """Send a foreign tensor too, well-formed, with or without numbers."""
    header, body = message.header(), message.numbers()
    count = random.choice((0, 0, 1, 8, 48))
    end = len(body)
    header["smuggled"] = {"dtype": "U8", "shape": [count], "data_offsets": [end, end + count]}
    return message.framed(header, bytes(body) + bytes(count))


def named_twice(random: Random, message: Message) -> bytes:
    """Repeat a key of the header's JSON, with the same or another value."""
    text = message.data[8 : message.start].decode().rstrip()
    header = message.header()
    name = random.choice(list(header))
    value = header[name] if random.random() < 0.5 else random.choice(ODD_VALUES)
    again = f"{json.dumps(name)}:{json.dumps(value)}"
    both = random.choice((text[:-1] + "," + again + "}", "{" + again + "," + text[1:]))
    return message.framed(both.encode())


def nested(random: Random, message: Message) -> bytes:
    """Nest lists or objects deeply, alone or as a field."""
    depth = random.choice((10, 100, 1000, 5000))
    deep = random.choice(
        ("[" * depth + "]" * depth, "[" * depth, '{"a":' * depth + "1" + "}" * depth)
    )
    text = message.data[8 : message.start].decode().rstrip()
    return message.framed(random.choice((deep, text[:-1] + f',"deep":{deep}' + "}")).encode())


def no_json(random: Random, message: Message) -> bytes:
    """Write what some parsers of JSON take."""
    text = message.data[8 : message.start].decode().rstrip()
    odd = (
        text.replace("{", "{/* */", 1), text[:-1] + ",}", text.replace('"', "'"), "\ufeff" + text,
        text + text, text[:-1] + ',"x":NaN}', text[:-1] + ',"x":Infinity}', text[:-1], "", "null",
        text[:-1] + ',"x":1e999}', text.replace("0", "00", 1), text + "\x00",
        text[:-1] + ',"x":' + "9" * 5000 + "}",
    )  # fmt: skip
    raw = random.choice((*(part.encode("utf-8", "surrogatepass") for part in odd), b"\xff\xfe{}"))
    return message.framed(raw)


def not_finite(random: Random, message: Message) -> bytes:
    """Put NaN or an infinity among the numbers: the highest bits of an element all set."""
    body, header = message.numbers(), message.header()
    patterns = {"F32": ("0000807f", "000080ff", "0000c07f", "0100807f"),
                "F16": ("007c", "00fc", "007e"), "BF16": ("807f", "80ff", "c07f")}  # fmt: skip
    floats = [
        entry for name, entry in header.items() if name != "__metadata__" and
        entry["dtype"] in patterns and entry["data_offsets"][0] < entry["data_offsets"][1]
    ]  # fmt: skip
    entry = random.choice(floats)
    raw = bytes.fromhex(random.choice(patterns[entry["dtype"]]))
    start, stop = entry["data_offsets"]
    place = start + len(raw) * random.randrange((stop - start) // len(raw))
    body[place : place + len(raw)] = raw
    return message.framed(body=bytes(body))


def huge_numbers(random: Random, message: Message) -> bytes:
    """Make numbers huge: exponent bits set, all but the lowest of them."""
    body = message.numbers()
    for place in range(random.randrange(4), len(body), random.choice((2, 4, 8))):
        body[place] |= random.choice((0x7E, 0x7B, 0x60))
    return message.framed(body=bytes(body))


def harmless(random: Random, message: Message) -> bytes:
    """Write the header differently, but say the same: it may be accepted."""
    header = message.header()
    names = list(header)
    random.shuffle(names)
    text = json.dumps({name: header[name] for name in names}, indent=random.choice((None, 1)))
    return message.framed(text.encode() + b" " * random.randrange(8))


def swapped(random: Random, message: Message, others: Sequence[Message]) -> bytes:
    """Send another valid message, or its header or its numbers with this one's rest."""
    other = random.choice(
        [it for it in others if it.data != message.data and it.kind != message.kind]
    )
    return random.choice((
        other.data, message.framed(body=bytes(other.numbers())), message.framed(other.header()),
    ))  # fmt: skip


MUTATIONS: dict[str, Callable[[Random, Message], bytes]] = {
    function.__name__: function
    for function in (
        flipped_length, flipped_header, flipped_numbers, truncated, extended, noise,
        metadata_missing, metadata_extra, metadata_type, other_version, other_kind, replayed_round,
        forged_client, odd_number, offsets, same_place, odd_field, other_shape, huge_claim,
        other_dtype, renamed, tensor_missing, tensor_extra, named_twice, nested, no_json,
        not_finite, huge_numbers, harmless,
    )
}  # fmt: skip

# refused whatever the draw by the decoder of the message's own kind; of the others some draws
# change nothing that counts, or numbers only
MUST_REFUSE = frozenset(MUTATIONS) - {
    "flipped_header", "flipped_numbers", "harmless", "huge_numbers", "not_finite",
}  # fmt: skip
