"""Weights of a model that are tuned and travel, beside a soft prompt or in its place.

Server and clients select them by the same names, whatever else their models hold; nothing is
trained here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch.nn import Parameter

from fedsp.backbone import Backbone
from fedsp.payload import Payload
from fedsp.seeding import isolated_rng, seed_for
from fedsp.state_files import write_bytes_atomically

Weights = dict[str, Parameter]


class TunedWeights(ABC):
    """Which weights are tuned and travel.

    `takes_all` is True where a client's first stage has nothing left to train.
    """

    takes_all = False

    @abstractmethod
    def select(self, backbone: Backbone, sources: Sequence[int], seed: int) -> Weights:
        """Find or add the weights in a model.

        Args:
            backbone: The model that will run with them.
            sources: Global layer that each of its layers is made from.
            seed: Seed of the first values of weights that are added.

        Returns:
            float32 parameters by names that are the same on both sides.

        Raises:
            ValueError: If the model has none of them, or not in float32.
        """

    def check(self, backbone: Backbone) -> None:
        """Refuse a global model whose weights cannot be tuned, before any work.

        Raises:
            ValueError: If its weights are not float32.
        """
        if backbone.dtype != torch.float32:
            raise ValueError(
                "`model.backbone.dtype` must be float32 where `model.tuned_weights` tunes the "
                f"model's own weights, got {backbone.spec.dtype}. `trainer.precision: bf16-mixed` "
                "computes in bfloat16 all the same."
            )

    def export(self, weights: Payload, backbone: Backbone, folder: Path, base_model: str) -> None:
        """Write tuned weights for use outside, as `tuned_weights.safetensors` under their names.

        Args:
            weights: What `weights_payload` returned.
            backbone: The model that they were tuned on.
            folder: An existing folder.
            base_model: Folder or hub id of the global model.
        """
        write_bytes_atomically(folder / "tuned_weights.safetensors", save(weights))


class LoRA(TunedWeights):
    """Low-rank updates of linear layers, by peft.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: int = 16,
        target_modules: list[str] | None = None,
    ) -> None:
        """Choose the updates.

        Args:
            rank: Rank of each update, at least 1.
            alpha: The update is scaled by alpha / rank.
            target_modules: Names of the linear layers; null takes peft's choice for the model.

        Raises:
            ValueError: If the rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"`model.tuned_weights.rank` must be at least 1, got {rank}.")
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules

    def config(self, backbone: Backbone) -> Any:
        """Return peft's configuration of the same settings for a model."""
        # peft takes about as long to import as everything else together
        from peft import LoraConfig

        # GPT-2's linear layers keep their weights transposed
        kinds = {type(module).__name__ for module in backbone.model.modules()}
        return LoraConfig(
            fan_in_fan_out="Conv1D" in kinds,
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )

    def check(self, backbone: Backbone) -> None:
        """Take any model: the updates are float32 beside weights of any dtype."""

    def select(self, backbone: Backbone, sources: Sequence[int], seed: int) -> Weights:
        """Put the updates into the model; see `TunedWeights.select`."""
        from peft import LoraModel

        if list(sources) != list(range(len(sources))):
            raise ValueError(
                "`model.tuned_weights` LoRA needs clients with all of the global model's layers: "
                "set `model.auxiliary` to fedsp.recipes.WholeModel."
            )
        with isolated_rng(seed_for(seed, "lora")):
            try:
                LoraModel(backbone.model, self.config(backbone), "default")
            except ValueError as error:
                raise ValueError(f"`model.tuned_weights.target_modules`: {error}") from error
        backbone.model.requires_grad_(False)
        named = backbone.model.named_parameters()
        found = {name: parameter for name, parameter in named if ".lora_" in name}
        for parameter in found.values():
            parameter.data = parameter.data.float()
        return found

    def export(self, weights: Payload, backbone: Backbone, folder: Path, base_model: str) -> None:
        """Write a peft adapter, for `PeftModel.from_pretrained`; see `TunedWeights.export`."""
        config = self.config(backbone)
        config.base_model_name_or_path = base_model
        config.inference_mode = True
        config.save_pretrained(str(folder))
        # peft leaves the adapter's own name, `default`, out of the names of a saved adapter
        named = {
            f"base_model.model.{name.replace('.default.', '.')}": tensor
            for name, tensor in weights.items()
        }
        write_bytes_atomically(folder / "adapter_model.safetensors", save(named))


class OuterLayers(TunedWeights):
    """All weights of the first and the last layers: the adapters of offsite-tuning.

    Source: Xiao et al. 2023, arXiv 2302.04870, section 3.1.
    """

    def __init__(self, num_layers: int = 2) -> None:
        """Choose the size.

        Args:
            num_layers: Layers at either end, at least 1.

        Raises:
            ValueError: If the number is below 1.
        """
        if num_layers < 1:
            raise ValueError(f"`model.tuned_weights.num_layers` must be >= 1, got {num_layers}.")
        self.num_layers = num_layers

    def select(self, backbone: Backbone, sources: Sequence[int], seed: int) -> Weights:
        """Return the layers' weights by place from either end; see `TunedWeights.select`."""
        total = len(backbone.layers)
        if 2 * self.num_layers > total:
            raise ValueError(
                "`model.tuned_weights.num_layers` at either end must fit in a model of "
                f"{total} layers, got {self.num_layers}."
            )
        places = {f"first.{idx}": idx for idx in range(self.num_layers)}
        places |= {f"last.{idx}": total - 1 - idx for idx in range(self.num_layers)}
        return {
            f"{place}.{name}": parameter
            for place, idx in places.items()
            for name, parameter in backbone.layers[idx].named_parameters()
        }


class AllWeights(TunedWeights):
    """Every weight: full fine-tuning, and FedAvg of the model that the clients hold.

    Source: McMahan et al. 2017, arXiv 1602.05629.
    """

    takes_all = True

    def select(self, backbone: Backbone, sources: Sequence[int], seed: int) -> Weights:
        """Return the model's parameters by name, each once; see `TunedWeights.select`."""
        return dict(backbone.model.named_parameters())


def weights_payload(weights: Weights) -> Payload:
    """Return float32 copies of tuned weights on the CPU."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in weights.items()
    }


@torch.no_grad()
def load_weights(weights: Weights, payload: Payload) -> None:
    """Take tuned weights over from a payload that holds them.

    Args:
        weights: What `TunedWeights.select` returned.
        payload: Tensors of the same names and shapes, and perhaps others.
    """
    for name, parameter in weights.items():
        parameter.copy_(payload[name])
