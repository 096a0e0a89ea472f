"""The fuzzer of messages: what it finds in the decoders (nothing), and that it would find it."""

import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsp.messages

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz
from fuzz_mutations import MUST_REFUSE, MUTATIONS, Message, swapped

VALID = fuzz.samples()


def tried(kind: str, message: Message, data: bytes) -> fuzz.Tally:
    tally = fuzz.Tally()
    fuzz.try_out(kind, message, data, tally)
    return tally


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([*MUTATIONS]), st.sampled_from(VALID), st.integers(0, 2**64 - 1))
def test_no_spoilt_message_crashes_a_decoder_or_passes_for_what_it_is_not(
    kind: str, message: Message, seed: int
) -> None:
    tally = tried(kind, message, MUTATIONS[kind](Random(seed), message))
    assert tally.wrong == []
    assert tally.crashes == []


@pytest.mark.parametrize("message", VALID, ids=lambda it: f"{it.kind}-{it.wire_dtype}")
def test_a_valid_message_is_read_by_its_decoder_and_described(message: Message) -> None:
    tally = tried("harmless", message, message.data)
    handout = message.kind == "auxiliary_handout"
    assert tally.verdicts == {"accepted": 3 if handout else 2, "MessageError": 2 if handout else 3}
    assert tally.wrong == []
    # the same bytes under a kind of change that must be refused are found to be wrong
    assert tried("truncated", message, message.data).wrong != []


def test_the_script_counts_by_kind_and_ends_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--inputs", "600"])
    assert fuzz.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "600 inputs, 3000 reads, 0 failures" in lines[-1]
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[1:-1]}
    assert counts.keys() <= {*MUTATIONS, "swapped"}
    assert sum(counts.values()) == 600


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("_check_size", []),  # the header is checked against the length of the file again
        ("_check_names", ["renamed", "tensor_extra"]),
        ("_check_entry", ["other_dtype", "other_shape"]),
    ],
)
def test_a_decoder_without_one_of_its_checks_is_found_out(
    monkeypatch: pytest.MonkeyPatch, fault: str, found: list[str]
) -> None:
    monkeypatch.setattr(fedsp.messages, fault, lambda *args: None)
    failed = set()
    for kind, mutate in MUTATIONS.items():
        for seed in range(30):
            message = VALID[seed % len(VALID)]
            tally = tried(kind, message, mutate(Random(seed), message))
            if tally.wrong or tally.crashes:
                failed.add(kind)
    assert failed >= set(found)
    assert bool(failed) == bool(found)


def test_a_swapped_message_is_another_one() -> None:
    for seed in range(50):
        message = VALID[seed % len(VALID)]
        assert swapped(Random(seed), message, VALID) != message.data


def test_changes_that_must_be_refused_change_something() -> None:
    for kind in sorted(MUST_REFUSE):
        for seed in range(50):
            message = VALID[seed % len(VALID)]
            assert MUTATIONS[kind](Random(seed), message) != message.data
