"""The server's line search: its choice against losses that transformers' own model gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.acceptance import Acceptance
from fedsp.baseline import ServerOnlyBaseline
from fedsp.data import FederatedDataModule
from fedsp.server import ServerModule
from tiny import fit, make_data, make_server

FRACTIONS = (0.0, 0.5, 1.0)
FABRIC = Fabric(accelerator="cpu", devices=1)


def ready(folder: Path, **options: Any) -> tuple[ServerModule, FederatedDataModule]:
    server, data = make_server(folder), make_data(folder, **options)
    server.configure_model()
    data.limit_tokens(60)
    data.setup("fit")
    server.initialize_prompt(data.sample_ids(4))
    return server, data


@torch.no_grad()
def expected_loss(server: ServerModule, data: FederatedDataModule, prefix: Tensor) -> float:
    """Mean over the answers' tokens, row by row, from logits that no code of the search makes."""
    backbone = server.require_model()[0]
    losses = []
    for batch in data.val_dataloader():
        for ids, mask, owner in zip(
            batch["input_ids"], batch["attention_mask"], batch["choice"], strict=True
        ):
            row, answer = ids[mask.bool()][None], owner[mask.bool()][1:] >= 0
            hidden = backbone.hidden_states(row, torch.ones_like(row), prefix)
            logits = backbone.logits(hidden)[0, :-1][answer]
            losses.append(F.cross_entropy(logits, row[0, 1:][answer], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("best", FRACTIONS)
def test_the_point_with_the_lowest_loss_is_taken(tmp_path: Path, best: float) -> None:
    server, data = ready(tmp_path)
    good = server.payload()["soft_prompt"]
    far = good + 3 * torch.randn(good.shape, generator=torch.Generator().manual_seed(0))
    before = {0.0: good, 0.5: 2 * good - far, 1.0: far}[best]
    after = far if best != 1.0 else good
    points = [torch.lerp(before, after, fraction) for fraction in FRACTIONS]
    losses = [expected_loss(server, data, point) for point in points]
    lowest = FRACTIONS[losses.index(min(losses))]
    payload, fraction = Acceptance(FRACTIONS).choose(
        FABRIC, server, data, {"soft_prompt": before}, {"soft_prompt": after}
    )
    assert fraction == lowest
    assert torch.equal(payload["soft_prompt"], points[FRACTIONS.index(lowest)])


def test_a_run_notes_how_much_was_taken_and_takes_nothing_that_harms(tmp_path: Path) -> None:
    only_all = fit(tmp_path, tmp_path / "all", acceptance=Acceptance([1.0]))
    plain = fit(tmp_path, tmp_path / "plain")
    assert [r["server/val_loss"] for r in only_all.history.rounds] == [
        r["server/val_loss"] for r in plain.history.rounds
    ]
    nothing = fit(tmp_path, tmp_path / "nothing", acceptance=Acceptance([0.0]))
    assert {r["server/accepted_fraction"] for r in nothing.history.rounds} == {0.0}
    assert "server/accepted_fraction" not in plain.history.rounds[0]


def test_the_servers_own_steps_are_taken_only_where_that_is_asked(tmp_path: Path) -> None:
    plain = fit(tmp_path, tmp_path / "plain")
    both = Acceptance([1.0], server_training=True)
    everything = fit(tmp_path, tmp_path / "all", acceptance=both)
    assert [r["server/val_loss"] for r in everything.history.rounds] == [
        r["server/val_loss"] for r in plain.history.rounds
    ]
    nothing = fit(
        tmp_path,
        tmp_path / "nothing",
        acceptance=Acceptance([0.0], server_training=True),
        callbacks=[ServerOnlyBaseline()],
    )
    for metrics in nothing.history.rounds:
        assert metrics["server/accepted_training"] == 0.0
        # with neither step taken all stays where it was, the baseline's twin too
        assert metrics["server/val_loss"] == metrics["baseline/val_loss"]
        assert metrics["server/val_loss"] == nothing.history.rounds[0]["server/val_loss"]
    trained = fit(tmp_path, tmp_path / "clients", acceptance=Acceptance([0.0]))
    losses = [metrics["server/val_loss"] for metrics in trained.history.rounds]
    assert losses[-1] != nothing.history.rounds[-1]["server/val_loss"]
    assert "server/accepted_training" not in trained.history.rounds[0]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for fractions in ([], [0.5, 1.2], [-0.1]):
        with pytest.raises(ValueError, match=r"`trainer.acceptance.fractions` must be numbers in"):
            Acceptance(fractions)
    with pytest.raises(ValueError, match=r"`trainer.acceptance.num_batches` must be at least 1"):
        Acceptance(num_batches=0)
    with pytest.raises(ValueError, match=r"`trainer.acceptance` measures on the selection split"):
        fit(
            tmp_path,
            tmp_path / "run",
            acceptance=Acceptance(),
            data=make_data(tmp_path, selection=None),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fractions", [FRACTIONS, (1.0, 0.5)])
def test_a_step_that_diverged_is_not_taken(tmp_path: Path, fractions: tuple[float, ...]) -> None:
    server, data = ready(tmp_path)
    before = server.payload()
    after = {name: torch.full_like(value, float("nan")) for name, value in before.items()}
    payload, fraction = Acceptance(fractions).choose(FABRIC, server, data, before, after)
    assert fraction == 0.0
    assert torch.equal(payload["soft_prompt"], before["soft_prompt"])
