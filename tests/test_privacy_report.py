"""The model-privacy report: figures by hand, and against the models put together by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import changed, command, make_config, of_class, write_config
from fedsp.auxiliary import KeptLayers
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.privacy_report import (
    ModelPrivacy,
    compare_tensors,
    lead,
    leaked_share,
    measure_privacy,
    summary,
)
from fedsp.stages import Stage
from fedsp.state_files import load_state
from tiny import fit, make_client, make_data, make_server, make_trainer


def test_the_share_runs_from_guessing_to_what_the_server_has() -> None:
    assert leaked_share(client=lead("loss", 5.0, 5.0), server=lead("loss", 3.0, 5.0)) == 0
    assert leaked_share(client=lead("loss", 4.5, 5.0), server=lead("loss", 3.0, 5.0)) == 0.25
    assert leaked_share(client=lead("loss", 3.0, 5.0), server=lead("loss", 3.0, 5.0)) == 1
    worse = leaked_share(client=lead("loss", 6.0, 5.0), server=lead("loss", 3.0, 5.0))
    assert worse == -0.5, "worse than guessing"
    # an accuracy rises where a loss falls
    right = leaked_share(client=lead("accuracy", 0.5, 0.25), server=lead("accuracy", 0.75, 0.25))
    assert right == 0.5


@pytest.mark.parametrize("server", [0.0, -1.0])
def test_a_server_that_only_guesses_has_nothing_to_leak(server: float) -> None:
    assert leaked_share(client=0.5, server=server) is None


def test_held_tensors_are_found_whatever_they_are_called() -> None:
    """Six of eight global parameters verbatim, one tensor near another, two that are like none."""
    model = {
        "embedding": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "layer.0": torch.tensor([5.0, 6.0]),
        "layer.1": torch.tensor([3.0, 4.0]),
    }
    handout = {
        "table": model["embedding"].clone(),
        "cell": model["layer.0"].clone(),
        "taught": torch.tensor([3.0, 6.5]),
        "foreign": torch.zeros(3),
        "ids": torch.tensor([9000, 9001]),
    }
    held = compare_tensors(handout, model)
    assert held.verbatim == ["embedding", "layer.0"]
    assert held.verbatim_share == 6 / 8
    assert held.share_of_global == 13 / 8
    assert held.changed_share == 2 / 8
    distance = pytest.approx(math.hypot(2, 0.5) / math.hypot(5, 6))
    assert held.changed == {"taught": ("layer.0", distance)}
    assert held.unlike == ["foreign", "ids"], "no such shape; thousands of norms away"
    assert held.unlike_share == 5 / 8


def test_what_rounds_to_the_global_models_format_counts_as_its_own() -> None:
    model = {"weight": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    assert compare_tensors({"w": torch.tensor([1.0, 2.0])}, model).verbatim == ["weight"]
    assert compare_tensors({"w": torch.tensor([1.0, 2.00001])}, model).verbatim == ["weight"]
    assert not compare_tensors({"w": torch.tensor([1.0, 2.1])}, model).verbatim


def test_equal_tensors_under_two_names_are_all_found() -> None:
    model = {"norm.0": torch.ones(2), "norm.1": torch.ones(2)}
    held = compare_tensors({"a": torch.ones(2), "b": torch.ones(2)}, model)
    assert (held.verbatim, held.verbatim_share, held.changed) == (["norm.0", "norm.1"], 1.0, {})


def test_a_run_reports_what_its_models_measure(tmp_path: Path) -> None:
    """Oracle: a client with the handed-out weights and the best prompt, measured by itself."""
    run = tmp_path / "run"
    parts: dict[str, Any] = {
        "server": make_server(tmp_path, auxiliary=KeptLayers(layers=[0, 3])),
        "client": make_client(),
        "data": make_data(tmp_path),
        "callbacks": [ModelPrivacy()],
    }
    trainer = fit(tmp_path, run, num_rounds=2, **parts)
    report = json.loads((run / "privacy.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert report["metrics"]["global"]["loss"] == results["test"]["zero_shot"]["loss"]
    assert report["metrics"]["global_prompt"]["loss"] == results["test"]["best"]["loss"]
    assert results["privacy"]["leaked"] == report["leaked"]

    backbone, _ = trainer.server.require_model()
    best = trainer.history.best
    assert best is not None
    auxiliary = KeptLayers(layers=[0, 3]).build(backbone)
    auxiliary.load(load_state(run / "auxiliary.safetensors")["weights"])  # type: ignore[index, call-overload]
    for name, prefix in (
        ("auxiliary", None),
        ("auxiliary_prompt", best.payload["soft_prompt"][[0, 3]]),
    ):
        losses = []
        for batch in trainer.data.test_dataloader():
            # the plain way: every row through the whole model, labels picked from all logits
            hidden = auxiliary.backbone.hidden_states(
                batch["input_ids"], batch["attention_mask"], prefix
            )
            logs = auxiliary.backbone.logits(hidden)[:, :-1].log_softmax(-1)
            token = logs.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
            losses.append(-token[batch["choice"][:, 1:] >= 0])
        expected = float(torch.cat(losses).mean().detach())
        assert report["metrics"][name]["loss"] == pytest.approx(expected, abs=1e-5)

    server, client = (report["metrics"][f"{it}_prompt"]["loss"] for it in ("global", "auxiliary"))
    guessing = math.log(257)
    assert report["guessing"] == {"loss": pytest.approx(guessing)}
    expected = (guessing - client) / (guessing - server)
    assert report["leaked"]["loss"] == pytest.approx(expected)
    alone = report["metrics"]["auxiliary"]["loss"]
    assert report["gap_closed"]["loss"] == pytest.approx((alone - client) / (alone - server))
    # embeddings, positions and head are shared; two of four layers were taught
    held = report["held"]
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(held["verbatim"])
    nearest, distance = held["changed"]["transformer.h.1.mlp.c_fc.weight"]
    assert nearest == "transformer.h.3.mlp.c_fc.weight", "the kept layers are 0 and 3"
    assert 0 < distance < 0.5
    assert 0 < held["verbatim_share"] < held["share_of_global"] < 1


def test_an_auxiliary_model_that_was_not_taught_is_held_verbatim(tmp_path: Path) -> None:
    server = make_server(
        tmp_path, auxiliary=KeptLayers(layers=[0, 1, 2, 3]), initial_distillation=None
    )
    client = make_client(auxiliary=Stage(steps=0))
    data = make_data(tmp_path, public=None)
    trainer = fit(
        tmp_path, tmp_path / "run", num_rounds=0, server=server, client=client, data=data,
        callbacks=[ModelPrivacy()],
    )  # fmt: skip
    report = json.loads((trainer.folder.path / "privacy.json").read_text())
    assert report["held"]["verbatim_share"] == report["held"]["share_of_global"] == 1
    assert report["leaked"]["loss"] == pytest.approx(1, abs=1e-5)


def test_fedsp_test_reports_on_a_finished_run(tmp_path: Path) -> None:
    config = changed(make_config(tmp_path), {"trainer.callbacks": []})
    file = write_config(tmp_path / "config.yaml", config)
    refused = command("test", "--config", file, "--ckpt_path", "null", "--privacy", "true")
    assert refused.status == 1
    assert "need the auxiliary model that a run handed out" in refused.err

    assert command("fit", "--config", file).status == 0
    run = tmp_path / "run"
    assert not (run / "privacy.json").exists()
    outcome = command("test", "--config", run / "config.yaml", "--privacy", "true")
    assert outcome.status == 0, outcome.err
    report = json.loads((run / "privacy.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert report["metrics"]["global_prompt"] == results["test"]["best"]
    for words in ("auxiliary model + prompt", "guessing", "a client holds"):
        assert words in outcome.out


def test_choices_are_guessed_at_their_number(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{idx}", "choices": ["a", "b", "c", "d"][: 2 + idx % 2 * 2], "answer": 0}
        for idx in range(18)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = of_class("fedsp.sources.Files", paths=str(tmp_path / "choices.jsonl"))
    config = changed(
        make_config(tmp_path),
        {
            "trainer.num_rounds": 0,
            "trainer.callbacks": [of_class("fedsp.privacy_report.ModelPrivacy")],
            "data.init_args.clients": source,
            "data.init_args.task": of_class("fedsp.tasks.MultipleChoice"),
            "data.init_args.test": source,
            **{f"data.init_args.{name}": 2 for name in ("server", "public", "selection")},
        },
    )
    outcome = command("fit", "--config", write_config(tmp_path / "config.yaml", config))
    assert outcome.status == 0, outcome.err
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert report["guessing"]["accuracy"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert set(report["leaked"]) == {"loss", "accuracy"}


def test_a_report_without_a_test_split_is_refused_before_the_rounds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", callbacks=[ModelPrivacy()])
    with pytest.raises(ValueError, match=r"ModelPrivacy measures on the test split, but `data.te"):
        trainer.fit(make_server(tmp_path), make_client(), make_data(tmp_path, test=None))


def test_a_trimmed_vocabulary_is_not_compared(tmp_path: Path) -> None:
    recipe = TrimmedVocabulary(KeptLayers(num_layers=2), num_tokens=9)
    server = make_server(tmp_path, auxiliary=recipe)
    fit(tmp_path, tmp_path / "run", server=server, callbacks=[ModelPrivacy()], num_rounds=1)
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert report["known_tokens_only"] is True
    assert report["leaked"] == {"loss": None}
    assert report["gap_closed"] == {"loss": None}


def test_factors_are_like_no_tensor_and_ids_of_tokens_are_no_parameters(tmp_path: Path) -> None:
    """The 32 ids of kept tokens have the shape of a bias: the hidden size is 32."""
    recipe = TrimmedVocabulary(LowRank(2, calibration_batches=0), num_tokens=32)
    server = make_server(tmp_path, auxiliary=recipe, initial_distillation=None)
    trainer = fit(tmp_path, tmp_path / "run", server=server, num_rounds=0)
    report = measure_privacy(trainer)
    held = report["held"]
    assert held["changed"] == {}, "nothing was taught"
    assert len(held["unlike"]) == 4 * 4 * 2, "two factors of four projections of four layers"
    assert all(name.endswith((".down", ".up")) for name in held["unlike"])
    # the projections are [32, 96], [32, 32], [32, 128] and [128, 32]
    assert held["unlike_share"] == pytest.approx(held["share_of_global"] - held["verbatim_share"])
    total = sum(it.numel() for it in trainer.server.require_model()[0].model.parameters())
    assert held["unlike_share"] * total == pytest.approx(4 * 2 * (128 + 64 + 160 + 160))
    assert "in 32 tensors: transformer.h.0.attn.c_attn.down, " in summary(report)


def test_rows_of_a_trimmed_table_are_the_global_models_own() -> None:
    """Two of four rows of a table of eight numbers, and a weight of two that was changed."""
    model = {"table": torch.arange(8.0).reshape(4, 2), "weight": torch.tensor([3.0, 4.0])}
    handout = {"table": torch.tensor([[2.0, 3.0], [6.0, 7.0]]), "weight": torch.tensor([3.0, 6.5])}
    rows = {"table": torch.tensor([1, 3])}
    held = compare_tensors(handout, model, rows)
    assert held.verbatim == ["table"]
    assert held.verbatim_share == 0.4  # 4 of 10 numbers
    assert held.changed == {"weight": ("weight", 0.5)}  # 2.5 of a norm of 5
    assert compare_tensors(handout, model).verbatim == []
