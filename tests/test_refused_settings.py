"""Settings that would fail, or do nothing, only after hours of work: refused before any of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.client import ClientModule
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.federation import Communication
from fedsp.recipes import WholeModel
from fedsp.server import SoftPromptSpec
from fedsp.stages import Stage
from fedsp.tuned import AllWeights
from tiny import fit, make_client, make_data, make_server, make_trainer


def refused(folder: Path, message: str, **options: Any) -> None:
    run_dir = folder / "run"
    with pytest.raises(ValueError, match=message):
        fit(folder, run_dir, **options)
    assert not run_dir.exists()


def test_nothing_to_train(tmp_path: Path) -> None:
    server = make_server(tmp_path, soft_prompt=SoftPromptSpec(0))
    refused(tmp_path, r"num_virtual_tokens` is 0 and `model.tuned_weights` null", server=server)


def test_a_first_stage_that_the_second_leaves_nothing_to_train(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "soft_prompt": SoftPromptSpec(0),
        "tuned_weights": AllWeights(),
        "deploy_auxiliary": True,
    }
    message = r"`client.auxiliary.steps` must be 0 for `model.tuned_weights` AllWeights, got 1"
    refused(tmp_path, message, server=make_server(tmp_path, **options))


def test_a_whole_model_with_a_trimmed_vocabulary_has_nothing_to_be_taught(tmp_path: Path) -> None:
    recipe = TrimmedVocabulary(WholeModel(), num_tokens=50)
    message = r"`client.auxiliary.steps` must be 0 for `model.auxiliary` TrimmedVocabulary"
    refused(tmp_path, message, server=make_server(tmp_path, auxiliary=recipe))
    assert LowRank(2, WholeModel()).is_taught, "its thin matrices are its own"


def test_more_updates_than_a_round_has_clients(tmp_path: Path) -> None:
    message = r"`trainer.communication.min_updates` must be at most .* of a round, 3, got 4"
    refused(tmp_path, message, communication=Communication(min_updates=4))


@pytest.mark.parametrize("first", [Stage(steps=2), Stage(steps=1, accumulate_grad_batches=4)])
def test_joint_stages_of_other_lengths(first: Stage) -> None:
    second = Stage(steps=4)
    with pytest.raises(ValueError, match=r"`client.joint` needs the same .*, got \(\d, \d\) and"):
        ClientModule(first, second, joint=True)


def test_two_optimizers_behind_one_loss_scale(tmp_path: Path) -> None:
    client = make_client(auxiliary=Stage(steps=2), soft_prompt=Stage(steps=2), joint=True)
    trainer = make_trainer(tmp_path / "run")
    trainer.precision = "16-mixed"  # Fabric itself has it on GPUs only
    with pytest.raises(ValueError, match=r"`client.joint` needs `trainer.precision` 32-true or"):
        trainer.fit(make_server(tmp_path), client, make_data(tmp_path))


@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.LBFGS(p), lambda p: torch.optim.SparseAdam(p)]
)
def test_optimizers_that_need_more_than_a_dense_gradient(tmp_path: Path, optimizer: Any) -> None:
    message = r"`{}` must step on dense gradients and without a closure, got (LBFGS|SparseAdam)"
    client = make_client(soft_prompt=Stage(1, optimizer))
    refused(tmp_path, message.format("client.soft_prompt.optimizer"), client=client)
    refused(tmp_path, message.format("trainer.server_optimizer"), server_optimizer=optimizer)


def test_a_run_does_not_go_on_from_its_best_prompt(tmp_path: Path) -> None:
    fit(tmp_path, tmp_path / "one", num_rounds=1)
    with pytest.raises(ValueError, match=r"`ckpt_path` must be last or a file .*, got best"):
        fit(tmp_path, tmp_path / "one", num_rounds=2, ckpt_path="best")
