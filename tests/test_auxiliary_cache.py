"""An auxiliary model that was taught once is found again, and only where it is the same."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.auxiliary import KeptLayers
from fedsp.batching import Batching
from fedsp.distillation import Distillation
from fedsp.prompt_pool import PromptPool
from fedsp.server import SoftPromptSpec
from fedsp.soft_prompt import TextInit
from fedsp.sources import Files
from fedsp.stages import Stage
from teaching import STAGE, Owner, cached_files, prepare, ready_data, same
from tiny import files, fit, make_client, make_server


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


@pytest.mark.parametrize("change", [{"dropout": 0.2}, {"reparameterization_size": 3}])
def test_what_makes_the_prompts_that_it_learns_to_read_counts(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    pool = PromptPool(rounds=1)
    spec = Distillation(Stage(steps=1), prompts=pool, cache_dir=str(tmp_path / "models"))
    for name, options in (("one", {}), ("two", change)):
        prompt = SoftPromptSpec(4, TextInit(), **{"dropout": 0.1, **options})
        data = ready_data(tmp_path)
        assert not prepare(tmp_path, name, spec, data=data, soft_prompt=prompt).cached
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
