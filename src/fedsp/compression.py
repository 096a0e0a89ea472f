"""Auxiliary models made smaller: fewer embeddings, projections of low rank.

Each recipe here wraps another one and shrinks what that one builds; nothing is trained here.

Axis letters: V vocabulary, r rank.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe
from fedsp.backbone import Backbone
from fedsp.quantization import dequantized
from fedsp.shards import whole
from fedsp.vocabulary import trim


class _Wrapper(AuxiliaryRecipe):
    """A recipe that changes what another one builds: the layers are the other's."""

    def __init__(self, recipe: AuxiliaryRecipe) -> None:
        super().__init__(recipe.train_embeddings)
        self.recipe = recipe
        self.is_taught = recipe.is_taught
        self.knows_all_tokens = recipe.knows_all_tokens
        self.calibration_batches = recipe.calibration_batches

    def sources(self, num_layers: int) -> list[int]:
        """Return the wrapped recipe's; see `AuxiliaryRecipe.sources`."""
        return self.recipe.sources(num_layers)

    def slots(self, num_layers: int) -> list[list[int]]:
        """Return the wrapped recipe's; see `AuxiliaryRecipe.slots`."""
        return self.recipe.slots(num_layers)

    def calibrate(
        self,
        auxiliary: Auxiliary,
        backbone: Backbone,
        batches: Iterable[dict[str, Tensor]],
        prefix: Tensor,
    ) -> None:
        """Let the wrapped recipe do what it does; see `AuxiliaryRecipe.calibrate`."""
        self.recipe.calibrate(auxiliary, backbone, batches, prefix)


class _EveryLayer(AuxiliaryRecipe):
    def sources(self, num_layers: int) -> list[int]:
        return list(range(num_layers))


class TrimmedVocabulary(_Wrapper):
    """Embeddings and head of the most frequent tokens only, counted on server and public data.

    Other tokens are read as the most similar kept one and are never predicted: where one is the
    label, the auxiliary model has no loss.
    """

    def __init__(self, recipe: AuxiliaryRecipe, num_tokens: int) -> None:
        """Choose how many tokens are kept.

        Args:
            recipe: Makes the model whose vocabulary is trimmed.
            num_tokens: Tokens kept, at least 2; all of them where the model has no more.

        Raises:
            ValueError: If `num_tokens` is below 2.
        """
        super().__init__(recipe)
        if num_tokens < 2:
            raise ValueError(
                f"`model.auxiliary.num_tokens` must be at least 2, got {num_tokens}: with one "
                "token there is nothing to predict."
            )
        self.num_tokens = num_tokens
        self.knows_all_tokens = False

    def build(self, backbone: Backbone, token_counts: Tensor | None = None) -> Auxiliary:
        """Build the wrapped recipe's model and cut its tables; see `AuxiliaryRecipe.build`.

        Raises:
            ValueError: If there is nothing to count the tokens on.
        """
        if token_counts is None or not token_counts.any():
            raise ValueError(
                "`model.auxiliary` TrimmedVocabulary counts tokens on the server's and the public "
                "data, but `data.server` and `data.public` are null. Give one of them."
            )
        auxiliary = self.recipe.build(backbone, token_counts)
        model = auxiliary.backbone.model
        full: Any = backbone.model.get_input_embeddings()
        vocabulary = trim(full.weight, token_counts, self.num_tokens)
        table: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        tied = head.weight is table.weight
        kept = vocabulary.kept
        table.weight = _rows(table.weight, kept)
        table.num_embeddings, table.padding_idx = len(kept), None
        head.weight = table.weight if tied else _rows(head.weight, kept)
        head.out_features = len(kept)
        if head.bias is not None:
            head.bias = _rows(head.bias, kept)
        text = model.config.get_text_config()
        text.vocab_size = len(kept)
        return auxiliary.rebuilt(Backbone(model, backbone.spec, vocabulary))


class LowRank(_Wrapper):
    """Every projection of every layer as a product of two thin matrices.

    It keeps the depth, and with it every slot of the prompt, at a fraction of the parameters. The
    matrices start from the SVD of the weights, or, calibrated, from the directions in which a
    projection's outputs vary most on public data behind the initial prompt.

    Source: Wang et al. 2024, arXiv 2403.07378 (SVD-LLM, truncation after whitening); the same
    minimum is found here from the outputs' second moments, with nothing to be inverted.
    """

    def __init__(
        self, rank: int, recipe: AuxiliaryRecipe | None = None, calibration_batches: int = 32
    ) -> None:
        """Choose the rank.

        Args:
            recipe: Makes the model whose layers are factorised; null keeps every layer.
            rank: r, at least 1; a projection that this would not make smaller stays as it is.
            calibration_batches: Public batches on which the projections' inputs are measured, in
                float32 on the model's device; 0, or no public data, leaves the SVD of the weights.

        Raises:
            ValueError: If `rank` is below 1 or `calibration_batches` below 0.
        """
        super().__init__(recipe or _EveryLayer())
        if rank < 1:
            raise ValueError(f"`model.auxiliary.rank` must be at least 1, got {rank}.")
        if calibration_batches < 0:
            raise ValueError(
                "`model.auxiliary.calibration_batches` must be at least 0, got "
                f"{calibration_batches}."
            )
        self.rank = rank
        self.calibration_batches = calibration_batches
        self.is_taught = True

    def build(self, backbone: Backbone, token_counts: Tensor | None = None) -> Auxiliary:
        """Build the wrapped recipe's model and factorise it; see `AuxiliaryRecipe.build`."""
        auxiliary = self.recipe.build(backbone, token_counts)
        layers = auxiliary.backbone.layers
        # One new module for each old one: what repetitions of a layer share stays shared.
        thin = {
            module: _Factorised(module, self.rank)
            for module in layers.modules()
            if isinstance(module, nn.Linear | Conv1D)
            and self.rank * sum(module.weight.shape) < module.weight.numel()
        }
        for parent in list(layers.modules()):
            for name, child in list(parent.named_children()):
                if child in thin:
                    setattr(parent, name, thin[child])
        return auxiliary.rebuilt(auxiliary.backbone)

    @torch.no_grad()
    def calibrate(
        self,
        auxiliary: Auxiliary,
        backbone: Backbone,
        batches: Iterable[dict[str, Tensor]],
        prefix: Tensor,
    ) -> None:
        """Start every product from the best one of its rank on the batches' inputs.

        Best is the smallest squared error of the outputs. The [in, in] second moments of all
        inputs of factorised projections are held at once. See `AuxiliaryRecipe.calibrate`.
        """
        full: dict[_Factorised, nn.Linear | Conv1D] = {}
        for layer, source in zip(auxiliary.backbone.layers, auxiliary.sources, strict=True):
            modules: dict[str, Any] = dict(backbone.layers[source].named_modules())
            for name, module in layer.named_modules():
                if isinstance(module, _Factorised):
                    full[module] = modules[name]
        moments = _second_moments(backbone, set(full.values()), batches, prefix)
        for thin, module in full.items():
            if module in moments:
                thin.fit(module, moments[module])


class _Factorised(nn.Module):
    """A linear map of rank r, with the bias of the one that it stands for."""

    def __init__(self, full: nn.Linear | Conv1D, rank: int) -> None:
        super().__init__()
        left, sizes, right = torch.linalg.svd(_matrix(full), full_matrices=False)
        root = sizes[:rank].sqrt()
        self.down = nn.Parameter((root[:, None] * right[:rank]).contiguous())
        self.up = nn.Parameter((left[:, :rank] * root).contiguous())
        self.bias = full.bias

    def fit(self, full: nn.Linear | Conv1D, moment: Tensor) -> None:
        """Project the outputs on the directions in which they are largest.

        Args:
            full: The map that it stands for.
            moment: [in, in] second moments of that one's inputs.
        """
        weight = _matrix(full)
        directions = torch.linalg.eigh(weight @ moment @ weight.T).eigenvectors
        up = directions[:, -self.up.shape[1] :]
        down = up.T @ weight
        # both factors alike in size, as one learning rate serves both
        root = down.norm(dim=1).clamp_min(torch.finfo(down.dtype).tiny).sqrt()
        self.down.copy_(down / root[:, None])
        self.up.copy_(up * root)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return nn.functional.linear(nn.functional.linear(inputs, self.down), self.up, self.bias)


def _matrix(module: nn.Linear | Conv1D) -> Tensor:
    """Return a projection's weight as [out, in] in float32; Conv1D holds it the other way round."""
    weight = whole(dequantized(module, module.weight).detach()).float()
    return weight if isinstance(module, nn.Linear) else weight.T


def _second_moments(
    backbone: Backbone,
    modules: Collection[nn.Module],
    batches: Iterable[dict[str, Tensor]],
    prefix: Tensor,
) -> dict[nn.Module, Tensor]:
    """Sum x x^T over the inputs x that the modules get at the batches' real tokens.

    Modules that read one tensor in a row, as queries, keys and values do, have one sum together.
    """
    sums: dict[tuple[nn.Module, ...], Tensor] = {}
    real: Tensor
    # the tensor that was read last, who has read it, and its x x^T
    held: Tensor | None = None
    readers: tuple[nn.Module, ...] = ()
    moment: Tensor

    def settle() -> None:
        if readers:
            sums[readers] = sums[readers] + moment if readers in sums else moment

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal held, readers, moment
        if args[0] is held:
            readers = (*readers, module)
            return
        settle()
        held, readers = args[0], (module,)
        rows = held.flatten(0, -2).float()
        if len(rows) == real.numel():  # not so where experts get their own tokens
            rows = rows[real.flatten()]
        with torch.autocast(rows.device.type, enabled=False):
            moment = rows.T @ rows

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        for batch in batches:
            real = batch["attention_mask"].bool()
            backbone.hidden_states(batch["input_ids"], batch["attention_mask"], prefix)
    finally:
        for hook in hooks:
            hook.remove()
    settle()
    moments: dict[nn.Module, Tensor] = {}
    for group, total in sums.items():
        for module in group:
            moments[module] = moments[module] + total if module in moments else total
    return moments


def _rows(weight: Tensor, kept: Tensor) -> nn.Parameter:
    rows = weight.detach()[kept].clone()
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
