"""The auxiliary model before the first round: taught on public data, made once, kept."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from fedsp.auxiliary import KeptLayers
from fedsp.callbacks import FederatedCallback
from fedsp.compression import LowRank
from fedsp.distillation import Distillation
from fedsp.phases import Optimization, train_server
from fedsp.preparation import check_public_data, fill_pool, prepare_auxiliary
from fedsp.prompt_pool import PromptPool
from fedsp.quality import measure_quality
from fedsp.sources import Files
from fedsp.stages import Stage
from teaching import STAGE, Owner, loaded_server, prepare, ready_data, same
from tiny import files, fit, make_data, make_server

# --- teaching -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        {"hidden_weight": 1.0},
        {"hidden_weight": 0.0, "logit_weight": 1.0},
        {"hidden_weight": 0.0, "lm_weight": 1.0},
    ],
)
def test_each_term_teaches_what_it_measures(tmp_path: Path, weights: dict[str, float]) -> None:
    """On examples that the distillation does not see."""
    prepared = prepare(tmp_path, "run", Distillation(STAGE, cache_dir="", **weights))
    before, after = prepared.before, prepared.after
    assert before is not None
    assert after is not None
    if weights["hidden_weight"]:
        assert after.hidden_error < 0.9 * before.hidden_error
    elif "logit_weight" in weights:
        assert after.divergence < before.divergence
    else:
        assert after.lm_loss < before.lm_loss - 0.1
    assert after.global_lm_loss == before.global_lm_loss


def test_the_quality_is_that_of_the_models_on_the_servers_data(tmp_path: Path) -> None:
    data = ready_data(tmp_path)
    server = loaded_server(tmp_path, Distillation(STAGE, cache_dir=""))
    (tmp_path / "run").mkdir()
    prepared = prepare_auxiliary(
        Fabric(accelerator="cpu", devices=1),
        server,
        data,
        kept=tmp_path / "run" / "auxiliary.safetensors",
        trainer=Owner(),
    )
    batches = list(data.server_dataloader(start_step=0, num_steps=8))
    backbone, prompt = server.require_model()
    fresh = server.auxiliary_recipe.build(backbone)
    for quality, auxiliary in ((prepared.after, prepared.auxiliary), (prepared.before, fresh)):
        assert quality == measure_quality(
            backbone, auxiliary.backbone, batches, prompt.prefix(), auxiliary.slots
        )


def test_the_global_model_is_left_alone_and_nothing_asks_for_a_gradient(tmp_path: Path) -> None:
    server = loaded_server(tmp_path, Distillation(STAGE, logit_weight=1.0, cache_dir=""))
    backbone = server.require_model()[0]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    (tmp_path / "run").mkdir()
    prepared = prepare_auxiliary(
        Fabric(accelerator="cpu", devices=1),
        server,
        ready_data(tmp_path),
        kept=tmp_path / "run" / "auxiliary.safetensors",
        trainer=Owner(),
    )
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    for parameter in (*backbone.parameters(), *prepared.auxiliary.parameters()):
        assert not parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize("distillation", [None, Distillation(Stage(steps=0), cache_dir="")])
@pytest.mark.parametrize("public", [20, None])
def test_without_distillation_the_auxiliary_is_the_cut_model(
    tmp_path: Path, distillation: Distillation | None, public: int | None
) -> None:
    data = ready_data(tmp_path, public=public)
    check_public_data(data, distillation)
    owner = Owner()
    prepared = prepare(tmp_path, "run", distillation, owner, data)
    server = loaded_server(tmp_path, None)
    fresh = server.auxiliary_recipe.build(server.require_model()[0]).state()
    assert all(torch.equal(fresh[name], x) for name, x in prepared.auxiliary.state().items())
    assert prepared.before == prepared.after
    assert not prepared.cached
    assert owner.calls == []


def test_without_any_data_of_the_servers_there_is_no_quality(tmp_path: Path) -> None:
    data = ready_data(tmp_path, server=None, public=None)
    prepared = prepare(tmp_path, "run", None, data=data)
    assert prepared.before is prepared.after is None
    again = prepare(tmp_path, "run", None, data=data)
    assert again.before is again.after is None


def test_a_run_goes_through_without_distillation(tmp_path: Path) -> None:
    server = make_server(tmp_path, initial_distillation=None)
    data = make_data(tmp_path, public=None)
    trainer = fit(tmp_path, tmp_path / "run", server=server, data=data, num_rounds=1)
    assert trainer.history.rounds_done == 1


def test_callbacks_hear_of_the_start_every_step_and_the_end(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listen(FederatedCallback):
        def on_distillation_start(self, trainer: Any, total_steps: int) -> None:
            heard.append(total_steps)

        def on_distillation_step(self, trainer: Any, step: int, loss: torch.Tensor) -> None:
            heard.append(step)

        def on_distillation_end(self, trainer: Any, before: Any, after: Any, cached: bool) -> None:
            heard.append((before, after, cached))

    trainer = fit(tmp_path, tmp_path / "run", num_rounds=0, callbacks=[Listen()])
    made = trainer.preparation
    assert heard == [4, 1, 2, 3, 4, (made.before, made.after, False)]


# --- prompts in front of the public texts ---------------------------------------------------------


def test_the_pool_holds_the_start_the_servers_own_rounds_and_texts(tmp_path: Path) -> None:
    """A round of it is a round of a run without clients; the server's own prompt stays."""
    server, data = loaded_server(tmp_path, None), ready_data(tmp_path)
    server.initialize_prompt(data.sample_ids(4))
    initial = server.require_model()[1].prefix()
    fabric = Fabric(accelerator="cpu", devices=1)
    pool = fill_pool(fabric, server, data, PromptPool(rounds=2, texts=3), seed=0)
    assert len(pool) == 1 + 2 + 3
    assert torch.equal(pool[0], initial)
    assert torch.equal(server.require_model()[1].prefix(), initial)

    prompt = server.require_model()[1]
    stage = server.training_stage
    optimization = Optimization.of(stage, prompt.parameters(), 2 * stage.steps)
    for round_idx in range(2):
        batches = data.server_dataloader(start_step=optimization.batches, num_steps=stage.batches)
        train_server(fabric, server, optimization, batches, seed=0, round_idx=round_idx)
        assert torch.equal(prompt.prefix(), pool[1 + round_idx])

    ids = next(iter(data.public_dataloader(start_step=0, num_steps=1)))["input_ids"][:1, :4]
    assert torch.equal(pool[3], server.require_model()[0].keys_values(ids))


def test_a_model_taught_behind_prompts_is_another_one_and_depends_on_the_servers_data(
    tmp_path: Path,
) -> None:
    _, rows = files(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "what is it?", "completion": "xyz"}\n' * 9)
    cache = tmp_path / "models"
    plain = Distillation(STAGE, cache_dir=str(cache))
    prompted = replace(plain, prompts=PromptPool(rounds=1))
    owners = [Owner() for _ in range(4)]
    made = [
        prepare(
            tmp_path,
            f"run{index}",
            spec,
            owners[index],
            ready_data(tmp_path, public=Files(rows), server=Files(server)),
        )
        for index, (spec, server) in enumerate(
            [(plain, rows), (prompted, rows), (prompted, rows), (prompted, str(other))]
        )
    ]
    assert [owner.steps for owner in owners] == [20, 20, 0, 20]
    assert same(made[1], made[2])
    assert not same(made[0], made[1])
    assert not same(made[1], made[3])


def test_a_wrapped_recipe_is_told_apart_by_its_settings(tmp_path: Path) -> None:
    distillation = Distillation(STAGE, cache_dir=str(tmp_path / "models"))
    owners = [Owner() for _ in range(3)]
    for index, rank in enumerate((2, 3, 2)):
        recipe = LowRank(rank, KeptLayers(num_layers=4))
        prepare(tmp_path, f"run{index}", distillation, owners[index], auxiliary=recipe)
    assert [owner.steps for owner in owners] == [20, 20, 0]


@pytest.mark.parametrize(("whole", "poor"), [(True, False), (False, True)])
def test_an_auxiliary_model_that_reads_prompts_otherwise_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool, poor: bool
) -> None:
    """The whole model reads them as the global one, a zeroed layer does not read them at all."""
    recipe = KeptLayers(num_layers=4 if whole else 1)
    build = KeptLayers.build

    def cut(self: KeptLayers, *args: Any) -> Any:
        auxiliary = build(self, *args)
        if not whole:
            for parameter in auxiliary.trainable().values():
                parameter.data.zero_()
        return auxiliary

    monkeypatch.setattr(KeptLayers, "build", cut)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare(tmp_path, "run", None, auxiliary=recipe)
        prepare(tmp_path, "run", None, auxiliary=recipe)
    assert prepared.after is not None
    assert bool(prepared.after.shortcomings) == poor
    assert [str(it.message)[:31] for it in caught] == ["The auxiliary model is too poor"] * 2 * poor
