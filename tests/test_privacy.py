"""Runs under noise: what they cost by dp-accounting's own figures, what they send, how they end."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import rdp
from torch import Tensor

from commands import changed, command, make_config, of_class, write_config
from fedsp.aggregation import CoordinateMedian, StreamingMean
from fedsp.callbacks import FederatedCallback
from fedsp.clipping import AdaptiveClipping
from fedsp.federation import Communication
from fedsp.history import Evaluation
from fedsp.noise import NoiseSource
from fedsp.payload import Payload, flatten
from fedsp.privacy import CentralPrivacy
from fedsp.sampling import SingleClient, UniformSampler
from fedsp.stages import Stage
from noisy import DELTA, SECRET, by_hand, central, local
from private_runs import REPEATABLE, Stops, results, spent
from processes import run_ranks
from tiny import adamw, fit, make_client, make_data, make_server

# --- central: what it costs -----------------------------------------------------------------------


def test_epsilon_of_every_round_is_dp_accountings_own(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tmp_path / "run", privacy=central())
    assert spent(trainer) == pytest.approx([by_hand(1.0, n) for n in (1, 2, 3)], rel=1e-12)
    found = results(tmp_path / "run")["central"]
    assert found["epsilon"] == spent(trainer)[-1]
    assert (found["delta"], found["releases"], found["amplification"]) == (DELTA, 3, "none")
    assert found["neighbours"].startswith("one client's changes, all of them, are there or zero")


def test_a_client_pays_only_for_the_rounds_that_it_takes_part_in(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        privacy=central(),
        sampler=UniformSampler(clients_per_round=1),
        num_rounds=4,
    )
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    cohorts = [json.loads(line)["cohort"] for line in lines]
    counts: Counter[int] = Counter()
    expected = []
    for cohort in cohorts:
        counts.update(cohort)
        expected.append(by_hand(1.0, max(counts.values())))
    assert max(counts.values()) < 4
    assert spent(trainer) == pytest.approx(expected, rel=1e-12)


def test_sampling_is_accounted_for_clients_that_are_replaced(tmp_path: Path) -> None:
    """Another client in one's place moves the sum by twice the norm: half the noise multiplier."""
    privacy = central(noise_multiplier=4.0, amplification="sampling")
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        privacy=privacy,
        sampler=UniformSampler(clients_per_round=1),
        seed=SECRET,
        num_rounds=2,
    )
    event = dp_accounting.SampledWithoutReplacementDpEvent(3, 1, dp_accounting.GaussianDpEvent(2.0))
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation).compose(event, 2)
    assert spent(trainer)[-1] == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)
    assert spent(trainer)[-1] < by_hand(2.0, 2)


def test_epsilon_is_shown_before_during_and_after_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(
        tmp_path,
        tmp_path / "run",
        privacy=central(max_epsilon=100.0),
        client=make_client(privacy=local()),
        enable_progress_bar=True,
        num_rounds=2,
    )
    out = capsys.readouterr().out
    text = " ".join(out.split())
    first, second = (f"{by_hand(1.0, n):.3g}" for n in (1, 2))
    own = f"{by_hand(2.0, 2):.4g}"
    row = next(line for line in out.splitlines() if re.match(r"[ *]+1 ", line))
    assert {second, f"{by_hand(2.0, 2):.3g}"} <= set(row.split())
    assert first in out
    # before the run and after it
    spent_text = f"epsilon {by_hand(1.0, 2):.4g} of 100 at delta 0.01, of a client, server's noise"
    assert text.count(spent_text) == 2
    assert f"epsilon {own} at delta 0.01, of a client, its own noise, 2 releases" in text


# --- central: what it does ------------------------------------------------------------------------


class Watches(FederatedCallback):
    """Keeps a round's accepted updates, what they started from and what came of them."""

    def __init__(self) -> None:
        self.changes: list[Tensor] = []
        self.start = self.after = torch.empty(0)

    def on_update_accepted(
        self, trainer: Any, round_idx: int, client_id: int, update: Payload, reference: Payload
    ) -> None:
        self.start = flatten(reference)
        self.changes.append(flatten(update) - self.start)

    def on_aggregate_end(self, trainer: Any, round_idx: int, payload: Payload) -> None:
        self.after = flatten(payload)


@REPEATABLE
def test_the_server_takes_the_noised_mean_of_the_clipped_changes(tmp_path: Path) -> None:
    watches = Watches()
    fit(
        tmp_path,
        tmp_path / "run",
        privacy=central(noise_multiplier=0.5, noise_seed=5),
        callbacks=[watches],
        num_rounds=1,
    )
    norms = [float(change.norm()) for change in watches.changes]
    assert min(norms) > 0.1
    clipped = sum(
        change * (0.1 / norm) for change, norm in zip(watches.changes, norms, strict=True)
    )
    drawn = NoiseSource(5).draw(len(watches.start) + 1, round_idx=0)[:-1]
    expected = watches.start + (clipped + 0.5 * 0.1 * drawn) / 3
    assert torch.allclose(watches.after.double(), expected, atol=1e-6)


def test_two_runs_of_one_seed_have_other_noise(tmp_path: Path) -> None:
    runs = [fit(tmp_path, tmp_path / name, privacy=central(), num_rounds=1) for name in ("a", "b")]
    one, other = (trainer.server.payload()["soft_prompt"] for trainer in runs)
    assert not torch.equal(one, other)


@REPEATABLE
def test_a_round_takes_its_noised_step_though_every_update_is_rejected(tmp_path: Path) -> None:
    watches = Watches()
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        privacy=central(noise_seed=0),
        communication=Communication(max_update_norm=1e-9),
        server=make_server(tmp_path, training=Stage(0)),
        callbacks=[watches],
        num_rounds=1,
    )
    start = trainer.history.rounds[0]
    assert start["round/rejected_updates"] == 3
    assert "privacy/clipped_fraction" not in start
    drawn = NoiseSource(0).draw(len(watches.after) + 1, round_idx=0)[:-1]
    initial = watches.after.double() - 0.1 / 3 * drawn
    before = flatten(fit(tmp_path, tmp_path / "none", num_rounds=0).server.payload())
    assert torch.allclose(initial, before.double(), atol=1e-6)


def test_an_adaptive_norm_is_logged_and_outlasts_a_resume(tmp_path: Path) -> None:
    def privacy() -> CentralPrivacy:
        return central(clipping=AdaptiveClipping(0.05, count_noise=1.0))

    run_dir = tmp_path / "run"
    fit(tmp_path, run_dir, privacy=privacy(), num_rounds=2)
    trainer = fit(tmp_path, run_dir, privacy=privacy(), num_rounds=3, ckpt_path="last")
    norms = spent(trainer, "clip_norm")
    assert norms[0] == 0.05
    assert len(set(norms)) == 3
    assert spent(trainer) == pytest.approx([by_hand(1.0, n) for n in (1, 2, 3)], rel=1e-12)


# --- central: the budget --------------------------------------------------------------------------


def test_the_budget_ends_the_run_before_the_round_that_would_exceed_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    between = (by_hand(1.0, 2) + by_hand(1.0, 3)) / 2
    run_dir = tmp_path / "run"
    privacy = central(max_epsilon=between)
    evaluation = Evaluation(every_n_rounds=5)
    trainer = fit(tmp_path, run_dir, privacy=privacy, num_rounds=6, evaluation=evaluation)
    assert trainer.history.rounds_done == 2
    assert spent(trainer)[-1] == pytest.approx(by_hand(1.0, 2), rel=1e-12)
    assert "server/val_loss" in trainer.history.rounds[-1]
    assert "The run ends after 2 rounds: another one would cost more" in capsys.readouterr().out
    card = (run_dir / "adapter" / "README.md").read_text()
    assert f"| differential_privacy, central, epsilon | {by_hand(1.0, 2):.6g} |" in card
    assert "test" in json.loads((run_dir / "results.json").read_text())
    again = fit(
        tmp_path,
        run_dir,
        privacy=central(max_epsilon=between),
        num_rounds=6,
        evaluation=evaluation,
        ckpt_path="last",
    )
    assert again.history.rounds_done == 2
    more = central(max_epsilon=by_hand(1.0, 3))
    longer = fit(tmp_path, run_dir, privacy=more, num_rounds=6, ckpt_path="last")
    assert longer.history.rounds_done == 3


@REPEATABLE
def test_a_resumed_run_has_spent_what_an_undisturbed_one_has(tmp_path: Path) -> None:
    whole = fit(tmp_path, tmp_path / "whole", privacy=central(noise_seed=1), num_rounds=4)
    run_dir = tmp_path / "run"
    stops = [Stops(2, "on_round_start")]
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, run_dir, privacy=central(noise_seed=1), num_rounds=4, callbacks=stops)
    privacy = central(noise_seed=1)
    resumed = fit(tmp_path, run_dir, privacy=privacy, num_rounds=4, ckpt_path="last")
    assert spent(resumed) == spent(whole)
    assert results(run_dir) == results(tmp_path / "whole")
    assert torch.equal(
        resumed.server.payload()["soft_prompt"], whole.server.payload()["soft_prompt"]
    )


def test_a_round_that_died_after_its_noise_was_drawn_is_paid_for_twice(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, run_dir, privacy=central(), callbacks=[Stops(1)])
    trainer = fit(tmp_path, run_dir, privacy=central(), ckpt_path="last")
    assert spent(trainer) == pytest.approx([by_hand(1.0, n) for n in (1, 3, 4)], rel=1e-12)


def test_a_round_that_died_before_costs_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, run_dir, privacy=central(), callbacks=[Stops(1, "on_client_end")])
    trainer = fit(tmp_path, run_dir, privacy=central(), ckpt_path="last")
    assert spent(trainer)[-1] == pytest.approx(by_hand(1.0, 3), rel=1e-12)


@pytest.mark.parametrize("where", ["run", "elsewhere"])
def test_going_back_to_an_older_checkpoint_forgets_nothing(tmp_path: Path, where: str) -> None:
    run_dir = tmp_path / "run"
    fit(tmp_path, run_dir, privacy=central(), num_rounds=2, keep_checkpoints=5)
    older = run_dir / "checkpoints" / "round-000001.safetensors"
    target = tmp_path / where
    if where == "elsewhere":
        (target / "clients").parent.mkdir()
        (run_dir / "clients").rename(target / "clients")
    trainer = fit(
        tmp_path, target, privacy=central(), num_rounds=2, keep_checkpoints=5, ckpt_path=str(older)
    )
    # in the run's own folder both rounds stay paid; a new folder knows what the checkpoint knows
    assert spent(trainer)[-1] == pytest.approx(by_hand(1.0, 3 if where == "run" else 2), rel=1e-12)
    budget = json.loads((target / "privacy_budget.json").read_text())
    assert budget["rounds"] == {"0": 1, "1": 2 if where == "run" else 1}


# --- central: what is refused ---------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a robust rule": (
        lambda: {"aggregator": CoordinateMedian()},
        r"`trainer.privacy` takes the place of `trainer.aggregator`.* got CoordinateMedian",
    ),
    "weights": (
        lambda: {"aggregator": StreamingMean(weight_by_examples=True)},
        r"`weight_by_examples: false`, got StreamingMean",
    ),
    "a round that depends on the updates": (
        lambda: {"communication": Communication(min_updates=2)},
        r"`trainer.communication.min_updates` must be 1 with `trainer.privacy`, got 2",
    ),
    "no clients": (
        lambda: {"sampler": UniformSampler(clients_per_round=0)},
        r"`trainer.privacy` hides clients' updates, and a round has none",
    ),
    "a known seed": (
        lambda: {"privacy": central(amplification="sampling")},
        r"`trainer.privacy.amplification` sampling needs a `trainer.seed` that nobody can guess",
    ),
    "no sample": (
        lambda: {
            "privacy": central(amplification="sampling"),
            "sampler": SingleClient(0),
            "seed": SECRET,
        },
        r"`trainer.privacy.amplification` sampling needs fedsp.sampling.UniformSampler, got Single",
    ),
    "too little for one round": (
        lambda: {"privacy": central(max_epsilon=0.5)},
        r"`trainer.privacy.max_epsilon` must be at least 2.\d+, which one round costs at delta",
    ),
    "too little noise on the count": (
        lambda: {"privacy": central(clipping=AdaptiveClipping())},
        r"`trainer.privacy.clipping.count_noise` must be above half of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_private_is_refused_before_any_work(tmp_path: Path, case: str) -> None:
    make, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, tmp_path / "run", **{"privacy": central(), **make()})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("who", ["trainer", "client"])
def test_a_server_that_trains_on_the_clients_rows_is_refused(tmp_path: Path, who: str) -> None:
    options: dict[str, Any] = {"data": make_data(tmp_path, pool_clients=True)}
    options |= (
        {"privacy": central()} if who == "trainer" else {"client": make_client(privacy=local())}
    )
    with pytest.raises(ValueError, match=r"`data.pool_clients: true` lets the server train on"):
        fit(tmp_path, tmp_path / "run", **options)


@pytest.mark.parametrize("who", ["trainer", "client"])
def test_a_missing_library_is_named(
    tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.accounting.importlib.util.find_spec", lambda name: None)
    options = (
        {"privacy": central()} if who == "trainer" else {"client": make_client(privacy=local())}
    )
    with pytest.raises(ModuleNotFoundError, match=rf"`{who}.privacy` needs dp-accounting"):
        fit(tmp_path, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_noise_that_can_be_drawn_again_and_a_large_delta_are_called_out(tmp_path: Path) -> None:
    sizes = {"aggregator": StreamingMean(), "min_updates": 1, "seed": 0, "sizes": (3, 3)}
    with pytest.warns(UserWarning, match=r"`trainer.privacy.noise_seed` is set: THE NOISE CAN BE"):
        central(noise_seed=0).check(sampler=UniformSampler(), **sizes)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"`client.privacy.noise_seed` is set: THE NOISE CAN BE"):
        local(noise_seed=0).check()
    with pytest.warns(UserWarning, match=r"`trainer.privacy.delta` 0.4 is above 1 / 3 clients"):
        central(delta=0.4).check(sampler=UniformSampler(), **sizes)  # type: ignore[arg-type]


# --- several ranks, the command line --------------------------------------------------------------


def two_ranks(folder: Path, run_dir: Path) -> dict[str, Any]:
    trainer = fit(
        folder,
        run_dir,
        privacy=central(max_epsilon=by_hand(1.0, 2)),
        client=make_client(
            privacy=local(max_epsilon=by_hand(2.0, 1)), soft_prompt=Stage(1, adamw(1e-2))
        ),
        devices=2,
    )
    payload = trainer.server.payload()["soft_prompt"].flatten().tolist()
    names = ("epsilon", "client_epsilon", "sat_out", "clip_norm")
    return {"payload": payload, **{name: spent(trainer, name) for name in names}}


def test_all_ranks_have_the_same_noise_and_the_same_budget(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    one, other = run_ranks(two_ranks, tmp_path / "out", tmp_path / "shared", tmp_path / "run")
    assert one == other
    assert one["epsilon"] == pytest.approx([by_hand(1.0, 1), by_hand(1.0, 2)], rel=1e-12)
    assert one["client_epsilon"] == pytest.approx([by_hand(2.0, 1)] * 2, rel=1e-12)
    assert one["sat_out"] == [0, 3]


def test_everything_is_set_in_a_configuration(tmp_path: Path) -> None:
    clipping = of_class("fedsp.clipping.AdaptiveClipping", initial_norm=0.2, count_noise=2.0)
    numbers = {"noise_multiplier": 1.5, "delta": DELTA}
    changes = {
        "trainer.aggregator": None,
        "trainer.num_rounds": 1,
        "trainer.callbacks": None,
        "trainer.privacy": of_class("fedsp.privacy.CentralPrivacy", clipping=clipping, **numbers),
        "client.init_args.privacy": of_class(
            "fedsp.privacy.LocalPrivacy", clip_norm=1.0, **numbers
        ),
    }
    file = write_config(tmp_path / "config.yaml", changed(make_config(tmp_path), changes))
    outcome = command("fit", "--config", file)
    assert outcome.status == 0, outcome
    found = results(tmp_path / "run")
    assert found["central"]["epsilon"] == pytest.approx(by_hand(1.5, 1), rel=1e-12)
    assert found["local"]["epsilon"] == pytest.approx(by_hand(0.75, 1), rel=1e-12)
    # how far a run goes may be said anew, how much noise it has may not
    budget = f"--trainer.privacy.max_epsilon={by_hand(1.5, 2) + 0.01}"
    more = ("fit", "--config", tmp_path / "run" / "config.yaml", "--ckpt_path", "last", budget)
    assert command(*more, "--trainer.num_rounds", 5).status == 0
    assert results(tmp_path / "run")["central"]["releases"] == 2
    outcome = command(*more, "--trainer.privacy.noise_multiplier", 9)
    assert outcome.status == 1
    assert "noise_multiplier: 1.5 in the checkpoint, 9.0 now" in outcome.err
