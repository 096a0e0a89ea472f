"""The server's role: a frozen global model and the soft prompt that is tuned on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fedsp.auxiliary import AuxiliaryRecipe, SharedCell
from fedsp.backbone import Backbone, load_backbone
from fedsp.distillation import Distillation
from fedsp.losses import token_cross_entropy
from fedsp.messages import ServerBroadcast
from fedsp.pretrained import NAME_OPTION, BackboneSpec, check_vocabulary, load_tokenizer
from fedsp.scoring import Scores, score
from fedsp.seeding import stream
from fedsp.soft_prompt import NormalInit, PromptInitializer, SoftPrompt, check_options
from fedsp.stages import Stage

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
    """The global model, frozen, and its soft prompt: all that is trained and that travels."""

    def __init__(
        self,
        backbone: BackboneSpec = BackboneSpec(),
        soft_prompt: SoftPromptSpec = SoftPromptSpec(),
        training: Stage = Stage(),
        auxiliary: AuxiliaryRecipe | None = None,
        initial_distillation: Distillation | None = None,
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
            seed: Seed of the prompt's initialisation and of random weights; null takes
                `seed_everything`.
        """
        super().__init__()
        self.backbone_spec = backbone
        self.prompt_spec = soft_prompt
        self.training_stage = training
        self.auxiliary_recipe = auxiliary if auxiliary is not None else SharedCell()
        self.initial_distillation = initial_distillation
        self.seed = seed or 0
        self.backbone: Backbone | None = None
        self.soft_prompt: SoftPrompt | None = None

    def configure_model(self) -> None:
        """Load the global model and make the soft prompt; a second call does nothing."""
        if self.backbone is not None:
            return
        self.backbone = load_backbone(self.backbone_spec, seed=self.seed)
        self.soft_prompt = self._new_prompt(self.backbone)
        self.tokenizer = load_tokenizer(self.backbone_spec)
        option = "model.backbone.tokenizer" if self.backbone_spec.tokenizer else NAME_OPTION
        check_vocabulary(self.tokenizer, self.backbone.vocab_size, option)
        self.initialize_prompt(self.tokenizer(NEUTRAL_TEXT)["input_ids"])

    def _new_prompt(self, backbone: Backbone) -> SoftPrompt:
        return SoftPrompt(
            backbone.kv_shape,
            self.prompt_spec.num_virtual_tokens,
            dropout=self.prompt_spec.dropout,
            reparameterization_size=self.prompt_spec.reparameterization_size,
            generator=stream(self.seed, "reparameterization"),
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

    def broadcast(self, round_idx: int) -> ServerBroadcast:
        """Return what the cohort of a round receives."""
        return ServerBroadcast(round_idx, self.require_model()[1].prefix().cpu())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the label tokens of a batch, in nats."""
        backbone, prompt = self.require_model()
        logits, targets, _ = backbone.label_logits(batch, prompt())
        return token_cross_entropy(logits, targets).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Scores:
        """Return the likelihoods of a batch of choices under the global model with the prompt."""
        backbone, prompt = self.require_model()
        return score(backbone, batch, prompt())

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
        backbone, prompt = self.require_model()
        ids = batch["input_ids"]
        # a model's own generation_config.json may ask for sampling
        options = {"do_sample": False, **options}
        output = backbone.generate(ids, batch["attention_mask"], prompt(), **options)
        texts: list[str] = self.tokenizer.batch_decode(
            output[:, ids.shape[1] :], skip_special_tokens=True
        )
        return texts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the soft prompt; the frozen global model is not in it."""
        return self.training_stage.optimizer(self.require_model()[1].parameters())
