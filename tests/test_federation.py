"""The server's side of a round with clients made up by the test: every figure is known by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.callbacks import FederatedCallback
from fedsp.federation import Communication
from fedsp.messages import (
    ClientUpdate,
    decode_broadcast,
    decode_update,
    encode,
)
from fedsp.schedules import LinearWarmup
from fedsp.stages import Stage
from scripted import NUM_EXAMPLES, Calls, make_federation, wander
from tiny import adamw, fit, make_data, make_server

# --- aggregation over a round -------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cohort", [[0, 1, 2], [2, 0], [1]])
def test_the_new_prompt_is_the_mean_of_the_clients_prompts(
    tmp_path: Path, weighted: bool, cohort: list[int]
) -> None:
    federation = make_federation(tmp_path, weighted=weighted)
    start = federation.broadcast["soft_prompt"].clone()
    metrics = federation.collect(0, cohort, Calls())
    weights = [NUM_EXAMPLES[c] if weighted else 1 for c in cohort]
    total = torch.zeros_like(start, dtype=torch.float64)
    for weight, client_id in zip(weights, cohort, strict=True):
        total += weight * wander(start, 0, client_id).double()
    expected = (total / sum(weights)).float()
    assert torch.equal(federation.broadcast["soft_prompt"], expected)
    assert torch.equal(federation.server.require_model()[1].prefix(), expected)
    assert metrics["round/clients"] == len(cohort)
    assert metrics["round/rejected_updates"] == 0


def test_fedavg_of_a_whole_run_is_the_mean_of_what_the_clients_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real executor, its messages caught on their way; three rounds without server steps."""
    sent: dict[int, list[Tensor]] = {}

    def catch(message: Any, wire_dtype: Any) -> bytes:
        if isinstance(message, ClientUpdate):
            sent.setdefault(message.round_idx, []).append(message.payload["soft_prompt"].clone())
        return encode(message, wire_dtype)

    means: list[Tensor] = []

    class Listen(FederatedCallback):
        def on_aggregate_end(self, trainer: Any, round_idx: int, payload: Any) -> None:
            means.append(payload["soft_prompt"].clone())

    monkeypatch.setattr("fedsp.executors.encode", catch)
    server = make_server(tmp_path, training=Stage(0))
    fit(tmp_path, tmp_path / "run", server=server, callbacks=[Listen()])
    assert len(means) == 3
    for round_idx, mean in enumerate(means):
        assert len(sent[round_idx]) == 3
        assert torch.allclose(mean, torch.stack(sent[round_idx]).mean(0), atol=1e-7)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["FedAdam", "FedAvgM", "FedAdagrad"],
)
def test_a_server_optimizer_over_two_rounds_equals_torchs_on_the_pseudo_gradient(
    tmp_path: Path, optimizer: Any
) -> None:
    federation = make_federation(tmp_path, optimizer=optimizer)
    by_hand = torch.nn.Parameter(federation.broadcast["soft_prompt"].clone())
    stepped = optimizer([by_hand])
    for round_idx in range(2):
        old = by_hand.detach().clone()
        mean = torch.stack([wander(old, round_idx, c) for c in range(3)]).double().mean(0).float()
        by_hand.grad = old - mean
        stepped.step()
        federation.collect(round_idx, [0, 1, 2], Calls())
        assert torch.equal(federation.broadcast["soft_prompt"], by_hand)


def test_a_server_optimizer_saved_between_rounds_goes_on(tmp_path: Path) -> None:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.1)

    whole, cut, resumed = (make_federation(tmp_path, optimizer=adam) for _ in range(3))
    for federation in (whole, cut):
        federation.collect(0, [0, 1, 2], Calls())
    resumed.load_state_dict(cut.state_dict())
    assert resumed.executor.loaded == {"rounds": 1}  # type: ignore[attr-defined]
    for federation in (whole, resumed):
        federation.collect(1, [0, 1, 2], Calls())
    assert torch.equal(whole.broadcast["soft_prompt"], resumed.broadcast["soft_prompt"])


# --- the wire -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16"])
def test_idle_clients_leave_the_servers_prompt_as_it_is_whatever_the_wire(
    tmp_path: Path, wire_dtype: Any
) -> None:
    """Rounding on the way down is no client's doing: small server steps are not lost to it."""
    federation = make_federation(
        tmp_path,
        lambda prefix, round_idx, client_id: prefix,
        communication=Communication(wire_dtype=wire_dtype),
    )
    start = federation.broadcast["soft_prompt"].clone()
    assert not torch.equal(start.bfloat16().float(), start)
    federation.collect(0, [0, 1, 2], Calls())
    assert torch.allclose(federation.broadcast["soft_prompt"], start, atol=1e-7)


def test_in_half_precision_the_server_moves_by_the_mean_change(tmp_path: Path) -> None:
    communication = Communication(wire_dtype="bfloat16")
    federation = make_federation(tmp_path, communication=communication)
    start = federation.broadcast["soft_prompt"].clone()
    rounded = start.bfloat16().float()
    sent = torch.stack([wander(rounded, 0, c).bfloat16().float() for c in range(3)])
    federation.collect(0, [0, 1, 2], Calls())
    expected = start + (sent.mean(0) - rounded)
    assert torch.allclose(federation.broadcast["soft_prompt"], expected, atol=1e-6)


def test_every_client_of_a_round_receives_the_same_bytes(tmp_path: Path) -> None:
    federation = make_federation(tmp_path)
    start = federation.broadcast["soft_prompt"].clone()
    federation.collect(0, [0, 1, 2], Calls())
    (data,) = federation.executor.received  # type: ignore[attr-defined]
    assert torch.equal(decode_broadcast(data, federation.contract).payload["soft_prompt"], start)


# --- hooks and metrics --------------------------------------------------------------------------


def test_the_hooks_of_a_round_come_in_order(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, training=Stage(1))
    calls = Calls()
    federation.collect(3, [2, 0], calls)
    federation.train_server(3, calls)
    assert [call[:3] for call in calls.made[:6]] == [
        ("on_client_start", 3, 2),
        ("on_client_end", 3, 2),
        ("on_update_accepted", 3, 2),
        ("on_client_start", 3, 0),
        ("on_client_end", 3, 0),
        ("on_update_accepted", 3, 0),
    ]
    assert calls.names()[6:] == [
        "on_aggregate_end",
        "on_server_train_start",
        "on_server_train_end",
    ]


def test_the_clients_losses_are_averaged_where_they_were_told(tmp_path: Path) -> None:
    federation = make_federation(tmp_path)
    federation.executor.losses = {0: 1.0, 2: 3.0}  # type: ignore[attr-defined]
    metrics = federation.collect(0, [0, 1, 2], Calls())
    assert metrics["client/train_loss"] == 2.0
    assert metrics["client/train_loss_std"] == 1.0
    assert "client/auxiliary_loss" not in metrics
    assert metrics["round/client_seconds"] > 0


def test_a_loss_that_is_not_finite_does_not_hide_the_others(tmp_path: Path) -> None:
    federation = make_federation(tmp_path)
    federation.executor.losses = {0: 1.0, 2: float("nan")}  # type: ignore[attr-defined]
    metrics = federation.collect(0, [0, 1, 2], Calls())
    assert metrics["client/train_loss"] == 1.0


# --- the server's own steps ---------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
def test_server_training_starts_from_the_aggregate(tmp_path: Path, average: bool) -> None:
    """By hand: an SGD step on the first batch; the broadcast is that or the plain average."""
    stage = Stage(1, lambda p: torch.optim.SGD(p, lr=0.5), gradient_clip_norm=None)
    federation = make_federation(
        tmp_path, training=stage, communication=Communication(broadcast_average=average)
    )
    backbone, prompt = federation.server.require_model()
    prompt.dropout = 0.0
    federation.collect(0, [0, 1, 2], Calls())
    mean = federation.broadcast["soft_prompt"].clone()
    values = torch.nn.Parameter(mean.clone())
    (batch,) = federation.data.server_dataloader(start_step=0, num_steps=1)
    logits, targets, _ = backbone.label_logits(batch, values)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss, values)
    metrics = federation.train_server(0, Calls())
    trained = prompt.prefix()
    assert torch.allclose(trained, mean - 0.5 * gradient, atol=1e-6)
    assert metrics["server/train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.equal(federation.broadcast["soft_prompt"], mean if average else trained)


@pytest.mark.parametrize("absent", ["steps", "data"])
def test_without_server_steps_or_data_nothing_is_trained(tmp_path: Path, absent: str) -> None:
    federation = make_federation(tmp_path, training=Stage(0 if absent == "steps" else 2))
    if absent == "data":
        federation.data = make_data(tmp_path, server=None)
        federation.data.limit_tokens(60)
        federation.data.setup("fit")
    start = federation.broadcast["soft_prompt"].clone()
    calls = Calls()
    assert federation.train_server(0, calls) == {}
    assert calls.made == []
    assert torch.equal(federation.server.require_model()[1].prefix(), start)


def test_the_servers_schedule_and_batches_go_on_over_the_rounds(tmp_path: Path) -> None:
    stage = Stage(2, adamw(0.01), LinearWarmup, accumulate_grad_batches=2)
    federation = make_federation(tmp_path, training=stage)
    for round_idx in range(2):
        federation.train_server(round_idx, Calls())
    state = federation.optimization
    assert state.batches == 8
    assert state.scheduler is not None
    assert state.scheduler.last_epoch == 4
    assert state.optimizer.param_groups[0]["lr"] == 0.0  # two rounds of two steps are all


def test_a_saved_federation_goes_on_bit_for_bit(tmp_path: Path) -> None:
    stage = Stage(2, adamw(0.01), LinearWarmup)
    whole, cut, resumed = (make_federation(tmp_path, training=stage) for _ in range(3))
    for federation in (whole, cut):
        federation.collect(0, [0, 1], Calls())
        federation.train_server(0, Calls())
    resumed.load_state_dict(cut.state_dict())
    for federation in (whole, resumed):
        federation.collect(1, [1, 2], Calls())
        federation.train_server(1, Calls())
    assert torch.equal(whole.broadcast["soft_prompt"], resumed.broadcast["soft_prompt"])
    assert torch.equal(
        whole.state_dict()["payload"]["soft_prompt"], resumed.state_dict()["payload"]["soft_prompt"]
    )


def test_an_update_is_measured_against_what_was_broadcast(tmp_path: Path) -> None:
    """The largest allowed norm is of the change, not of the prompt."""
    federation = make_federation(tmp_path, communication=Communication(max_update_norm=3.0))
    data = encode(
        ClientUpdate(0, 0, {"soft_prompt": federation.broadcast["soft_prompt"]}, 1), "float32"
    )
    assert federation.broadcast["soft_prompt"].norm() > 3.0
    decode_update(
        data, federation.contract, reference=federation.broadcast, round_idx=0, client_id=0
    )
