"""The auxiliary model before the first round: taught on public data, made once, kept."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.auxiliary import KeptLayers
from fedsp.batching import Batching
from fedsp.callbacks import FederatedCallback
from fedsp.compression import LowRank
from fedsp.distillation import Distillation
from fedsp.phases import Optimization, train_server
from fedsp.preparation import Preparation, check_public_data, fill_pool, prepare_auxiliary
from fedsp.prompt_pool import PromptPool
from fedsp.quality import measure_quality
from fedsp.schedules import LinearWarmup
from fedsp.server import ServerModule
from fedsp.sources import Files
from fedsp.stages import Stage
from fedsp.state_files import load_state
from tiny import adamw, files, fit, make_client, make_data, make_server

STAGE = Stage(steps=20, optimizer=adamw(3e-3))


class Owner:
    """Stands in for the trainer and counts what it is told."""

    def __init__(self, seed: int = 0, precision: str = "32-true") -> None:
        self.seed, self.precision = seed, precision
        self.calls: list[tuple[Any, ...]] = []

    def call(self, hook: str, *args: Any) -> None:
        self.calls.append((hook, *args))

    @property
    def steps(self) -> int:
        return sum(hook == "on_distillation_step" for hook, *_ in self.calls)


def ready_data(folder: Path, **options: Any) -> Any:
    data = make_data(folder, **options)
    data.limit_tokens(60)
    data.setup("fit")
    return data


def loaded_server(folder: Path, distillation: Distillation | None, **options: Any) -> ServerModule:
    server = make_server(folder, initial_distillation=distillation, **options)
    server.configure_model()
    return server


def prepare(
    folder: Path,
    run: str,
    distillation: Distillation | None,
    owner: Owner | None = None,
    data: Any = None,
    **options: Any,
) -> Preparation:
    server = loaded_server(folder, distillation, **options)
    (folder / run).mkdir(exist_ok=True)
    return prepare_auxiliary(
        Fabric(accelerator="cpu", devices=1),
        server,
        data or ready_data(folder),
        kept=folder / run / "auxiliary.safetensors",
        trainer=owner or Owner(),
    )


def same(one: Preparation, other: Preparation) -> bool:
    states = [prepared.auxiliary.state() for prepared in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


def cached_files(cache: Path) -> list[Path]:
    return sorted((cache / "auxiliary").glob("*"))


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


# --- finding it again ---------------------------------------------------------------------------


def test_another_run_finds_the_distilled_model_and_trains_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "models"
    distillation = Distillation(STAGE, cache_dir=str(cache))
    first, second = Owner(), Owner()
    made = prepare(tmp_path, "one", distillation, first)
    found = prepare(tmp_path, "two", distillation, second)
    assert (first.steps, second.steps) == (20, 0)
    assert (made.cached, found.cached) == (False, True)
    assert same(made, found)
    assert (found.before, found.after) == (None, made.after)
    assert len(cached_files(cache)) == 1


def test_the_quality_of_a_found_model_is_of_this_runs_data(tmp_path: Path) -> None:
    """The server's data has no part in the weights, so the artefact fits runs with other data."""
    _, rows = files(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "what is it?", "completion": "xyz"}\n' * 9)
    public = Files(rows)
    distillation = Distillation(STAGE, cache_dir=str(tmp_path / "models"))
    made, found = (
        prepare(
            tmp_path, name, distillation, data=ready_data(tmp_path, public=public, server=server)
        )
        for name, server in (("one", Files(rows)), ("two", Files(str(other))))
    )
    assert found.cached
    assert found.after is not None
    assert made.after is not None
    assert found.after.global_lm_loss != made.after.global_lm_loss


def test_a_resumed_run_finds_its_own_model_whatever_became_of_the_cache(tmp_path: Path) -> None:
    distillation = Distillation(STAGE, cache_dir=str(tmp_path / "models"))
    made = prepare(tmp_path, "run", distillation)
    for path in cached_files(tmp_path / "models"):
        path.unlink()
    owner = Owner()
    found = prepare(tmp_path, "run", distillation, owner)
    assert owner.calls == []
    assert same(made, found)
    assert found.cached
    assert (found.before, found.after) == (made.before, made.after)


@pytest.mark.parametrize(
    "change",
    [
        {"distillation": {"lm_weight": 1.0}},
        {"server": {"auxiliary": KeptLayers(layers=[0, 3])}},
        {"server": {"seed": 1}},
        {"data": {"public": 19}},
        {"data": {"seed": 1}},
        {"data": {"batching": Batching(batch_size=3)}},
        {"data": {"batching": Batching(batch_size=4, length_grouping=False)}},
        {"owner": {"seed": 1}},
        {"owner": {"precision": "bf16-mixed"}},
    ],
)
def test_whatever_makes_the_model_another_is_not_found(
    tmp_path: Path, change: dict[str, dict[str, Any]]
) -> None:
    """The public data is a source of its own here: no seed or batch size changes its rows."""
    _, rows = files(tmp_path)
    base = Distillation(Stage(steps=1), cache_dir=str(tmp_path / "models"))
    owners, data = [], {"public": Files(rows)}
    for name, parts in (("one", {}), ("two", change)):
        owner = Owner(**parts.get("owner", {}))
        owners.append(owner)
        prepare(
            tmp_path,
            name,
            replace(base, **parts.get("distillation", {})),
            owner,
            ready_data(tmp_path, **{**data, **parts.get("data", {})}),
            **parts.get("server", {}),
        )
    assert [owner.steps for owner in owners] == [1, 1]
    assert len(cached_files(tmp_path / "models")) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"batching": Batching(batch_size=4, eval_batch_size=2)}},
        {"data": {"selection": 5}},
        {"distillation": {"strict_public_data": False}},
        {"server": {"training": Stage(steps=9)}},
    ],
)
def test_what_has_no_part_in_the_model_leaves_it_found(
    tmp_path: Path, change: dict[str, dict[str, Any]]
) -> None:
    _, rows = files(tmp_path)
    base = Distillation(Stage(steps=1), cache_dir=str(tmp_path / "models"))
    for name, parts in (("one", {}), ("two", change)):
        prepared = prepare(
            tmp_path,
            name,
            replace(base, **parts.get("distillation", {})),
            data=ready_data(tmp_path, **{"public": Files(rows), **parts.get("data", {})}),
            **parts.get("server", {}),
        )
    assert prepared.cached


@pytest.mark.parametrize("distillation", [Distillation(Stage(steps=2), cache_dir=""), None])
def test_a_model_that_a_start_with_other_settings_left_is_not_taken(
    tmp_path: Path, distillation: Distillation | None
) -> None:
    """A run killed before its first checkpoint may be begun anew with another configuration."""
    prepare(tmp_path, "run", distillation)
    recipe = KeptLayers(layers=[0, 3])
    again = prepare(tmp_path, "run", distillation, auxiliary=recipe)
    fresh = prepare(tmp_path, "fresh", distillation, auxiliary=recipe)
    assert not again.cached
    assert same(again, fresh)
    assert prepare(tmp_path, "run", distillation, auxiliary=recipe).cached


@pytest.mark.parametrize("damage", ["cut", "emptied", "foreign", "other shapes", "a folder"])
def test_a_damaged_artefact_is_made_anew_with_a_warning(tmp_path: Path, damage: str) -> None:
    from fedsp.state_files import save_state

    distillation = Distillation(STAGE, cache_dir=str(tmp_path / "models"))
    made = prepare(tmp_path, "one", distillation)
    (artefact,) = cached_files(tmp_path / "models")
    healthy = artefact.read_bytes()
    if damage == "cut":
        artefact.write_bytes(healthy[:-7])
    elif damage == "emptied":
        artefact.write_bytes(b"")
    elif damage == "foreign":
        save_state(artefact, ["something", "else"])
    elif damage == "other shapes":
        save_state(artefact, {name: x[:1] for name, x in made.auxiliary.state().items()})
    else:
        artefact.unlink()
        artefact.mkdir()
    owner = Owner()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = prepare(tmp_path, "two", distillation, owner)
    texts = [str(warning.message) for warning in caught]
    assert any(f"{artefact} is unusable and made anew" in text for text in texts)
    assert owner.steps == 20
    assert not again.cached
    assert same(made, again)
    if damage != "a folder":
        assert artefact.read_bytes() == healthy


def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a folder is wanted")
    distillation = Distillation(Stage(steps=1), cache_dir=str(tmp_path / "models"))
    with pytest.warns(
        UserWarning, match="cannot be cached .* `model.initial_distillation.cache_dir`"
    ):
        prepared = prepare(tmp_path, "run", distillation)
    assert not prepared.cached


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSP_CACHE", str(tmp_path / "from-environment"))
    prepare(tmp_path, "run", Distillation(Stage(steps=1)))
    assert len(cached_files(tmp_path / "from-environment")) == 1


def test_without_a_cache_every_run_distils(tmp_path: Path) -> None:
    owners = [Owner(), Owner()]
    for name, owner in zip(("one", "two"), owners, strict=True):
        prepare(tmp_path, name, Distillation(Stage(steps=2), cache_dir=""), owner)
    assert [owner.steps for owner in owners] == [2, 2]


def test_two_whole_runs_share_a_distilled_model_and_end_alike(tmp_path: Path) -> None:
    trainers = [
        fit(
            tmp_path,
            tmp_path / name,
            num_rounds=1,
            client=make_client(auxiliary=Stage(steps=1)),
            server=make_server(
                tmp_path,
                initial_distillation=Distillation(
                    Stage(steps=4), cache_dir=str(tmp_path / "models")
                ),
            ),
        )
        for name in ("one", "two")
    ]
    assert [trainer.preparation.cached for trainer in trainers] == [False, True]
    prefixes = [trainer.federation.broadcast["soft_prompt"] for trainer in trainers]
    assert torch.equal(*prefixes)


# --- public data --------------------------------------------------------------------------------


def overlapping(folder: Path) -> Any:
    """The public file holds three of the clients' rows and one of its own."""
    data = ready_data(folder, public=None, server=None)
    owned = [data.clients.load()[row] for row in data._divided().clients[0].rows[:3]]
    lines = [
        f'{{"prompt": "{row["prompt"]}", "completion": "{row["completion"]}"}}' for row in owned
    ]
    public = folder / "public.jsonl"
    public.write_text("\n".join([*lines, '{"prompt": "unlike", "completion": "others"}']) + "\n")
    return make_data(folder, public=Files(str(public)), server=None)


def test_clients_examples_in_the_public_data_are_counted_in_a_warning(tmp_path: Path) -> None:
    data = overlapping(tmp_path)
    data.limit_tokens(60)
    data.setup("fit")
    with pytest.warns(UserWarning, match="`data.public`: 3 public examples occur in the clients'"):
        check_public_data(data, Distillation(STAGE, cache_dir=""))


def test_strict_public_data_makes_that_an_error_before_any_work(tmp_path: Path) -> None:
    server = make_server(
        tmp_path,
        initial_distillation=Distillation(STAGE, cache_dir="", strict_public_data=True),
    )
    with pytest.raises(ValueError, match=r"3 public examples .*strict_public_data` forbids that"):
        fit(tmp_path, tmp_path / "run", server=server, data=overlapping(tmp_path))
    assert not (tmp_path / "run").exists()


def test_public_data_apart_from_the_clients_raises_nothing(tmp_path: Path) -> None:
    check_public_data(ready_data(tmp_path), Distillation(STAGE, strict_public_data=True))


def test_missing_public_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs public data, but `data\.public` is null"):
        check_public_data(ready_data(tmp_path, public=None), Distillation(STAGE))


class Plug(FederatedCallback):
    """Pulls it after some steps of the distillation, and counts them."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def on_distillation_step(self, trainer: Any, step: int, loss: Tensor) -> None:
        self.steps += 1
        if step == self.after:
            raise KeyboardInterrupt


def test_a_distillation_cut_short_goes_on_where_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.preparation.SAVE_EVERY_N_STEPS", 4)
    distillation = Distillation(
        Stage(10, adamw(1e-3), LinearWarmup), logit_weight=1.0, max_logit_tokens=3, cache_dir=""
    )

    def run(name: str, plug: Plug, ckpt_path: str | None = None) -> Any:
        server = make_server(tmp_path, initial_distillation=distillation)
        fit(
            tmp_path,
            tmp_path / name,
            server=server,
            callbacks=[plug],
            ckpt_path=ckpt_path,
            num_rounds=0,
        )
        return load_state(tmp_path / name / "auxiliary.safetensors")["weights"]

    whole = run("whole", Plug(after=99))
    with pytest.raises(KeyboardInterrupt):
        run("cut", Plug(after=9))
    rest = Plug(after=99)
    resumed = run("cut", rest, ckpt_path="last")
    assert rest.steps == 2  # 8 of 10 were safe
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not list((tmp_path / "cut").glob("*.unfinished"))


def test_half_a_distillation_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.preparation.SAVE_EVERY_N_STEPS", 2)

    class Dying(Owner):
        def call(self, hook: str, *args: Any) -> None:
            if hook == "on_distillation_step" and args[0] == 3:
                raise KeyboardInterrupt

    distillation = Distillation(Stage(steps=4), cache_dir="")
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, "cut", distillation, Dying())
    assert list((tmp_path / "cut").glob("*.unfinished"))
    other, owner = replace(distillation, lm_weight=1.0), Owner()
    again = prepare(tmp_path, "cut", other, owner)
    assert owner.steps == 4
    assert same(again, prepare(tmp_path, "fresh", other))


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
    optimization = Optimization(*stage.build(prompt.parameters(), 2 * stage.steps))
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
    assert prepared.after.is_poor == poor
    assert [str(it.message)[:31] for it in caught] == ["The auxiliary model is too poor"] * 2 * poor
