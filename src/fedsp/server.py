"""The server's role: a frozen global model and what is tuned on it, as a rule a soft prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe, SharedCell
from fedsp.backbone import Backbone, load_backbone, outline_backbone
from fedsp.distillation import Distillation
from fedsp.losses import token_cross_entropy
from fedsp.payload import SOFT_PROMPT, Payload
from fedsp.pretrained import NAME_OPTION, BackboneSpec, check_vocabulary, load_tokenizer
from fedsp.scoring import Scores, complete, score
from fedsp.seeding import stream
from fedsp.soft_prompt import (
    NormalInit,
    PromptInitializer,
    SoftPrompt,
    check_options,
    pool_layers,
)
from fedsp.stages import Stage
from fedsp.tuned import TunedWeights, Weights, load_weights, weights_payload

NEUTRAL_TEXT = (
    "Read the text, think about what is asked, and write the answer that follows from it."
)


@dataclass(frozen=True)
class SoftPromptSpec:
    """The soft prompt that all sides share, and how the server holds it.

    Args:
        num_virtual_tokens: Keys and values prepended at every layer, at least 0.
        initializer: Where the first prompt comes from; null draws from N(0, 0.02).
        dropout: Share of the prefix's numbers dropped while the server trains, in [0, 1).
        reparameterization_size: Width of a two-layer MLP that makes the prefix on the server; null
            trains the prefix itself. The MLP never travels.
    """

    num_virtual_tokens: int = 20
    initializer: PromptInitializer | None = None
    dropout: float = 0.0
    reparameterization_size: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If a number is out of its range.
        """
        owner = "model.soft_prompt."
        check_options(owner, self.num_virtual_tokens, self.dropout, self.reparameterization_size)


class ServerModule(LightningModule):
    """The global model, frozen, and what is tuned on it: all that is trained and that travels."""

    def __init__(  # noqa: PLR0913 - the signature is the command line's schema
        self,
        backbone: BackboneSpec = BackboneSpec(),
        soft_prompt: SoftPromptSpec = SoftPromptSpec(),
        training: Stage = Stage(),
        auxiliary: AuxiliaryRecipe | None = None,
        initial_distillation: Distillation | None = None,
        tuned_weights: TunedWeights | None = None,
        deploy_auxiliary: bool = False,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; weights are loaded by `configure_model`, after processes have started.

        Args:
            backbone: The global model.
            soft_prompt: Length and initialisation of the prompt.
            training: The server's own steps each round; `steps: 0` leaves them out. In a plain
                `lightning.Trainer` only the optimizer counts.
            auxiliary: How the clients' model is derived from the global model; null shares its
                first layer.
            initial_distillation: How the auxiliary model is taught before the first round; null
                skips it.
            tuned_weights: Weights of the model that are tuned and travel beside the soft prompt, or
                in its place where it has no virtual tokens; null tunes the prompt alone.
            deploy_auxiliary: Let the auxiliary model take the global model's place on the server
                too, to be tuned and measured: FedAvg of a small model. The global model then only
                teaches it.
            seed: Seed of the prompt's initialisation and of random weights; null takes
                `seed_everything`.
        """
        super().__init__()
        self.backbone_spec = backbone
        self.prompt_spec = soft_prompt
        self.training_stage = training
        self.auxiliary_recipe = auxiliary if auxiliary is not None else SharedCell()
        self.initial_distillation = initial_distillation
        self.tuned_weights = tuned_weights
        self.deploy_auxiliary = deploy_auxiliary
        self.seed = seed or 0
        self.backbone: Backbone | None = None
        self.soft_prompt: SoftPrompt | None = None
        self._deployed: Auxiliary | None = None
        self._weights: Weights = {}
        self._initial_weights: Payload = {}

    def configure_model(self) -> None:
        """Load the global model and make the soft prompt; a second call does nothing."""
        if self.backbone is not None:
            return
        self._take(load_backbone(self.backbone_spec, seed=self.seed))
        self.initialize_prompt(self.tokenizer(NEUTRAL_TEXT)["input_ids"])

    def configure_outline(self) -> None:
        """Take the global model's configuration and tokenizer, which a client may have; no weights.

        Raises:
            ValueError: If there is no such configuration or tokenizer.
        """
        self._take(outline_backbone(self.backbone_spec))

    def _take(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.soft_prompt = self._new_prompt(backbone)
        self.tokenizer = load_tokenizer(self.backbone_spec)
        option = "model.backbone.tokenizer" if self.backbone_spec.tokenizer else NAME_OPTION
        check_vocabulary(self.tokenizer, backbone.vocab_size, option)

    def _new_prompt(self, backbone: Backbone) -> SoftPrompt:
        return SoftPrompt(
            backbone.kv_shape,
            self.prompt_spec.num_virtual_tokens,
            dropout=self.prompt_spec.dropout,
            reparameterization_size=self.prompt_spec.reparameterization_size,
            generator=stream(self.seed, "reparameterization"),
        )

    def check_whole(self, wish: str) -> None:
        """Refuse what cannot be done with a model that is divided among processes.

        Args:
            wish: What is wanted, as the message begins.

        Raises:
            ValueError: If `model.backbone.sharded` is on.
        """
        if self.backbone_spec.sharded:
            raise ValueError(
                f"{wish} needs the global model in one piece, got `model.backbone.sharded: true`. "
                "Set it to false, where one process can hold the model."
            )

    def initialize_prompt(self, sample_ids: Sequence[int]) -> None:
        """Give the prompt its first value.

        Args:
            sample_ids: Token ids of real text, for initialisers that start from its keys and
                values.
        """
        backbone, prompt = self.require_model()
        initializer = self.prompt_spec.initializer or NormalInit()
        prefix = initializer(
            backbone.kv_shape,
            self.prompt_spec.num_virtual_tokens,
            stream(self.seed, "soft_prompt"),
            lambda ids: backbone.keys_values(ids.to(self.device)).cpu(),
            sample_ids,
        )
        prompt.load_prefix(prefix)

    def require_model(self) -> tuple[Backbone, SoftPrompt]:
        """Return backbone and prompt.

        Raises:
            RuntimeError: If `configure_model` has not run.
        """
        if self.backbone is None or self.soft_prompt is None:
            raise RuntimeError("expected a loaded ServerModule; call `configure_model()` first")
        return self.backbone, self.soft_prompt

    def text_room(self) -> int | None:
        """Return how many positions the prompt leaves for text, None where there is no limit."""
        backbone, prompt = self.require_model()
        if backbone.max_positions is None:
            return None
        offset = backbone.spec.position_offset
        return backbone.max_positions - (prompt.num_virtual_tokens if offset is None else offset)

    def require_deployed(self) -> Backbone:
        """Return the model that is tuned and measured: the global model, or the auxiliary.

        Raises:
            RuntimeError: If `configure_model` has not run.
        """
        return self.require_model()[0] if self._deployed is None else self._deployed.backbone

    def start_tuning(self, auxiliary: Auxiliary | None = None) -> None:
        """Set up the weights that are tuned beside the prompt; a second call does nothing.

        The clients' model must have been derived by now: it is derived from an untouched one.

        Args:
            auxiliary: The clients' model, which takes the global model's place where
                `deploy_auxiliary` is on.

        Raises:
            ValueError: If the model has no such weights.
        """
        if self._weights or self._deployed is not None:
            return
        sources = list(range(self.require_model()[0].kv_shape.num_layers))
        if self.deploy_auxiliary and auxiliary is not None:
            # a copy of its own: the clients train theirs
            self._deployed = auxiliary.duplicate()
            sources = list(auxiliary.sources)
        if self.tuned_weights is not None:
            deployed = self.require_deployed()
            self._weights = self.tuned_weights.select(deployed, sources, self.seed)
            self._initial_weights = weights_payload(self._weights)
        for parameter in self.tuned_parameters():
            parameter.requires_grad_(True)

    def tuned_parameters(self) -> list[torch.nn.Parameter]:
        """Return what the server trains."""
        return [*self.require_model()[1].parameters(), *self._weights.values()]

    def payload(self) -> Payload:
        """Return copies of what travels: the soft prompt, tuned weights, or both."""
        named = {SOFT_PROMPT: self.require_model()[1].prefix().cpu()} if self.tunes_prompt else {}
        return named | self.weights()

    @property
    def tunes_prompt(self) -> bool:
        """Whether a soft prompt is tuned and travels; one without tokens stands for no weights."""
        return self.prompt_spec.num_virtual_tokens > 0 or self.tuned_weights is None

    def weights(self) -> Payload:
        """Return copies of the tuned weights, without the prompt."""
        return weights_payload(self._weights)

    @property
    def is_exportable(self) -> bool:
        """Whether something was tuned that others can load beside the global model."""
        has_parts = self.prompt_spec.num_virtual_tokens > 0 or self.tuned_weights is not None
        return has_parts and not self.deploy_auxiliary

    def load_payload(self, payload: Payload) -> None:
        """Become exactly what `payload` returned."""
        if SOFT_PROMPT in payload:
            self.require_model()[1].load_prefix(payload[SOFT_PROMPT])
        load_weights(self._weights, payload)

    @contextmanager
    def as_delivered(self) -> Iterator[Backbone]:
        """Give the global model as it was before anything was tuned, for the time of a block."""
        tuned = weights_payload(self._weights)
        load_weights(self._weights, self._initial_weights)
        try:
            yield self.require_model()[0]
        finally:
            load_weights(self._weights, tuned)

    def prefix(self) -> Tensor:
        """Return [L, 2, K, P, D], the prompt as the deployed model reads it."""
        prefix: Tensor = self.require_model()[1]()
        return prefix if self._deployed is None else pool_layers(prefix, self._deployed.slots)

    def twin(self) -> "ServerModule":
        """Return a server of its own prompt over the same global model, which is not copied."""
        backbone, prompt = self.require_model()
        other = ServerModule(
            self.backbone_spec,
            self.prompt_spec,
            self.training_stage,
            self.auxiliary_recipe,
            seed=self.seed,
        )
        other.backbone, other.tokenizer = backbone, self.tokenizer
        other.soft_prompt = self._new_prompt(backbone)
        other.soft_prompt.load_state_dict(prompt.state_dict())
        return other

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the label tokens of a batch, in nats."""
        logits, targets, _ = self.require_deployed().label_logits(batch, self.prefix())
        return token_cross_entropy(logits, targets).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Scores:
        """Return the likelihoods of a batch of choices under the model as it is tuned."""
        return score(self.require_deployed(), batch, self.prefix())

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Scores:
        """Return the same as `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, **options: Any) -> list[str]:
        """Write completions greedily.

        Args:
            batch: `input_ids` and `attention_mask` [B, T], left-padded.
            batch_idx: Index of the batch.
            options: Passed on to `generate`, such as `max_new_tokens`.

        Returns:
            One text a row, without the prompt.
        """
        model, prefix = self.require_deployed(), self.prefix()
        return complete(model, self.tokenizer, batch, prefix, **options)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of what is tuned; the frozen rest of the model is not in it."""
        return self.training_stage.optimizer(self.tuned_parameters())
