"""The round loop end to end on a tiny federation: its numbers, files and messages."""

import json
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.auxiliary import KeptLayers
from fedsp.callbacks import FederatedCallback
from fedsp.client import ClientModule
from fedsp.federation import Communication
from fedsp.history import Evaluation
from fedsp.ledger import read_ledger
from fedsp.messages import ClientUpdate, MessageError, encode
from fedsp.sampling import UniformSampler
from fedsp.server import SoftPromptSpec
from fedsp.stages import Stage
from fedsp.state_files import load_state
from fedsp.trainer import FederatedTrainer
from interruptions import checkpointed, equal
from tiny import adamw, fit, make_client, make_data, make_server

# --- numbers ------------------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_place(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run")
    run = tmp_path / "run"
    assert trainer.history.rounds_done == 3
    for name in ("auxiliary.safetensors", "ledger.jsonl", "results.json", "csv/metrics.csv"):
        assert (run / name).stat().st_size > 0
    results = json.loads((run / "results.json").read_text())
    assert len(results["rounds"]) == 3
    assert results["test"].keys() == {"zero_shot", "best"}
    assert (run / "adapter" / "adapter_config.json").exists()


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path, tmp_path / name, seed=seed)
    assert equal(checkpointed(tmp_path / "a"), checkpointed(tmp_path / "b"))
    assert not equal(checkpointed(tmp_path / "a"), checkpointed(tmp_path / "c"))


def test_one_round_of_one_client_equals_training_by_hand(tmp_path: Path) -> None:
    """One client, prompt stage only, no server steps: the aggregate is that client's prompt."""
    client = make_client(
        auxiliary=Stage(steps=0),
        soft_prompt=Stage(steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)),
        dropout=0.0,
    )
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        client=client,
        server=make_server(tmp_path, training=Stage(steps=0), initial_distillation=None),
        num_rounds=1,
        sampler=UniformSampler(clients_per_round=1),
    )
    chosen = trainer.sampler.cohort(3, seed=0, round_idx=0)[0]
    auxiliary = client.require_model()[0].backbone
    values = torch.nn.Parameter(_initial_prefix(tmp_path))
    for batch in make_ready(tmp_path).client_dataloader(chosen, start_step=0, num_steps=3):
        logits, targets, _ = auxiliary.label_logits(batch, values)
        (gradient,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, targets), values
        )
        norm = gradient.norm()
        with torch.no_grad():
            values -= 0.5 * gradient * min(1.0, 1.0 / (norm + 1e-6))
    assert torch.allclose(trainer.federation.broadcast["soft_prompt"], values, atol=1e-6)


def make_ready(folder: Path) -> Any:
    data = make_data(folder)
    data.limit_tokens(60)
    data.setup("fit")
    return data


def _initial_prefix(folder: Path) -> Tensor:
    server = make_server(folder)
    server.configure_model()
    server.initialize_prompt(make_ready(folder).sample_ids(4))
    return server.require_model()[1].prefix()


def test_the_frozen_global_model_keeps_every_bit(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    server.configure_model()
    backbone = server.require_model()[0]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    fit(tmp_path, tmp_path / "run", server=server)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(
        not parameter.requires_grad and parameter.grad is None
        for parameter in backbone.parameters()
    )


def test_clients_do_not_see_each_others_auxiliary_models(tmp_path: Path) -> None:
    """The first client's update is the same whoever works after it in the cohort."""

    class First(FederatedCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_client_end(self, trainer: Any, round_idx: int, client_id: int, stages: Any) -> None:
            if client_id == 2:
                self.losses.append(stages["auxiliary"].loss)

    losses = []
    for name, size in (("all", None), ("one", 1)):
        first = First()

        class Last(UniformSampler):
            def cohort(self, num_clients: int, *, seed: int, round_idx: int) -> list[int]:
                return [0, 1, 2] if self.clients_per_round is None else [2]

        fit(tmp_path, tmp_path / name, num_rounds=1, sampler=Last(size), callbacks=[first])
        losses.append(first.losses)
    assert losses[0] == losses[1]


class WatchDtypes(FederatedCallback):
    """Collects the output dtypes of a linear layer of the global and the auxiliary model."""

    def __init__(self) -> None:
        self.dtypes: dict[str, set[torch.dtype]] = {"server": set(), "client": set()}

    def on_fit_start(self, trainer: Any) -> None:
        models = {
            "server": trainer.server.require_model()[0],
            "client": trainer.client.require_model()[0].backbone,
        }
        for name, model in models.items():
            model.layers[1].mlp.c_fc.register_forward_hook(
                lambda module, args, output, name=name: self.dtypes[name].add(output.dtype)
            )


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)]
)
def test_autocast_is_on_in_every_step_exactly_when_asked_for(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    watch = WatchDtypes()
    trainer = fit(tmp_path, tmp_path / "run", precision=precision, num_rounds=1, callbacks=[watch])
    assert watch.dtypes["server"] == {dtype}
    assert dtype in watch.dtypes["client"]
    assert trainer.federation.broadcast["soft_prompt"].dtype == torch.float32


def test_a_zero_length_prompt_changes_nothing(tmp_path: Path) -> None:
    server = make_server(
        tmp_path, soft_prompt=SoftPromptSpec(num_virtual_tokens=0), training=Stage(steps=0)
    )
    client = make_client(soft_prompt=Stage(steps=0))
    trainer = fit(tmp_path, tmp_path / "run", server=server, client=client, num_rounds=1)
    assert trainer.history.rounds[0]["server/val_loss"] == pytest.approx(
        trainer.history.zero_shot["server/val_loss"], abs=1e-6
    )
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_dropped_layer_auxiliary_runs(tmp_path: Path) -> None:
    server = make_server(tmp_path, auxiliary=KeptLayers(layers=[0, 3]))
    trainer = fit(tmp_path, tmp_path / "run", server=server, num_rounds=1)
    assert trainer.history.rounds_done == 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_clients_optimizer_moments_last_only_when_kept(tmp_path: Path, keep: bool) -> None:
    fit(tmp_path, tmp_path / "run", client=make_client(keep_optimizers=keep))
    state = load_state(tmp_path / "run" / "clients" / "000000" / "round-000002.safetensors")
    training = state["training"]["soft_prompt"]
    assert bool(training["optimizer"]["state"]) is keep
    assert training["scheduler"]["last_epoch"] == 6  # 3 rounds of 2 steps


def test_the_plain_average_can_be_broadcast(tmp_path: Path) -> None:
    results = {}
    for name, average in (("server", False), ("average", True)):
        trainer = fit(
            tmp_path,
            tmp_path / name,
            num_rounds=1,
            communication=Communication(broadcast_average=average),
        )
        prompt = trainer.server.require_model()[1]
        prompt.load_state_dict(
            checkpointed(tmp_path / name, 1)["tree"]["federation"]["soft_prompt"]
        )
        results[name] = torch.equal(trainer.federation.broadcast["soft_prompt"], prompt.prefix())
    assert results == {"server": True, "average": False}


def test_no_clients_at_all_is_server_only_training(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run", sampler=UniformSampler(clients_per_round=0))
    assert trainer.history.rounds_done == 3
    assert read_ledger(tmp_path / "run" / "ledger.jsonl") == []


# --- messages -----------------------------------------------------------------------------------


def test_the_ledger_holds_every_payload_and_after_the_handout_only_prompts(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run")
    rows = read_ledger(tmp_path / "run" / "ledger.jsonl")
    handouts = [row for row in rows if row["kind"] == "auxiliary_handout"]
    assert [row["client"] for row in handouts] == [0, 1, 2]
    assert {row["round"] for row in handouts} == {0}
    others = [row for row in rows if row["kind"] != "auxiliary_handout"]
    assert len(others) == 3 * 3 * 2
    assert all([t["name"] for t in row["tensors"]] == ["soft_prompt"] for row in others)
    prompt_bytes = 4 * 2 * 4 * 4 * 8 * 4
    assert all(prompt_bytes < row["bytes"] <= prompt_bytes + 1024 for row in others)
    for round_idx, metrics in enumerate(trainer.history.rounds):
        for direction in ("up", "down"):
            total = sum(
                row["bytes"]
                for row in rows
                if row["round"] == round_idx and row["direction"] == direction
            )
            assert metrics[f"comm/{direction}_bytes"] == total


def test_half_precision_on_the_wire_halves_the_bytes(tmp_path: Path) -> None:
    fit(
        tmp_path,
        tmp_path / "run",
        num_rounds=1,
        communication=Communication(wire_dtype="bfloat16"),
    )
    rows = read_ledger(tmp_path / "run" / "ledger.jsonl")
    prompts = [row for row in rows if row["kind"] != "auxiliary_handout"]
    assert all(row["bytes"] <= 4 * 2 * 4 * 4 * 8 * 2 + 1024 for row in prompts)
    assert {row["tensors"][0]["dtype"] for row in prompts} == {"bfloat16"}


class Diverging(ClientModule):
    """Client 1 returns NaN, client 2 a huge prompt."""

    def update(self, client_id: int, num_examples: int) -> ClientUpdate:
        honest = super().update(client_id, num_examples)
        change = {1: float("nan"), 2: 1e9}.get(client_id, 0.0)
        payload = {name: tensor + change for name, tensor in honest.payload.items()}
        return ClientUpdate(honest.round_idx, client_id, payload, num_examples)


def _diverging() -> ClientModule:
    return Diverging(Stage(steps=0), Stage(steps=2, optimizer=adamw(1e-2)))


def test_bad_updates_are_rejected_counted_and_the_round_goes_on(tmp_path: Path) -> None:
    reasons = []

    class Listen(FederatedCallback):
        def on_update_rejected(
            self, trainer: Any, round_idx: int, client_id: int, reason: str
        ) -> None:
            reasons.append((client_id, reason))

    trainer = fit(
        tmp_path,
        tmp_path / "run",
        client=_diverging(),
        num_rounds=1,
        communication=Communication(max_update_norm=100.0),
        callbacks=[Listen()],
    )
    assert trainer.history.rounds[0]["round/rejected_updates"] == 2
    assert [client_id for client_id, _ in reasons] == [1, 2]
    assert "NaN" in reasons[0][1]
    assert "max_update_norm" in reasons[1][1]
    assert torch.isfinite(trainer.federation.broadcast["soft_prompt"]).all()


def test_too_few_updates_keep_the_servers_prompt(tmp_path: Path) -> None:
    server = make_server(tmp_path, training=Stage(steps=0))
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        server=server,
        client=_diverging(),
        num_rounds=1,
        communication=Communication(max_update_norm=100.0, min_updates=2),
    )
    assert torch.equal(trainer.federation.broadcast["soft_prompt"], _initial_prefix(tmp_path))


def test_a_foreign_tensor_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(message: ClientUpdate, wire_dtype: Any) -> bytes:
        if not isinstance(message, ClientUpdate):
            return encode(message, wire_dtype)
        # as large as what is expected: it is not refused for its size
        stolen = torch.zeros_like(message.payload["soft_prompt"])
        return encode(replace(message, payload={"lm_head.weight": stolen}), wire_dtype)

    monkeypatch.setattr("fedsp.executors.encode", weights)
    with pytest.raises(MessageError, match=r"lm_head\.weight"):
        fit(tmp_path, tmp_path / "run", num_rounds=1)


# --- bad input ----------------------------------------------------------------------------------


def test_a_cohort_larger_than_the_population_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, num_clients=3\], got 12"):
        fit(tmp_path, tmp_path / "run", sampler=UniformSampler(clients_per_round=12))
    assert not (tmp_path / "run").exists()


def test_an_accelerator_that_is_not_there_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ValueError, match=r"`trainer\.accelerator` 'cuda'"):
        FederatedTrainer(accelerator="cuda")


def test_an_unknown_precision_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`trainer.precision` must be one of .*model.backbone.dtype"
    ):
        FederatedTrainer(accelerator="cpu", precision="bf16-true")  # type: ignore[arg-type]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of an x86 CPU")
def test_bf16_on_a_cpu_without_it_is_told() -> None:
    cpus = Path("/proc/cpuinfo")
    if not cpus.is_file():
        pytest.skip("needs /proc")
    has_instructions = "avx512bw" in cpus.read_text().split()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        FederatedTrainer(accelerator="cpu", precision="32-true")
        assert not told
        FederatedTrainer(accelerator="cpu", precision="bf16-mixed")
    texts = [str(warning.message) for warning in told]
    assert len(texts) == (not has_instructions)
    assert all("no instructions for bfloat16" in text for text in texts)


def test_a_folder_without_write_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"`trainer\.run_dir` must be writable"):
        fit(tmp_path, tmp_path / "run")


def test_distillation_without_public_data_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model\.initial_distillation` needs public data"):
        fit(tmp_path, tmp_path / "run", data=make_data(tmp_path, public=None))
    assert not (tmp_path / "run").exists()


def test_monitoring_an_accuracy_without_choices_is_refused_before_any_work(tmp_path: Path) -> None:
    evaluation = Evaluation(monitor="server/val_accuracy", mode="max")
    with pytest.raises(ValueError, match="needs questions with several choices"):
        fit(tmp_path, tmp_path / "run", evaluation=evaluation)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, tmp_path / "whole")
    from fedsp.checkpoint import Checkpoints

    saved = Checkpoints.save

    def full(self: Checkpoints, state: Any) -> Path:
        if state.round_idx == 2:
            raise OSError(28, "No space left on device")
        return saved(self, state)

    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, tmp_path / "cut")
    monkeypatch.setattr(Checkpoints, "save", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, tmp_path / "cut", ckpt_path="last")
    assert equal(
        checkpointed(tmp_path / "whole")["tree"]["federation"],
        checkpointed(tmp_path / "cut")["tree"]["federation"],
    )


class Counter(FederatedCallback):
    """Counts rounds over a run's attempts."""

    def __init__(self, step: int) -> None:
        self.step, self.count = step, 0

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Any) -> None:
        self.count += self.step

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_callbacks_of_one_class_resume_each_with_its_own_state(tmp_path: Path) -> None:
    fit(tmp_path, tmp_path / "run", num_rounds=1, callbacks=[Counter(1), Counter(10)])
    counters = [Counter(1), Counter(10), Counter(100)]
    fit(tmp_path, tmp_path / "run", num_rounds=3, callbacks=counters, ckpt_path="last")
    assert [counter.count for counter in counters] == [3, 30, 200]


def test_what_other_packages_bring_for_fabric_is_no_callback_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fabric adds the callbacks of its entry points to the list that it is given."""
    monkeypatch.setattr("lightning.fabric.fabric._load_external_callbacks", lambda _: [object()])
    trainer = fit(tmp_path, tmp_path / "run", num_rounds=1)
    assert trainer.history.rounds_done == 1
