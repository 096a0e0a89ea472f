"""Several processes of one run: the same numbers as one process, the same files, no hanging."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import changed, make_config, write_config
from fedsp.acceptance import Acceptance
from fedsp.aggregation import CoordinateMedian
from fedsp.baseline import ServerOnlyBaseline
from fedsp.batching import Batching
from fedsp.callbacks import FederatedCallback
from fedsp.client import ClientModule
from fedsp.client_state import ClientStateStore
from fedsp.distillation import Distillation
from fedsp.history import Evaluation
from fedsp.ledger import Ledger, read_ledger
from fedsp.parallel import divide
from fedsp.partition import BySizes
from fedsp.prompt_pool import PromptPool
from fedsp.recipes import WholeModel
from fedsp.sampling import UniformSampler
from fedsp.stages import Stage
from fedsp.tuned import LoRA
from processes import assert_close, federation, free_port, run_ranks, state
from tiny import adamw, make_client, make_data, make_server

ROOT = Path(__file__).parents[1]


def plain(folder: Path, run_dir: Path, devices: int, **options: Any) -> dict[str, Any]:
    """Clients of unequal sizes that keep a model of their own, two of three a round."""
    return federation(
        folder,
        run_dir,
        devices,
        data=make_data(folder, partitioner=BySizes([6, 20, 30])),
        client=make_client(reparameterization_size=3),
        sampler=UniformSampler(clients_per_round=2),
        acceptance=Acceptance([0.5, 1.0]),
        client_memory_bytes=10**7,
        **options,
    )


class Diverging(ClientModule):
    """Client 1's losses are NaN in round 1."""

    def update(self, client_id: int, num_examples: int) -> Any:
        update = super().update(client_id, num_examples)
        if (client_id, update.round_idx) == (1, 1):
            update.payload["soft_prompt"].fill_(float("nan"))
        return update


def crowded(folder: Path, run_dir: Path, devices: int) -> dict[str, Any]:
    """More ranks than clients a round or rows of a batch; a robust rule, and a rejected update."""
    return federation(
        folder,
        run_dir,
        devices,
        callbacks=None,
        num_rounds=2,
        data=make_data(folder, partitioner=BySizes([6, 50]), batching=Batching(2, 5)),
        client=Diverging(Stage(1, adamw(1e-3)), Stage(2, adamw(1e-2))),
        server=make_server(folder, initial_distillation=lesson(max_logit_tokens=3)),
        aggregator=CoordinateMedian(),
        evaluation=Evaluation(generate_tokens=3),
    )


def lesson(**options: Any) -> Distillation:
    return Distillation(
        Stage(3, adamw(1e-3), accumulate_grad_batches=2),
        logit_weight=0.5,
        lm_weight=0.5,
        gradient_weight=0.5,
        prompts=PromptPool(share=0.7, rounds=1, texts=1, noise=0.1),
        cache_dir="",
        **options,
    )


def lora(folder: Path, run_dir: Path, devices: int) -> dict[str, Any]:
    """Another payload than the prompt."""
    return federation(
        folder,
        run_dir,
        devices,
        callbacks=None,
        num_rounds=1,
        server=make_server(
            folder, auxiliary=WholeModel(), initial_distillation=None, tuned_weights=LoRA(rank=2)
        ),
        client=make_client(auxiliary=Stage(0)),
    )


def files(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())


def traffic(run_dir: Path) -> list[tuple[Any, ...]]:
    names = ("attempt", "round", "client", "direction", "kind", "bytes")
    return sorted(
        tuple(row[name] for name in names) for row in read_ledger(run_dir / "ledger.jsonl")
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder with the run `alone`, and what it came to."""
    folder = tmp_path_factory.mktemp("parallel")
    return folder, plain(folder, folder / "alone", 1)


# --- the same numbers and files -------------------------------------------------------------------


def test_two_ranks_reach_what_one_process_reaches(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = alone
    first, second = run_ranks(plain, tmp_path, folder, folder / "both", 2)
    assert first == second
    assert_close(first, expected)
    assert_close(state(folder / "both", 3), state(folder / "alone", 3))
    assert files(folder / "both") == files(folder / "alone")
    assert traffic(folder / "both") == traffic(folder / "alone")


class Stop(FederatedCallback):
    """Ctrl-C before the last round, on every rank."""

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Any) -> None:
        if round_idx == 2:
            raise KeyboardInterrupt


def stopped(folder: Path, run_dir: Path, devices: int) -> None:
    plain(folder, run_dir, devices, callbacks=[ServerOnlyBaseline(), Stop()])


def resumed(folder: Path, run_dir: Path, devices: int) -> dict[str, Any]:
    return plain(folder, run_dir, devices, ckpt_path="last")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    alone: tuple[Path, dict[str, Any]], tmp_path: Path, before: int, after: int
) -> None:
    folder, expected = alone
    run_dir = folder / f"resumed-{before}-{after}"
    if before == 2:
        run_ranks(stopped, tmp_path, folder, run_dir, 2, fails=True)
        result = resumed(folder, run_dir, 1)
    else:
        with pytest.raises(KeyboardInterrupt):
            stopped(folder, run_dir, 1)
        result, _ = run_ranks(resumed, tmp_path, folder, run_dir, 2)
    assert_close(result, expected)
    assert_close(state(run_dir, 3)["tree"], state(folder / "alone", 3)["tree"])


def test_three_ranks_with_fewer_clients_and_rows(tmp_path: Path) -> None:
    expected = crowded(tmp_path, tmp_path / "alone", 1)
    results = run_ranks(crowded, tmp_path / "out", tmp_path, tmp_path / "three", 3, size=3)
    assert results[0] == results[1] == results[2]
    assert_close(results[0], expected)
    assert [metrics["round/rejected_updates"] for metrics in expected["rounds"]] == [0, 1]
    lines = (tmp_path / "three" / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert list(records[1]["rejected"]) == ["1"]


def test_other_payloads_are_shared_too(tmp_path: Path) -> None:
    expected = lora(tmp_path, tmp_path / "alone", 1)
    first, second = run_ranks(lora, tmp_path / "out", tmp_path, tmp_path / "both", 2)
    assert first == second
    assert_close(first, expected)


# --- failing together -----------------------------------------------------------------------------


class Failing(FederatedCallback):
    """Does something at the start of a client's work, on one rank."""

    def __init__(self, rank: int, act: str) -> None:
        self.rank, self.act = rank, act

    def on_client_start(self, trainer: Any, round_idx: int, client_id: int) -> None:
        if round_idx == 1 and trainer.fabric.global_rank == self.rank:
            if self.act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no such luck")


def failing(folder: Path, run_dir: Path, rank: int, act: str) -> dict[str, Any]:
    return federation(folder, run_dir, 2, callbacks=[Failing(rank, act)])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all_and_is_named(tmp_path: Path, rank: int) -> None:
    results = run_ranks(
        failing, tmp_path / "out", tmp_path, tmp_path / "run", rank, "raise", fails=True
    )
    assert results[rank]["error"] == "ValueError: no such luck"
    told = f"OtherRankFailedError: rank {rank} of 2 failed: ValueError: no such luck"
    assert results[1 - rank]["error"] == told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(tmp_path: Path, rank: int) -> None:
    results = run_ranks(
        failing, tmp_path / "out", tmp_path, tmp_path / "run", rank, "kill", fails=True
    )
    assert results[rank] == {}
    assert "OtherRankFailedError" in results[1 - rank]["error"]


# --- parts ----------------------------------------------------------------------------------------


def test_work_is_divided_longest_first() -> None:
    work = {5: 1.0, 3: 7.0, 9: 4.0, 1: 3.0, 2: 1.0}
    assert divide(work, 2) == [[5, 3], [9, 1, 2]]
    assert divide({4: 2.0}, 3) == [[4], [], []]
    assert divide({}, 2) == [[], []]


def test_a_store_takes_over_what_another_process_has_put(tmp_path: Path) -> None:
    mine = ClientStateStore(tmp_path, max_in_memory_bytes=10**6, keep=1)
    theirs = ClientStateStore(tmp_path, keep=1, deletes=False)
    mine.put(0, 0, {"x": 1})
    theirs.adopt({0: 0})
    theirs.put(0, 1, {"x": 2})
    mine.adopt({0: 1})
    assert mine.get(0) == {"x": 2}
    theirs.commit()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    mine.commit()
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["round-000001.safetensors"]


def test_a_ledger_without_a_file_adds_up(tmp_path: Path) -> None:
    ledger = Ledger(None)
    ledger.record_digest(0, 1, "up", {"kind": "client_update", "tensors": []}, 7, "")
    ledger.close()
    assert ledger.totals(0) == {"up_bytes": 7, "down_bytes": 0}


# --- as users start it ----------------------------------------------------------------------------


def start(folder: Path, *launcher: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run `fedsp fit` on the tiny federation with the shipped overlay for two processes."""
    config = write_config(folder / "mine.yaml", changed(make_config(folder), changes))
    overlay = ROOT / "configs" / "trainer" / "ddp.yaml"
    arguments = ["-m", "fedsp", "fit", "--config", str(config), "--config", str(overlay)]
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_torchrun_starts_a_run(tmp_path: Path) -> None:
    port = str(free_port())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    outcome = start(tmp_path, *launcher)
    assert outcome.returncode == 0, outcome.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["rounds"]) == 2
    assert (tmp_path / "run" / "csv" / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_the_command_starts_its_processes_itself(tmp_path: Path) -> None:
    outcome = start(tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_a_command_that_cannot_run_ends_all_its_processes(tmp_path: Path) -> None:
    paths = {"data.init_args.clients.init_args.paths": str(tmp_path / "nowhere.jsonl")}
    outcome = start(tmp_path, **paths)
    assert outcome.returncode != 0
    assert "fedsp: error: " in outcome.stderr
    assert not (tmp_path / "run").exists()
