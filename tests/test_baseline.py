"""The server-only baseline: what it equals, what it leaves alone, and how it survives a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.baseline import ServerOnlyBaseline
from fedsp.callbacks import FederatedCallback
from fedsp.history import Evaluation
from fedsp.sampling import UniformSampler
from fedsp.stages import Stage
from tiny import fit, make_data, make_server


class Interrupt(FederatedCallback):
    """Raises KeyboardInterrupt at the start of a round, as Ctrl-C would."""

    def __init__(self, round_idx: int) -> None:
        self.round_idx = round_idx

    def on_round_start(self, trainer: Any, round_idx: int, cohort: Any) -> None:
        if round_idx == self.round_idx:
            raise KeyboardInterrupt


def column(trainer: Any, name: str) -> list[float]:
    return [metrics[name] for metrics in trainer.history.rounds if name in metrics]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_the_baseline_is_the_run_without_clients(tmp_path: Path) -> None:
    alone = fit(tmp_path, tmp_path / "alone", sampler=UniformSampler(clients_per_round=0))
    beside = fit(tmp_path, tmp_path / "beside", callbacks=[ServerOnlyBaseline()])
    assert column(beside, "baseline/val_loss") == column(alone, "server/val_loss")
    assert len(column(beside, "baseline/val_loss")) == 3
    assert column(beside, "server/val_loss") != column(alone, "server/val_loss")


def test_the_baseline_leaves_the_run_alone(tmp_path: Path) -> None:
    plain = fit(tmp_path, tmp_path / "plain")
    beside = fit(tmp_path, tmp_path / "beside", callbacks=[ServerOnlyBaseline()])
    for name in ("server/val_loss", "server/train_loss", "client/train_loss", "comm/up_bytes"):
        assert column(plain, name) == column(beside, name)
    prompts = [trainer.server.require_model()[1].prefix() for trainer in (plain, beside)]
    assert torch.equal(*prompts)


def test_the_baseline_is_measured_only_when_the_server_is(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        callbacks=[ServerOnlyBaseline()],
        evaluation=Evaluation(every_n_rounds=2),
        num_rounds=4,
    )
    measured = ["baseline/val_loss" in metrics for metrics in trainer.history.rounds]
    assert measured == [False, True, False, True]
    every = fit(tmp_path, tmp_path / "every", callbacks=[ServerOnlyBaseline()], num_rounds=4)
    assert column(trainer, "baseline/val_loss") == column(every, "baseline/val_loss")[1::2]


def test_a_resumed_baseline_is_bit_identical(tmp_path: Path) -> None:
    whole, resumed = ServerOnlyBaseline(), ServerOnlyBaseline()
    first = fit(tmp_path, tmp_path / "whole", callbacks=[whole, Interrupt(-1)])
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "run", callbacks=[ServerOnlyBaseline(), Interrupt(2)])
    callbacks = [resumed, Interrupt(-1)]
    second = fit(tmp_path, tmp_path / "run", callbacks=callbacks, ckpt_path="last")
    assert column(first, "baseline/val_loss") == column(second, "baseline/val_loss")
    assert equal(whole.state_dict(), resumed.state_dict())


def test_the_best_round_of_the_baseline_is_tested_beside_that_of_the_run(tmp_path: Path) -> None:
    class Check(FederatedCallback):
        """Keeps the test split's loss of every prompt that the baseline has had."""

        def __init__(self, baseline: ServerOnlyBaseline) -> None:
            self.baseline = baseline
            self.losses: list[float] = []

        def on_round_end(self, trainer: Any, round_idx: int, metrics: dict[str, float]) -> None:
            self.losses.append(trainer.measure(self.baseline._twin, "test")["loss"])

    baseline = ServerOnlyBaseline()
    check = Check(baseline)
    trainer = fit(tmp_path, tmp_path / "run", callbacks=[baseline, check])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    losses = column(trainer, "baseline/val_loss")
    best = losses.index(min(losses))
    server_only = results["selection"]["server_only"]
    assert server_only == {"round": best, "baseline/val_loss": losses[best]}
    assert results["test"]["server_only"]["loss"] == check.losses[best]
    # the run's own prompt is still the one that was chosen
    assert torch.equal(
        trainer.server.require_model()[1].prefix(), trainer.history.best.payload["soft_prompt"]
    )


def test_a_baseline_that_only_gets_worse_keeps_the_initial_prompt(tmp_path: Path) -> None:
    def diverge(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=50.0, maximize=True)

    server = make_server(tmp_path, training=Stage(steps=2, optimizer=diverge))
    baseline = ServerOnlyBaseline()
    fit(tmp_path, tmp_path / "run", server=server, callbacks=[baseline], num_rounds=2)
    best = baseline._require_history().best
    assert best is not None
    assert best.round_idx == -1


def test_a_server_without_steps_is_refused(tmp_path: Path) -> None:
    server = make_server(tmp_path, training=Stage(steps=0))
    with pytest.raises(ValueError, match=r"`trainer.callbacks`.*`model.training.steps` is 0"):
        fit(tmp_path, tmp_path / "run", server=server, callbacks=[ServerOnlyBaseline()])


def test_a_server_without_data_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path, server=None)
    with pytest.raises(ValueError, match=r"`trainer.callbacks`.*`data.server` is null"):
        fit(tmp_path, tmp_path / "run", data=data, callbacks=[ServerOnlyBaseline()])


def test_before_the_run_there_is_no_state() -> None:
    baseline = ServerOnlyBaseline()
    assert baseline.state_dict() == {}
    baseline.load_state_dict({})
    with pytest.raises(RuntimeError, match="on_fit_start"):
        baseline._require_history()
