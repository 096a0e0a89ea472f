import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from fedsp.ledger import Ledger, next_attempt, parse_line, read_ledger, summarize
from fedsp.messages import (
    ClientUpdate,
    Contract,
    MessageError,
    ServerBroadcast,
    describe,
    encode,
    encode_handout,
)

PREFIX = torch.zeros(2, 2, 1, 3, 4)
BROADCAST = encode(ServerBroadcast(0, {"soft_prompt": PREFIX}), "float32")
UPDATE = encode(ClientUpdate(0, 3, {"soft_prompt": PREFIX}, 17), "bfloat16")
HANDOUT = encode_handout({"norm": torch.ones(4), "embedding": torch.zeros(5, 4).bfloat16()})


def test_a_payload_is_named_with_size_and_checksum(tmp_path):
    path = tmp_path / "runs" / "1" / "ledger.jsonl"
    ledger = Ledger(path, attempt=2)
    ledger.record(4, 3, "up", UPDATE)
    ledger.close()
    assert json.loads(path.read_text()) == {
        "attempt": 2,
        "round": 4,
        "client": 3,
        "direction": "up",
        "kind": "client_update",
        "tensors": [{"name": "soft_prompt", "shape": [2, 2, 1, 3, 4], "dtype": "bfloat16"}],
        "bytes": len(UPDATE),
        "sha256": hashlib.sha256(UPDATE).hexdigest(),
    }
    assert read_ledger(path) == [json.loads(path.read_text())]


def test_a_line_can_be_read_by_others_before_record_returns_to_its_caller(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for count in range(1, 4):
        ledger.record(0, count, "down", BROADCAST)
        seen = subprocess.run(["wc", "-l", path], capture_output=True, text=True, check=True)
        assert seen.stdout.split()[0] == str(count)


def test_a_payload_of_many_foreign_names_takes_no_more_room_than_an_honest_one(tmp_path):
    """An answer of 1 MiB whose header is all names; what is left out is said."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.declare(Contract({"soft_prompt": PREFIX.shape}, "float32", None), {"a": PREFIX})
    foreign = {f"{idx:04d}{chr(0x1F600) * 60}": torch.zeros(0) for idx in range(1000)}
    update = encode(ClientUpdate(0, 3, {"soft_prompt": PREFIX, **foreign}, 17), "float32")
    ledger.record(0, 3, "up", update)
    line = path.read_bytes().splitlines()[-1]
    assert len(line) < 6000 < len(update)
    row = json.loads(line)
    assert row["sha256"] == hashlib.sha256(update).hexdigest()
    kept = len(row["tensors"]) - 1
    assert kept >= 1
    assert row["tensors"][-1]["name"] == f"and {1001 - kept} tensors more"


def test_totals_are_the_bytes_of_one_round_and_direction(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.totals(0) == {"up_bytes": 0, "down_bytes": 0}
    for client in range(3):
        ledger.record(0, client, "down", BROADCAST)
    ledger.record(0, 1, "up", UPDATE)
    ledger.record(1, 0, "up", UPDATE)
    assert ledger.totals(0) == {"up_bytes": len(UPDATE), "down_bytes": 3 * len(BROADCAST)}
    assert ledger.totals(1) == {"up_bytes": len(UPDATE), "down_bytes": 0}
    assert ledger.totals(2) == {"up_bytes": 0, "down_bytes": 0}


def test_a_resumed_run_counts_its_own_attempt_and_keeps_the_lines_before(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert next_attempt(path) == 0
    for attempt in range(3):
        ledger = Ledger(path, attempt=next_attempt(path))
        assert ledger.totals(0) == {"up_bytes": 0, "down_bytes": 0}
        ledger.record(0, 3, "up", UPDATE)
        assert ledger.totals(0)["up_bytes"] == len(UPDATE)
        ledger.close()
        assert next_attempt(path) == attempt + 1
    assert [row["attempt"] for row in read_ledger(path)] == [0, 1, 2]


def test_a_payload_for_many_clients_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.record(0, 0, "down", HANDOUT)
    description, checksum = describe(HANDOUT), hashlib.sha256(HANDOUT).hexdigest()
    monkeypatch.setattr(hashlib, "sha256", None)
    ledger.record_digest(0, 1, "down", description, len(HANDOUT), checksum)
    first, second = read_ledger(path)
    assert second == first | {"client": 1}
    assert ledger.totals(0)["down_bytes"] == 2 * len(HANDOUT)


def test_the_summary_adds_up_by_kind_and_direction(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.record(0, 0, "down", HANDOUT)
    for client in range(3):
        ledger.record(0, client, "down", BROADCAST)
        ledger.record(0, client, "up", UPDATE)
    handout = {"up_bytes": 0, "down_bytes": len(HANDOUT), "payloads": 1}
    broadcast = {"up_bytes": 0, "down_bytes": 3 * len(BROADCAST), "payloads": 3}
    assert summarize(read_ledger(path)) == {
        "auxiliary_handout": handout,
        "server_broadcast": broadcast,
        "client_update": {"up_bytes": 3 * len(UPDATE), "down_bytes": 0, "payloads": 3},
    }
    assert summarize([]) == {}


CONTRACT = Contract({"soft_prompt": (2, 2, 1, 3, 4), "lora.a": (4, 1)}, "bfloat16", None)
PAYLOAD = [
    {"name": "lora.a", "shape": [4, 1], "dtype": "bfloat16"},
    {"name": "soft_prompt", "shape": [2, 2, 1, 3, 4], "dtype": "bfloat16"},
]


def test_what_may_travel_is_declared_on_a_line_that_is_no_payload(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, attempt=1)
    ledger.declare(CONTRACT, {"norm": torch.ones(4, device="meta")}, client_id=2)
    ledger.record(0, 2, "down", HANDOUT)
    first, second = path.read_bytes().splitlines()
    assert (
        json.loads(first)
        == parse_line(first, "")
        == {
            "attempt": 1,
            "client": 2,
            "declares": {
                "auxiliary_handout": [{"name": "norm", "shape": [4], "dtype": "float32"}],
                "server_broadcast": PAYLOAD,
                "client_update": PAYLOAD,
            },
        }
    )
    assert read_ledger(path) == [parse_line(second, "")]
    assert ledger.totals(0) == {"up_bytes": 0, "down_bytes": len(HANDOUT)}


def test_an_attempt_that_only_declared_is_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, attempt=3).declare(CONTRACT, {})
    assert next_attempt(path) == 4
    Ledger(None).declare(CONTRACT, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"more": 1}, "expected the fields"),
        ({"client": "a"}, "`client` is 'a'"),
        ({"client": True}, "`client` is True"),
        ({"declares": []}, "`declares` is []"),
        ({"declares": {"x": {}}}, "a tensor is {}"),
        ({"declares": {"x": [PAYLOAD[0] | {"shape": [-1]}]}}, "a tensor is {'name': 'lora.a'"),
        ({"declares": {"x": [PAYLOAD[0] | {"shape": [True]}]}}, "a tensor is {'name': 'lora.a'"),
        ({"declares": {"x": [PAYLOAD[0] | {"dtype": 1}]}}, "a tensor is {'name': 'lora.a'"),
        ({"declares": {"x": [1]}}, "a tensor is 1"),
    ],
)
def test_a_damaged_declaration_is_named(tmp_path, change, reason):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).declare(CONTRACT, {})
    row = json.loads(path.read_text()) | change
    with pytest.raises(ValueError, match=re.escape(f"x: the ledger is damaged, {reason}")):
        parse_line(json.dumps(row).encode(), "x")


def test_what_is_no_message_is_not_recorded(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(MessageError):
        Ledger(path).record(0, 0, "up", b"weights")
    assert path.read_bytes() == b""


def test_a_direction_that_is_neither_up_nor_down_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`direction` must be up or down, got 'sideways'"):
        Ledger(tmp_path / "ledger.jsonl").record(0, 0, "sideways", UPDATE)


def test_an_attempt_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`attempt` must be at least 0, got -1"):
        Ledger(tmp_path / "ledger.jsonl", attempt=-1)


def test_a_closed_ledger_lets_nothing_pass(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="is closed: nothing more may be sent"):
        ledger.record(0, 0, "up", UPDATE)


# --- crashes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"{", b'{"attempt": 0, "round"', b"x" * 200_000])
@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_torn_last_line_is_cut_off_on_reopening(tmp_path, torn, lines):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for client in range(lines):
        ledger.record(0, client, "up", UPDATE)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_ledger(path)) == lines
    assert next_attempt(path) == (1 if lines else 0)
    ledger = Ledger(path, attempt=1)
    assert path.read_bytes() == whole
    ledger.record(0, 9, "up", UPDATE)
    assert [row["client"] for row in read_ledger(path)] == [*range(lines), 9]


def test_a_line_longer_than_a_block_is_found_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    many = encode_handout({f"layer.{i}.weight": torch.zeros(1) for i in range(3000)})
    Ledger(path, attempt=4).record(0, 0, "down", many)
    assert path.stat().st_size > 2 * 65536
    assert next_attempt(path) == 5


def test_a_full_disk_stops_the_payload_and_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.record(0, 0, "up", UPDATE)
    whole = path.read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(OSError, match=r"No space left.*payload must not be sent") as error:
            ledger.record(0, 1, "up", UPDATE)
        assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == whole
    assert ledger.totals(0)["up_bytes"] == len(UPDATE)


def test_a_failing_write_stops_the_payload_and_names_the_file(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def fail(file, data):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(
        OSError, match=r"cannot write the ledger .*ledger.jsonl: Input/output error"
    ):
        ledger.record(0, 1, "up", UPDATE)


def test_every_payload_that_left_a_killed_process_is_in_the_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import torch
        from fedsp.ledger import Ledger
        from fedsp.messages import ServerBroadcast, encode

        data = encode(ServerBroadcast(0, {"soft_prompt": torch.zeros(1, 2, 1, 1, 1)}), "float32")
        ledger = Ledger(Path(sys.argv[1]))
        for client in range(10**9):
            ledger.record(0, client, "down", data)
            print(client, flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    )
    for _ in range(50):
        process.stdout.readline()
    process.kill()
    left = 50 + len(process.stdout.read().split("\n")[:-1])
    process.stdout.close()
    process.wait()
    clients = [row["client"] for row in read_ledger(path)]
    assert clients == list(range(len(clients)))
    assert left <= len(clients) <= left + 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "line 2: the ledger is damaged, expected JSON"),
        (b"\xff\xfe", "line 2: the ledger is damaged, expected JSON"),
        (b"", "line 2: the ledger is damaged, expected JSON"),
        (b"[" * 100_000, "line 2: the ledger is damaged, expected JSON"),
        (b"[]", "line 2: the ledger is damaged, expected the fields"),
        (b'{"round": 1}', "line 2: the ledger is damaged, expected the fields"),
    ],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path, line, reason):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(0, 0, "up", UPDATE)
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ValueError, match=reason):
        read_ledger(path)


@pytest.mark.parametrize(("name", "value"), [("bytes", "12"), ("round", True), ("direction", "x")])
def test_a_field_of_the_wrong_kind_is_named(tmp_path, name, value):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(0, 0, "up", UPDATE)
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {name: value}) + "\n")
    with pytest.raises(ValueError, match=f"line 1: the ledger is damaged, `{name}` is {value!r}"):
        read_ledger(path)


def test_a_missing_ledger_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_ledger(tmp_path / "ledger.jsonl")
