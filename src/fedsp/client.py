"""The client's role: an auxiliary model and a soft prompt, trained on private data."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter

from fedsp.auxiliary import Auxiliary
from fedsp.losses import token_cross_entropy
from fedsp.messages import ClientUpdate, ServerBroadcast
from fedsp.scoring import Scores, score
from fedsp.seeding import stream
from fedsp.soft_prompt import SoftPrompt, check_options, gather_layers, scatter_layers
from fedsp.stages import Stage

STAGES = ("auxiliary", "soft_prompt")


class ClientModule(LightningModule):
    """An auxiliary model that stays with the client, and the soft prompt that travels."""

    def __init__(
        self,
        auxiliary: Stage = Stage(),
        soft_prompt: Stage = Stage(),
        dropout: float = 0.0,
        reparameterization_size: int | None = None,
        keep_optimizers: bool = True,
    ) -> None:
        """Keep the settings; the auxiliary model comes from the server.

        Args:
            auxiliary: First stage of a round: the auxiliary model learns from the client's data,
                the prompt is frozen. `steps: 0` leaves it out and keeps the auxiliary model as
                handed out.
            soft_prompt: Second stage: the prompt learns, the auxiliary model is frozen.
            dropout: Share of the prefix's numbers dropped while the prompt learns, in [0, 1).
            reparameterization_size: Width of a two-layer MLP that makes the prefix on the client;
                null trains the prefix itself. The MLP never travels.
            keep_optimizers: Carry the optimizers' moments from one participation to the next; the
                schedules always go on.
        """
        super().__init__()
        check_options("client.", 0, dropout, reparameterization_size)
        self.stages = {"auxiliary": auxiliary, "soft_prompt": soft_prompt}
        self.dropout = dropout
        self.reparameterization_size = reparameterization_size
        self.keep_optimizers = keep_optimizers
        self.auxiliary: Auxiliary | None = None
        self.soft_prompt: SoftPrompt | None = None
        self.stage = "soft_prompt"
        self._received: ServerBroadcast | None = None

    def install(self, auxiliary: Auxiliary, num_virtual_tokens: int, seed: int = 0) -> None:
        """Take the auxiliary model in: round 0's hand-out.

        Args:
            auxiliary: The model as the server made it.
            num_virtual_tokens: Length of the prompt that will be received.
            seed: Seed of the reparameterisation's first weights.
        """
        self.auxiliary = auxiliary
        self.soft_prompt = SoftPrompt(
            auxiliary.backbone.kv_shape,
            num_virtual_tokens,
            dropout=self.dropout,
            reparameterization_size=self.reparameterization_size,
            generator=stream(seed, "client_reparameterization"),
        )

    def require_model(self) -> tuple[Auxiliary, SoftPrompt]:
        """Return auxiliary model and prompt.

        Raises:
            RuntimeError: If `install` has not run.
        """
        if self.auxiliary is None or self.soft_prompt is None:
            raise RuntimeError("expected a client with an auxiliary model; call `install()` first")
        return self.auxiliary, self.soft_prompt

    def receive(self, broadcast: ServerBroadcast) -> None:
        """Start a round from the server's prompt."""
        auxiliary, prompt = self.require_model()
        prompt.load_prefix(gather_layers(broadcast.prefix, auxiliary.layer_map))
        self._received = broadcast

    def update(self, client_id: int, num_examples: int) -> ClientUpdate:
        """Return what leaves the client: its prompt and its number of examples, nothing else.

        Layers that the auxiliary model lacks keep the server's values.

        Raises:
            RuntimeError: If nothing was received this round.
        """
        auxiliary, prompt = self.require_model()
        if self._received is None:
            raise RuntimeError("expected a broadcast before an update; call `receive()` first")
        prefix = scatter_layers(prompt.prefix().cpu(), auxiliary.layer_map, self._received.prefix)
        return ClientUpdate(self._received.round_idx, client_id, prefix, num_examples)

    def stage_parameters(self, stage: str) -> dict[str, Parameter]:
        """Return what a stage trains, by name."""
        auxiliary, prompt = self.require_model()
        return auxiliary.trainable() if stage == "auxiliary" else dict(prompt.named_parameters())

    def set_stage(self, stage: str) -> None:
        """Freeze all but what the stage trains; only that part is in training mode (dropout)."""
        auxiliary, prompt = self.require_model()
        self.stage = stage
        auxiliary.train(stage == "auxiliary")
        prompt.train(stage == "soft_prompt")
        for name in STAGES:
            for parameter in self.stage_parameters(name).values():
                parameter.requires_grad_(name == stage)
                parameter.grad = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over a batch's label tokens under the auxiliary model, in nats."""
        auxiliary, prompt = self.require_model()
        logits, targets, _ = auxiliary.backbone.label_logits(batch, prompt())
        # a trimmed vocabulary may know none of a batch's labels: nothing to learn, and not NaN
        return token_cross_entropy(logits, targets).sum() / max(1, len(targets))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Scores:
        """Return the likelihoods of a batch of choices under auxiliary model and prompt."""
        auxiliary, prompt = self.require_model()
        return score(auxiliary.backbone, batch, prompt())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the current stage."""
        return self.stages[self.stage].optimizer(self.stage_parameters(self.stage).values())

    def private_state(self) -> dict[str, Any]:
        """Return what the client keeps between rounds: only what its stages trained, on the CPU."""
        auxiliary, prompt = self.require_model()
        state: dict[str, Any] = {}
        if self.stages["auxiliary"].steps:
            state["auxiliary"] = auxiliary.state()
        if self.reparameterization_size is not None:
            state["soft_prompt"] = {k: v.cpu().clone() for k, v in prompt.state_dict().items()}
        return state

    def load_private_state(self, state: dict[str, Any]) -> None:
        """Restore what `private_state` returned."""
        auxiliary, prompt = self.require_model()
        if "auxiliary" in state:
            auxiliary.load(state["auxiliary"])
        if "soft_prompt" in state:
            prompt.load_state_dict(state["soft_prompt"])
