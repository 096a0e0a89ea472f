"""The inner loops against loops by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fedsp.client import ClientModule
from fedsp.collate import collate
from fedsp.distillation import Distillation
from fedsp.phases import (
    Batches,
    ClientTurn,
    Optimization,
    StageResult,
    distill,
    train_client,
    train_server,
)
from fedsp.pretrained import BackboneSpec
from fedsp.schedules import LinearWarmup
from fedsp.server import ServerModule
from fedsp.stages import Stage
from tiny import (
    GPT2,
    adamw,
    examples,
    files,
    loaded_client,
    loaded_server,
)

P = 4


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def text(count: int = 4, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    return collate(examples(count, seed, **sizes), pad_id=256)


def halves(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: chunks[name][i] for name in batch} for i in range(parts)]


def run_server(
    fabric: Fabric, server: ServerModule, batches: Batches, total_steps: int = 10, **options: int
) -> tuple[StageResult, Optimization]:
    prompt = server.require_model()[1]
    optimization = Optimization.of(server.training_stage, prompt.parameters(), total_steps)
    settings = {"seed": 0, "round_idx": 0, **options}
    return train_server(fabric, server, optimization, batches, **settings), optimization


def turn(batches: list[dict[str, Tensor]], client_id: int = 0, **options: Any) -> ClientTurn:
    def loader(start: int, count: int) -> Batches:
        return [batches[i % len(batches)] for i in range(start, start + count)]

    defaults: dict[str, Any] = {"round_idx": 0, "seed": 0, "participations": 3, "loader": loader}
    return ClientTurn(client_id, **{**defaults, **options})


class Watched(torch.optim.SGD):
    """SGD that notes every step's gradient norm."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.norms: list[float] = []

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return super().step(closure)


# --- the loop -----------------------------------------------------------------------------------


def test_training_equals_a_loop_written_by_hand(tmp_path: Path, fabric: Fabric) -> None:
    """AdamW, warm-up and clipping, three steps."""
    stage = Stage(steps=3, optimizer=adamw(0.05), lr_scheduler=LinearWarmup, gradient_clip_norm=0.1)
    server = loaded_server(tmp_path, training=stage)
    backbone, prompt = server.require_model()
    batches = [text(seed=seed) for seed in range(3)]
    values = nn.Parameter(prompt.prefix())
    optimizer = torch.optim.AdamW([values], lr=0.05, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        output = backbone.hidden_states(batch["input_ids"], batch["attention_mask"], values)
        loss = nn.functional.cross_entropy(
            backbone.logits(output)[:, :-1].flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
            ignore_index=-100,
        )
        optimizer.zero_grad()
        loss.backward()
        assert values.grad is not None
        values.grad *= min(1.0, 0.1 / (float(values.grad.norm()) + 1e-6))
        # 10 steps in all: one of warm-up, then down to zero
        optimizer.param_groups[0]["lr"] = 0.05 if step == 0 else 0.05 * (1 - (step - 1) / 9)
        optimizer.step()
        losses.append(loss.item())
    result, _ = run_server(fabric, server, batches)
    assert torch.allclose(prompt.prefix(), values, atol=1e-6)
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (result.steps, result.num_tokens) == (3, 3 * 4 * 9)
    assert result.seconds > 0


def test_joint_stages_step_both_parts_on_the_same_batches(tmp_path: Path, fabric: Fabric) -> None:
    """Two optimizers of plain SGD on one loss, by hand."""
    tokenizer = files(tmp_path)[0]
    still = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    spec = BackboneSpec(name_or_path=tokenizer, tokenizer=tokenizer, config=still)
    server = loaded_server(tmp_path, backbone=spec)
    stages = {
        "auxiliary": Stage(steps=2, optimizer=sgd(0.01), gradient_clip_norm=None),
        "soft_prompt": Stage(steps=2, optimizer=sgd(0.5), gradient_clip_norm=None),
    }
    client = loaded_client(server, **stages, joint=True, dropout=0.0)
    by_hand = loaded_client(server, **stages, dropout=0.0)
    batches = [text(seed=1), text(seed=2)]
    turn = ClientTurn(0, 0, 0, 1, lambda start, num: batches[start : start + num])
    results, kept = train_client(fabric, client, {}, turn)
    auxiliary, prompt = by_hand.require_model()
    by_hand.set_stages(["auxiliary", "soft_prompt"])
    auxiliary.eval()
    for batch in batches:
        by_hand.training_step(batch, 0).backward()
        with torch.no_grad():
            for rate, part in ((0.01, auxiliary.trainable().values()), (0.5, prompt.parameters())):
                for parameter in part:
                    parameter -= rate * parameter.grad
                    parameter.grad = None
    assert torch.allclose(client.require_model()[1].prefix(), prompt.prefix(), atol=1e-6)
    trained = client.require_model()[0].state()
    for name, tensor in auxiliary.state().items():
        assert torch.allclose(trained[name], tensor, atol=1e-6), name
    assert results.keys() == {"soft_prompt"}
    assert results["soft_prompt"].steps == 2
    assert kept["batches"] == 2


def test_joint_stages_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got .2, 1. and .3, 1."):
        ClientModule(Stage(steps=2), Stage(steps=3), joint=True)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_of_equal_token_counts_equal_one_big_batch(
    tmp_path: Path, fabric: Fabric, parts: int
) -> None:
    batches, prefixes, losses = [text(8, seed=1), text(8, seed=2)], [], []
    for accumulate in (1, parts):
        stage = Stage(2, adamw(0.05), gradient_clip_norm=0.5, accumulate_grad_batches=accumulate)
        server = loaded_server(tmp_path, training=stage)
        micro = [part for batch in batches for part in halves(batch, accumulate)]
        result, optimization = run_server(fabric, server, micro)
        assert (result.steps, optimization.batches) == (2, 2 * accumulate)
        prefixes.append(server.require_model()[1].prefix())
        losses.append(result.loss)
    assert torch.allclose(*prefixes, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("norm", [1e-3, None, 1e6])
def test_clipping_bounds_the_norm_of_the_gradient_that_is_stepped(
    tmp_path: Path, fabric: Fabric, norm: float | None
) -> None:
    made: list[Watched] = []

    def optimizer(parameters: Any) -> Watched:
        made.append(Watched(parameters, lr=0.1))
        return made[-1]

    stage = Stage(3, optimizer, gradient_clip_norm=norm)
    server = loaded_server(tmp_path, training=stage)
    run_server(fabric, server, [text(seed=seed) for seed in range(3)])
    norms = made[-1].norms
    assert len(norms) == 3
    if norm == 1e-3:
        assert norms == pytest.approx([1e-3] * 3, rel=1e-2)
    else:
        assert min(norms) > 2e-3


def test_clipping_counts_all_parameters_of_a_stage_together(tmp_path: Path, fabric: Fabric) -> None:
    made: list[Watched] = []

    def optimizer(parameters: Any) -> Watched:
        made.append(Watched(parameters, lr=0.1))
        return made[-1]

    client = loaded_client(
        loaded_server(tmp_path),
        auxiliary=Stage(2, optimizer, gradient_clip_norm=1e-3),
        soft_prompt=Stage(0),
    )
    train_client(fabric, client, {}, turn([text()]))
    assert made[-1].norms == pytest.approx([1e-3] * 2, rel=1e-2)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_schedule_is_stepped_once_an_optimizer_step(
    tmp_path: Path, fabric: Fabric, accumulate: int
) -> None:
    stage = Stage(4, adamw(0.1), LinearWarmup, accumulate_grad_batches=accumulate)
    server = loaded_server(tmp_path, training=stage)
    batches = [text(1, seed=seed) for seed in range(stage.batches)]
    _, optimization = run_server(fabric, server, batches, total_steps=20)
    assert optimization.scheduler is not None
    assert optimization.scheduler.last_epoch == 4
    # warm-up over 2 of 20 steps; step 4 is the third of 18 downwards
    assert optimization.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - 2 / 18))


def test_a_stage_without_a_schedule_keeps_its_rate(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path, training=Stage(2, adamw(0.1)))
    _, optimization = run_server(fabric, server, [text(), text()])
    assert optimization.scheduler is None
    assert optimization.optimizer.param_groups[0]["lr"] == 0.1
    assert optimization.state_dict()["scheduler"] is None


def test_no_batches_leave_everything_and_have_no_loss(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path)
    before = server.require_model()[1].prefix()
    result, _ = run_server(fabric, server, [])
    assert math.isnan(result.loss)
    assert (result.steps, result.num_tokens) == (0, 0)
    assert torch.equal(server.require_model()[1].prefix(), before)


def test_an_optimization_goes_on_after_a_save_as_if_nothing_had_been(
    tmp_path: Path, fabric: Fabric
) -> None:
    """Moments, schedule and place in the stream; the copy is taken through nested plain state."""
    from fedsp.state_files import decode_state, encode_state

    stage = Stage(4, adamw(0.05), LinearWarmup)
    batches = [text(seed=seed) for seed in range(4)]
    whole = loaded_server(tmp_path, training=stage)
    run_server(fabric, whole, batches)
    cut = loaded_server(tmp_path, training=stage)
    _, first = run_server(fabric, cut, batches[:2])
    prompt = cut.require_model()[1]
    second = Optimization.of(stage, prompt.parameters(), 10)
    state: Any = decode_state(encode_state(first.state_dict()))
    second.load_state_dict(state)
    assert second.batches == 2
    train_server(fabric, cut, second, batches[2:], seed=0, round_idx=0)
    assert torch.equal(prompt.prefix(), whole.require_model()[1].prefix())


def test_a_run_that_is_given_more_rounds_goes_on_learning(tmp_path: Path, fabric: Fabric) -> None:
    """Four steps planned and done, the rate at zero; then eight are planned."""
    stage = Stage(4, adamw(0.05), LinearWarmup)
    server = loaded_server(tmp_path, training=stage)
    batches = [text(seed=seed) for seed in range(4)]
    _, first = run_server(fabric, server, batches, total_steps=4)
    assert first.optimizer.param_groups[0]["lr"] == 0.0
    second = Optimization.of(stage, server.require_model()[1].parameters(), 8)
    second.load_state_dict(first.state_dict())
    train_server(fabric, server, second, batches[:1], seed=0, round_idx=1)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 - 5 / 8))


# --- the client ---------------------------------------------------------------------------------


def test_each_stage_trains_its_part_and_leaves_the_other(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path)
    frozen = {n: p.clone() for n, p in server.require_model()[0].named_parameters()}
    for name, other in (("auxiliary", "soft_prompt"), ("soft_prompt", "auxiliary")):
        client = loaded_client(server, **{name: Stage(2, adamw(0.01)), other: Stage(0)})
        before = {
            stage: [p.detach().clone() for p in client.stage_parameters(stage).values()]
            for stage in (name, other)
        }
        results, kept = train_client(fabric, client, {}, turn([text()]))
        after = {stage: list(client.stage_parameters(stage).values()) for stage in before}
        assert not any(map(torch.equal, before[name], after[name]))
        assert all(map(torch.equal, before[other], after[other]))
        assert results.keys() == {name}
        assert kept.keys() == {name, "batches"}
    now = dict(server.require_model()[0].named_parameters())
    assert all(torch.equal(p, now[n]) and now[n].grad is None for n, p in frozen.items())


def test_both_stages_read_on_in_one_stream_over_the_rounds(tmp_path: Path, fabric: Fabric) -> None:
    asked: list[tuple[int, int]] = []

    def loader(start: int, count: int) -> Batches:
        asked.append((start, count))
        return [text(seed=start + i) for i in range(count)]

    client = loaded_client(
        loaded_server(tmp_path),
        auxiliary=Stage(1, accumulate_grad_batches=2),
        soft_prompt=Stage(3),
    )
    _, kept = train_client(fabric, client, {}, turn([], loader=loader))
    train_client(fabric, client, kept, turn([], loader=loader, round_idx=1))
    assert asked == [(0, 2), (2, 3), (5, 2), (7, 3)]


def test_a_clients_schedule_spans_its_participations(tmp_path: Path, fabric: Fabric) -> None:
    totals: list[int] = []

    def schedule(optimizer: Any, total_steps: int) -> Any:
        totals.append(total_steps)
        return LinearWarmup(optimizer, total_steps)

    client = loaded_client(
        loaded_server(tmp_path),
        auxiliary=Stage(2, lr_scheduler=schedule),
        soft_prompt=Stage(3, lr_scheduler=schedule),
    )
    train_client(fabric, client, {}, turn([text()], participations=5))
    assert totals == [10, 15]


@pytest.mark.parametrize("keep", [True, False])
def test_a_second_turn_equals_a_loop_by_hand_with_kept_or_fresh_moments(
    tmp_path: Path, fabric: Fabric, keep: bool
) -> None:
    client = loaded_client(
        loaded_server(tmp_path),
        auxiliary=Stage(0),
        soft_prompt=Stage(1, adamw(0.05), gradient_clip_norm=None),
        dropout=0.0,
        keep_optimizers=keep,
    )
    auxiliary, prompt = client.require_model()
    values = nn.Parameter(prompt.prefix())
    batch = text()

    def by_hand(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        logits, targets, _ = auxiliary.backbone.label_logits(batch, values)
        nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()

    optimizer = torch.optim.AdamW([values], lr=0.05, weight_decay=0.0)
    by_hand(optimizer)
    by_hand(optimizer if keep else torch.optim.AdamW([values], lr=0.05, weight_decay=0.0))
    _, kept = train_client(fabric, client, {}, turn([batch]))
    train_client(fabric, client, kept, turn([batch], round_idx=1))
    assert torch.allclose(prompt.prefix(), values, atol=1e-6)


def _dropout_run(
    folder: Path, fabric: Fabric, global_seed: int, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """What a turn with dropout in the prompt and in the auxiliary model makes of both."""
    client = loaded_client(loaded_server(folder), dropout=0.3)
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    train_client(fabric, client, {}, turn([text(), text(seed=1)], **options))
    assert torch.equal(torch.get_rng_state(), before)
    auxiliary, prompt = client.require_model()
    return prompt.prefix(), list(auxiliary.state().values())


def test_a_clients_dropout_depends_on_seed_round_and_client_only(
    tmp_path: Path, fabric: Fabric
) -> None:
    base = _dropout_run(tmp_path, fabric, global_seed=1)
    again = _dropout_run(tmp_path, fabric, global_seed=2)
    assert torch.equal(base[0], again[0])
    assert all(map(torch.equal, base[1], again[1]))
    for options in ({"seed": 1}, {"round_idx": 1}, {"client_id": 1}):
        other = _dropout_run(tmp_path, fabric, global_seed=1, **options)
        assert not torch.equal(base[0], other[0])
        assert not all(map(torch.equal, base[1], other[1]))


def test_the_servers_dropout_depends_on_seed_and_round_only(tmp_path: Path, fabric: Fabric) -> None:
    def run(global_seed: int, **options: int) -> Tensor:
        server = loaded_server(tmp_path, dropout=0.3)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        run_server(fabric, server, [text(), text(seed=1)], **options)
        assert torch.equal(torch.get_rng_state(), before)
        assert not server.require_model()[1].training
        return server.require_model()[1].prefix()

    assert torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(1, seed=1))
    assert not torch.equal(run(1), run(1, round_idx=1))


# --- distillation -------------------------------------------------------------------------------


def test_distillation_equals_a_loop_written_by_hand(tmp_path: Path, fabric: Fabric) -> None:
    """The model's own dropout (0.1 in its configuration) stays off on both sides."""
    server = loaded_server(tmp_path)
    teacher = server.require_model()[0]
    spec = Distillation(Stage(3, sgd(0.5), gradient_clip_norm=None), logit_weight=0.5, cache_dir="")
    batches = [text(seed=seed) for seed in range(3)]
    by_hand = server.auxiliary_recipe.build(teacher)
    parameters = by_hand.trainable()
    losses = []
    for batch in batches:
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        with torch.no_grad():
            wanted = teacher.model(ids, attention_mask=mask, output_hidden_states=True)
        output = by_hand.backbone.model(ids, attention_mask=mask, output_hidden_states=True)
        target = wanted.hidden_states[-1]
        loss = (output.hidden_states[-1] - target).pow(2).mean() / target.pow(2).mean()
        counted = labels[:, 1:] != -100
        p, q = (x.logits[:, :-1][counted].softmax(-1) for x in (wanted, output))
        loss = loss + 0.5 * (p * (p / q).log()).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.5 * gradient
        losses.append(float(loss.detach()))
    auxiliary = server.auxiliary_recipe.build(teacher)
    steps: list[tuple[int, float]] = []
    server.initial_distillation = spec
    result = distill(
        fabric,
        server,
        auxiliary,
        Optimization.of(spec.stage, auxiliary.trainable().values(), 3),
        batches,
        seed=0,
        on_step=lambda step, loss: steps.append((step, float(loss))),
    )
    for name, parameter in auxiliary.trainable().items():
        assert torch.allclose(parameter, parameters[name], atol=1e-5), name
    assert [step for step, _ in steps] == [1, 2, 3]
    assert [loss for _, loss in steps] == pytest.approx(losses, rel=1e-4)
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_distillation_draws_from_its_own_stream(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path)
    spec = Distillation(
        Stage(2, sgd(0.5)), hidden_weight=0.0, lm_weight=1.0, max_logit_tokens=2, cache_dir=""
    )
    server.initial_distillation = spec
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        auxiliary = server.auxiliary_recipe.build(server.require_model()[0])
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        batches = [text(), text(seed=1)]
        optimization = Optimization.of(spec.stage, auxiliary.trainable().values(), 2)
        distill(fabric, server, auxiliary, optimization, batches, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(list(auxiliary.state().values()))
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))
