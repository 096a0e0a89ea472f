"""The frozen causal language model, run with a soft prompt.

Nothing is trained here, and nothing is written: see `fedsp.generation`.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K key/value heads, D head size,
E embedding size, V vocabulary, N label positions.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsp.choice_tree import depths, predecessors, seen_text, tree_masks
from fedsp.positions import mask_with_prompt, padding_to_the_right, text_positions
from fedsp.prefix_cache import ModelCache, check_prefix, new_cache, read_only_cache, read_prefix
from fedsp.pretrained import (
    NAME_OPTION,
    BackboneSpec,
    describe,
    find_layers,
    load_model,
    load_outline,
    text_option,
)
from fedsp.recompute import recomputed
from fedsp.seeding import isolated_rng
from fedsp.shards import run_parts
from fedsp.vocabulary import IGNORED_LABEL, Vocabulary


def load_backbone(spec: BackboneSpec, *, seed: int = 0) -> "Backbone":
    """Load the model frozen and in evaluation mode, and check that it is run rightly.

    Args:
        spec: Which model, and how it is run.
        seed: Seed of random weights, where `spec.config` asks for them.

    Raises:
        ValueError: If there is no such model, its weights are incomplete, or its keys and values or
            its logits are not where this program takes them to be.
    """
    with isolated_rng(seed):
        model = load_model(spec)
    backbone = Backbone(model.requires_grad_(False).eval(), spec)
    backbone.check()
    return backbone


def outline_backbone(spec: BackboneSpec) -> "Backbone":
    """Describe the model by its configuration: what derives from it is known, it cannot run.

    Args:
        spec: Which model, and how what derives from it is run.

    Raises:
        ValueError: If there is no such configuration, or the model is of no supported kind.
    """
    return Backbone(load_outline(spec).requires_grad_(False).eval(), spec)


class Backbone(nn.Module):
    """A causal language model that reads a soft prompt at every layer.

    Attributes:
        model: The transformers model.
        spec: How it is run.
        kv_shape: (L, K, D) of its keys and values.
        hidden_size: E, size of its last hidden states.
        vocab_size: V, number of its logits.
        vocabulary: Rows that token ids stand for; None where each has its own.
        max_positions: Highest number of positions it was made for; None if it names none.
    """

    def __init__(
        self, model: PreTrainedModel, spec: BackboneSpec, vocabulary: Vocabulary | None = None
    ) -> None:
        """Describe the model.

        Args:
            model: A transformers causal language model.
            spec: How it is run; the name, the config and the tokenizer play no part any more.
            vocabulary: Of a model with rows for some tokens only; texts and labels are given in
                token ids of the full vocabulary all the same.

        Raises:
            ValueError: If the model is of no supported kind, or `position_offset` is negative.
        """
        super().__init__()
        if spec.position_offset is not None and spec.position_offset < 0:
            raise ValueError(
                "`model.backbone.position_offset` must be at least 0, or null for the number of "
                f"virtual tokens, got {spec.position_offset}."
            )
        self.model = model
        self.training = model.training
        self.spec = spec
        self.vocabulary = vocabulary
        self.kv_shape = describe(model)
        self.vocab_size, self.hidden_size = model.get_output_embeddings().weight.shape
        self.max_positions: int | None = text_option(model, "max_position_embeddings")
        # a configuration's attributes are slow to read, and these are needed in every step
        self._window: int | None = text_option(model, "sliding_window")
        self._logit_cap: float | None = text_option(model, "final_logit_softcapping")

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The L decoder layers."""
        return find_layers(self.model)

    @property
    def rotary(self) -> nn.Module | None:
        """The decoder's rotary embedding; None where it has learned positions."""
        return dict(self.decoder.named_children()).get("rotary_emb")

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the decoder layers."""
        return next(p.dtype for p in self.layers.parameters() if p.is_floating_point())

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None
    ) -> Tensor:
        """Run the model without its head.

        Args:
            input_ids: [B, T] int64 token ids, padded on either side.
            attention_mask: [B, T] int64, 1 where a token is real.
            prefix: [L, 2, K, P, D] soft prompt; None or P = 0 runs the model alone.

        Returns:
            [B, T, E] last hidden states after the final norm; meaningless where the mask is 0.

        Raises:
            ValueError: If the prompt's shape is not the model's, or there are too few positions.
        """
        return run_parts(self.model, self._hidden_states, input_ids, attention_mask, prefix)

    def _hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None
    ) -> Tensor:
        start = self.text_start(prefix)
        self.check_length(start + input_ids.shape[1])
        cache = read_only_cache(prefix)
        if cache is None or not self.slides(cache.get_seq_length() + input_ids.shape[1]):
            return self._run(input_ids, attention_mask, cache, start)
        # Windows count places, padding included: on the left it would push the prompt away.
        there, back = padding_to_the_right(attention_mask)
        text, mask = input_ids.gather(1, there), attention_mask.gather(1, there)
        hidden = self._run(text, mask, cache, start)
        return hidden.gather(1, back[:, :, None].expand_as(hidden))

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Score the vocabulary, or a part of it.

        Args:
            hidden: [..., E] last hidden states.
            tokens: [n] rows of the head to be scored; None is all of them.

        Returns:
            [..., V] or [..., n] logits in the head's dtype.
        """
        return run_parts(self.model, self._logits, hidden, tokens)

    def _logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        head: Any = self.model.get_output_embeddings()
        hidden = hidden.to(head.weight.dtype)
        if tokens is None:
            logits = head(hidden)
        else:
            bias = None if head.bias is None else head.bias[tokens]
            logits = F.linear(hidden, head.weight[tokens], bias)
        cap = self._logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def label_logits(
        self, batch: Mapping[str, Tensor], prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score the vocabulary only where a label is, so that no [B, T, V] ever exists.

        Args:
            batch: "input_ids", "attention_mask" and "labels", each [B, T] int64; labels are -100
                where nothing is to be predicted.
            prefix: [L, 2, K, P, D] soft prompt or None.

        Returns:
            [N, V] logits, [N] int64 targets, and [N] int64 row of the batch that each comes from.

        Raises:
            ValueError: As `hidden_states`.
        """
        return run_parts(self.model, self._label_logits, batch, prefix)

    def _label_logits(
        self, batch: Mapping[str, Tensor], prefix: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self._hidden_states(batch["input_ids"], batch["attention_mask"], prefix)
        targets = self.own_labels(batch["labels"])[:, 1:]
        rows, columns = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
        return self._logits(hidden[rows, columns]), targets[rows, columns], rows

    def choice_logits(
        self, batch: Mapping[str, Tensor], prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score the tokens of every choice; all choices of a question share one run of its prompt.

        Args:
            batch: "input_ids" and "attention_mask" [B, T] int64, padded on the right, each row a
                prompt and all its choices; "choice" [B, T] int64, the index in the batch of the
                choice that a token belongs to, -1 elsewhere; "is_answer" [choices].
            prefix: [L, 2, K, P, D] soft prompt or None.

        Returns:
            [N, V] logits, [N] int64 targets, and [N] int64 choice that each comes from. A choice
            without a prompt loses its first token, which nothing predicts, and where the
            vocabulary is trimmed, tokens that have no row are left out.

        Raises:
            ValueError: As `hidden_states`.
        """
        return run_parts(self.model, self._choice_logits, batch, prefix)

    def _choice_logits(
        self, batch: Mapping[str, Tensor], prefix: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask, choice = batch["input_ids"], batch["attention_mask"], batch["choice"]
        if len(batch["is_answer"]) == len(ids):
            # of one choice each, the rows are plain text, for which attention has faster kernels
            hidden = self._hidden_states(ids, mask, prefix)
        else:
            hidden = self._tree_states(ids, seen_text(mask, choice), prefix)
        before = predecessors(mask, choice)
        targets = self.own_labels(ids)
        counts = (choice >= 0) & (before >= 0) & (targets != IGNORED_LABEL)
        rows, columns = counts.nonzero(as_tuple=True)
        logits = self._logits(hidden[rows, before[rows, columns]])
        return logits, targets[rows, columns], choice[rows, columns]

    def own_labels(self, labels: Tensor) -> Tensor:
        """Return labels as this model's rows: [B, T] int64, -100 where it has none to predict."""
        return labels if self.vocabulary is None else self.vocabulary.labels(labels)

    @property
    def known_tokens(self) -> Tensor | None:
        """[n] tokens that this model scores; None where it has the full vocabulary."""
        return None if self.vocabulary is None else self.vocabulary.kept

    def own_logits(self, logits: Tensor) -> Tensor:
        """Return a full model's [..., V] logits of those tokens that this model scores."""
        return logits if self.vocabulary is None else self.vocabulary.logits(logits)

    @torch.no_grad()
    def keys_values(self, input_ids: Tensor, start: int | None = None) -> Tensor:
        """Return the keys and values of real tokens.

        Args:
            input_ids: [1, P] int64 token ids.
            start: Position of the first one. None: they end right before the text to come; with
                `position_offset: 0` that is at -P to -1 where positions are rotary; learned
                positions have no such places, there it is 0 to P - 1.

        Returns:
            [L, 2, K, P, D] float32; as a prompt before a text it equals running both in one piece.

        Raises:
            ValueError: If there are more tokens than positions; `start` is taken as it is given.
        """
        if start is None:
            num_tokens, offset = input_ids.shape[1], self.spec.position_offset
            start = 0 if offset is None else offset - num_tokens
            if self.rotary is None:
                start = max(start, 0)
            self.check_length(start + num_tokens)
        return run_parts(self.model, self._keys_values, input_ids.to(self.model.device), start)

    @torch.no_grad()
    def check(self) -> None:
        """Compare text after a prompt of real tokens with the model's own logits of both.

        Raises:
            ValueError: If keys, values, positions or head are not where they are taken to be.
        """
        ids = torch.arange(4, device=self.model.device)[None] % self.vocab_size
        mask = torch.ones_like(ids)
        expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 2:]
        prefix = self.keys_values(ids[:, :2], 0)
        got = run_parts(self.model, self._logits_behind, prefix, ids[:, 2:])
        if not is_close(got, expected, self.dtype):
            raise ValueError(
                f"`{NAME_OPTION}` must be a causal language model whose logits are its output "
                f"embedding of the last hidden states, got {self.model.config.model_type!r}, whose "
                f"logits differ by {(got - expected).abs().max().item():.3g}."
            )

    def _logits_behind(self, prefix: Tensor, ids: Tensor) -> Tensor:
        cache = read_only_cache(prefix)
        return self._logits(self._run(ids, torch.ones_like(ids), cache, prefix.shape[3]))

    def text_start(self, prefix: Tensor | None) -> int:
        """Return the position of the first text token behind a prompt.

        Args:
            prefix: [L, 2, K, P, D] soft prompt or None.

        Raises:
            ValueError: If the prompt's shape is not the model's.
        """
        if prefix is not None:
            check_prefix(prefix, self.kv_shape)
        if self.spec.position_offset is not None:
            return self.spec.position_offset
        return 0 if prefix is None else prefix.shape[3]

    def slides(self, num_places: int) -> bool:
        """Whether some layer sees less than the last `num_places` keys."""
        return self._window is not None and num_places > self._window

    def check_length(self, num_positions: int) -> None:
        """Refuse what needs more positions than the model has.

        Args:
            num_positions: Of text and, where it stands before it, prompt.

        Raises:
            ValueError: If it does.
        """
        if self.max_positions is not None and num_positions > self.max_positions:
            raise ValueError(
                f"the model has {self.max_positions} positions, virtual tokens and text need "
                f"{num_positions}. Use fewer virtual tokens or shorter texts (`data.max_tokens`)."
            )

    def _tree_states(self, input_ids: Tensor, seen: Tensor, prefix: Tensor | None) -> Tensor:
        """Run rows in which every token sees what `seen` [B, T, T] says, and the whole prompt."""
        positions = depths(seen) + self.text_start(prefix)
        self.check_length(int(positions.max()) + 1)
        mask = tree_masks(
            seen,
            0 if prefix is None else prefix.shape[3],
            layer_types=text_option(self.model, "layer_types"),
            window=self._window,
            dtype=self.dtype,
        )
        return self._decode(input_ids, mask, positions, read_only_cache(prefix))

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, cache: ModelCache | None, start: int
    ) -> Tensor:
        mask = mask_with_prompt(attention_mask, 0 if cache is None else cache.get_seq_length())
        return self._decode(input_ids, mask, text_positions(attention_mask, start), cache)

    def _decode(
        self,
        input_ids: Tensor,
        mask: Tensor | dict[str, Tensor],
        positions: Tensor,
        cache: ModelCache | None,
    ) -> Tensor:
        rows = input_ids if self.vocabulary is None else self.vocabulary.rows(input_ids)
        embeds = self.model.get_input_embeddings()(rows)
        recompute = self.spec.gradient_checkpointing and torch.is_grad_enabled()
        with recomputed(self.layers) if recompute else nullcontext():
            output = self.decoder(
                # An auxiliary model shares bfloat16 embeddings under float32 layers.
                inputs_embeds=embeds.to(self.dtype),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=False,
            )
        return output.last_hidden_state

    def _keys_values(self, input_ids: Tensor, start: int) -> Tensor:
        cache = new_cache()
        self._run(input_ids, torch.ones_like(input_ids), cache, start)
        return read_prefix(cache, self.kv_shape)


def is_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether both are equal up to rounding, relative to the largest entry; never for NaN.

    Args:
        got: What was computed.
        expected: What it is taken to be.
        dtype: Of the model that computed it; float32 may be TF32.
    """
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())
