"""What a user can get wrong: one clear error before any work, and nothing left behind."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedsp.cli
from commands import Outcome, changed, command, make_config, of_class, write_config
from fedsp.pretrained import BackboneSpec, check_vocabulary, load_tokenizer
from fedsp.state_files import load_state, save_state
from tiny import write_rows

DATA = "data.init_args"
MODEL = "model.init_args"
WRITABLE = os.W_OK | os.X_OK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return make_config(folder)


@pytest.fixture
def fit(config: dict[str, Any], tmp_path: Path) -> Callable[..., Outcome]:
    """Run `fedsp fit` in a folder of its own with some values of the configuration changed."""

    def run(changes: dict[str, Any], *args: object) -> Outcome:
        file = write_config(tmp_path / "config.yaml", changed(config, changes))
        return command("fit", "--config", file, "--trainer.run_dir", tmp_path / "run", *args)

    return run


def _assert_refused(outcome: Outcome, *parts: str) -> None:
    """One error that begins with itself, its parts in it, and nothing of where it came from."""
    assert outcome.status == 1, outcome
    assert outcome.err.startswith("fedsp: error: ")
    assert outcome.err.count("fedsp: error:") == 1
    assert not re.search("Traceback|Union|Namespace|Given value", outcome.err)
    for part in parts:
        assert part in outcome.err


# --- data -----------------------------------------------------------------------------------------

ROW = '{"prompt": "1+1=", "completion": "2"}\n'
FILES = {
    "missing": (None, ["`data.clients`: Data file", "does not exist"]),
    "empty": ("", ["`data.clients`: Data file", "is empty"]),
    "only blank lines": ("\n\n", ["`data.clients`: Data file", "holds no rows"]),
    "malformed line": (ROW + '{"prompt": \n', ["rows.jsonl, line 2", "malformed JSON"]),
    "no object": (ROW + "[1]\n", ["rows.jsonl, line 2", "a JSON object", "got [1]"]),
    "missing field": (
        ROW * 9 + '{"prompt": "1+1="}\n',
        ["`data.task.completion` names the field 'completion', which row 9 lacks"],
    ),
    "fewer examples than clients": (
        ROW * 65,
        ["`data.partitioner`: 3 clients need at least 3 rows, but only 1 rows are left"],
    ),
    "fewer examples than splits": (ROW * 20, ["Carved out of `data.clients` are 64 rows"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_data_file_is_refused(case: str, fit: Callable[..., Outcome], tmp_path: Path) -> None:
    text, parts = FILES[case]
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    outcome = fit({f"{DATA}.clients.init_args.paths": str(path)})
    _assert_refused(outcome, *parts)
    assert not (tmp_path / "run").exists()


def test_a_multiple_choice_answer_out_of_range_is_refused(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"question": "1+1=", "choices": ["1", "2"], "answer": 0}
    rows = [row] * 70 + [{**row, "answer": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        f"{DATA}.clients.init_args.paths": str(path),
        f"{DATA}.task": of_class("fedsp.tasks.MultipleChoice"),
    }
    outcome = fit(changes)
    _assert_refused(outcome, "`data.task.answer`='answer'", "index from 0 to 1, got 2 in row 70")
    assert not (tmp_path / "run").exists()


def test_examples_that_are_too_long_are_cut_counted_and_reported(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    rows = [{"prompt": "x" * 80 + f"{i}=", "completion": str(i)} for i in range(100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        outcome = fit({f"{DATA}.clients.init_args.paths": str(path)}, "--trainer.num_rounds", 0)
    assert outcome.status == 0, outcome
    # one line for people: neither the place in the code nor the line of code
    assert (
        "\nfedsp: warning: `data.clients`: 36 of 36 examples are longer than `data.max_tokens`=60; "
        "their prompts " in "\n" + outcome.err
    )


# --- numbers that do not fit ----------------------------------------------------------------------

NUMBERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "clients_per_round": (
        {"trainer.sampler.init_args.clients_per_round": 12},
        ["`trainer.sampler.clients_per_round` must be in [0, num_clients=3], got 12"],
    ),
    "empty partition": (
        {f"{DATA}.partitioner": of_class("fedsp.partition.BySizes", sizes=[0.999, 0.001])},
        ["`data.partitioner.sizes`: client-1 would get no row"],
    ),
    "cell size": (
        {f"{MODEL}.auxiliary": of_class("fedsp.auxiliary.SharedCell", cell_size=3)},
        ["`model.auxiliary.cell_size`", "4", "got 3"],
    ),
    "layers that are not there": (
        {f"{MODEL}.auxiliary": of_class("fedsp.auxiliary.KeptLayers", layers=[0, 9])},
        ["`model.auxiliary.layers`", "9"],
    ),
    "max_tokens": (
        {f"{DATA}.max_tokens": 61},
        ["`data.max_tokens` must be at most 60", "`model.soft_prompt.num_virtual_tokens`, got 61"],
    ),
    "a prompt as long as the context": (
        {f"{MODEL}.soft_prompt.num_virtual_tokens": 64},
        ["`model.soft_prompt.num_virtual_tokens`", "it leaves 0"],
    ),
    "negative virtual tokens": (
        {f"{MODEL}.soft_prompt.num_virtual_tokens": -1},
        ["`model.soft_prompt.num_virtual_tokens` must be at least 0, got -1"],
    ),
    "dropout": (
        {"client.init_args.dropout": 1.0},
        ["`client.dropout` of the soft prompt must be in [0, 1), got 1.0"],
    ),
    "negative steps": (
        {f"{MODEL}.training.steps": -1},
        ["`model.training.steps` must be at least 0, got -1"],
    ),
    "num_rounds": ({"trainer.num_rounds": -1}, ["`trainer.num_rounds` must be at least 0, got -1"]),
    "client_memory_bytes": (
        {"trainer.client_memory_bytes": -1},
        ["`trainer.client_memory_bytes` must be at least 0, got -1"],
    ),
    "learning rate": (
        {"client.init_args.soft_prompt.optimizer.init_args.lr": -1.0},
        ["`client.soft_prompt.optimizer` cannot be built", "-1.0"],
    ),
    "schedule": (
        {f"{MODEL}.training.lr_scheduler.init_args.warmup_fraction": 2.0},
        ["`model.training.lr_scheduler` cannot be built", "warmup_fraction", "got 2.0"],
    ),
    "a schedule that takes no number of steps": (
        {f"{MODEL}.training.lr_scheduler": of_class("torch.optim.lr_scheduler.MultiStepLR")},
        ["`model.training.lr_scheduler` cannot be built"],
    ),
    "distillation's learning rate": (
        {f"{MODEL}.initial_distillation.stage.optimizer": of_class("torch.optim.AdamW", lr=-1.0)},
        ["`model.initial_distillation.stage.optimizer` cannot be built", "-1.0"],
    ),
    "server optimizer": (
        {"trainer.server_optimizer": of_class("torch.optim.Adam", lr=-1.0)},
        ["`trainer.server_optimizer` cannot be built", "-1.0"],
    ),
    "spread of the first prompt": (
        {f"{MODEL}.soft_prompt.initializer": of_class("fedsp.soft_prompt.NormalInit", std=-1.0)},
        ["`model.soft_prompt.initializer.std`", "at least 0, got -1.0"],
    ),
    "batch size": (
        {f"{DATA}.batching.batch_size": 0},
        ["`data.batching.batch_size` must be at least 1, got 0"],
    ),
    "fraction": (
        {f"{DATA}.selection": 1.5},
        ["`data.selection` as a fraction must be in (0, 1), got 1.5"],
    ),
    "template": (
        {f"{DATA}.task.init_args": {"prompt": "{question"}},
        ["`data.task.prompt`='{question' is no template"],
    ),
    "no such column": (
        {f"{DATA}.partitioner": of_class("fedsp.partition.ByColumn", column="author")},
        ["`data.partitioner.column` must be a column of `data.clients`, got 'author'"],
    ),
    "keep_checkpoints": (
        {"trainer.keep_checkpoints": 0},
        ["`trainer.keep_checkpoints` must be at least 1, got 0"],
    ),
    "vocabulary": (
        {f"{MODEL}.backbone.config.vocab_size": 200},
        ["`model.backbone.name_or_path` must be a tokenizer of at most 200 tokens", "got 257"],
    ),
    "monitor": (
        {"trainer.evaluation.monitor": "val_loss"},
        ["`trainer.evaluation.monitor` must be one of", "server/val_loss", "got 'val_loss'"],
    ),
    "no public data": (
        {f"{DATA}.public": None},
        ["`model.initial_distillation` needs public data, but `data.public` is null"],
    ),
    "text for the first prompt": (
        {
            f"{DATA}.public": None,
            f"{DATA}.server": None,
            f"{DATA}.selection": None,
            f"{MODEL}.initial_distillation": None,
            f"{MODEL}.training.steps": 0,
            "trainer.callbacks": None,
        },
        ["TextInit needs", "`data.server`, `data.public` or `data.selection`"],
    ),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_value_that_does_not_fit_is_refused(
    case: str, fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    changes, parts = NUMBERS[case]
    _assert_refused(fit(changes), *parts)
    assert not (tmp_path / "run").exists()


# --- models ---------------------------------------------------------------------------------------

MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "folder": (
        {"name_or_path": "./nowhere", "config": None},
        ["`model.backbone.name_or_path`", "there is no folder nowhere"],
    ),
    "hub id": (
        {"name_or_path": "nobody/no-such-model", "config": None},
        ["`model.backbone.name_or_path`: 'nobody/no-such-model' could not be loaded"],
    ),
    "embedded": (
        {"name_or_path": "fedsp://no-such-model", "config": None},
        ["`model.backbone.name_or_path`", "with this installation comes fedsp://docstring-nano"],
    ),
    "tokenizer": ({"tokenizer": "./nowhere"}, ["`model.backbone.tokenizer`", "there is no folder"]),
    "model type": ({"config": {"n_layer": 2}}, ["`model.backbone.config` must hold `model_type`"]),
    "position offset": (
        {"position_offset": -2},
        ["`model.backbone.position_offset` must be at least 0", "got -2"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_there_is_named(
    case: str, fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    options, parts = MODELS[case]
    changes = {f"{MODEL}.backbone.{name}": value for name, value in options.items()}
    _assert_refused(fit(changes), *parts)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_pad_token_is_no_error(config: dict[str, Any], folder: Path) -> None:
    """The tiny tokenizer is one of these; every run of this file stands on it."""
    settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings.get("pad_token") is None
    assert settings["eos_token"]


def test_a_vocabulary_padded_above_the_tokenizer_is_no_error(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = fit({f"{MODEL}.backbone.config.vocab_size": 320, "trainer.num_rounds": 0})
    assert outcome.status == 0, outcome


def test_an_added_token_beyond_the_vocabulary_must_not_pad_texts(
    config: dict[str, Any], folder: Path
) -> None:
    """Gemma 3 1B has an image token in its tokenizer and no embedding for it."""
    tokenizer = load_tokenizer(BackboneSpec(tokenizer=str(folder / "tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == 258
    check_vocabulary(tokenizer, 257, "data.tokenizer")
    tokenizer.pad_token = "<image>"
    with pytest.raises(ValueError, match=r"`data\.tokenizer` must be .* at most 257"):
        check_vocabulary(tokenizer, 257, "data.tokenizer")


def test_cuda_that_is_not_there_is_named(fit: Callable[..., Outcome], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    outcome = fit({"trainer.accelerator": "cuda"})
    _assert_refused(outcome, "`trainer.accelerator` 'cuda'", "Use `--trainer.accelerator cpu`")
    assert not (tmp_path / "run").exists()


# --- the run folder and what lies in it -----------------------------------------------------------


def test_a_used_run_folder_is_refused_untouched(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    outcome = fit({})
    _assert_refused(
        outcome, "`trainer.run_dir` must be a new or empty folder", "`--ckpt_path last`"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_without_write_permission_is_refused(
    fit: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root, as in containers, may write everywhere."""
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: mode != WRITABLE and access(path, mode))
    _assert_refused(fit({}), "`trainer.run_dir` must be writable", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], folder: Path) -> Path:
    """Run folder of one finished round; copy it before changing it."""
    run = folder / "finished"
    file = write_config(folder / "finished.yaml", config)
    outcome = command("fit", "--config", file, "--trainer.run_dir", run, "--trainer.num_rounds", 1)
    assert outcome.status == 0, outcome
    return run


@pytest.fixture
def used(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_checkpoint_of_another_configuration_says_which_keys_differ(
    fit: Callable[..., Outcome], used: Path
) -> None:
    before = sorted(path.name for path in used.rglob("*"))
    outcome = fit(
        {"client.init_args.soft_prompt.steps": 5, "seed_everything": 3}, "--ckpt_path", "last"
    )
    _assert_refused(
        outcome,
        "comes from another configuration",
        "client.init_args.soft_prompt.steps: 2 in the checkpoint, 5 now",
        "seed_everything: 0 in the checkpoint, 3 now",
    )
    assert sorted(path.name for path in used.rglob("*")) == before


def test_a_checkpoint_of_another_format_version_is_refused(
    fit: Callable[..., Outcome], used: Path
) -> None:
    path = used / "checkpoints" / "round-000001.safetensors"
    save_state(path, {**load_state(path), "format_version": 99})
    outcome = fit({}, "--ckpt_path", "last")
    _assert_refused(
        outcome, "`ckpt_path`", "checkpoint format version 99, this fedsp reads version"
    )


def test_a_foreign_file_is_no_checkpoint(fit: Callable[..., Outcome], used: Path) -> None:
    outcome = fit({}, "--ckpt_path", used / "auxiliary.safetensors")
    _assert_refused(outcome, "`ckpt_path`", "is not a run's checkpoint")


def test_a_checkpoint_that_is_not_there_is_named(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    _assert_refused(fit({}, "--ckpt_path", "last"), "`ckpt_path` last: there is no checkpoint")
    _assert_refused(fit({}, "--ckpt_path", "no.safetensors"), "got 'no.safetensors'")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_resumable(
    fit: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the checkpoint of the second round is being written."""

    def full(descriptor: int) -> None:
        if (tmp_path / "run" / "checkpoints" / "round-000001.safetensors").exists():
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = fit({})
    _assert_refused(outcome, "No space left on device")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not list(checkpoints.glob("*tmp*"))
    assert load_state(checkpoints / "round-000001.safetensors")["round_idx"] == 1
    assert fit({}, "--ckpt_path", "last").status == 0
    assert load_state(checkpoints / "round-000002.safetensors")["round_idx"] == 2


def test_a_logger_that_is_not_installed_leaves_no_run_behind(
    fit: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(save_dir: str) -> None:
        raise ModuleNotFoundError("tensorboard is missing")

    monkeypatch.setattr("fedsp.tracking.TensorBoardLogger", lambda *a, **k: missing("x"))
    changes = {"trainer.logger": ["fedsp.tracking.tensorboard_logger"]}
    _assert_refused(fit(changes), "tensorboard is missing")
    assert not (tmp_path / "run" / "config.yaml").exists()


# --- names ----------------------------------------------------------------------------------------


def test_every_option_that_an_error_names_exists(config: dict[str, Any], tmp_path: Path) -> None:
    """Every dotted name in backticks in the package's texts is a place in the configuration."""
    known = _names_of_all_options(config, tmp_path)
    texts = {p.name: p.read_text() for p in Path(fedsp.cli.__file__).parent.glob("*.py")}
    named = re.compile(r"`-{0,2}((?:trainer|model|client|data)\.[a-z_.]+[a-z_])\b[`=:]")
    foreign = {
        f"{file}: {name}"
        for file, text in texts.items()
        for name in named.findall(text)
        if name not in known and not name.startswith(("data.fedsp", "model.fedsp"))
    }
    assert not foreign


def _names_of_all_options(config: dict[str, Any], tmp_path: Path) -> set[str]:
    variants: list[dict[str, Any]] = [
        {},
        {f"{MODEL}.auxiliary": of_class("fedsp.auxiliary.SharedCell")},
        {f"{MODEL}.auxiliary": of_class("fedsp.recipes.OffsiteTuning")},
        {f"{MODEL}.auxiliary": of_class("fedsp.compression.TrimmedVocabulary", num_tokens=9)},
        {f"{MODEL}.auxiliary": of_class("fedsp.compression.LowRank", rank=2)},
        {f"{MODEL}.initial_distillation.prompts": {"rounds": 1}},
        {f"{MODEL}.tuned_weights": of_class("fedsp.tuned.LoRA")},
        {f"{MODEL}.tuned_weights": of_class("fedsp.tuned.OuterLayers")},
        {"trainer.sampler": of_class("fedsp.sampling.SingleClient")},
        {"trainer.acceptance": of_class("fedsp.acceptance.Acceptance")},
        {
            "trainer.privacy": of_class(
                "fedsp.privacy.CentralPrivacy",
                noise_multiplier=1.0,
                delta=0.01,
                clipping=of_class("fedsp.clipping.AdaptiveClipping"),
            )
        },
        {
            "client.init_args.privacy": of_class(
                "fedsp.privacy.LocalPrivacy", noise_multiplier=1.0, delta=0.01, clip_norm=1.0
            )
        },
        {f"{DATA}.partitioner": of_class("fedsp.partition.Parties", parties=["a"], own="a")},
        {f"{DATA}.task": of_class("fedsp.tasks.ChatCompletion")},
        {f"{DATA}.task": of_class("fedsp.tasks.MultipleChoice")},
        {f"{DATA}.task": of_class("fedsp.tasks.RawText")},
        {f"{DATA}.public_task": of_class("fedsp.tasks.RawText")},
        {f"{DATA}.partitioner": of_class("fedsp.partition.BySizes", sizes=[1])},
        {
            f"{DATA}.partitioner": of_class(
                "fedsp.partition.Dirichlet", num_clients=3, column="x", alpha=1.0
            )
        },
    ]
    names: set[str] = set()
    for changes in variants:
        file = write_config(tmp_path / "names.yaml", changed(config, changes))
        names |= set(_names(yaml.safe_load(command("fit", "--config", file, "--print_config").out)))
    return names


def _names(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    names = []
    for key, value in node.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        names += [name, *_names(value, name)]
    return names


def test_rows_of_the_tiny_federation_are_what_the_cases_above_count_on(tmp_path: Path) -> None:
    assert len(Path(write_rows(tmp_path / "rows.jsonl")).read_text().splitlines()) == 120
