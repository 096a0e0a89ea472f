"""Every shipped method runs a round of the tiny federation, and only what it declares travels."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from commands import changed, command, make_config, write_config
from fedsp.audit import audit
from fedsp.ledger import read_ledger
from fedsp.shipped import shipped_names

PROMPT = {"soft_prompt"}
# methods in which nothing travels between server and clients
ALONE = ("zero_shot", "server_only", "prefix_tuning", "full_finetuning")
# what the tiny model and its rows need besides
SHORT = ["--model.initial_distillation.stage.steps=2"]
OPTIONS = {
    "fedsp": SHORT,
    "fedsp_paper": SHORT,
    "fedsp_non_iid": ["--data.partitioner.column=completion", "--data.partitioner.alpha=9"],
}
WEIGHTS = {
    "fedlora": lambda name: ".lora_" in name,
    "offsite_tuning": lambda name: name.split(".")[0] in ("first", "last"),
    "fedavg_auxiliary": lambda name: name.startswith("transformer."),
}


def run(folder: Path, method: str, *options: str, **changes: Any) -> Path:
    """Run a round of a method and return the run's folder."""
    config = make_config(folder)
    for name in ("sampler", "aggregator", "server_optimizer", "callbacks"):
        del config["trainer"][name]
    # as in the quickstart, over which the methods are meant to be laid
    pool = {"model.init_args.initial_distillation.prompts": {"rounds": 1}}
    config = changed(config, {"client.init_args.auxiliary.steps": 0, **pool, **changes})
    base = write_config(folder / "base.yaml", config)
    place = ["--trainer.num_rounds=0" if method == "zero_shot" else "--trainer.num_rounds=1"]
    outcome = command("fit", "--config", base, "--method", method, *place, *options)
    assert outcome.status == 0, outcome.err
    return folder / "run"


@pytest.mark.parametrize("method", shipped_names("method"))
def test_a_method_runs_a_round_and_sends_what_it_declares(tmp_path: Path, method: str) -> None:
    folder = run(tmp_path, method, *OPTIONS.get(method, []))
    results = json.loads((folder / "results.json").read_text())
    assert results["test"]["best"]["loss"] > 0
    assert results["test"]["zero_shot"]["loss"] > 0
    rows = read_ledger(folder / "ledger.jsonl")
    assert audit(folder).findings == ()
    if method in ALONE:
        assert not rows
        return
    sent = [{t["name"] for t in row["tensors"]} for row in rows if row["kind"] == "client_update"]
    assert len(sent) == {"local_only": 1, "fedsp_non_iid": 10}.get(method, 3)
    if method not in WEIGHTS:
        assert all(names == PROMPT for names in sent)
    else:
        assert all(names and all(map(WEIGHTS[method], names)) for names in sent)


def test_zero_shot_is_zero_shot(tmp_path: Path) -> None:
    results = json.loads((run(tmp_path, "zero_shot") / "results.json").read_text())
    assert results["test"]["best"] == results["test"]["zero_shot"]


def test_the_server_alone_equals_the_baseline_beside_a_run(tmp_path: Path) -> None:
    """Two ways to the same comparison: a method of its own, and the twin of a federated run."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "beside").mkdir()
    alone = json.loads((run(tmp_path / "alone", "server_only") / "results.json").read_text())
    twin = "--trainer.callbacks=fedsp.baseline.ServerOnlyBaseline"
    beside = json.loads(
        (run(tmp_path / "beside", "fedsp", twin, *SHORT) / "results.json").read_text()
    )
    assert alone["test"]["best"] == beside["test"]["server_only"]


def test_centralised_training_sees_everybodys_rows(tmp_path: Path) -> None:
    """120 rows, 56 of them held out or public, 20 the server's: 64 + 20 are trained on."""
    from fedsp.cli import FederatedCLI

    base = write_config(tmp_path / "base.yaml", make_config(tmp_path))
    cli = FederatedCLI(["--config", str(base), "--data.pool_clients=true"], run=False)
    cli.datamodule.default_tokenizer(tiny.files(tmp_path)[0], vocab_size=257)
    cli.datamodule.setup()
    assert cli.datamodule.num_examples("server") == 120 - 20 - 12 - 12


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fedsp", ["--data.public=null"], "`model.initial_distillation` needs public data"),
        ("server_only", ["--data.server=null"], "`data.server` or `data.pool_clients: true`"),
        ("prefix_tuning", ["--model.training.steps=0"], "needs `model.training.steps` above 0"),
        ("fedprompt", ["--client.auxiliary.steps=2"], "`client.auxiliary.steps` must be 0 for"),
        (
            "fedprompt",
            ["--model.initial_distillation.stage.steps=2"],
            "`model.initial_distillation.stage.steps` must be 0 for",
        ),
        ("offsite_tuning", ["--model.backbone.dtype=bfloat16"], "must be float32"),
        (
            "local_only",
            [
                "--model.auxiliary=fedsp.compression.TrimmedVocabulary",
                "--model.auxiliary.num_tokens=9",
                "--model.auxiliary.recipe=fedsp.auxiliary.SharedCell",
            ],
            "vocabulary gives other tokens no likelihood",
        ),
        (
            "offsite_tuning",
            ["--model.initial_distillation.prompts.rounds=1"],
            "`model.initial_distillation.prompts` teaches to read prompts",
        ),
        (
            "fedlora",
            ["--trainer.callbacks=fedsp.baseline.ServerOnlyBaseline"],
            "ServerOnlyBaseline tunes a soft prompt",
        ),
    ],
)
def test_a_method_that_lacks_something_says_so_before_any_work(
    tmp_path: Path, method: str, options: list[str], message: str
) -> None:
    base = write_config(tmp_path / "base.yaml", make_config(tmp_path))
    outcome = command("fit", "--config", base, "--method", method, *options)
    assert outcome.status == 1
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_exported_lora_gives_the_same_loss_in_peft(tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from fedsp.cli import FederatedCLI

    options = ["--model.training.optimizer.lr=0.1"]
    folder = run(tmp_path, "fedlora", *options)
    arguments = ["--config", str(folder / "config.yaml")]
    cli = FederatedCLI(arguments, run=False)
    server, data = cli.model, cli.datamodule
    cli.trainer.test(server, cli.client, data)
    delivered = AutoModelForCausalLM.from_config(server.backbone.model.config)
    untouched = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in server.backbone.model.state_dict().items()
        if ".lora_" not in name
    }
    delivered.load_state_dict(untouched)
    model = peft.PeftModel.from_pretrained(delivered, folder / "adapter").eval()
    batch = next(iter(data.server_dataloader(start_step=0, num_steps=1)))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ours = server.backbone.label_logits(batch)[0]
    rows, columns = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    assert torch.allclose(logits[rows, columns], ours, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        bare = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not torch.allclose(logits, bare, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "name"),
    [("offsite_tuning", "tuned_weights.safetensors"), ("fedprompt", "adapter_model.safetensors")],
)
def test_what_was_tuned_on_the_global_model_is_exported(
    tmp_path: Path, method: str, name: str
) -> None:
    assert (run(tmp_path, method) / "adapter" / name).is_file()


def test_what_was_tuned_on_the_auxiliary_model_is_not_exported_but_can_be_tested(
    tmp_path: Path,
) -> None:
    folder = run(tmp_path, "fedavg_auxiliary")
    assert not (folder / "adapter").exists()
    refused = command("export", "--config", folder / "config.yaml")
    assert refused.status == 1
    assert "`model.deploy_auxiliary` tunes the auxiliary model" in refused.err
    again = command("test", "--config", folder / "config.yaml")
    assert again.status == 0, again.err
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(again.out)["test"] == pytest.approx(results["test"]["best"])
