"""Noise at the client: what leaves it, what it costs, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.auxiliary import KeptLayers
from fedsp.callbacks import FederatedCallback
from fedsp.executors import BudgetSpentError
from fedsp.messages import Contract, decode_update
from fedsp.noise import NoiseSource
from fedsp.privacy import LocalPrivacy
from fedsp.stages import Stage
from noisy import by_hand, local
from private_runs import REPEATABLE, Stops, results, spent
from tiny import fit, make_client, make_server


def test_a_clients_epsilon_is_dp_accountings_own_for_any_two_data_sets(tmp_path: Path) -> None:
    """Two clipped changes lie up to twice the norm apart: half the noise multiplier."""
    trainer = fit(tmp_path, tmp_path / "run", client=make_client(privacy=local()))
    expected = [by_hand(2.0, n) for n in (1, 2, 3)]
    assert spent(trainer, "client_epsilon") == pytest.approx(expected, rel=1e-12)
    found = results(tmp_path / "run")["local"]
    assert found["epsilon"] == pytest.approx(expected[-1], rel=1e-12)
    assert found["neighbours"] == "any two data sets that one client could have"


@REPEATABLE
def test_the_clipped_and_noised_change_leaves_the_client_and_nothing_else(tmp_path: Path) -> None:
    """Of four layers the client has two: the others come back as they were sent, without noise."""
    sent: dict[int, bytes] = {}

    class Keeps(FederatedCallback):
        def on_fit_start(self, trainer: Any) -> None:
            executor = trainer.federation.executor
            run = executor.run

            def watched(*args: Any) -> Any:
                for reply in run(*args):
                    sent[reply.client_id] = reply.data
                    yield reply

            executor.run = watched

    def run(name: str, privacy: LocalPrivacy | None) -> tuple[dict[int, bytes], Any]:
        sent.clear()
        trainer = fit(
            tmp_path,
            tmp_path / name,
            client=make_client(privacy=privacy),
            server=make_server(tmp_path, auxiliary=KeptLayers(num_layers=2), training=Stage(0)),
            callbacks=[Keeps()],
            num_rounds=1,
        )
        return dict(sent), trainer

    plain, trainer = run("plain", None)
    start = fit(tmp_path, tmp_path / "start", num_rounds=0).server.payload()["soft_prompt"]
    noised, _ = run("noised", local(noise_multiplier=0.25, noise_seed=3))
    contract: Contract = trainer.federation.contract
    slots = [slot for group in trainer.client.require_model()[0].slots for slot in group]
    others = [layer for layer in range(4) if layer not in slots]
    assert len(slots) == 2
    for client_id in plain:
        without, with_noise = (
            decode_update(
                data[client_id],
                contract,
                reference=trainer.federation.broadcast,
                round_idx=0,
                client_id=client_id,
            )
            for data in (plain, noised)
        )
        assert without.num_examples > 1
        assert with_noise.num_examples == 1
        change = (without.payload["soft_prompt"] - start)[slots].double()
        drawn = NoiseSource(3).draw(change.numel(), round_idx=0, client_id=client_id)
        clipped = change * (0.1 / change.norm())
        expected = start[slots] + clipped + 0.25 * 0.1 * drawn.view_as(clipped)
        found = with_noise.payload["soft_prompt"]
        assert torch.allclose(found[slots].double(), expected, atol=1e-6)
        assert torch.equal(found[others], start[others])


def test_a_client_whose_budget_is_spent_sits_out(tmp_path: Path) -> None:
    privacy = local(max_epsilon=(by_hand(2.0, 2) + by_hand(2.0, 3)) / 2)
    trainer = fit(tmp_path, tmp_path / "run", client=make_client(privacy=privacy))
    assert [metrics["round/clients"] for metrics in trainer.history.rounds] == [3, 3, 0]
    assert spent(trainer, "sat_out") == [0, 0, 3]
    assert spent(trainer, "client_epsilon")[-1] == pytest.approx(by_hand(2.0, 2), rel=1e-12)
    executor: Any = trainer.federation.executor
    with pytest.raises(BudgetSpentError, match=r"client 1 has spent its `client.privacy.max_eps"):
        executor.turn(3, 1, b"")


def test_what_a_client_sent_is_never_forgotten(tmp_path: Path) -> None:
    """Round 1 dies after client 0 has answered; it is run again: that client has answered 4 times.

    Then the run goes back to before round 1.
    """
    run_dir = tmp_path / "run"
    stops = Stops(1, "on_update_accepted")
    options: dict[str, Any] = {"keep_checkpoints": 9}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, run_dir, client=make_client(privacy=local()), callbacks=[stops], **options)
    trainer = fit(
        tmp_path, run_dir, client=make_client(privacy=local()), ckpt_path="last", **options
    )
    expected = [by_hand(2.0, n) for n in (1, 3, 4)]
    assert spent(trainer, "client_epsilon") == pytest.approx(expected, rel=1e-12)
    older = str(run_dir / "checkpoints" / "round-000001.safetensors")
    trainer = fit(
        tmp_path, run_dir, client=make_client(privacy=local()), ckpt_path=older, **options
    )
    assert trainer.federation.executor.most_answers() == 6
    assert [trainer.federation.executor.simulation.store.answers()[c] for c in (1, 2)] == [5, 5]  # type: ignore[attr-defined]


def test_a_local_budget_too_small_for_one_answer_is_refused(tmp_path: Path) -> None:
    client = make_client(privacy=local(max_epsilon=0.1))
    with pytest.raises(ValueError, match=r"`client.privacy.max_epsilon` must be at least 1.\d+"):
        fit(tmp_path, tmp_path / "run", client=client)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"`client.privacy.clip_norm` must be above 0, got 0.0"):
        local(clip_norm=0.0)
