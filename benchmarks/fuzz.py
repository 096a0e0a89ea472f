"""Hostile bytes for every decoder of messages: none may crash, hang or be taken for what it is not.

Run: OMP_NUM_THREADS=1 python benchmarks/fuzz.py --inputs 100000

Valid broadcasts, updates and hand-outs are changed in many ways (`fuzz_mutations.py`), drawn by
hypothesis, and read by all decoders. What is accepted is read again by the safetensors library and
has to be in the contract. Prints, by kind of change: errors by class, what was accepted, rightly or
wrongly, crashes, the slowest input in CPU time and the most memory that one took.
"""

import argparse
import math
import signal
import sys
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import safetensors
import torch
from fuzz_mutations import MUST_REFUSE, MUTATIONS, Message, swapped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsp.messages import (
    ClientUpdate,
    Contract,
    MessageError,
    RejectedUpdate,
    ServerBroadcast,
    decode_broadcast,
    decode_handout,
    decode_update,
    describe,
    encode,
    encode_handout,
)
from fedsp.payload import Payload

SHAPES = {"soft_prompt": (2, 2, 1, 3, 4), "layers.0.lora_A": (3, 5)}
WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8")
ROUND, CLIENT, MAX_NORM = 5, 3, 4.0
LIMIT_SECONDS = 10  # of one input; the alarm counts as a crash
INPUTS_AN_EXAMPLE = 20  # hypothesis takes several ms for each example
CODES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


def tensors(seed: int, scale: float = 0.1) -> Payload:
    """Return small numbers in the shapes of the contract."""
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


REFERENCE = tensors(0)
HANDOUT = {"embeddings": torch.ones(3, 4), "norm": torch.ones(4).bfloat16(), "empty": torch.ones(0)}


def samples() -> list[Message]:
    """Return valid messages: of every kind, and of both kinds with a payload in every format."""
    update = ClientUpdate(ROUND, CLIENT, tensors(1), num_examples=17)
    broadcast = ServerBroadcast(ROUND, REFERENCE)
    found = [Message("auxiliary_handout", "", encode_handout(HANDOUT))]
    for wire_dtype in WIRE_DTYPES:
        found.append(Message("client_update", wire_dtype, encode(update, wire_dtype)))
        found.append(Message("server_broadcast", wire_dtype, encode(broadcast, wire_dtype)))
    return found


@dataclass
class Tally:
    """What became of one kind of change."""

    inputs: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0
    peak_bytes: int = 0


def readers(wire_dtype: str) -> dict[str, Callable[[bytes], Any]]:
    """Return every decoder, asked for the sample's round, client and number format."""
    contract = Contract(SHAPES, wire_dtype or "float32", MAX_NORM)  # type: ignore[arg-type]
    return {
        "server_broadcast": lambda data: decode_broadcast(data, contract, round_idx=ROUND),
        "client_update": lambda data: decode_update(
            data, contract, reference=REFERENCE, round_idx=ROUND, client_id=CLIENT
        ),
        "auxiliary_handout": lambda data: decode_handout(data, HANDOUT),
        "any handout": decode_handout,
        "describe": describe,
    }


def by_the_library(data: bytes) -> dict[str, torch.Tensor]:
    """Read tensors with safetensors itself; it raises where the bytes are not such a file."""
    found = {}
    for name, entry in safetensors.deserialize(data):
        dtype = CODES.get(entry["dtype"], torch.uint8)
        shape = entry["shape"] if entry["dtype"] in CODES else [len(entry["data"])]
        raw = torch.frombuffer(bytearray(entry["data"]) + bytes(8), dtype=torch.uint8)
        found[name] = raw[: len(entry["data"])].clone().view(dtype).reshape(shape)
    return found


def objection(reader: str, data: bytes, came: Any) -> str:
    """Say what is wrong with something that was accepted; nothing if it is in the contract."""
    try:
        there = by_the_library(data)
    except Exception as error:  # the library's own errors, of any class
        return f"safetensors refuses it: {error}"
    if reader == "describe":
        names = [entry["name"] for entry in came["tensors"]]
        return "" if names == sorted(there) else "describes other tensors"
    if reader == "any handout":
        return "" if came.tensors.keys() == there.keys() else "holds other tensors"
    if reader == "auxiliary_handout":
        return "" if _same(came.tensors, HANDOUT, values=False) else "not the hand-out asked for"
    return _payload_objection(came, there)


def _number(there: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return what a tensor stands for, which in 8 bits is a multiple of its row's scale."""
    scale = there.get(f"{name}/scale")
    return there[name].float() if scale is None else there[name].float() * scale.unsqueeze(-1)


def _payload_objection(came: Any, there: Mapping[str, torch.Tensor]) -> str:
    expected = {name: _number(there, name) for name in there if not name.endswith("/scale")}
    if came.round_idx != ROUND:
        return "another round"
    if not _same(came.payload, expected, values=True):
        return "other values than safetensors reads"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in came.payload.values()):
        return "not finite"
    if isinstance(came, ServerBroadcast):
        return ""
    change = sum(
        float((came.payload[name].double() - REFERENCE[name].double()).square().sum())
        for name in SHAPES
    )
    if not math.sqrt(change) <= MAX_NORM * (1 + 1e-6):
        return f"moved by {math.sqrt(change)}"
    if came.client_id != CLIENT or not 1 <= came.num_examples < 2**53:
        return "another client or an impossible number of examples"
    return ""


def _same(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *, values: bool
) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape
        and tensor.dtype == other[name].dtype
        and (not values or torch.equal(tensor, other[name]))
        for name, tensor in one.items()
    )


def _hangs(signum: int, frame: Any) -> None:
    raise TimeoutError(f"no answer within {LIMIT_SECONDS} s")


def try_out(kind: str, message: Message, data: bytes, tally: Tally) -> None:
    """Let every decoder read one input and note what came of it."""
    tally.inputs += 1
    for reader, read in readers(message.wire_dtype).items():
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        started = time.process_time()
        came, verdict = None, "accepted"
        try:
            came = read(data)
        except (MessageError, RejectedUpdate) as error:
            verdict = type(error).__name__
        except Exception as error:
            verdict = "crashed"
            tally.crashes.append(f"{reader}: {type(error).__name__}: {error}: {data!r:.300}")
        tally.slowest_ms = max(tally.slowest_ms, 1000 * (time.process_time() - started))
        signal.setitimer(signal.ITIMER_REAL, 0)
        tally.peak_bytes = max(tally.peak_bytes, tracemalloc.get_traced_memory()[1] - held)
        tally.verdicts[verdict] += 1
        if verdict == "accepted":
            wrong = objection(reader, data, came)
            if not wrong and kind in MUST_REFUSE and reader == message.kind:
                wrong = "must be refused"
            if wrong:
                tally.wrong.append(f"{reader}: {wrong}: {data!r:.300}")


def fuzz(num_inputs: int) -> dict[str, Tally]:
    """Try inputs that hypothesis draws, the same ones in every run.

    Args:
        num_inputs: Number of changed messages, each of which all decoders read.

    Returns:
        By kind of change.
    """
    tallies: dict[str, Tally] = defaultdict(Tally)
    valid = samples()
    kinds = [*MUTATIONS, "swapped"]

    an_input = st.tuples(st.sampled_from(kinds), st.sampled_from(valid), st.integers(0, 2**64 - 1))

    @settings(
        max_examples=-(-num_inputs // INPUTS_AN_EXAMPLE),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(an_input, min_size=INPUTS_AN_EXAMPLE, max_size=INPUTS_AN_EXAMPLE))
    def draw(inputs: list[tuple[str, Message, int]]) -> None:
        for kind, message, seed in inputs:
            random = Random(seed)
            if kind == "swapped":
                data = swapped(random, message, valid)
            else:
                data = MUTATIONS[kind](random, message)
            try_out(kind, message, data, tallies[kind])

    previous = signal.signal(signal.SIGALRM, _hangs)
    tracemalloc.start()
    try:
        draw()
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, previous)
    return dict(sorted(tallies.items()))


def main() -> int:
    """Print one line a kind of change; the exit code is 1 if a decoder failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="changed messages to try")
    started = time.perf_counter()
    tallies = fuzz(parser.parse_args().inputs)
    print(
        f"{'change':22} {'inputs':>7} {'MessageError':>12} {'Rejected':>9} {'accepted':>9} "
        f"{'wrongly':>8} {'crashed':>8} {'slowest ms':>11} {'memory kB':>10}"
    )
    for kind, tally in tallies.items():
        print(
            f"{kind:22} {tally.inputs:7d} {tally.verdicts['MessageError']:12d} "
            f"{tally.verdicts['RejectedUpdate']:9d} {tally.verdicts['accepted']:9d} "
            f"{len(tally.wrong):8d} {len(tally.crashes):8d} {tally.slowest_ms:11.2f} "
            f"{tally.peak_bytes / 1000:10.1f}"
        )
    failures = [text for tally in tallies.values() for text in (*tally.wrong, *tally.crashes)]
    inputs = sum(tally.inputs for tally in tallies.values())
    reads = sum(sum(tally.verdicts.values()) for tally in tallies.values())
    print(
        f"{inputs} inputs, {reads} reads, {len(failures)} failures, "
        f"{time.perf_counter() - started:.0f} s"
    )
    for text in failures[:20]:
        print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
