"""Models and tokenizers: what is found, what is refused; local names never reach the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from families import random_text, tiny_backbone, tiny_config
from fedsp import pretrained
from fedsp.backbone import load_backbone
from fedsp.pretrained import BackboneSpec, load_model, load_tokenizer, resolve


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_backbone("llama").model.save_pretrained(folder)
    return folder


def tokenizer_folder(folder: Path, **special: str) -> Path:
    vocab = {"<a>": 0, "<b>": 1, "<eos>": 2}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<a>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def test_a_model_of_a_folder_has_the_saved_weights(model_folder: Path) -> None:
    ids, mask = random_text()
    backbone = load_backbone(BackboneSpec(str(model_folder)))
    expected = tiny_backbone("llama").hidden_states(ids, mask)
    assert torch.equal(backbone.hidden_states(ids, mask), expected)


def test_a_relative_folder_is_found(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert resolve("model") == "model"
    assert resolve("./model") == "model"


def test_the_home_folder_is_understood(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert resolve("~/model") == str(model_folder)


def test_weights_are_loaded_in_the_wanted_format(model_folder: Path) -> None:
    backbone = load_backbone(BackboneSpec(str(model_folder), dtype="bfloat16"))
    assert backbone.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["./nowhere", "../nowhere", "~/nowhere", "/nowhere", "a/b/c", "folder/", ".", ""]
)
def test_a_local_name_never_goes_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("asked")
    )
    with pytest.raises(
        ValueError, match=r"`model\.backbone\.name_or_path` must be a folder"
    ) as error:
        load_model(BackboneSpec(name))
    assert repr(name) in str(error.value)


def test_a_folder_without_a_config_never_goes_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    with pytest.raises(ValueError, match=r"the folder gpt2 holds no config.json"):
        resolve("gpt2")


def test_a_hub_id_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2") == "gpt2"
    assert resolve("google/gemma-3-270m") == "google/gemma-3-270m"


def test_a_hub_id_that_cannot_be_loaded_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    message = r"`model\.backbone\.name_or_path`: 'no/model' could not be loaded: offline"
    with pytest.raises(ValueError, match=message):
        load_model(BackboneSpec("no/model"))


def test_a_model_that_comes_with_fedsp_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.json").write_text("{}")
    monkeypatch.setattr(pretrained, "ASSETS", tmp_path)
    assert resolve("fedsp://nano") == str(tmp_path / "nano")
    for name in ("fedsp://micro", "fedsp://../nano", "fedsp://", "fedsp://nano/."):
        with pytest.raises(ValueError, match="with this installation comes fedsp://nano"):
            resolve(name)


def test_missing_weights_are_refused_and_named(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_model(BackboneSpec(str(model_folder)))


def test_a_damaged_file_is_one_clear_error(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"`model\.backbone\.name_or_path`.*could not be loaded"):
        load_model(BackboneSpec(str(model_folder)))


def test_an_unknown_model_type_is_one_clear_error(model_folder: Path) -> None:
    (model_folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ValueError, match=r"`model\.backbone\.name_or_path`.*could not be loaded"):
        load_model(BackboneSpec(str(model_folder)))
    with pytest.raises(
        ValueError, match=r"`model\.backbone\.config`: 'abacus' could not be loaded"
    ):
        load_model(BackboneSpec(config={"model_type": "abacus"}))


def test_a_config_without_a_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model\.backbone\.config` must hold `model_type`"):
        load_model(BackboneSpec(config={"n_layer": 2}))


def test_gemma_2_asks_for_eager_attention() -> None:
    with pytest.raises(ValueError, match=r"`model\.backbone\.attn_implementation`.*eager"):
        load_model(BackboneSpec(config=tiny_config("gemma2")))


def test_random_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, third = (tiny_backbone("gpt2", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_of_text(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, eos_token="<eos>")
    tokenizer = load_tokenizer(BackboneSpec("unused", tokenizer=str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_pad_token_is_kept(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, eos_token="<eos>", pad_token="<b>")
    assert load_tokenizer(BackboneSpec(str(folder))).pad_token_id == 1


def test_a_tokenizer_with_neither_token_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"`model\.backbone\.tokenizer` must name a tokenizer with"
    ):
        load_tokenizer(BackboneSpec(tokenizer=str(folder)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json or tokenizer_config\.json"):
        load_tokenizer(BackboneSpec(tokenizer=str(tmp_path)))
