"""Causal language models and tokenizers: named, found, loaded and described; not run."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from fedsp.quantization import Bits, check_installed, keep_differentiable, quantization_config
from fedsp.shards import prepare

ASSETS = Path(__file__).parent / "assets"
SCHEME = "fedsp://"
NAME_OPTION = "model.backbone.name_or_path"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVShape(NamedTuple):
    """Sizes (L, K, D) of the keys and values that a model keeps."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class BackboneSpec:
    """Which global model is used, and how it is run."""

    name_or_path: str = "fedsp://docstring-nano"
    """Folder with `config.json`, hub id, or `fedsp://NAME` for a model that comes with fedsp."""
    config: dict[str, Any] | None = None
    """Random weights of this transformers config, with its `model_type`; null loads weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null takes that of `name_or_path`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights; the soft prompt is always float32."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel; Gemma 2 needs `eager`."""
    position_offset: int | None = None
    """Position of the first text token; null: after the P virtual tokens, 0: the paper's code."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    sharded: bool = False
    """Divide the frozen weights among the run's processes (FSDP2): none ever holds all of them."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Hold the layers' frozen projections in 8 or 4 bits (NF4); needs `fedsp[quantization]`."""


def resolve(
    name_or_path: str, *, option: str = NAME_OPTION, files: tuple[str, ...] = ("config.json",)
) -> str:
    """Turn what the user typed into a folder or a hub id; what looks local never goes to the hub.

    Args:
        name_or_path: Folder, hub id or `fedsp://NAME`.
        option: Name of the setting, for error messages.
        files: A folder must hold one of these.

    Returns:
        Path of an existing folder, or a hub id.

    Raises:
        ValueError: If a folder is named that does not exist or holds none of `files`.
    """
    error = f"`{option}` must be a folder, a hub id or {SCHEME}NAME, got {name_or_path!r}: "
    if name_or_path.startswith(SCHEME):
        known = sorted(path.name for path in ASSETS.glob("*") if path.is_dir())
        if name_or_path.removeprefix(SCHEME) not in known:
            names = ", ".join(SCHEME + name for name in known) or "no model"
            raise ValueError(f"{error}with this installation comes {names}.")
        folder = ASSETS / name_or_path.removeprefix(SCHEME)
    elif _looks_local(name_or_path):
        folder = Path(name_or_path).expanduser()
    else:
        return name_or_path
    if not folder.is_dir():
        raise ValueError(f"{error}there is no folder {folder}.")
    if not any((folder / file).is_file() for file in files):
        raise ValueError(f"{error}the folder {folder} holds no {' or '.join(files)}.")
    return str(folder)


def load_tokenizer(spec: BackboneSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a pad token pads with its end-of-text token.

    Args:
        spec: Names the tokenizer, or the model it comes with.

    Returns:
        The tokenizer, with a pad token. Only the attention mask says which tokens count.

    Raises:
        ValueError: If there is no such tokenizer, or it has neither of the two tokens.
    """
    option = NAME_OPTION if spec.tokenizer is None else "model.backbone.tokenizer"
    name = spec.name_or_path if spec.tokenizer is None else spec.tokenizer
    source = resolve(name, option=option, files=("tokenizer.json", "tokenizer_config.json"))
    with _loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"`{option}` must name a tokenizer with a pad or an end-of-text token, {name!r} "
                "has neither. Set one of them in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, option: str) -> None:
    """Refuse a tokenizer that gives ids which the model has no embedding for.

    Tokens added to the vocabulary beyond the model's (Gemma 3's image token) may be there, as long
    as no text is padded, begun or ended with them.

    Args:
        tokenizer: Tokenizer of texts for the model.
        vocab_size: V, the model's number of embeddings, often padded above the tokenizer's.
        option: Name of the setting that gives the tokenizer, for the error message.

    Raises:
        ValueError: If an ordinary token, or a pad, start or end token has an id of V or more.
    """
    marks = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    needed = max(tokenizer.vocab_size, *(idx + 1 for idx in marks if idx is not None))
    if needed > vocab_size:
        raise ValueError(
            f"`{option}` must be a tokenizer of at most {vocab_size} tokens, the vocabulary of the "
            f"global model, got {needed} tokens. Name the one that the model was trained with."
        )


def load_model(spec: BackboneSpec) -> PreTrainedModel:
    """Load the model, or draw random weights from torch's global stream where `spec.config` is set.

    Raises:
        ValueError: If there is no such model, its weights are incomplete, or it cannot be sharded
            or quantised.
    """
    settings: dict[str, Any] = {
        "dtype": DTYPES[spec.dtype],
        "attn_implementation": spec.attn_implementation,
    }
    if spec.sharded:
        _check_sharded(spec)
    if spec.quantization is not None:
        _check_quantized(spec, spec.quantization)
        settings["quantization_config"] = quantization_config(spec.quantization, DTYPES[spec.dtype])
    if spec.config is not None:
        with _loading("model.backbone.config", str(spec.config.get("model_type"))):
            return AutoModelForCausalLM.from_config(_configuration(spec), **settings)
    source = resolve(spec.name_or_path)
    with _loading(NAME_OPTION, spec.name_or_path), _unused_rules_hidden():
        if spec.sharded:
            settings["distributed_config"] = _division(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            local_files_only=Path(source).is_dir(),
            output_loading_info=True,
            **settings,
        )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"`{NAME_OPTION}` must hold all weights (transformers would draw others at random), "
            f"{spec.name_or_path!r} lacks {', '.join(sorted(report['missing_keys'])[:5])}."
        )
    if spec.sharded:
        prepare(model)
    keep_differentiable(model)
    return model


def load_outline(spec: BackboneSpec) -> PreTrainedModel:
    """Build the model's modules from its configuration alone: no weights are read or held.

    Its parameters are on the meta device, its buffers (such as rotary frequencies) are real.

    Raises:
        ValueError: If there is no such configuration.
    """
    settings: dict[str, Any] = {
        "dtype": DTYPES[spec.dtype],
        "attn_implementation": spec.attn_implementation,
    }
    name = NAME_OPTION if spec.config is None else "model.backbone.config"
    with _loading(name, spec.name_or_path), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(_configuration(spec), **settings)
    model.tie_weights()
    return model


def save_outline(spec: BackboneSpec, folder: Path) -> None:
    """Write what `load_outline` and `load_tokenizer` read: configuration and tokenizer, no weights.

    Args:
        spec: Names the model.
        folder: New folder.

    Raises:
        ValueError: If there is no such model or tokenizer.
    """
    name = NAME_OPTION if spec.config is None else "model.backbone.config"
    with _loading(name, spec.name_or_path):
        config = _configuration(spec)
    config.name_or_path = ""  # where the owner keeps it
    config.save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)


def _configuration(spec: BackboneSpec) -> PreTrainedConfig:
    """Return the configuration that is named, or that of a model of random weights."""
    if spec.config is None:
        source = resolve(spec.name_or_path)
        return AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    options = dict(spec.config)
    kind = options.pop("model_type", None)
    if kind is None:
        raise ValueError(
            "`model.backbone.config` must hold `model_type` (such as gpt2 or llama), got only "
            f"{sorted(options)}."
        )
    return AutoConfig.for_model(kind, **options)


def _check_sharded(spec: BackboneSpec) -> None:
    """Refuse what cannot be divided among processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            "`model.backbone.sharded` divides the model among several processes, got one. Set it "
            "to false, or raise `trainer.devices`."
        )
    if spec.config is not None:
        raise ValueError(
            "`model.backbone.sharded` needs weights in files, but `model.backbone.config` asks for "
            "random ones. Save such a model to a folder and name that."
        )
    if spec.position_offset is not None:
        raise ValueError(
            "`model.backbone.position_offset` must be null with `model.backbone.sharded`, got "
            f"{spec.position_offset}: its export turns keys with a model that one process runs."
        )


def _check_quantized(spec: BackboneSpec, bits: Bits) -> None:
    """Refuse what cannot be quantised."""
    check_installed(bits)
    if spec.config is not None or spec.sharded:
        other = "sharded" if spec.sharded else "config"
        raise ValueError(
            f"`model.backbone.quantization` must be null with `model.backbone.{other}`, got "
            f"{bits}: only a whole model whose weights are in files is quantised."
        )


def _division(source: str) -> Any:
    """Return how the model is divided: each layer, the embeddings and the head by themselves.

    transformers has such a plan for most families, but for GPT-2 and OPT one that fits no module.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {module: name for name, module in model.named_modules()}
    plan = {
        f"{names[find_layers(model)]}.*": "free_full_weight",
        names[model.get_input_embeddings()]: "free_full_weight",
        names[model.get_output_embeddings()]: "keep_full_weight",
    }
    return DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_plan=plan)


@contextmanager
def _unused_rules_hidden() -> Iterator[None]:
    """Keep transformers from telling which rules of its own plan, beside ours, fit no module."""

    def is_news(record: logging.LogRecord) -> bool:
        return "match nothing" not in record.getMessage()

    logger = logging.getLogger("transformers.distributed.mixin")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model of the same configuration without memory for its parameters.

    Args:
        model: Whole, sharded or quantised.
    """
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=config._attn_implementation
        )


def hide_loading_bar() -> None:
    """Keep transformers from drawing its bar, of which a log would show every redrawing."""
    disable_progress_bar()


def describe(model: PreTrainedModel) -> KVShape:
    """Read the sizes of the keys and values from the configuration.

    Raises:
        ValueError: If the model has no head, or layers of a kind that keeps other things.
    """
    kinds = set(text_option(model, "layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds or model.get_output_embeddings() is None:
        reason = f"layers of kind {sorted(kinds)}" if kinds else "no output embedding"
        raise ValueError(
            f"`{NAME_OPTION}` must be a causal language model with full or sliding attention in "
            f"every layer, got model type {model.config.model_type!r} with {reason}."
        )
    heads = text_option(model, "num_attention_heads")
    head_dim = text_option(model, "head_dim") or text_option(model, "hidden_size") // heads
    num_kv_heads = text_option(model, "num_key_value_heads") or heads
    return KVShape(len(find_layers(model)), num_kv_heads, head_dim)


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of the L decoder layers.

    Raises:
        ValueError: If the decoder has no such list.
    """
    num_layers = text_option(model, "num_hidden_layers")
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return child
    raise ValueError(
        f"`{NAME_OPTION}` must be a decoder-only model with its layers in one list, got model type "
        f"{model.config.model_type!r}."
    )


def text_option(model: PreTrainedModel, name: str) -> Any:
    """Return one setting of the language part's configuration, None where it has none."""
    return getattr(model.config.get_text_config(), name, None)


@contextmanager
def _loading(option: str, name: str) -> Iterator[None]:
    """Turn what transformers says about a missing or foreign folder into one error."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "attention implementation" in str(error):
            raise ValueError(
                f"`model.backbone.attn_implementation` must be one that {name!r} has, which is not "
                "sdpa. Set it to eager."
            ) from error
        raise ValueError(f"`{option}`: {name!r} could not be loaded: {error}") from error


def _looks_local(name: str) -> bool:
    path = Path(name).expanduser()
    parts = name.split("/")
    is_hub_id = len(parts) <= 2 and all(parts) and not name.startswith((".", "~"))
    return path.exists() or path.is_absolute() or not is_hub_id
