"""The command line: configurations, overrides, typos, what a run saves, interruptions."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from commands import Outcome, changed, command, make_config, of_class, write_config
from fedsp.backbone import load_backbone
from fedsp.pretrained import BackboneSpec
from fedsp.state_files import load_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return make_config(folder)


@pytest.fixture(scope="module")
def file(folder: Path, config: dict[str, Any]) -> Path:
    return write_config(folder / "config.yaml", config)


@pytest.fixture(scope="module")
def run(folder: Path, file: Path) -> Path:
    """Run folder of `fedsp fit` with the configuration as it is."""
    outcome = command("fit", "--config", file)
    assert outcome.status == 0, outcome
    return folder / "run"


@pytest.fixture(scope="module")
def other(folder: Path) -> dict[str, Any]:
    """The configuration of another experiment, in which all other choices are made."""
    adam = of_class("torch.optim.Adam", lr=0.01)
    return changed(
        make_config(folder),
        {
            "trainer.run_dir": str(folder / "other"),
            "trainer.num_rounds": 1,
            "trainer.sampler": None,
            "trainer.aggregator": None,
            "trainer.server_optimizer": None,
            "trainer.callbacks": None,
            "trainer.evaluation": {"every_n_rounds": 2, "patience": 1},
            "trainer.communication": {"wire_dtype": "bfloat16", "max_update_norm": 100.0},
            "model.init_args.soft_prompt.initializer": of_class(
                "fedsp.soft_prompt.NormalInit", std=0.1
            ),
            "model.init_args.training": {
                "steps": 1,
                "optimizer": adam,
                "lr_scheduler": of_class("torch.optim.lr_scheduler.StepLR", gamma=0.5),
            },
            "model.init_args.auxiliary": of_class("fedsp.auxiliary.SharedCell", cell_size=2),
            "model.init_args.initial_distillation": None,
            "data.init_args.partitioner": of_class(
                "fedsp.partition.Dirichlet", num_clients=2, column="completion", alpha=5.0
            ),
            "data.init_args.task": of_class(
                "fedsp.tasks.PromptCompletion", prompt="{prompt} ", add_eos=False
            ),
            "data.init_args.test": None,
            "data.init_args.public": None,
        },
    )


def _last_prefix(run: Path, rounds: int = 2) -> torch.Tensor:
    state: Any = load_state(run / "checkpoints" / f"round-{rounds:06d}.safetensors")
    prefix: torch.Tensor = state["tree"]["federation"]["payload"]["soft_prompt"]
    return prefix


def _printed(*args: object) -> dict[str, Any]:
    outcome = command("fit", *args, "--print_config")
    assert outcome.status == 0, outcome
    printed: dict[str, Any] = yaml.safe_load(outcome.out)
    return printed


# --- running --------------------------------------------------------------------------------------


def test_fit_leaves_a_run_that_all_other_commands_use(run: Path) -> None:
    saved = run / "config.yaml"
    for name in ("auxiliary.safetensors", "ledger.jsonl", "results.json", "csv/metrics.csv"):
        assert (run / name).exists()
    results = json.loads((run / "results.json").read_text())
    outcome = command("test", "--config", saved)
    assert json.loads(outcome.out)["test"]["loss"] == results["test"]["best"]["loss"]
    outcome = command("validate", "--config", saved)
    best = results["selection"]["best"]["server/val_loss"]
    assert json.loads(outcome.out)["selection"]["loss"] == best
    outcome = command("predict", "--config", saved, "--max_new_tokens", 2)
    assert outcome.status == 0, outcome
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 12


def test_a_run_without_its_best_prompt_is_measured_only_on_request(run: Path) -> None:
    outcome = command("test", "--config", run / "config.yaml", "--ckpt_path", "null")
    results = json.loads((run / "results.json").read_text())
    assert json.loads(outcome.out)["test"]["loss"] != results["test"]["best"]["loss"]


def test_the_saved_configuration_runs_again_to_the_same_prompt(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    outcome = command("fit", "--config", run / "config.yaml", "--trainer.run_dir", again)
    assert outcome.status == 0, outcome
    assert torch.equal(_last_prefix(again), _last_prefix(run))
    first, second = ((at / "config.yaml").read_text() for at in (run, again))
    assert first.replace(str(run), "") == second.replace(str(again), "")


# peft asks transformers under a name of an older release
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_exported_adapter_gives_the_backbones_logits_in_peft(
    run: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    outcome = command(
        "export", "--config", run / "config.yaml", "--output_dir", tmp_path / "adapter"
    )
    assert outcome.status == 0, outcome
    spec = config["model"]["init_args"]["backbone"]
    backbone = load_backbone(BackboneSpec(**spec), seed=0)
    prefix = load_state(run / "checkpoints" / "best.safetensors")["tree"]["federation"]["payload"][
        "soft_prompt"
    ]
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = backbone.logits(backbone.hidden_states(ids, mask, prefix))
        options = dict(spec["config"])
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
        model.load_state_dict(backbone.model.state_dict())
        peft_model = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
        theirs = peft_model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_every_choice_can_be_another_class(other: dict[str, Any], tmp_path: Path) -> None:
    """Explicit nulls too: no distillation, no test split, nothing public."""
    outcome = command("fit", "--config", write_config(tmp_path / "other.yaml", other))
    assert outcome.status == 0, outcome
    run = Path(other["trainer"]["run_dir"])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["init_args"]["test"] is None
    assert saved["data"]["init_args"]["public"] is None
    assert saved["model"]["init_args"]["initial_distillation"] is None
    assert saved["data"]["init_args"]["selection"] == 12
    outcome = command("test", "--config", run / "config.yaml")
    assert outcome.status == 1
    assert "`data.test` is null, but its data is needed" in outcome.err


def test_the_data_takes_the_global_models_tokenizer(config: dict[str, Any], run: Path) -> None:
    """The configuration names none; that of the model is the only one there is."""
    assert "tokenizer" not in config["data"]["init_args"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["init_args"]["tokenizer"] is None


def test_a_tokenizer_of_the_data_itself_wins(file: Path, tmp_path: Path) -> None:
    outcome = command("fit", "--config", file, "--data.tokenizer", tmp_path / "nowhere",
                      "--trainer.run_dir", tmp_path / "run")  # fmt: skip
    assert outcome.status == 1
    assert "`data.tokenizer` must be a folder" in outcome.err


# --- loggers --------------------------------------------------------------------------------------


@pytest.fixture
def _no_wandb_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("_no_wandb_settings")
def test_loggers_are_chosen_by_name_and_wandb_stays_offline(file: Path, tmp_path: Path) -> None:
    loggers = [
        "fedsp.tracking.csv_logger",
        "fedsp.tracking.tensorboard_logger",
        of_class("fedsp.tracking.OfflineWandb", project="tiny", name="one"),
        of_class("lightning.pytorch.loggers.CSVLogger", name="second"),
    ]
    overlay = write_config(tmp_path / "loggers.yaml", {"trainer": {"logger": loggers}})
    run = tmp_path / "run"
    args = ("--config", file, "--config", overlay, "--trainer.run_dir", run)
    outcome = command("fit", *args, "--trainer.num_rounds", 1)
    assert outcome.status == 0, outcome
    assert (run / "csv" / "metrics.csv").exists()
    assert list(run.glob("second/version_0/metrics.csv"))
    assert list((run / "tensorboard").glob("events.*"))
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1
    saved = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert saved[0] == "fedsp.tracking.csv_logger"
    assert saved[2]["init_args"] == {"project": "tiny", "name": "one", "offline": None}


# --- configurations -------------------------------------------------------------------------------


def test_two_files_merge_and_the_command_line_wins(file: Path, tmp_path: Path) -> None:
    second = {
        "trainer": {"num_rounds": 7, "keep_checkpoints": 5},
        "model": {"init_args": {"seed": 3}},
    }
    overlay = write_config(tmp_path / "overlay.yaml", second)
    printed = _printed("--config", file, "--config", overlay, "--trainer.keep_checkpoints", 6)
    assert printed["trainer"]["num_rounds"] == 7
    assert printed["trainer"]["keep_checkpoints"] == 6
    assert printed["trainer"]["sampler"]["init_args"] == {"clients_per_round": 2}
    assert printed["model"]["init_args"]["seed"] == 3
    assert printed["model"]["init_args"]["soft_prompt"]["num_virtual_tokens"] == 4


def test_another_class_in_a_second_file_keeps_the_settings_both_classes_know(
    file: Path, tmp_path: Path
) -> None:
    """docs/footguns.md#13; repeat what matters beside every class path."""
    sgd = {"optimizer": of_class("torch.optim.SGD", momentum=0.9)}
    second = {"model": {"init_args": {"training": sgd}}}
    overlay = write_config(tmp_path / "overlay.yaml", second)
    optimizer = _printed("--config", file, "--config", overlay)["model"]["init_args"]["training"][
        "optimizer"
    ]
    assert optimizer["class_path"] == "torch.optim.SGD"
    assert optimizer["init_args"]["momentum"] == 0.9
    assert optimizer["init_args"]["lr"] == 0.01  # of the first file's AdamW
    assert "betas" not in optimizer["init_args"]


def test_what_is_printed_runs(file: Path, tmp_path: Path) -> None:
    outcome = command("fit", "--config", file, "--print_config")
    (tmp_path / "printed.yaml").write_text(outcome.out)
    assert _printed("--config", tmp_path / "printed.yaml") == yaml.safe_load(outcome.out)


@pytest.mark.parametrize(
    "option",
    [
        "model.soft_prompt.num_virtual_tokens=5",
        "model.initial_distillation.hidden_weight=0.5",
        "model.training.optimizer.lr=0.5",
        "client.soft_prompt.steps=5",
        "data.partitioner.num_clients=5",
        "trainer.sampler.clients_per_round=1",
        "data.init_args.task.init_args.add_eos=false",
    ],
)
def test_an_option_is_typed_without_init_args(option: str, file: Path) -> None:
    name, value = option.split("=")
    node: Any = _printed("--config", file, f"--{option}")
    for part in name.replace("init_args.", "").split("."):
        node = node.get("init_args", node)[part]
    assert node == yaml.safe_load(value)


# --- seeds ----------------------------------------------------------------------------------------


def test_one_seed_reaches_every_part_and_a_seed_by_hand_stays(
    file: Path, tmp_path: Path, run: Path
) -> None:
    """The saved configuration keeps the null, so that another seed on top of it is another run."""
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["seed_everything"] == 0
    assert saved["data"]["init_args"]["seed"] is None
    prefixes = {}
    for name, args in {
        "all": ("--seed_everything", 1),
        "hand": ("--trainer.seed", 1, "--model.seed", 1, "--data.seed", 1),
        "data": ("--data.seed", 1),
    }.items():
        place = ("--trainer.run_dir", tmp_path / name, "--trainer.num_rounds", 1)
        outcome = command("fit", "--config", run / "config.yaml", *args, *place)
        assert outcome.status == 0, outcome
        prefixes[name] = _last_prefix(tmp_path / name, 1)
    assert torch.equal(prefixes["all"], prefixes["hand"])
    assert not torch.equal(prefixes["all"], prefixes["data"])
    printed = _printed("--config", file, "--data.seed", 1)
    assert printed["data"]["init_args"]["seed"] == 1


def test_the_private_network_of_a_prompt_does_not_depend_on_the_global_stream(
    file: Path, tmp_path: Path
) -> None:
    """Server and client draw its weights from streams of their own."""
    prefixes = []
    for name, noise in (("a", 0), ("b", 7)):
        torch.rand(noise)
        options = ("--model.soft_prompt.reparameterization_size", 6,
                   "--client.reparameterization_size", 5, "--seed_everything", "false")  # fmt: skip
        place = ("--trainer.run_dir", tmp_path / name, "--trainer.num_rounds", 1)
        outcome = command("fit", "--config", file, *options, *place)
        assert outcome.status == 0, outcome
        prefixes.append(_last_prefix(tmp_path / name, 1))
    assert torch.equal(*prefixes)


# --- typos ----------------------------------------------------------------------------------------


def _assert_is_no_option(outcome: Outcome, *parts: str) -> None:
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("fedsp: error: ")
    assert len(outcome.err.splitlines()) < 9, "the reason, not the list of all options"
    assert "\nAll options: fedsp " in outcome.err, "not __main__.py"
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.num_round=3",
        "--trainer.evaluation.every_n_round=3",
        "--trainer.sampler.clients_per=3",
        "--model.soft_promp.num_virtual_tokens=3",
        "--model.soft_prompt.num_virtual_token=3",
        "--model.init_args.training.step=3",
        "--model.training.optimizer.init_args.l=3",
        "--client.dropou=0.1",
        "--data.partitioner.num_client=3",
        "--data.max_token=3",
        "--seed=3",
        "--conf=x.yaml",
        "--ckpt=last",
    ],
)
def test_an_abbreviated_option_is_refused(option: str, file: Path) -> None:
    typed = option.split("=")[0]
    outcome = command("fit", "--config", file, option)
    _assert_is_no_option(outcome)
    name = typed.split(".")[-1]
    assert f"'{name}' is not accepted" in outcome.err or re.search(
        rf"unrecognized arguments: --[\w.]*\b{name.removeprefix('--')}=", outcome.err
    )


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--trainer.num_round=3", "trainer.num_rounds"),
        ("--model.soft_prompt.num_virtual_token=3", "soft_prompt.num_virtual_tokens"),
        ("--client.dropou=0.1", "dropout"),
        ("--data.max_token=3", "max_tokens"),
        ("--zebra=3", ""),
    ],
)
def test_a_typo_is_told_what_it_was_meant_to_be(option: str, meant: str, file: Path) -> None:
    outcome = command("fit", "--config", file, option)
    _assert_is_no_option(outcome)
    assert outcome.err.count("Did you mean") == bool(meant)
    if meant:
        assert f"Did you mean `{meant}`?" in outcome.err


def test_a_command_without_a_configuration_says_where_one_is() -> None:
    outcome = command("fit")
    _assert_is_no_option(outcome, "required: task, partitioner", "--config configs/quickstart.yaml")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainr", {"num_rounds": 3}),
        ("trainer.num_round", 3),
        ("trainer.evaluation.monitr", "server/val_loss"),
        ("trainer.sampler.init_args.clients", 3),
        ("model.init_args.soft_promt", None),
        ("model.init_args.soft_prompt.num_virtual_token", 3),
        ("model.init_args.training.optimizer.init_args.learning_rate", 3),
        ("model.init_args.backbone.dtyp", "float32"),
        ("client.init_args.soft_prompt.lr_schedule", None),
        ("data.init_args.task.init_args.promt", "x"),
        ("data.init_args.batching.batchsize", 3),
        ("data.init_arg", {}),
    ],
)
def test_an_unknown_key_in_a_file_is_refused(
    path: str, value: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    wrong = write_config(tmp_path / "wrong.yaml", changed(config, {path: value}))
    _assert_is_no_option(command("fit", "--config", wrong), path.split(".")[-1])


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("data.init_args.task.class_path", "fedsp.tasks.PromptCompletio", ["PromptCompletio"]),
        ("model.init_args.backbone.dtype", "float64", ["dtype", "float64"]),
        ("trainer.num_rounds", "many", ["trainer.num_rounds", "many"]),
        ("trainer.communication.wire_dtype", "int4", ["trainer.communication.wire_dtype", "int4"]),
        ("trainer.logger", ["fedsp.tracking.no_logger"], ["trainer.logger", "no_logger"]),
    ],
)
def test_a_value_of_another_kind_is_refused(
    path: str, value: Any, parts: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    wrong = write_config(tmp_path / "wrong.yaml", changed(config, {path: value}))
    _assert_is_no_option(command("fit", "--config", wrong), *parts)


def test_where_an_error_came_from_is_shown_on_request(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSP_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"`trainer\.num_rounds`"):
        command("fit", "--config", file, "--trainer.num_rounds", -1)


def test_an_unknown_command_and_a_missing_file_are_refused(file: Path) -> None:
    _assert_is_no_option(command("fitt", "--config", file), "fitt", "export")
    _assert_is_no_option(command("fit", "--config", "no.yaml"), "no.yaml")


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_resumes(
    signum: signal.Signals, status: int, file: Path, tmp_path: Path
) -> None:
    """A process of its own, stopped as a shell or a batch system does it, after its first round."""
    run = tmp_path / "run"
    args = [
        "fit",
        "--config",
        str(file),
        "--trainer.run_dir",
        str(run),
        "--trainer.num_rounds",
        "500",
    ]
    # tests started in the background of a shell inherit an ignored SIGINT; a terminal's do not
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from fedsp.cli import main; main({args!r})"
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=err, env=os.environ
        )
    try:
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/round-000001*")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.05)
        process.send_signal(signum)
        assert process.wait(60) == status
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "err").read_text()
    rounds = max(int(p.stem[-6:]) for p in (run / "checkpoints").glob("round-*.safetensors"))
    more = ("--trainer.run_dir", run, "--trainer.num_rounds", rounds + 1, "--ckpt_path", "last")
    outcome = command("fit", "--config", file, *more)
    assert outcome.status == 0, outcome
    assert len(json.loads((run / "results.json").read_text())["rounds"]) == rounds + 1


def test_a_finished_run_gets_more_rounds_on_top(run: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(run, tmp_path / "longer")
    more = ("--trainer.run_dir", longer, "--trainer.num_rounds", 3, "--ckpt_path", "last")
    outcome = command("fit", "--config", longer / "config.yaml", *more)
    assert outcome.status == 0, outcome
    assert len(json.loads((longer / "results.json").read_text())["rounds"]) == 3
