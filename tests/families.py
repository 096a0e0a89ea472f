"""Tiny random models of every supported family, with weights large enough to see effects."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor

from fedsp.backbone import Backbone, load_backbone
from fedsp.pretrained import BackboneSpec

VOCAB = 96
POSITIONS = 64

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": 32,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_NO_DROPOUT,
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "dropout": 0.0,
    },
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 9},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 9},
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "rotary_pct": 0.25,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "mistral": {**_LLAMA_LIKE, "sliding_window": 9},
}

FAMILIES = list(_CONFIGS)
LEARNED_POSITIONS = ["gpt2", "opt"]
SLIDING = ["gemma2", "gemma3_text", "mistral"]
ROTARY = [family for family in FAMILIES if family not in LEARNED_POSITIONS]
WITH_KERNELS = [
    (family, kernel)
    for family in FAMILIES
    for kernel in ("sdpa", "eager")
    # transformers refuses sdpa for Gemma 2: its scores are soft-capped.
    if (family, kernel) != ("gemma2", "sdpa")
]


def tiny_config(family: str, num_layers: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the `model.backbone.config` of a tiny model; layer types alternate where there are."""
    config = {"model_type": family, **_CONFIGS[family]}
    config["n_layer" if family == "gpt2" else "num_hidden_layers"] = num_layers
    if family in ("gemma2", "gemma3_text"):
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[i % 2] for i in range(num_layers)]
    return {**config, **changes}


def tiny_spec(family: str, kernel: Any = None, **settings: Any) -> BackboneSpec:
    """Return the settings of a tiny model; `kernel` defaults to the fastest that the family has."""
    if kernel is None:
        kernel = "eager" if family == "gemma2" else "sdpa"
    config = settings.pop("config", None) or tiny_config(family)
    return BackboneSpec(config=config, attn_implementation=kernel, **settings)


def tiny_backbone(
    family: str, kernel: str | None = None, *, seed: int = 0, **settings: Any
) -> Backbone:
    """Return a tiny model with weights four times the usual, so that prompts matter visibly."""
    backbone = load_backbone(tiny_spec(family, kernel, **settings), seed=seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return backbone


def random_prefix(backbone: Backbone, num_virtual_tokens: int = 5, seed: int = 1) -> torch.Tensor:
    """Return a [L, 2, K, P, D] prompt of standard normal entries."""
    num_layers, num_kv_heads, head_dim = backbone.kv_shape
    shape = (num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_text(
    rows: int = 3, length: int = 12, seed: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [B, T] ids and a mask; row 1 is padded on the right, row 2 on the left."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, -4:] = 0
    if rows > 2:
        mask[2, :3] = 0
    return ids, mask


def peft_model(backbone: Backbone, prefix: torch.Tensor) -> Any:
    """Wrap the model in peft's prefix tuning, with `prefix` as its virtual tokens."""
    num_layers, num_kv_heads, head_dim = backbone.kv_shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=prefix.shape[3],
        num_layers=num_layers,
        token_dim=num_kv_heads * head_dim,
        num_attention_heads=num_kv_heads,
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for a name that it deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(backbone.model, config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(prefix.permute(3, 0, 1, 2, 4).reshape(prefix.shape[3], -1))
    return model, weight


def at_offset(backbone: Backbone, position_offset: int | None) -> Backbone:
    return Backbone(backbone.model, replace(backbone.spec, position_offset=position_offset))


def logits_of(backbone: Backbone, ids: Tensor, mask: Tensor, prefix: Tensor | None) -> Tensor:
    return backbone.logits(backbone.hidden_states(ids, mask, prefix))
