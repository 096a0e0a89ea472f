"""The client's role: an auxiliary model and a soft prompt, trained on private data."""

from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter

from fedsp.auxiliary import Auxiliary
from fedsp.losses import token_cross_entropy
from fedsp.messages import ClientUpdate, ServerBroadcast
from fedsp.payload import SOFT_PROMPT, Payload
from fedsp.privacy import LocalPrivacy
from fedsp.scoring import Scores, score
from fedsp.seeding import stream
from fedsp.soft_prompt import SoftPrompt, check_options, pool_layers, spread_layers
from fedsp.stages import Stage
from fedsp.tuned import TunedWeights, Weights, load_weights, weights_payload

STAGES = ("auxiliary", "soft_prompt")


class ClientModule(LightningModule):
    """An auxiliary model that stays with the client, and the soft prompt that travels."""

    def __init__(  # noqa: PLR0913 - the signature is the command line's schema
        self,
        auxiliary: Stage = Stage(),
        soft_prompt: Stage = Stage(),
        dropout: float = 0.0,
        reparameterization_size: int | None = None,
        keep_optimizers: bool = True,
        joint: bool = False,
        proximal_weight: float = 0.0,
        privacy: LocalPrivacy | None = None,
    ) -> None:
        """Keep the settings; the auxiliary model comes from the server.

        Args:
            auxiliary: First stage of a round: the auxiliary model learns from the client's data,
                the prompt is frozen. `steps: 0` leaves it out and keeps the auxiliary model as
                handed out.
            soft_prompt: Second stage: what travels learns (the soft prompt, or the weights that
                `model.tuned_weights` names), the rest of the auxiliary model is frozen.
            dropout: Share of the prefix's numbers dropped while the prompt learns, in [0, 1).
            reparameterization_size: Width of a two-layer MLP that makes the prefix on the client;
                null trains the prefix itself. The MLP never travels.
            keep_optimizers: Carry the optimizers' moments from one participation to the next; the
                schedules always go on.
            joint: Train both at once instead of one after the other, each with the optimizer of its
                own stage; both stages must have the same number of steps.
            proximal_weight: FedProx's mu, at least 0: half of it times the prompt's squared
                distance from the received one is added to the loss of the second stage.
            privacy: Shortens what the client changed and adds noise to it before it leaves; null
                sends it as it is.

        Raises:
            ValueError: If a number is out of its range, or joint stages differ in their steps.
        """
        super().__init__()
        check_options("client.", 0, dropout, reparameterization_size)
        lengths = [
            (stage.steps, stage.accumulate_grad_batches) for stage in (auxiliary, soft_prompt)
        ]
        if joint and lengths[0] != lengths[1]:
            raise ValueError(
                "`client.joint` needs the same `steps` and `accumulate_grad_batches` in "
                f"`client.auxiliary` as in `client.soft_prompt`, got {lengths[0]} and {lengths[1]}."
            )
        if not proximal_weight >= 0:
            raise ValueError(f"`client.proximal_weight` must be at least 0, got {proximal_weight}.")
        self.stages = {"auxiliary": auxiliary, "soft_prompt": soft_prompt}
        self.joint = joint
        self.dropout = dropout
        self.reparameterization_size = reparameterization_size
        self.keep_optimizers = keep_optimizers
        self.proximal_weight = proximal_weight
        self.privacy = privacy
        self.auxiliary: Auxiliary | None = None
        self.soft_prompt: SoftPrompt | None = None
        self._weights: Weights = {}
        self._received: ServerBroadcast | None = None
        self._start: Tensor | None = None

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """What a round trains, one pass over the data after the other: the stages of each."""
        return (STAGES,) if self.joint else tuple((name,) for name in STAGES)

    def install(
        self,
        auxiliary: Auxiliary,
        num_virtual_tokens: int,
        seed: int = 0,
        tuned_weights: TunedWeights | None = None,
    ) -> None:
        """Take the auxiliary model in: round 0's hand-out.

        Args:
            auxiliary: The model as the server made it.
            num_virtual_tokens: Length of the prompt that will be received.
            seed: Seed of the reparameterisation's first weights.
            tuned_weights: The weights of the model that travel too.

        Raises:
            ValueError: If the model has no such weights, or only such as it must not train.
        """
        self.auxiliary = auxiliary
        auxiliary.seal()
        if tuned_weights is not None:
            self._weights = tuned_weights.select(auxiliary.backbone, auxiliary.sources, seed)
            auxiliary.leave_out(self._weights.values())
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

    def weights(self) -> Payload:
        """Return copies of the tuned weights that travel, without the prompt."""
        return weights_payload(self._weights)

    def receive(self, broadcast: ServerBroadcast) -> None:
        """Start a round from what the server sent."""
        auxiliary, prompt = self.require_model()
        if SOFT_PROMPT in broadcast.payload:
            prompt.load_prefix(pool_layers(broadcast.payload[SOFT_PROMPT], auxiliary.slots))
        load_weights(self._weights, broadcast.payload)
        self._received, self._start = broadcast, prompt.prefix()

    def update(self, client_id: int, num_examples: int) -> ClientUpdate:
        """Return what leaves the client: its payload and its number of examples, nothing else.

        Layers that the auxiliary model lacks keep the server's values. With `privacy` the change is
        noised, and the number of examples is told as 1.

        Raises:
            RuntimeError: If nothing was received this round.
        """
        auxiliary, prompt = self.require_model()
        if self._received is None:
            raise RuntimeError("expected a broadcast before an update; call `receive()` first")
        payload = self.weights()
        if SOFT_PROMPT in self._received.payload:
            payload[SOFT_PROMPT] = prompt.prefix().cpu()
        if self.privacy is not None:
            # before the layers are spread: what the client cannot change needs no noise
            payload, num_examples = self._noised(payload, self._received, client_id), 1
        if SOFT_PROMPT in payload:
            full = self._received.payload[SOFT_PROMPT]
            payload[SOFT_PROMPT] = spread_layers(payload[SOFT_PROMPT], auxiliary.slots, full)
        return ClientUpdate(self._received.round_idx, client_id, payload, num_examples)

    def _noised(self, payload: Payload, received: ServerBroadcast, client_id: int) -> Payload:
        if self.privacy is None or self._start is None:
            raise RuntimeError("expected a broadcast and `privacy`; call `receive()` first")
        start = {**received.payload, SOFT_PROMPT: self._start}
        reference = {name: start[name] for name in payload}
        return self.privacy.privatize(
            payload, reference, round_idx=received.round_idx, client_id=client_id
        )

    def stage_parameters(self, stage: str) -> dict[str, Parameter]:
        """Return what a stage trains, by name."""
        auxiliary, prompt = self.require_model()
        if stage == "auxiliary":
            return auxiliary.trainable()
        return dict(prompt.named_parameters()) | self._weights

    def set_stages(self, names: Collection[str]) -> None:
        """Freeze all but what the stages train; only that is in training mode (dropout)."""
        auxiliary, prompt = self.require_model()
        auxiliary.train("auxiliary" in names)
        prompt.train("soft_prompt" in names)
        for name in STAGES:
            for parameter in self.stage_parameters(name).values():
                parameter.requires_grad_(name in names)
                parameter.grad = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over a batch's label tokens under the auxiliary model, in nats.

        With the proximal term of `proximal_weight`, which a frozen prompt leaves at zero.
        """
        auxiliary, prompt = self.require_model()
        logits, targets, _ = auxiliary.backbone.label_logits(batch, prompt())
        # a trimmed vocabulary may know none of a batch's labels: nothing to learn, and not NaN
        loss = token_cross_entropy(logits, targets).sum() / max(1, len(targets))
        return loss + self._proximal_term() if self.proximal_weight else loss

    def _proximal_term(self) -> Tensor:
        """Return mu / 2 |prompt - received prompt|^2 (Li et al. 2020, arXiv 1812.06127, eq. 2)."""
        if self._start is None:
            raise RuntimeError("expected a broadcast before a step; call `receive()` first")
        change = self.require_model()[1].dense() - self._start
        return self.proximal_weight / 2 * change.square().sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Scores:
        """Return the likelihoods of a batch of choices under auxiliary model and prompt."""
        auxiliary, prompt = self.require_model()
        return score(auxiliary.backbone, batch, prompt())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of what travels."""
        return self.stages["soft_prompt"].optimizer(self.stage_parameters("soft_prompt").values())

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
