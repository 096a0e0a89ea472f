"""The frozen causal language model: found, loaded, described and run with a soft prompt.

The only file that knows transformers' cache classes; nothing is trained here.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K key/value heads, D head size, E embedding
size, V vocabulary, N label positions.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fedsp.seeding import isolated_rng

ASSETS = Path(__file__).parent / "assets"
SCHEME = "fedsp://"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IGNORED_LABEL = -100


class KVShape(NamedTuple):
    """Sizes of the keys and values that a model keeps: (L, K, D)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class BackboneSpec:
    """Which global model is used, and how it is run."""

    name_or_path: str = "fedsp://docstring-nano"
    """Folder with `config.json`, id on the Hugging Face hub, or `fedsp://NAME` for a model that comes with fedsp."""
    config: dict[str, Any] | None = None
    """Build random weights from this transformers configuration (it must hold `model_type`); null loads weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null takes that of `name_or_path`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights; the soft prompt is always float32."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel; Gemma 2 needs `eager`."""
    position_offset: int | None = None
    """Position of the first text token; null puts it after the P virtual tokens, 0 is the paper's code."""
    gradient_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass: less memory, about a third more time."""


def resolve(
    name_or_path: str,
    *,
    option: str = "model.backbone.name_or_path",
    files: tuple[str, ...] = ("config.json",),
) -> str:
    """Turn what the user typed into a folder or a hub id; what looks like a folder never becomes a hub id.

    Args:
        name_or_path: Folder, hub id or `fedsp://NAME`.
        option: Name of the setting, for error messages.
        files: A folder must hold one of these.

    Returns:
        Path of an existing folder, or a hub id.

    Raises:
        ValueError: If a folder is named that does not exist or holds none of `files`.
    """
    wanted = f"`{option}` must be a folder with {' or '.join(files)}, a hub id or {SCHEME}NAME"
    if name_or_path.startswith(SCHEME):
        folder = ASSETS / name_or_path.removeprefix(SCHEME)
        known = sorted(path.name for path in ASSETS.glob("*") if path.is_dir())
        if folder.name not in known or folder.parent != ASSETS:
            names = ", ".join(SCHEME + name for name in known) or "none in this installation"
            raise ValueError(
                f"{wanted}, got {name_or_path!r}. Models that come with fedsp: {names}."
            )
    elif _looks_local(name_or_path):
        folder = Path(name_or_path).expanduser()
    else:
        return name_or_path
    if not folder.is_dir():
        raise ValueError(f"{wanted}, got {name_or_path!r}: there is no folder {folder}.")
    if not any((folder / file).is_file() for file in files):
        raise ValueError(
            f"{wanted}, got {name_or_path!r}: the folder {folder} holds none of these files."
        )
    return str(folder)


def load_tokenizer(spec: BackboneSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer; where it has no pad token, the end-of-text token pads (the mask says what counts).

    Raises:
        ValueError: If there is no such tokenizer, or it has neither a pad nor an end-of-text token.
    """
    option = "model.backbone.name_or_path" if spec.tokenizer is None else "model.backbone.tokenizer"
    name = spec.name_or_path if spec.tokenizer is None else spec.tokenizer
    source = resolve(name, option=option, files=("tokenizer.json", "tokenizer_config.json"))
    with _loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"`{option}` must name a tokenizer with a pad or an end-of-text token, {name!r} has neither. "
                "Set one of them in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_backbone(spec: BackboneSpec, *, seed: int = 0) -> "Backbone":
    """Load the model frozen and in evaluation mode, and check that it is run rightly.

    Args:
        spec: Which model, and how it is run.
        seed: Seed of random weights, where `spec.config` asks for them.

    Raises:
        ValueError: If there is no such model, its weights are incomplete, or it is of a kind whose keys and
            values or logits this program would get wrong.
    """
    if spec.config is None:
        model = _load_model(spec)
    else:
        model = _random_model(spec, seed)
    backbone = Backbone(model.requires_grad_(False).eval(), spec)
    backbone.check()
    return backbone


class Backbone(nn.Module):
    """A causal language model that reads a soft prompt at every layer.

    Attributes:
        model: The transformers model.
        spec: How it is run.
        kv_shape: (L, K, D) of its keys and values.
        hidden_size: E, size of its last hidden states.
        vocab_size: V, number of its logits.
        max_positions: Highest number of positions it was made for; None if it names none.
    """

    def __init__(self, model: PreTrainedModel, spec: BackboneSpec) -> None:
        """Describe the model.

        Args:
            model: A transformers causal language model, on its device.
            spec: How it is run; name, config and tokenizer play no part any more.

        Raises:
            ValueError: If the model's layers differ in kind, or `position_offset` is negative.
        """
        super().__init__()
        if spec.position_offset is not None and spec.position_offset < 0:
            raise ValueError(
                "`model.backbone.position_offset` must be at least 0, or null for the number of virtual "
                f"tokens, got {spec.position_offset}."
            )
        self.model = model
        self.spec = spec
        self.kv_shape = _describe(model)
        self.vocab_size, self.hidden_size = model.get_output_embeddings().weight.shape
        self.max_positions: int | None = _text_option(model, "max_position_embeddings")

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The L decoder layers."""
        return _find_layers(self.model)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None
    ) -> Tensor:
        """Run the model without its head.

        Args:
            input_ids: [B, T] int64 token ids, padded on either side.
            attention_mask: [B, T] 1 where a token is real.
            prefix: [L, 2, K, P, D] soft prompt; None or P = 0 runs the model alone.

        Returns:
            [B, T, E] last hidden states, after the final norm; without meaning where the mask is 0.

        Raises:
            ValueError: If the prompt's shape is not the model's, or the text runs past its positions.
        """
        start = self._start(prefix)
        self._check_length(start + input_ids.shape[1])
        return self._run(input_ids, attention_mask, self._read_only_cache(prefix), start)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary.

        Args:
            hidden: [..., E] last hidden states.

        Returns:
            [..., V] logits in the head's dtype.
        """
        head = self.model.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype))
        cap = _text_option(self.model, "final_logit_softcapping")
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def label_logits(
        self, batch: Mapping[str, Tensor], prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score the vocabulary only where a label is, so that no [B, T, V] ever exists.

        Args:
            batch: "input_ids", "attention_mask" and "labels", each [B, T] int64; labels are -100 where
                nothing is to be predicted.
            prefix: [L, 2, K, P, D] soft prompt or None.

        Returns:
            [N, V] logits, [N] int64 targets and [N] int64 row of the batch each comes from.
        """
        hidden = self.hidden_states(batch["input_ids"], batch["attention_mask"], prefix)
        targets = batch["labels"][:, 1:]
        rows, columns = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
        return self.logits(hidden[rows, columns]), targets[rows, columns], rows

    @torch.no_grad()
    def keys_values(self, input_ids: Tensor) -> Tensor:
        """Return the keys and values of real tokens, placed right before the text that will follow.

        With `position_offset: 0` models of rotary positions put them at -P .. -1; models of learned positions
        have no such places and put them at 0 .. P - 1.

        Args:
            input_ids: [1, P] int64 token ids.

        Returns:
            [L, 2, K, P, D] float32; as a prompt before a text it equals running both in one piece.
        """
        num_tokens = input_ids.shape[1]
        offset = self.spec.position_offset
        start = 0 if offset is None else offset - num_tokens
        if self._rotary() is None:
            start = max(start, 0)
        self._check_length(start + num_tokens)
        return self._keys_values(input_ids.to(self.model.device), start)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Continue texts.

        Args:
            input_ids: [B, T] int64 token ids, padded on the left.
            attention_mask: [B, T] 1 where a token is real.
            prefix: [L, 2, K, P, D] soft prompt or None.
            **kwargs: Options of transformers' `generate`, such as `max_new_tokens`.

        Returns:
            [B, T + new] int64 token ids, the given ones included.

        Raises:
            ValueError: If the padding is on the right, the prompt's shape is not the model's, or the text
                would run past the model's positions.
        """
        if not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "`generate` needs texts that are padded on the left, got padding on the right."
            )
        start = self._start(prefix)
        self._check_length(start + input_ids.shape[1] + kwargs.get("max_new_tokens", 0))
        positions = _positions(attention_mask, start)
        if prefix is not None and prefix.shape[3] > 0:
            beams = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
            cache = DynamicCache()
            for index, (keys, values) in enumerate(prefix.to(self.dtype).unbind()):
                shape = (len(input_ids) * beams, -1, -1, -1)
                cache.update(keys.expand(shape), values.expand(shape), index)
            kwargs["past_key_values"] = cache
            attention_mask = _with_prefix(attention_mask, prefix.shape[3])
        return self.model.generate(
            input_ids, attention_mask=attention_mask, position_ids=positions, **kwargs
        )

    def rotate_keys(self, prefix: Tensor, by: int) -> Tensor:
        """Move a prompt's keys along the positions, so that text may start `by` later at the same logits.

        Args:
            prefix: [L, 2, K, P, D] soft prompt.
            by: Number of positions; P turns a prompt trained with `position_offset: 0` into one of the default.

        Returns:
            [L, 2, K, P, D] prompt in the same dtype.

        Raises:
            ValueError: If the model has learned positions, or its rotation is not the usual one.
        """
        self._check_prefix(prefix)
        if self._rotary() is None:
            raise ValueError(
                "a prompt's keys can only be moved along rotary positions, and this model "
                f"({self.model.config.model_type}) has learned ones: a prompt trained with "
                "`model.backbone.position_offset: 0` cannot become one with text at position P."
            )
        ids = torch.arange(4, device=self.model.device)[None] % self.vocab_size
        here, there = (self._keys_values(ids, start) for start in (0, by))
        if not _close(self._rotate(here, by), there, self.dtype):
            raise ValueError(
                f"the rotary positions of {self.model.config.model_type} are not the usual ones (rotation of "
                "half against half at fixed frequencies): its prompts cannot be moved. Keep `position_offset`."
            )
        return self._rotate(prefix, by)

    @torch.no_grad()
    def check(self) -> None:
        """Compare a prompt of real tokens with the model's own logits on four tokens.

        Raises:
            ValueError: If keys, values, positions or head are not where this program takes them to be.
        """
        ids = torch.arange(4, device=self.model.device)[None] % self.vocab_size
        expected = self.model(input_ids=ids, use_cache=False).logits[:, 2:]
        cache = self._read_only_cache(self._keys_values(ids[:, :2], 0))
        got = self.logits(self._run(ids[:, 2:], torch.ones_like(ids[:, 2:]), cache, 2))
        if not _close(got, expected, self.dtype):
            raise ValueError(
                "`model.backbone.name_or_path` must be a causal language model whose logits are its output "
                f"embedding of the last hidden states, got model type {self.model.config.model_type!r}, whose "
                f"own logits differ by {(got - expected).abs().max().item():.3g}. This family is not supported."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the decoder layers."""
        return next(p.dtype for p in self.layers.parameters() if p.is_floating_point())

    def _start(self, prefix: Tensor | None) -> int:
        offset = self.spec.position_offset
        if offset is not None:
            return offset
        return 0 if prefix is None else prefix.shape[3]

    def _rotary(self) -> nn.Module | None:
        return dict(self.decoder.named_children()).get("rotary_emb")

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None, start: int
    ) -> Tensor:
        embeds = self.model.get_input_embeddings()(input_ids)
        full_mask = _with_prefix(attention_mask, cache.get_seq_length() if cache else 0)
        recompute = self.spec.gradient_checkpointing and torch.is_grad_enabled()
        with _checkpointed(self.layers) if recompute else nullcontext():
            output = self.decoder(
                # An auxiliary model shares bfloat16 embeddings under float32 layers.
                inputs_embeds=embeds.to(self.dtype),
                attention_mask=full_mask,
                position_ids=_positions(attention_mask, start),
                past_key_values=cache,
                use_cache=False,
            )
        return output.last_hidden_state

    def _read_only_cache(self, prefix: Tensor | None) -> Cache | None:
        if prefix is None:
            return None
        self._check_prefix(prefix)
        if prefix.shape[3] == 0:
            return None
        return Cache(layers=[_PrefixLayer(*layer.unbind()) for layer in prefix.unbind()])

    def _keys_values(self, input_ids: Tensor, start: int) -> Tensor:
        # Without a config no layer's cache is cut to its sliding window.
        cache = DynamicCache()
        self._run(input_ids, torch.ones_like(input_ids), cache, start)
        num_layers, num_kv_heads, head_dim = self.kv_shape
        got = [(*layer.keys.shape[1::2], layer.values.shape[3]) for layer in cache.layers]
        if got != [(num_kv_heads, head_dim, head_dim)] * num_layers:
            raise ValueError(
                f"`model.backbone.name_or_path` must be a model whose {num_layers} layers all keep keys and "
                f"values of {num_kv_heads} heads of size {head_dim}, got (heads, key size, value size) = {got}."
            )
        layers = [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
        return torch.stack(layers).float()

    def _rotate(self, prefix: Tensor, by: int) -> Tensor:
        rotary = self._rotary()
        assert rotary is not None
        # Position 0 tells the factor that some models put on the cosine; the keys already carry it.
        positions = torch.tensor([[0, by]], device=prefix.device)
        per_layer = "layer_type" in inspect.signature(rotary.forward).parameters
        types = _text_option(self.model, "layer_types") if per_layer else None
        rotated = []
        for index, (keys, values) in enumerate(prefix.float().unbind()):
            extra = () if types is None else (types[index],)
            cos, sin = rotary(keys, positions, *extra)
            size = cos.shape[-1]
            turning, fixed = keys.split([size, keys.shape[-1] - size], dim=-1)
            first, second = turning.chunk(2, dim=-1)
            across = torch.cat([-second, first], dim=-1)
            turned = (turning * cos[0, 1] + across * sin[0, 1]) / cos[0, 0]
            rotated.append(torch.stack([torch.cat([turned, fixed], dim=-1), values]))
        return torch.stack(rotated).to(prefix.dtype)

    def _check_prefix(self, prefix: Tensor) -> None:
        num_layers, num_kv_heads, head_dim = self.kv_shape
        if prefix.dim() != 5 or tuple(prefix.shape[i] for i in (0, 1, 2, 4)) != (
            num_layers,
            2,
            num_kv_heads,
            head_dim,
        ):
            raise ValueError(
                f"a soft prompt of shape [L, 2, K, P, D] = [{num_layers}, 2, {num_kv_heads}, P, {head_dim}] was "
                f"expected, got {list(prefix.shape)}."
            )

    def _check_length(self, num_positions: int) -> None:
        if self.max_positions is not None and num_positions > self.max_positions:
            raise ValueError(
                f"the model has {self.max_positions} positions, and virtual tokens and text together need "
                f"{num_positions}. Lower `model.num_virtual_tokens` or `data.max_length`."
            )


class _PrefixLayer(DynamicLayer):
    """Read-only keys and values of one layer.

    `update` returns prompt and new states and stores nothing, so that a recomputed layer (gradient
    checkpointing) sees what it saw before.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys[None], values[None]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return [B, K, P + S, D] keys and values in the dtype of the new ones."""
        shape = (len(key_states), -1, -1, -1)
        keys = self.keys.to(key_states.dtype).expand(shape)
        values = self.values.to(value_states.dtype).expand(shape)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@contextmanager
def _checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Recompute every layer in the backward pass of what is run inside.

    transformers' own switch takes the prompt away from the layers; see docs/footguns.md. `forward` is wrapped and
    not `__call__`, so that the hooks of sharding stay outside.
    """
    layers = list(layers)
    before = [dict(layer.__dict__) for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            layer.__dict__.pop("forward")
            if "forward" in attributes:
                layer.__dict__["forward"] = attributes["forward"]


@contextmanager
def _loading(option: str, name: str) -> Iterator[None]:
    """Turn what transformers says about a missing or foreign folder into one error with the option's name."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"`{option}`: {name!r} could not be loaded as a folder or hub id. transformers says: {error}"
        ) from error


def _looks_local(name: str) -> bool:
    path = Path(name).expanduser()
    parts = name.split("/")
    is_hub_id = len(parts) <= 2 and all(parts) and not name.startswith((".", "~"))
    return path.exists() or path.is_absolute() or not is_hub_id


def _load_model(spec: BackboneSpec) -> PreTrainedModel:
    source = resolve(spec.name_or_path)
    with _loading("model.backbone.name_or_path", spec.name_or_path):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[spec.dtype],
            attn_implementation=spec.attn_implementation,
            local_files_only=Path(source).is_dir(),
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise ValueError(
            f"`model.backbone.name_or_path` must hold all weights, {spec.name_or_path!r} lacks "
            f"{sorted(report['missing_keys'])[:5]} (they would be random)."
        )
    return model


def _random_model(spec: BackboneSpec, seed: int) -> PreTrainedModel:
    options = dict(spec.config or {})
    if "model_type" not in options:
        raise ValueError(
            f"`model.backbone.config` must hold `model_type` (such as gpt2 or llama), got {sorted(options)}."
        )
    with _loading("model.backbone.config", options["model_type"]), isolated_rng(seed):
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        return AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[spec.dtype], attn_implementation=spec.attn_implementation
        )


def _text_option(model: PreTrainedModel, name: str) -> Any:
    """One setting of the language part's configuration, None where it has no such setting."""
    return getattr(model.config.get_text_config(), name, None)


def _describe(model: PreTrainedModel) -> KVShape:
    kinds = set(_text_option(model, "layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds or model.get_output_embeddings() is None:
        reason = f"layers of kind {sorted(kinds)}" if kinds else "no output embedding"
        raise ValueError(
            "`model.backbone.name_or_path` must be a causal language model with full or sliding attention in every "
            f"layer, got model type {model.config.model_type!r} with {reason}."
        )
    heads = _text_option(model, "num_attention_heads")
    head_dim = _text_option(model, "head_dim") or _text_option(model, "hidden_size") // heads
    return KVShape(
        len(_find_layers(model)), _text_option(model, "num_key_value_heads") or heads, head_dim
    )


def _find_layers(model: PreTrainedModel) -> nn.ModuleList:
    num_layers = _text_option(model, "num_hidden_layers")
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return child
    raise ValueError(
        "`model.backbone.name_or_path` must be a decoder-only model with its layers in one list, got model type "
        f"{model.config.model_type!r}."
    )


def _positions(attention_mask: Tensor, start: int) -> Tensor:
    """[B, T] positions that count real tokens from `start`, whichever side the padding is on."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0) + start


def _with_prefix(attention_mask: Tensor, num_virtual_tokens: int) -> Tensor:
    """[B, P + T] mask in which every virtual token counts."""
    return torch.cat(
        [attention_mask.new_ones(len(attention_mask), num_virtual_tokens), attention_mask], dim=1
    )


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of `dtype`, relative to the largest entry; never for NaN."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())
