"""A run that was stopped, killed or damaged goes on to the same bits, or says why not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.aggregation import StreamingMean
from fedsp.auxiliary import SharedCell
from fedsp.callbacks import FederatedCallback
from fedsp.checkpoint import Checkpoints
from fedsp.distillation import Distillation
from fedsp.history import Evaluation
from fedsp.recipes import OffsiteTuning, WholeModel
from fedsp.sampling import UniformSampler
from fedsp.server import SoftPromptSpec
from fedsp.stages import Stage
from fedsp.tuned import AllWeights, LoRA, OuterLayers
from interruptions import Interrupt, checkpointed, equal
from tiny import fit, make_client, make_data, make_server, make_trainer


@pytest.mark.parametrize(
    ("hook", "round_idx"),
    [
        ("on_fit_start", 0),
        ("on_client_end", 0),
        ("on_server_train_end", 1),
        ("on_round_end", 1),
        ("on_checkpoint_saved", 2),
        ("on_round_start", 2),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path, hook: str, round_idx: int
) -> None:
    fit(tmp_path, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "cut", callbacks=[Interrupt(hook, round_idx)])
    fit(tmp_path, tmp_path / "cut", ckpt_path="last", callbacks=[FederatedCallback()])
    assert equal(
        checkpointed(tmp_path / "whole")["tree"]["federation"],
        checkpointed(tmp_path / "cut")["tree"]["federation"],
    )
    assert equal(
        checkpointed(tmp_path / "whole")["tree"]["history"],
        checkpointed(tmp_path / "cut")["tree"]["history"],
    )
    whole, cut = ((tmp_path / name / "csv" / "metrics.csv") for name in ("whole", "cut"))
    assert len(cut.read_text().splitlines()) == len(whole.read_text().splitlines())


def test_a_server_optimizer_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "server_optimizer": lambda p: torch.optim.Adam(p, lr=0.1),
        "sampler": UniformSampler(clients_per_round=2),
        "aggregator": StreamingMean(weight_by_examples=True),
    }
    fit(tmp_path, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "cut", callbacks=[Interrupt("on_client_start", 1)], **options)
    fit(tmp_path, tmp_path / "cut", ckpt_path="last", callbacks=[FederatedCallback()], **options)
    assert equal(
        checkpointed(tmp_path / "whole")["tree"]["federation"],
        checkpointed(tmp_path / "cut")["tree"]["federation"],
    )


WEIGHT_METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"tuned_weights": LoRA(rank=2), "auxiliary": WholeModel()},
    "adapters": {"tuned_weights": OuterLayers(1), "auxiliary": OffsiteTuning(1, 1)},
    "small model": {
        "tuned_weights": AllWeights(),
        "auxiliary": SharedCell(train_embeddings=True),
        "deploy_auxiliary": True,
    },
}


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_tuned_weights_resume_to_the_same_bits(tmp_path: Path, method: str) -> None:
    def options() -> dict[str, Any]:
        settings = WEIGHT_METHODS[method]
        taught = settings["auxiliary"].is_taught
        return {
            "server": make_server(
                tmp_path,
                soft_prompt=SoftPromptSpec(num_virtual_tokens=0),
                initial_distillation=Distillation(Stage(steps=2), cache_dir="") if taught else None,
                **settings,
            ),
            "client": make_client(auxiliary=Stage(steps=0)),
            "server_optimizer": lambda p: torch.optim.Adam(p, lr=0.01),
        }

    fit(tmp_path, tmp_path / "whole", **options())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, tmp_path / "cut", callbacks=[Interrupt("on_client_end", 1)], **options())
    listen = [FederatedCallback()]
    fit(tmp_path, tmp_path / "cut", ckpt_path="last", callbacks=listen, **options())
    whole, cut = (checkpointed(tmp_path / name)["tree"] for name in ("whole", "cut"))
    assert equal(whole["federation"], cut["federation"])
    assert equal(whole["history"], cut["history"])


def test_a_used_run_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"`trainer\.run_dir` must be a new or empty folder"):
        fit(tmp_path, run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_resuming_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`ckpt_path` last: there is no checkpoint"):
        fit(tmp_path, tmp_path / "none", ckpt_path="last")


def test_a_checkpoint_of_another_configuration_names_the_keys(tmp_path: Path) -> None:
    def run(rounds: int, local_steps: int, ckpt_path: str | None) -> None:
        trainer = make_trainer(tmp_path / "run", num_rounds=rounds)
        trainer.config = {
            "trainer": {"num_rounds": rounds},
            "client": {"init_args": {"soft_prompt": {"steps": local_steps}}},
        }
        trainer.fit(make_server(tmp_path), make_client(), make_data(tmp_path), ckpt_path=ckpt_path)

    run(1, 2, None)
    with pytest.raises(ValueError, match=r"client\.init_args\.soft_prompt\.steps"):
        run(1, 5, "last")
    run(2, 2, "last")  # more rounds are no other experiment


def test_early_stopping_ends_the_run(tmp_path: Path) -> None:
    """Nothing is trained, so nothing beats the initial prompt: two evaluations and out."""
    trainer = fit(
        tmp_path,
        tmp_path / "run",
        server=make_server(tmp_path, training=Stage(steps=0)),
        client=make_client(auxiliary=Stage(steps=0), soft_prompt=Stage(steps=0)),
        num_rounds=9,
        evaluation=Evaluation(patience=2),
    )
    assert trainer.history.rounds_done == 2
    assert trainer.history.best is not None
    assert trainer.history.best.round_idx == -1


def test_the_best_round_is_what_is_exported(tmp_path: Path) -> None:
    from fedsp.export import import_adapter

    trainer = fit(tmp_path, tmp_path / "run")
    assert trainer.history.best is not None
    assert torch.equal(
        import_adapter(tmp_path / "run" / "adapter"), trainer.history.best.payload["soft_prompt"]
    )


def test_after_an_older_checkpoint_best_is_what_this_run_has_seen(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(tmp_path, run, num_rounds=4, keep_checkpoints=4)
    older = str(run / "checkpoints" / "round-000002.safetensors")
    resumed = fit(tmp_path, run, num_rounds=2, keep_checkpoints=4, ckpt_path=older)
    best = resumed.history.best
    assert best is not None
    assert best.round_idx < 2
    kept = Checkpoints(run / "checkpoints").load("best")
    assert kept.round_idx == best.round_idx + 1
    payload = kept.tree["federation"]["payload"]
    assert torch.equal(payload["soft_prompt"], best.payload["soft_prompt"])


def test_without_a_checkpoint_the_runs_own_first_prompt_is_measured(tmp_path: Path) -> None:
    """Made of the server's text, as round -1 of the run was."""
    trainer = fit(tmp_path, tmp_path / "run", num_rounds=0)
    assert trainer.history.best is not None
    parts = make_server(tmp_path), make_client(), make_data(tmp_path)
    measured = make_trainer(tmp_path / "run").validate(*parts, ckpt_path=None)
    assert measured["loss"] == trainer.history.best.value
