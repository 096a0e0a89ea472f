"""`fedsp report` and `fedsp compare` as typed: what they write, print and refuse."""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch

import runs
from commands import Outcome, changed, make_config, write_config
from fedsp.ledger import Ledger
from fedsp.messages import ClientUpdate, Contract, ServerBroadcast, encode, encode_handout
from fedsp.report_commands import main

METHOD = "fedsp"


def command(*args: object) -> Outcome:
    """Run a command in this process and catch how it ends."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main([str(arg) for arg in args])
    return Outcome(int(end.value.code or 0), out.getvalue(), err.getvalue())


# --- report -------------------------------------------------------------------------------------


def test_a_report_lies_in_the_first_folder_unless_told_otherwise(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run")
    outcome = command("report", folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == f"report: {folder / 'report.html'}\n"
    assert command("report", folder, "--output", tmp_path / "page.html").status == 0
    assert (tmp_path / "page.html").read_text() == (folder / "report.html").read_text()


def test_an_unfinished_run_is_shown_with_a_warning(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", finished=False)
    outcome = command("report", folder)
    assert outcome.status == 0
    assert outcome.err == (
        f"fedsp: warning: {folder}: The run is not finished: there is no results.json, so nothing "
        "is tested.\n"
    )


def test_a_foreign_folder_is_one_error_and_nothing_is_written(tmp_path: Path) -> None:
    outcome = command("report", runs.write_run(tmp_path / "run"), tmp_path / "none")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("fedsp: error: `RUN_DIR` must be the folder of a run")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_page_wants_a_folder_that_exists(tmp_path: Path) -> None:
    output = tmp_path / "no" / "page.html"
    outcome = command("report", runs.write_run(tmp_path / "run"), "--output", output)
    assert outcome.status == 1
    assert outcome.err == (
        f"fedsp: error: `--output` must lie in a folder that exists, got {output}.\n"
    )


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("figures", "charts", "html_report"):
        monkeypatch.delitem(sys.modules, f"fedsp.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    outcome = command("report", runs.write_run(tmp_path / "run"))
    assert outcome.status == 1
    assert outcome.err == (
        'fedsp: error: Reports and charts need plotly: pip install "fedsp[report]".\n'
    )


# --- compare ------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny federation, with a model of eight layers for methods that keep four."""
    config = make_config(tmp_path)
    config = changed(config, {"model.init_args.backbone.config.n_layer": 8})
    return write_config(tmp_path / "base.yaml", config)


def test_a_comparison_runs_goes_on_and_reports_a_failed_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seed 1 finds a foreign folder in its place; when that is gone, only it is run."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    folder = tmp_path / "cmp"
    blocked = folder / METHOD / "seed-1"
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("mine")
    words = ["compare", "--config", base, "--methods", METHOD, "--seeds", "0", "1"]
    words += ["--run_dir", folder, "--trainer.num_rounds", "1"]
    outcome = command(*words)
    assert outcome.status == 1
    assert f"fedsp: error: {METHOD}, seed 1: exit status 1, {blocked}" in outcome.err
    first = json.loads((folder / "comparison.json").read_text())
    assert [row["seed"] for row in first["runs"]] == [0]
    (blocked / "notes.txt").unlink()
    outcome = command(*words)
    assert (outcome.status, outcome.err) == (0, "")
    assert "seed 0 (1 of 2): finished already" in outcome.out
    with (folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["rounds"]) for row in rows] == [
        (METHOD, "0", "1"),
        (METHOD, "1", "1"),
    ]
    for row in rows:
        results = json.loads((folder / METHOD / f"seed-{row['seed']}/results.json").read_text())
        assert float(row["test_loss"]) == results["test"]["best"]["loss"]
    assert rows[0]["test_loss"] != rows[1]["test_loss"]
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--methods", "no-such"), 1, "`--methods` must be files or of"),
        (("--method", METHOD), 2, "here it is `--methods NAME ...`"),
        ((), 2, "the following arguments are required: --methods"),
        (("--methods", METHOD, "--seeds", "one"), 2, "argument --seeds: invalid int value: 'one'"),
        (("--methods", METHOD, "--task", "no-such"), 1, "`--task` must be one of"),
    ],
)
def test_bad_words_are_one_error(
    base: Path, tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    outcome = command("compare", "--config", base, "--run_dir", tmp_path / "cmp", *words)
    assert outcome.status == status
    assert message in outcome.err
    assert not (tmp_path / "cmp").exists()


# --- audit --------------------------------------------------------------------------------------

CONTRACT = Contract({"soft_prompt": (4, 2, 2, 3, 8)}, "float32", None)
AUXILIARY = {f"layer.{idx}": torch.zeros(idx + 1) for idx in range(3)}


def write_ledgers(root: Path, parties: tuple[str, ...] = ("alpha", "beta")) -> Path:
    """Write both sides' ledgers of two rounds, in the folders of a federation."""
    server = Ledger(root / "server" / "run" / "ledger.jsonl")
    server.declare(CONTRACT, AUXILIARY)
    own = [Ledger(root / "clients" / party / "run" / "ledger.jsonl") for party in parties]
    for client_id, ledger in enumerate(own):
        ledger.declare(CONTRACT, AUXILIARY, client_id)
    for round_idx in range(2):
        prompt = {"soft_prompt": torch.full((4, 2, 2, 3, 8), float(round_idx))}
        broadcast = encode(ServerBroadcast(round_idx, prompt), "float32")
        for client_id in range(len(parties)):
            update = encode(ClientUpdate(round_idx, client_id, prompt, 5), "float32")
            for ledger in (server, own[client_id]):
                if not round_idx:
                    ledger.record(0, client_id, "down", encode_handout(AUXILIARY))
                ledger.record(round_idx, client_id, "down", broadcast)
                ledger.record(round_idx, client_id, "up", update)
    return root


def test_an_audit_shows_what_travelled_and_that_both_sides_agree(tmp_path: Path) -> None:
    outcome = command("audit", write_ledgers(tmp_path))
    assert (outcome.status, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[:4] == [
        "may travel",
        "auxiliary handout: 3 tensors",
        "server broadcast: soft_prompt [4, 2, 2, 3, 8] float32",
        "client update: soft_prompt [4, 2, 2, 3, 8] float32",
    ]
    handout = f"{len(encode_handout(AUXILIARY))} B"
    prompt = {"soft_prompt": torch.zeros(4, 2, 2, 3, 8)}
    updates = f"{2 * len(encode(ClientUpdate(0, 0, prompt, 5), 'float32')) / 1000:.2f} kB"
    for party in ("alpha", "beta"):
        assert f"{party} 0 down auxiliary handout 3 tensors 1 {handout}" in lines
        tensor = "soft_prompt [4, 2, 2, 3, 8] float32"
        assert f"{party} 0-1 up client update {tensor} 2 {updates}" in lines
    assert lines[-1] == "audit: 10 payloads, 10 in both sides' ledgers; all as declared"


def test_every_finding_is_a_line_and_the_status_is_1(tmp_path: Path) -> None:
    write_ledgers(tmp_path)
    path = tmp_path / "server" / "run" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"bytes", b"bites", 1)[:-1])
    outcome = command("audit", tmp_path / "server" / "run")
    assert outcome.status == 1
    first, *_, last = outcome.err.splitlines()
    assert first.startswith(f"fedsp: error: {path}, line 2: the ledger is damaged, expected the fi")
    assert last.startswith("fedsp: error: ")
    count = len(outcome.err.splitlines())
    assert outcome.out.splitlines()[-1] == f"audit: 8 payloads; {count} findings"


def test_an_audit_for_programs_is_json(tmp_path: Path) -> None:
    write_ledgers(tmp_path)
    (tmp_path / "clients" / "beta" / "run" / "ledger.jsonl").unlink()
    outcome = command("audit", tmp_path, "--format", "json")
    made = json.loads(outcome.out)
    assert (outcome.status, made["passed"], made["agreed"], made["findings"]) == (0, True, 5, [])
    assert made["notes"] == ["client 1: its ledger is not here to compare"]
    assert made["flows"][0] == {
        "party": "alpha",
        "round_idx": 0,
        "direction": "down",
        "kind": "auxiliary_handout",
        "tensors": [f"layer.{idx} [{idx + 1}] float32" for idx in range(3)],
        "payloads": 1,
        "num_bytes": len(encode_handout(AUXILIARY)),
    }


def test_an_audit_of_a_foreign_folder_is_one_error(tmp_path: Path) -> None:
    outcome = command("audit", tmp_path)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == (
        "fedsp: error: `RUN_DIR` must be the folder of a run, with ledger.jsonl in it, or that of "
        f"a federation, with server/run/ledger.jsonl, got {tmp_path}, which holds none.\n"
    )
    server = write_ledgers(tmp_path) / "server" / "run"
    outcome = command("audit", server, "--clients", tmp_path / "none")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == (
        "fedsp: error: `--clients` must be the folder of a run, with ledger.jsonl in it, got "
        f"{tmp_path / 'none'}, which is no folder.\n"
    )
    outcome = command("audit")
    assert outcome.status == 2
    assert outcome.err.startswith("fedsp: error: the following arguments are required: RUN_DIR\n")
