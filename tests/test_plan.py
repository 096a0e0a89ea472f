"""The plan of a run, against the run itself: bytes, disk, steps, and the measured peak memory."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import peak_memory
from commands import changed, command, make_config, of_class, write_config
from fedsp.acceptance import Acceptance
from fedsp.batching import Batching
from fedsp.client import ClientModule
from fedsp.federation import Communication
from fedsp.ledger import read_ledger
from fedsp.opening import check_trainer, launch, load, set_up_data
from fedsp.plan import Plan, make_plan
from fedsp.plan_table import disk_rows, memory_rows, time_rows
from fedsp.rehearsal import Cost, rehearse_evaluation
from fedsp.sampling import UniformSampler
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.stages import Stage
from tiny import fit, make_client, make_data, make_server, make_trainer

# GPT-2 of tiny.py: embeddings, 4 layers of 12 E^2 + 13 E, a final norm; the auxiliary has one layer
LAYER = 12 * 32**2 + 13 * 32
EMBEDDINGS = (257 + 64) * 32
PROMPT = 4 * 2 * 32 * 4


def plan_of(folder: Path, parts: tuple[Any, ClientModule, Any], **options: Any) -> Plan:
    server, client, data = parts
    trainer = make_trainer(folder / "planned", **options)
    trainer.server, trainer.data = server, data
    launch(trainer.fabric)
    load(trainer.fabric, server)
    set_up_data(trainer.fabric, server, data, "fit")
    check_trainer(trainer, client)
    return make_plan(trainer, client)


def tiny_parts(folder: Path) -> tuple[Any, ClientModule, Any]:
    return make_server(folder), make_client(), make_data(folder)


OPTIONS: dict[str, Any] = {
    "num_rounds": 4,
    "sampler": UniformSampler(2),
    "communication": Communication(wire_dtype="float16"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return plan_of(folder, tiny_parts(folder), **OPTIONS)


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return fit(folder, folder / "run", **OPTIONS)


def test_parameters_are_those_counted_by_hand(plan: Plan) -> None:
    assert plan.parameters == {
        "global": EMBEDDINGS + 4 * LAYER + 2 * 32,
        "auxiliary": EMBEDDINGS + LAYER + 2 * 32,
        "prompt": PROMPT,
        "trained_on_server": PROMPT,
        "trained_on_client": LAYER + 2 * 32 + PROMPT,
    }


def test_bytes_are_those_of_the_ledger(plan: Plan, run: Any) -> None:
    rows = read_ledger(run.folder.ledger)
    prompts = [row for row in rows if row["kind"] != "auxiliary_handout"]
    for round_idx in range(4):
        sent = [row for row in prompts if row["round"] == round_idx]
        for way in ("up", "down"):
            assert plan.traffic[way] == sum(r["bytes"] for r in sent if r["direction"] == way)
    totals = [run.ledger.totals(round_idx) for round_idx in range(4)]
    assert plan.traffic["first_round_down"] == totals[0]["down_bytes"]
    assert plan.traffic["total_up"] == sum(total["up_bytes"] for total in totals)
    assert plan.traffic["total_down"] == sum(total["down_bytes"] for total in totals)
    assert {r["bytes"] for r in rows if r not in prompts} == {plan.traffic["handout"]}


def test_client_states_take_the_disk_that_was_planned(plan: Plan, run: Any) -> None:
    on_disk = run.federation.executor.simulation.store.disk_bytes()
    assert plan.client_states["end"] == pytest.approx(on_disk, rel=0.02)
    assert plan.client_states["peak"] >= plan.client_states["end"]


def test_steps_are_those_of_the_run(plan: Plan) -> None:
    # 4 rounds of 2 clients, with 1 and 2 steps; the server has 2, the distillation 4
    assert plan.steps == {
        "distillation": 4,
        "client_auxiliary": 8,
        "client_soft_prompt": 16,
        "server": 8,
    }


def test_weights_and_moments_are_those_counted_by_hand(plan: Plan) -> None:
    assert plan.server_memory["weights"] == 4 * plan.parameters["global"]
    # AdamW: the numbers and two moments, and a step count
    trained = 3 * 4 * PROMPT
    assert plan.server_memory["trained_and_optimizer"] == pytest.approx(trained, rel=0.01)
    assert plan.client_memory["weights"] == 4 * EMBEDDINGS
    trained = 3 * 4 * plan.parameters["trained_on_client"]
    assert plan.client_memory["trained_and_optimizer"] == pytest.approx(trained, rel=0.01)
    for memory in (plan.server_memory, plan.client_memory):
        assert memory["logits"] > 0
        assert memory["activations_and_gradients"] > 0


def test_a_longer_prompt_takes_more(folder: Path, plan: Plan) -> None:
    prompt = SoftPromptSpec(num_virtual_tokens=16)
    parts = (make_server(folder, soft_prompt=prompt), make_client(), make_data(folder))
    longer = plan_of(folder, parts, **OPTIONS)
    for sizes in ("server_memory", "client_memory"):
        name = "activations_and_gradients"
        assert getattr(longer, sizes)[name] > getattr(plan, sizes)[name]
    assert longer.traffic["up"] > 3 * plan.traffic["up"]


def test_what_a_run_lacks_costs_nothing(folder: Path) -> None:
    prompt = SoftPromptSpec(num_virtual_tokens=4)
    options = {"initial_distillation": None, "training": Stage(steps=0), "soft_prompt": prompt}
    server = make_server(folder, **options)
    client = make_client(auxiliary=Stage(steps=0), soft_prompt=Stage(steps=0))
    data = make_data(folder, server=None, public=None, selection=None, test=None)
    plan = plan_of(folder, (server, client, data), num_rounds=1)
    assert set(plan.seconds.values()) == {0.0}
    assert set(plan.steps.values()) == {0}
    assert plan.client_states == {"each": 0, "peak": 0, "end": 0}
    assert disk_rows(plan) == [("clients", "nothing is kept between rounds")]


def test_a_line_search_is_measured_as_often_as_planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def a_second_a_batch(trainer: Any, split: str) -> tuple[Cost, int] | None:
        found = rehearse_evaluation(trainer, split)
        return found and (replace(found[0], seconds=1.0), found[1])

    measured: list[int] = []
    step = ServerModule.validation_step

    def counted(server: ServerModule, *args: Any) -> Any:
        measured.append(1)
        return step(server, *args)

    monkeypatch.setattr("fedsp.plan.rehearse_evaluation", a_second_a_batch)
    seconds, counts = [], []
    for idx, acceptance in enumerate((None, Acceptance(num_batches=1, server_training=True))):
        parts = tiny_parts(folder)
        parts[2].batching = Batching(batch_size=4, eval_batch_size=4)
        options = {"acceptance": acceptance, "num_rounds": 2}
        seconds.append(plan_of(folder, parts, **options).seconds["evaluation"])
        with monkeypatch.context() as patch:
            patch.setattr(ServerModule, "validation_step", counted)
            measured.clear()
            fit(folder, folder / f"searched-{idx}", data=parts[2], **options)
            counts.append(len(measured))
    assert seconds[1] - seconds[0] == counts[1] - counts[0] == 2 * 2 * 4


def test_the_peak_memory_is_that_of_a_run(tmp_path: Path) -> None:
    peak_memory.make_parts(tmp_path)
    script = [sys.executable, peak_memory.__file__, str(tmp_path)]
    # glibc would keep freed tensors, and the peak would be what it keeps: see docs/plan.md
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    # two plays at once: the run in a process of its own, the plan in this one
    with subprocess.Popen(script, stdout=subprocess.PIPE, env=environment) as process:
        plan = plan_of(
            tmp_path, peak_memory.make_parts(tmp_path), num_rounds=peak_memory.NUM_ROUNDS
        )
        output, _ = process.communicate()
    assert process.returncode == 0
    measured = json.loads(output.splitlines()[-1])
    peak, planned = max(measured["peaks"].values()), plan.peak_memory
    assert peak > 200e6  # else what is measured is no model but the libraries
    assert planned == pytest.approx(peak, rel=0.2), (plan.process_memory, measured)
    assert plan.client_states["end"] == pytest.approx(measured["states"], rel=0.02)


def test_the_command_prints_a_table_and_writes_nothing(tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.yaml", make_config(tmp_path))
    outcome = command("plan", "--config", file)
    assert outcome.status == 0, outcome
    words = ("Parameters", "Memory", "Traffic", "Disk", "Steps", "Time", "simulated", "hand-out")
    assert all(word in outcome.out for word in words), outcome.out
    assert not (tmp_path / "run").exists()


def test_the_command_prints_json(tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.yaml", make_config(tmp_path))
    outcome = command("plan", "--config", file, "--as_json", "true")
    assert outcome.status == 0, outcome
    assert json.loads(outcome.out).keys() == asdict(_some_plan()).keys()


def test_the_command_says_what_noise_will_cost_and_where_the_budget_ends(tmp_path: Path) -> None:
    noise = {"noise_multiplier": 1.0, "delta": 0.01}
    clipping = of_class("fedsp.clipping.FixedClipping", norm=0.1)
    changes = {
        "trainer.aggregator": None,
        "trainer.num_rounds": 6,
        "trainer.callbacks": None,
        "trainer.sampler": None,
        "trainer.privacy": of_class("fedsp.privacy.CentralPrivacy", clipping=clipping, **noise),
        "client.init_args.privacy": of_class("fedsp.privacy.LocalPrivacy", clip_norm=0.1, **noise),
    }
    file = write_config(tmp_path / "config.yaml", changed(make_config(tmp_path), changes))
    outcome = command("plan", "--config", file, "--as_json", "true")
    assert outcome.status == 0, outcome
    unlimited = json.loads(outcome.out)
    assert unlimited["rounds"] == unlimited["privacy"]["central"]["releases"] == 6
    budget = f"--trainer.privacy.max_epsilon={unlimited['privacy']['central']['epsilon'] - 1e-6}"
    outcome = command("plan", "--config", file, budget)
    assert outcome.status == 0, outcome
    words = " ".join(outcome.out.split())
    assert "of a client, server's noise, 5 releases" in words
    assert "of a client, its own noise, 5 releases" in words
    assert "rounds 5 of 6: `trainer.privacy.max_epsilon` pays for no more" in words
    assert "for 5 rounds on cpu" in words


def test_settings_are_checked_as_before_a_run(tmp_path: Path) -> None:
    changes = {"trainer.aggregator": of_class("fedsp.aggregation.MultiKrum")}
    config = changed(make_config(tmp_path), changes)
    outcome = command("plan", "--config", write_config(tmp_path / "config.yaml", config))
    assert outcome.status == 1
    assert outcome.err.startswith("fedsp: error: `trainer.aggregator`")


def test_rows_name_the_busiest_moment_and_the_sum() -> None:
    plan = _some_plan()
    rows = dict(memory_rows(plan)[:3])
    assert rows["server"].startswith("1.11 kB: 1.00 kB weights, 100 B trained")
    assert rows["simulated"].startswith("3.30 kB in a process that plays all, in 'b', with 10.0 %")
    trainer = make_trainer(Path("unused"), num_rounds=2)
    assert time_rows(plan, trainer)[-1] == ("in all", "about 1 m 30 s for 2 rounds on cpu")


def _some_plan() -> Plan:
    memory = {
        "weights": 1000,
        "trained_and_optimizer": 100,
        "activations_and_gradients": 10,
        "logits": 1,
    }
    return Plan(
        rounds=2,
        privacy={},
        parameters={},
        server_memory=memory,
        client_memory=memory,
        process_memory={"a": 2000, "b": 3000},
        peak_memory=3300,
        traffic={},
        client_states={},
        steps={},
        seconds={"clients": 60.0, "server": 30.0},
    )
