"""The adapter against peft itself: what `PeftModel.from_pretrained` makes of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

from families import ROTARY, random_prefix, random_text, tiny_backbone
from fedsp.backbone import Backbone, load_backbone
from fedsp.export import export_adapter, import_adapter
from fedsp.generation import generate
from fedsp.pretrained import BackboneSpec
from fedsp.stages import Stage
from tiny import GPT2, files, fit, make_client, make_data, make_server, make_trainer

FIGURES = {
    "selection": {"zero_shot": {"server/val_loss": 3.21}, "best": {"round": 7, "loss": 2.125}},
    "test": {"best": {"loss": 2.5, "accuracy": 0.75}},
}


def export(backbone: Backbone, prefix: Tensor, folder: Path, **results: Any) -> Path:
    return export_adapter(prefix, backbone, folder, base_model="my/base-model", results=results)


def own_logits(backbone: Backbone, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return backbone.logits(backbone.hidden_states(ids, mask, prefix))


def peft_logits(backbone: Backbone, folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """A fresh model of the same weights, wrapped by peft from the folder alone."""
    fresh = tiny_backbone(backbone.model.config.model_type)
    fresh.load_state_dict(backbone.state_dict())
    model = PeftModel.from_pretrained(fresh.model, str(folder)).eval()
    return model(input_ids=ids, attention_mask=mask).logits


# --- identical logits ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("num_virtual_tokens", [1, 5])
@torch.no_grad()
def test_peft_gives_the_same_logits_from_the_folder(
    tmp_path: Path, family: str, num_virtual_tokens: int
) -> None:
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone, num_virtual_tokens)
    ids, mask = random_text(rows=2)
    export(backbone, prefix, tmp_path / "adapter")
    got = peft_logits(backbone, tmp_path / "adapter", ids, mask)
    expected = own_logits(backbone, prefix, ids, mask)
    bare = own_logits(backbone, None, ids, mask)  # type: ignore[arg-type]
    real = mask.bool()
    assert (got - expected)[real].abs().max() < 1e-5
    assert (got - bare)[real].abs().max() > 1e-2


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("offset", [0, 2, 5])
@torch.no_grad()
def test_a_prompt_of_another_position_offset_is_converted_for_peft(
    tmp_path: Path, family: str, offset: int
) -> None:
    """Text at positions 0 and on in training; peft puts it at P and on."""
    backbone = tiny_backbone(family, position_offset=offset)
    prefix = random_prefix(backbone, 5)
    ids = random_text(rows=1, length=4)[0]
    mask = torch.ones_like(ids)
    export(backbone, prefix, tmp_path / "adapter")
    got = peft_logits(backbone, tmp_path / "adapter", ids, mask)
    expected = own_logits(backbone, prefix, ids, mask)
    # the scores are as large as the weights of these models: relative to the largest
    assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert torch.equal(import_adapter(tmp_path / "adapter"), prefix) == (offset == 5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_with_an_offset_are_refused(tmp_path: Path, family: str) -> None:
    backbone = tiny_backbone(family, position_offset=0)
    with pytest.raises(ValueError, match=r"learned ones.*`model\.backbone\.position_offset: 0`"):
        export(backbone, random_prefix(backbone), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_prompt_of_no_tokens_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("gpt2")
    with pytest.raises(
        ValueError, match=r"`model\.soft_prompt\.num_virtual_tokens` must be above 0"
    ):
        export(backbone, random_prefix(backbone, 0), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("num_virtual_tokens", [1, 6])
def test_an_import_gives_back_every_bit(
    tmp_path: Path, family: str, num_virtual_tokens: int
) -> None:
    backbone = tiny_backbone(family)
    prefix = random_prefix(backbone, num_virtual_tokens)
    came = import_adapter(export(backbone, prefix, tmp_path / "adapter"))
    assert torch.equal(came, prefix)
    assert came.dtype == torch.float32


@torch.no_grad()
def test_an_adapter_that_peft_trained_is_imported(tmp_path: Path) -> None:
    """Written by peft's own save, from its own random prompt."""
    backbone = tiny_backbone("llama")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_backbone("llama").model, config).eval()
    model.save_pretrained(str(tmp_path / "theirs"))
    ids, mask = random_text(rows=2)
    expected = model(input_ids=ids, attention_mask=mask).logits
    got = own_logits(backbone, import_adapter(tmp_path / "theirs"), ids, mask)
    assert (got - expected)[mask.bool()].abs().max() < 1e-5


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    backbone = tiny_backbone("gpt2")
    export(backbone, random_prefix(backbone, 5), tmp_path / "adapter")
    second = random_prefix(backbone, 3, seed=9)
    export(backbone, second, tmp_path / "adapter")
    assert torch.equal(import_adapter(tmp_path / "adapter"), second)


# --- the card -----------------------------------------------------------------------------------


def test_the_card_holds_the_base_model_and_every_figure(tmp_path: Path) -> None:
    backbone = tiny_backbone("gpt2")
    export(backbone, random_prefix(backbone), tmp_path / "adapter", **FIGURES)
    text = (tmp_path / "adapter" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front_matter = yaml.safe_load(front)
    assert front_matter["base_model"] == "my/base-model"
    assert front_matter["library_name"] == "peft"
    assert "5 virtual tokens" in body
    assert "arXiv 2311.06805" in body
    rows = dict(
        (cell.strip() for cell in line.strip("|").split("|"))
        for line in body.splitlines()
        if line.startswith("| ") and len(line) > 7
    )
    assert rows == {
        "selection, zero_shot, server/val_loss": "3.21",
        "selection, best, round": "7",
        "selection, best, loss": "2.125",
        "test, best, loss": "2.5",
        "test, best, accuracy": "0.75",
    }


def test_a_card_without_figures_has_no_table(tmp_path: Path) -> None:
    backbone = tiny_backbone("gpt2")
    export(backbone, random_prefix(backbone), tmp_path / "adapter")
    assert "|" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_base_model_of_any_spelling_leaves_the_card_readable(tmp_path: Path) -> None:
    backbone = tiny_backbone("gpt2")
    name = "/models/a: b #c"
    export_adapter(
        random_prefix(backbone), backbone, tmp_path / "adapter", base_model=name, results={}
    )
    front = (tmp_path / "adapter" / "README.md").read_text().split("---\n", 2)[1]
    assert yaml.safe_load(front)["base_model"] == name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name


# --- from a run ---------------------------------------------------------------------------------


def test_an_exported_run_has_the_figures_that_the_run_measured(tmp_path: Path) -> None:
    fit(tmp_path, tmp_path / "run", num_rounds=1)
    trainer = make_trainer(tmp_path / "run")
    parts = make_server(tmp_path), make_client(), make_data(tmp_path)
    trainer.export(*parts, ckpt_path="best", output_dir=str(tmp_path / "best"))
    trainer.export(*parts, ckpt_path="last", output_dir=str(tmp_path / "last"))
    loss = json.loads((tmp_path / "run" / "results.json").read_text())["test"]["best"]["loss"]
    assert f"| test, best, loss | {loss:.6g} |" in (tmp_path / "best" / "README.md").read_text()
    # what was measured was the best prompt
    assert "|" not in (tmp_path / "last" / "README.md").read_text()
    assert torch.equal(
        import_adapter(tmp_path / "best"), import_adapter(tmp_path / "run" / "adapter")
    )


def test_a_run_that_peft_cannot_express_ends_with_a_warning_and_its_results(
    tmp_path: Path,
) -> None:
    """Learned positions and text at position 0: the training is not lost for the adapter's sake."""
    tokenizer, _ = files(tmp_path)
    spec = BackboneSpec(name_or_path=tokenizer, tokenizer=tokenizer, config=GPT2, position_offset=0)
    server = make_server(tmp_path, backbone=spec, training=Stage(1))
    with pytest.warns(UserWarning, match="no adapter is written: .*learned"):
        trainer = fit(tmp_path, tmp_path / "run", server=server, num_rounds=1)
    assert trainer.history.rounds_done == 1
    assert (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()


# --- the code in the documentation ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_the_documented_code_completes_as_the_backbone_does(tmp_path: Path, dtype: Any) -> None:
    backbone = load_backbone(BackboneSpec(dtype=dtype))
    prefix = random_prefix(backbone, 5)
    export_adapter(prefix, backbone, tmp_path, base_model="fedsp://docstring-nano", results={})
    page = (Path(__file__).parents[1] / "docs" / "inference.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "torch.bfloat16" in code
    for old, new in (("runs/quickstart/adapter", str(tmp_path)), ("bfloat16", dtype)):
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    ids = names["inputs"]["input_ids"]
    output = generate(
        backbone, ids, torch.ones_like(ids), prefix, max_new_tokens=20, do_sample=False
    )
    text = names["tokenizer"].decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert names["completion"]
    if dtype == "float32":  # in bf16 a near tie may fall the other way
        assert names["completion"] == text
