"""Oracle: `hashlib` over the bytes that a link carried; then every way to falsify a ledger."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsp.audit import audit
from fedsp.recipes import WholeModel
from fedsp.remote import Patience
from fedsp.stages import Stage
from fedsp.tuned import LoRA
from fedsp.wire import Record
from parties import NAMES, LocalLink, make_site, remote, server_data, write_party_rows
from tiny import fit, make_client, make_server, make_trainer

Row = dict[str, Any]
Edit = Callable[[list[Row]], Any]
PROMPT = "soft_prompt [4, 2, 4, 4, 8] float32"
ROUNDS = 2


class Wiretap(LocalLink):
    """Keeps every message that went over the wire; loses the answers that it is told to lose."""

    def __init__(self, sites: dict[str, Any], lost: tuple[str, ...] = ()) -> None:
        super().__init__(sites)
        self.seen: list[tuple[str, str, bytes]] = []
        self.lost = lost

    def send(self, party: str, record: Record) -> None:
        messages = [record["handout"], record["broadcast"]]
        self.seen += [
            (party, "down", data) for data in messages if isinstance(data, bytes) and data
        ]
        super().send(party, record)
        update = self.answers[-1][1]["update"]
        assert isinstance(update, bytes)
        self.seen.append((party, "up", update))

    def receive(self, seconds: float) -> list[tuple[str, Record]]:
        return [
            (party, record) for party, record in super().receive(seconds) if party not in self.lost
        ]


def federate(
    root: Path, tiny_folder: Path, lost: tuple[str, ...] = (), *, lora: bool = False
) -> Wiretap:
    """Run a live federation over a wire that listens, in the folders of a real one."""
    paths = write_party_rows(tiny_folder / "rows")
    runs = {name: root / "clients" / name / "run" for name in NAMES}
    recipe: Row = {
        "initial_distillation": None,
        "auxiliary": WholeModel(),
        "tuned_weights": LoRA(2),
    }
    options = recipe if lora else {}
    client = {"auxiliary": Stage(0)} if lora else {}
    sites = {
        name: make_site(
            tiny_folder, run, name, paths[name], make_server(tiny_folder, **options), **client
        )
        for name, run in runs.items()
    }
    link = Wiretap(sites, lost)
    trainer = make_trainer(root / "server" / "run", num_rounds=ROUNDS)
    trainer.make_executor = remote(
        link, Patience(join_seconds=0.0, round_seconds=0.2 if lost else 5.0)
    )
    server = make_server(tiny_folder, **options)
    trainer.fit(server, make_client(**client), server_data(tiny_folder, paths))
    for site in sites.values():
        site.close()
    return link


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Wiretap]:
    root = tmp_path_factory.mktemp("federation")
    return root, federate(root, tiny_folder)


@pytest.fixture
def root(real: tuple[Path, Wiretap], tmp_path: Path) -> Path:
    """A copy of the federation's folder, to do with as one likes."""
    for ledger in real[0].glob("**/ledger.jsonl"):
        copy = tmp_path / ledger.relative_to(real[0])
        copy.parent.mkdir(parents=True)
        shutil.copy(ledger, copy)
    shutil.copytree(real[0] / "server" / "run" / "csv", tmp_path / "server" / "run" / "csv")
    return tmp_path


def ledger(root: Path, party: str = "server") -> Path:
    return root / ("server" if party == "server" else f"clients/{party}") / "run" / "ledger.jsonl"


def rewrite(path: Path, edit: Edit) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def find(rows: list[Row], **wanted: Any) -> Row:
    """Return the first payload that has all of these values."""
    return next(row for row in rows if wanted.items() <= row.items())


# --- nothing is wrong ---------------------------------------------------------------------------


def test_both_sides_agree_on_every_message_that_the_wire_carried(
    real: tuple[Path, Wiretap],
) -> None:
    root, link = real
    report = audit(root)
    assert (report.findings, report.notes, report.passed) == ((), (), True)
    assert report.agreed == len(link.seen) == len(NAMES) * (1 + 2 * ROUNDS)
    for party in NAMES:
        for way in ("up", "down"):
            flows = [it for it in report.flows if (it.party, it.direction) == (party, way)]
            carried = [data for name, went, data in link.seen if (name, went) == (party, way)]
            assert sum(flow.payloads for flow in flows) == len(carried)
            assert sum(flow.num_bytes for flow in flows) == sum(map(len, carried))
    # the hashes that both sides agree on are those of the bytes on the wire
    rows = [json.loads(line) for line in ledger(root).read_text().splitlines()[1:]]
    assert Counter(row["sha256"] for row in rows) == Counter(
        hashlib.sha256(data).hexdigest() for _, _, data in link.seen
    )


def test_what_may_travel_is_the_prompt_and_the_auxiliary_model(real: tuple[Path, Wiretap]) -> None:
    declared = audit(real[0]).declared
    assert declared["server_broadcast"] == declared["client_update"] == (PROMPT,)
    assert len(declared["auxiliary_handout"]) > 10
    assert not any("soft_prompt" in text for text in declared["auxiliary_handout"])


def test_weights_that_travel_beside_the_prompt_are_declared_by_both_sides(
    tmp_path: Path, tiny_folder: Path
) -> None:
    link = federate(tmp_path, tiny_folder, lora=True)
    report = audit(tmp_path)
    assert (report.findings, report.agreed) == ((), len(link.seen))
    weights = [text for text in report.declared["client_update"] if ".lora_" in text]
    assert len(weights) > 1


def test_clients_may_be_named_one_by_one_and_the_others_are_told_of(root: Path) -> None:
    report = audit(
        ledger(root).parent, [ledger(root, "gamma").parent, ledger(root, "alpha").parent]
    )
    assert report.passed
    assert report.agreed == 2 * (1 + 2 * ROUNDS)
    assert report.notes == ("client 1: its ledger is not here to compare",)
    assert {flow.party for flow in report.flows} == {"alpha", "client 1", "gamma"}
    ledger(root, "beta").unlink()
    assert audit(root) == report


@pytest.mark.parametrize("party", ["server", "alpha"])
def test_one_side_alone_is_audited_by_its_own_declaration(root: Path, party: str) -> None:
    report = audit(ledger(root, party).parent)
    assert (report.findings, report.agreed) == ((), None)
    clients = {"client 0", "client 1", "client 2"} if party == "server" else {"client 0"}
    assert {flow.party for flow in report.flows} == clients


def test_a_simulation_that_was_resumed_repeats_rounds_and_passes(
    tmp_path: Path, tiny_folder: Path
) -> None:
    fit(tiny_folder, tmp_path / "run", num_rounds=2)
    max((tmp_path / "run" / "checkpoints").glob("round-*")).unlink()
    fit(tiny_folder, tmp_path / "run", num_rounds=3, ckpt_path="last")
    rows = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(row)["attempt"] for row in rows if "declares" in row] == [0, 1]
    report = audit(tmp_path / "run")
    assert report.findings == ()
    again = next(it for it in report.flows if (it.round_idx, it.kind) == (1, "server_broadcast"))
    assert again.payloads == 2


def test_answers_that_never_arrive_are_lost_on_the_way_and_no_fault(
    tmp_path: Path, tiny_folder: Path
) -> None:
    link = federate(tmp_path, tiny_folder, lost=("beta",))
    report = audit(tmp_path)
    assert report.findings == ()
    updates = [data for party, way, data in link.seen if (party, way) == ("beta", "up")]
    assert len(updates) == ROUNDS
    assert report.notes == tuple(
        f"round {idx}, client update: lost on the way from beta to the server: "
        f"{hashlib.sha256(data).hexdigest():.12} ({len(data)} bytes)"
        for idx, data in enumerate(updates)
    )
    assert report.agreed == len(link.seen) - ROUNDS


def test_a_broadcast_to_a_client_that_died_is_lost_on_the_way(root: Path) -> None:
    rewrite(ledger(root, "alpha"), lambda rows: rows.__delitem__(slice(-2, None)))
    rewrite(ledger(root), lambda rows: rows.remove(find(rows, round=1, client=0, direction="up")))
    shutil.rmtree(root / "server" / "run" / "csv")  # the round did not end
    report = audit(root)
    assert report.findings == ()
    assert [note[:60] for note in report.notes] == [
        "round 1, server broadcast: lost on the way from the server to alpha"[:60]
    ]


def test_an_answer_that_came_after_its_round_was_measured_is_told_of(root: Path) -> None:
    table = root / "server" / "run" / "csv" / "metrics.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    place = lines[0].index("comm/up_bytes")
    up_bytes = float(lines[1][place])
    lines[1][place] = str(up_bytes * 2 / 3)  # as if one of three answers had been late
    table.write_text("".join(",".join(line) + "\n" for line in lines))
    report = audit(root)
    assert report.findings == ()
    (note,) = report.notes
    assert note.endswith(f"round 0: {up_bytes / 3:.0f} bytes came up after the round was measured")


def test_a_model_that_is_handed_out_again_is_told_of(root: Path) -> None:
    for party in ("server", "alpha"):
        rewrite(
            ledger(root, party),
            lambda rows: rows.insert(2, find(rows, kind="auxiliary_handout", client=0)),
        )
    shutil.rmtree(root / "server" / "run" / "csv")
    report = audit(root)
    assert report.findings == ()
    assert [note.split(": ")[1] for note in report.notes] == [
        "client 0 was handed the auxiliary model 2 times"
    ] * 2


# --- something is wrong with one ledger ---------------------------------------------------------


def update(rows: list[Row]) -> Row:
    return find(rows, kind="client_update", client=1)


def an_extra_tensor(rows: list[Row]) -> None:
    update(rows)["tensors"].append({"name": "rows", "shape": [9], "dtype": "int64"})


def an_image(rows: list[Row]) -> None:
    update(rows)["kind"] = "image"


def another_shape(rows: list[Row]) -> None:
    update(rows)["tensors"][0]["shape"] = [4, 2, 4, 5, 8]


def another_dtype(rows: list[Row]) -> None:
    update(rows)["tensors"][0]["dtype"] = "float64"


def no_tensor(rows: list[Row]) -> None:
    update(rows)["tensors"] = []


def too_many_bytes(rows: list[Row]) -> None:
    update(rows)["bytes"] += 1024


def too_few_bytes(rows: list[Row]) -> None:
    update(rows)["bytes"] = 4096


def the_wrong_way(rows: list[Row]) -> None:
    find(rows, kind="auxiliary_handout", client=1)["direction"] = "up"


def no_hash(rows: list[Row]) -> None:
    update(rows)["sha256"] = "none"


def another_model(rows: list[Row]) -> None:
    find(rows, kind="auxiliary_handout", client=1)["sha256"] = "0" * 64


def another_broadcast(rows: list[Row]) -> None:
    find(rows, kind="server_broadcast", client=1)["sha256"] = "0" * 64


def a_second_answer(rows: list[Row]) -> None:
    rows.append(update(rows))


def no_broadcast(rows: list[Row]) -> None:
    rows.remove(find(rows, kind="server_broadcast", client=1, round=0))


def no_handout(rows: list[Row]) -> None:
    rows.remove(find(rows, kind="auxiliary_handout", client=1))


def no_answer(rows: list[Row]) -> None:
    rows.remove(update(rows))


def a_later_attempt(rows: list[Row]) -> None:
    rows[-1]["attempt"] = 2


def an_earlier_round(rows: list[Row]) -> None:
    rows.append({**find(rows, kind="server_broadcast", round=0)})


def no_declaration(rows: list[Row]) -> None:
    del rows[0]


def another_declaration(rows: list[Row]) -> None:
    more = json.loads(json.dumps(rows[0]))
    more["declares"]["client_update"][0]["shape"][0] = 5
    rows.append(more)


IN_ROUND_0 = "client update of client 1 in round 0"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (an_extra_tensor, f"{IN_ROUND_0} holds what is not declared: rows [9] int64"),
        (an_image, "the image of client 1 in round 0 is of a kind that is not declared"),
        (another_shape, "holds what is not declared: soft_prompt [4, 2, 4, 5, 8] float32"),
        (another_dtype, "holds what is not declared: soft_prompt [4, 2, 4, 4, 8] float64"),
        (no_tensor, f"{IN_ROUND_0} lacks what is declared: {PROMPT}"),
        # 4 * 2 * 4 * 4 * 8 numbers of 4 bytes are 4096, around a single tensor 1 KiB is allowed
        (too_many_bytes, "bytes, where its tensors are 4096 and at most 1024 may be around them"),
        (too_few_bytes, "has 4096 bytes, where its tensors are 4096 and at most 1024 may be"),
        (the_wrong_way, "auxiliary handout of client 1 in round 0 went up, its direction is down"),
        (no_hash, f"{IN_ROUND_0} has no SHA-256 but 'none'"),
        (another_model, "is another auxiliary model than that handed out before"),
        (another_broadcast, "of client 1 in round 0 is another one than that of the round to othe"),
        (a_second_answer, f"{IN_ROUND_0} answers no broadcast, or one that was answered before"),
        (no_broadcast, f"{IN_ROUND_0} answers no broadcast, or one that was answered before"),
        (no_handout, "went to a client without an auxiliary model: a line is gone"),
        (no_answer, "round 0: comm/up_bytes of the run's metrics is another number, the ledger ha"),
        (a_later_attempt, "attempt 2 is out of turn: lines are gone"),
        (an_earlier_round, "server broadcast of client 0 in round 0 comes after round 1 has begun"),
        (no_declaration, "it declares nothing, so that nothing may travel: the line is gone, or"),
        (another_declaration, "it declares something else than before"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_must_not_be_in_a_ledger_is_found(root: Path, edit: Edit, words: str) -> None:
    run = ledger(root).parent
    assert audit(run).passed
    rewrite(ledger(root), edit)
    report = audit(run)
    assert not report.passed
    assert any(words in finding for finding in report.findings), report.findings
    assert all(finding.startswith(str(run)) for finding in report.findings)


def test_a_finding_names_the_line(root: Path) -> None:
    rewrite(ledger(root), an_extra_tensor)
    lines = ledger(root).read_text().splitlines()
    number = next(idx for idx, line in enumerate(lines, start=1) if '"rows"' in line)
    (finding,) = audit(ledger(root).parent).findings
    assert finding.startswith(f"{ledger(root)}, line {number}: the client update of client 1 in ")


@pytest.mark.parametrize("length", [1, 500])
def test_a_ledger_that_was_cut_off_is_found(root: Path, length: int) -> None:
    data = ledger(root).read_bytes()
    ledger(root).write_bytes(data[:-length])
    findings = audit(ledger(root).parent).findings
    last = data[:-length].count(b"\n") + 1
    assert [it for it in findings if f"line {last}: it is cut off. Its writer was killed" in it]


def test_a_line_that_is_none_is_found_and_the_others_are_read(root: Path) -> None:
    ledger(root).write_bytes(ledger(root).read_bytes() + b"nothing\n[]\n")
    report = audit(ledger(root).parent)
    assert ["expected JSON" in it for it in report.findings] == [True, False]
    assert "expected the fields" in report.findings[1]
    assert sum(flow.payloads for flow in report.flows) == len(NAMES) * (1 + 2 * ROUNDS)


def test_a_clients_ledger_that_names_another_client_is_found(root: Path) -> None:
    rewrite(ledger(root, "alpha"), lambda rows: rows[-1].update(client=1))
    finding = audit(ledger(root, "alpha").parent).findings[0]
    assert finding.endswith("of client 1 in round 1 is not of client 0, whose ledger this is")


# --- the two sides do not agree -----------------------------------------------------------------


def test_a_hash_that_differs_is_found_whoever_changed_it(root: Path) -> None:
    before = find(
        [json.loads(x) for x in ledger(root).read_text().splitlines()[1:]], direction="up"
    )
    rewrite(ledger(root, "alpha"), lambda rows: find(rows, direction="up").update(sha256="a" * 64))
    size = before["bytes"]
    assert audit(root).findings == (
        "round 0, client update: the server's ledger and that of alpha differ: "
        f"{before['sha256']:.12} ({size} bytes) and {'a' * 12} ({size} bytes)",
    )


def test_an_answer_that_the_client_never_sent_is_found(root: Path) -> None:
    rewrite(ledger(root, "beta"), no_answer)
    (finding,) = audit(root).findings
    assert finding.startswith("round 0, client update: the server got ")
    assert finding.endswith(", which beta never sent")


def test_a_message_that_the_server_did_not_write_down_is_found(root: Path) -> None:
    rewrite(ledger(root), no_broadcast)
    findings = audit(root).findings
    assert [
        it for it in findings if "server broadcast: beta got " in it and "the server never" in it
    ]


def test_a_size_that_differs_is_found(root: Path) -> None:
    rewrite(ledger(root, "beta"), lambda rows: update(rows).update(bytes=update(rows)["bytes"] + 1))
    (finding,) = audit(root).findings
    assert finding.startswith("round 0, client update: the server's ledger and that of beta differ")


def test_sides_that_declare_other_tensors_are_found(root: Path) -> None:
    def first(rows: list[Row]) -> None:
        next(row for row in rows if "declares" in row)["declares"]["client_update"] = []

    rewrite(ledger(root, "gamma"), first)
    assert "gamma and the server do not declare the same tensors" in audit(root).findings


def test_an_emptied_ledger_is_not_taken_for_that_of_an_absent_client(root: Path) -> None:
    ledger(root, "gamma").write_bytes(b"")
    assert audit(root).findings == (
        f"client 2 answered the server and no ledger here says so; empty: {ledger(root, 'gamma')}",
    )


# --- folders that are none ----------------------------------------------------------------------


def test_folders_that_do_not_fit_are_refused(root: Path, tmp_path: Path) -> None:
    server, alpha = ledger(root).parent, ledger(root, "alpha").parent
    for path, state in ((tmp_path / "none", "is no folder"), (root / "clients", "holds none")):
        with pytest.raises(ValueError, match=rf"^`RUN_DIR` must be .*got {path}, which {state}\.$"):
            audit(path)
        with pytest.raises(
            ValueError, match=rf"^`--clients` must be .*got {path}, which {state}\.$"
        ):
            audit(server, [path])
    with pytest.raises(
        ValueError, match=r"clients are given, got .*whose ledger is that of client 0"
    ):
        audit(alpha, [alpha])
    with pytest.raises(ValueError, match=r"got .*, whose ledger is not that of one client\.$"):
        audit(server, [server])
    with pytest.raises(ValueError, match=r"must be different clients, got .* both of client 0\.$"):
        audit(server, [alpha, alpha])
