"""Which public data the auxiliary model may be taught on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.callbacks import FederatedCallback
from fedsp.distillation import Distillation
from fedsp.preparation import check_public_data
from fedsp.schedules import LinearWarmup
from fedsp.sources import Files
from fedsp.stages import Stage
from fedsp.state_files import load_state
from teaching import STAGE, Owner, prepare, ready_data, same
from tiny import adamw, fit, make_data, make_server


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
