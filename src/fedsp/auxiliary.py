"""The auxiliary model: derived from the backbone; what of it is trained, kept and handed out.

It is built without copying the global model; nothing is trained here.

Axis letters: L layers of the global model, P virtual tokens.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsp.backbone import Backbone
from fedsp.derivation import derive, embeddings, head


class Auxiliary(nn.Module):
    """A small model that reads the same kind of soft prompt as the global one.

    Attributes:
        backbone: Runs it, with the methods of the global model's backbone.
        slots: Global layers whose prompt slots each of its layers stands for.
        sources: Global layer that each of its layers is made from.
    """

    def __init__(
        self,
        backbone: Backbone,
        slots: Sequence[Sequence[int]],
        sources: Sequence[int],
        global_num_parameters: int,
    ) -> None:
        """Take what `AuxiliaryRecipe.build` made.

        Args:
            backbone: The auxiliary's model; its own parameters require a gradient, no others.
            slots: Global layers whose prompt slots each of its layers stands for.
            sources: Global layer that each of its layers is made from.
            global_num_parameters: Size of the global model, for `summary`.
        """
        super().__init__()
        self.backbone = backbone
        self.slots = tuple(map(tuple, slots))
        self.sources = tuple(sources)
        self._global_num_parameters = global_num_parameters
        self._borrowed = frozenset(
            id(p) for p in backbone.model.parameters() if not p.requires_grad
        )
        # By name, so that a stage may switch gradients off without changing what is trainable.
        self._trainable_names = tuple(
            name for name, p in backbone.model.named_parameters() if p.requires_grad
        )
        self._left_out: frozenset[str] = frozenset()
        self._handout: dict[str, Tensor] = {}

    def seal(self) -> None:
        """Hand out the tensors of now, whatever a client puts into the model beside them."""
        self._handout = self.handout_tensors()

    def leave_out(self, tuned: Collection[nn.Parameter]) -> None:
        """Take what travels out of what the auxiliary stage trains and the client keeps.

        Raises:
            ValueError: If it is shared with the global model: training it would change that too.
        """
        owned = {id(parameter) for parameter in tuned}
        if owned & self._borrowed:
            raise ValueError(
                "`model.tuned_weights` would train weights that the clients' model shares with the "
                "global model. Set `model.auxiliary.train_embeddings` to true, or tune others."
            )
        mine = self.trainable().items()
        self._left_out |= {name for name, p in mine if id(p) in owned}
        self._trainable_names = tuple(name for name, _ in mine if name not in self._left_out)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the model's own parameters, each under one name that never changes."""
        parameters = dict(self.backbone.model.named_parameters())
        return {name: parameters[name] for name in self._trainable_names}

    def rebuilt(self, backbone: Backbone) -> "Auxiliary":
        """Return it over a model that was made from its own; what was left out stays so by name."""
        other = Auxiliary(backbone, self.slots, self.sources, self._global_num_parameters)
        other._left_out = self._left_out
        other._trainable_names = tuple(
            name for name in other._trainable_names if name not in self._left_out
        )
        return other

    def duplicate(self) -> "Auxiliary":
        """Return a copy with parameters of its own; those of the global model stay shared."""
        parameters = self.backbone.model.parameters()
        return copy.deepcopy(self, {id(p): p for p in parameters if id(p) in self._borrowed})

    def state(self) -> dict[str, Tensor]:
        """Return CPU copies of what is trained; `load` takes them back bit for bit."""
        return {
            name: parameter.detach().to("cpu", copy=True).contiguous()
            for name, parameter in self.trainable().items()
        }

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned.

        Args:
            state: One tensor for every name of `trainable()`.

        Raises:
            ValueError: If names, shapes or dtypes differ; nothing is changed then.
        """
        own = self.trainable()
        if own.keys() != state.keys():
            raise ValueError(
                "the state of an auxiliary model must hold its trainable parameters, got one that "
                f"lacks {sorted(own.keys() - state.keys())[:5]} and has in excess "
                f"{sorted(state.keys() - own.keys())[:5]}. Load one of the same `model.auxiliary`."
            )
        for name, parameter in own.items():
            if (state[name].shape, state[name].dtype) != (parameter.shape, parameter.dtype):
                raise ValueError(
                    f"{name!r} of the auxiliary model must be {list(parameter.shape)} "
                    f"{parameter.dtype}, got {list(state[name].shape)} {state[name].dtype}."
                )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def handout_tensors(self) -> dict[str, Tensor]:
        """Return all that a client needs: its own parameters, embeddings and head, each once.

        A trimmed vocabulary's two maps are among it; those of `trainable()` have the same names.
        """
        if self._handout:
            return self._handout
        model = self.backbone.model
        saved = model.state_dict(keep_vars=True).keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
        vocabulary = self.backbone.vocabulary
        maps = {} if vocabulary is None else vocabulary.state_dict(prefix="vocabulary.")
        return {**dict(model.named_parameters()), **buffers, **maps}

    def handout(self) -> dict[str, Tensor]:
        """Return contiguous CPU copies of `handout_tensors`."""
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.handout_tensors().items()
        }

    def num_parameters(self) -> int:
        """Return the number of parameters; shared ones count once."""
        return sum(p.numel() for p in self.backbone.model.parameters())

    def summary(self) -> dict[str, int | float]:
        """Return where the parameters are.

        Returns:
            "num_layers"; the numbers of parameters in "embeddings", "cell", "norm" (with anything
            else outside the layers), "head" (0 if it is the embedding), "total" and "trainable";
            "share_of_global", the total divided by that of the global model.
        """
        tables = embeddings(self.backbone)
        cell = set(self.backbone.layers.parameters())
        untied = head(self.backbone) - tables
        rest = set(self.backbone.model.parameters()) - tables - cell - untied
        total = self.num_parameters()
        return {
            "num_layers": len(self.sources),
            "embeddings": _count(tables),
            "cell": _count(cell),
            "norm": _count(rest),
            "head": _count(untied),
            "total": total,
            "trainable": _count(self.trainable().values()),
            "share_of_global": total / self._global_num_parameters,
        }


class AuxiliaryRecipe(ABC):
    """Which of the global model's layers an auxiliary model is made of.

    `is_taught` is False where it has no parameters of its own to be trained, `knows_all_tokens`
    where some tokens have no likelihood under it, `calibration_batches` tells how many batches of
    public data `calibrate` asks for.
    """

    is_taught = True
    knows_all_tokens = True
    calibration_batches = 0

    def __init__(self, train_embeddings: bool = False) -> None:
        """Keep what all recipes share.

        Args:
            train_embeddings: Whether it has embeddings and a head of its own and trains them;
                otherwise it shares the global model's, frozen.
        """
        self.train_embeddings = train_embeddings

    @abstractmethod
    def sources(self, num_layers: int) -> list[int]:
        """Return the global layer that each of the auxiliary's layers is made from.

        Args:
            num_layers: L.

        Raises:
            ValueError: If the recipe does not fit a model of so many layers.
        """

    def slots(self, num_layers: int) -> list[list[int]]:
        """Return the global layers whose prompt slots each of the auxiliary's layers stands for.

        By default every layer reads the slot that it reads in the global model.
        """
        return [[source] for source in self.sources(num_layers)]

    def shared(self, backbone: Backbone) -> set[nn.Parameter]:
        """Return the global model's parameters that the auxiliary uses as they are, frozen."""
        return set() if self.train_embeddings else embeddings(backbone) | head(backbone)

    def check(self, num_layers: int) -> None:
        """Refuse a model that the recipe does not fit, before anything is built.

        Args:
            num_layers: L.

        Raises:
            ValueError: If it does not.
        """
        self.sources(num_layers)
        self.slots(num_layers)

    def build(self, backbone: Backbone, token_counts: Tensor | None = None) -> Auxiliary:
        """Derive the auxiliary model; the global one is neither changed nor copied.

        Args:
            backbone: The global model.
            token_counts: [V] How often each token occurs in the data that the server sees, for
                recipes that ask.

        Returns:
            The auxiliary model in evaluation mode, its own parameters in float32.

        Raises:
            ValueError: If the recipe does not fit the model.
        """
        num_layers = len(backbone.layers)
        sources, slots = self.sources(num_layers), self.slots(num_layers)
        derived = derive(backbone, sources, self.shared(backbone))
        return Auxiliary(derived, slots, sources, _count(backbone.model.parameters()))

    def calibrate(  # noqa: B027 - most recipes have nothing to fit
        self,
        auxiliary: Auxiliary,
        backbone: Backbone,
        batches: Iterable[dict[str, Tensor]],
        prefix: Tensor,
    ) -> None:
        """Fit what was built to what the global model computes, without training.

        By default nothing is done.

        Args:
            auxiliary: As `build` returned it; changed in place.
            backbone: The global model.
            batches: `calibration_batches` public batches on its device.
            prefix: [L, 2, K, P, D] soft prompt that the global model reads before them.
        """


class SharedCell(AuxiliaryRecipe):
    """Cross-layer sharing: a cell of contiguous layers repeated to the global model's depth.

    Source: Dong et al. 2023, arXiv 2311.06805, cross-layer sharing.
    """

    def __init__(self, start: int = 0, cell_size: int = 1, train_embeddings: bool = False) -> None:
        """Choose the cell.

        Args:
            start: First layer of the cell, 0-based.
            cell_size: Number of layers in the cell; it must divide the model's number of layers.
            train_embeddings: Whether embeddings and head are copied and trained; otherwise they
                are the global model's, frozen.

        Raises:
            ValueError: If a number is out of range.
        """
        super().__init__(train_embeddings)
        if start < 0:
            raise ValueError(f"`model.auxiliary.start` must be at least 0, got {start}.")
        if cell_size < 1:
            raise ValueError(f"`model.auxiliary.cell_size` must be at least 1, got {cell_size}.")
        self.start = start
        self.cell_size = cell_size

    def sources(self, num_layers: int) -> list[int]:
        """Repeat the cell; see `AuxiliaryRecipe.sources`."""
        if num_layers % self.cell_size:
            divisors = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
            raise ValueError(
                f"`model.auxiliary.cell_size` must divide the global model's {num_layers} layers, "
                f"got {self.cell_size}. Choose one of {divisors}."
            )
        if self.start + self.cell_size > num_layers:
            raise ValueError(
                "`model.auxiliary.start` + `model.auxiliary.cell_size` must be at most the global "
                f"model's {num_layers} layers, got {self.start} + {self.cell_size}. Lower "
                "`model.auxiliary.start`."
            )
        return [self.start + index % self.cell_size for index in range(num_layers)]

    def slots(self, num_layers: int) -> list[list[int]]:
        """Return every layer: each repetition reads a slot of its own."""
        return [[layer] for layer in range(num_layers)]


class KeptLayers(AuxiliaryRecipe):
    """Layer dropping: some layers of the global model, each kept once, as in offsite-tuning.

    Source: Xiao et al. 2023, arXiv 2302.04870 (uniform layer dropping).
    """

    def __init__(
        self,
        layers: list[int] | None = None,
        num_layers: int | None = None,
        train_embeddings: bool = False,
    ) -> None:
        """Choose the layers, by name or by number.

        Args:
            layers: 0-based layers to keep, in rising order; null chooses `num_layers` of them.
            num_layers: How many layers to keep, evenly spaced from the first to the last; null
                where `layers` is given.
            train_embeddings: Whether embeddings and head are copied and trained; otherwise they
                are the global model's, frozen.

        Raises:
            ValueError: If not exactly one of `layers` and `num_layers` is given, or it is out of
                range.
        """
        super().__init__(train_embeddings)
        if (layers is None) == (num_layers is None):
            raise ValueError(
                "exactly one of `model.auxiliary.layers` and `model.auxiliary.num_layers` must be "
                f"given, got {layers} and {num_layers}."
            )
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(
                "`model.auxiliary.layers` must name at least one layer, each once and in rising "
                f"order, got {layers}."
            )
        if num_layers is not None and num_layers < 1:
            raise ValueError(f"`model.auxiliary.num_layers` must be at least 1, got {num_layers}.")
        self.layers = layers
        self.num_layers = num_layers

    def sources(self, num_layers: int) -> list[int]:
        """Return the kept layers; see `AuxiliaryRecipe.sources`."""
        if self.layers is not None:
            if self.layers[0] < 0 or self.layers[-1] >= num_layers:
                raise ValueError(
                    f"`model.auxiliary.layers` must be in [0, {num_layers - 1}], as the global "
                    f"model has {num_layers} layers, got {self.layers}."
                )
            return list(self.layers)
        assert self.num_layers is not None
        if self.num_layers > num_layers:
            raise ValueError(
                f"`model.auxiliary.num_layers` must be at most the global model's {num_layers} "
                f"layers, got {self.num_layers}."
            )
        gaps = max(self.num_layers - 1, 1)
        return [index * (num_layers - 1) // gaps for index in range(self.num_layers)]


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
