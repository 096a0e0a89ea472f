"""Client models of the methods that FedSP is compared with; those of FedSP are in `auxiliary`."""

from torch import Tensor, nn

from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe
from fedsp.backbone import Backbone


class WholeModel(AuxiliaryRecipe):
    """The global model itself, frozen: what FedPrompt and FedLoRA hand to every client."""

    is_taught = False

    def __init__(self) -> None:
        """There is nothing to choose."""
        super().__init__()

    def sources(self, num_layers: int) -> list[int]:
        """Return every layer; see `AuxiliaryRecipe.sources`."""
        return list(range(num_layers))

    def shared(self, backbone: Backbone) -> set[nn.Parameter]:
        """Return all parameters: none is copied, none is trained."""
        return set(backbone.model.parameters())


class FirstLayers(AuxiliaryRecipe):
    """The global model's first layers, each standing for as many of its prompt slots as others.

    A layer reads the mean of its slots and writes to all of them.

    Source: Dong et al. 2023, arXiv 2311.06805, baseline FedPrompt-LSR.
    """

    def __init__(self, num_layers: int = 1) -> None:
        """Choose the depth.

        Args:
            num_layers: How many layers to keep; it must divide the model's number of layers.

        Raises:
            ValueError: If the number is below 1.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"`model.auxiliary.num_layers` must be at least 1, got {num_layers}.")
        self.num_layers = num_layers

    def sources(self, num_layers: int) -> list[int]:
        """Return the first layers; see `AuxiliaryRecipe.sources`."""
        if num_layers % self.num_layers:
            raise ValueError(
                f"`model.auxiliary.num_layers` must divide the global model's {num_layers} layers, "
                f"got {self.num_layers}."
            )
        return list(range(self.num_layers))

    def slots(self, num_layers: int) -> list[list[int]]:
        """Return equal runs of neighbouring layers."""
        size = num_layers // self.num_layers
        return [list(range(start, start + size)) for start in range(0, num_layers, size)]


class OffsiteTuning(AuxiliaryRecipe):
    """Adapters, the first and last layers, around an emulator: some of the layers in between.

    Only the emulator is distilled. The adapters are the global model's own layers and are meant to
    be what travels (`fedsp.tuned.OuterLayers` with the same number).

    Source: Xiao et al. 2023, arXiv 2302.04870, section 3.
    """

    def __init__(self, num_adapter_layers: int = 2, num_emulator_layers: int = 2) -> None:
        """Choose the sizes.

        Args:
            num_adapter_layers: Layers of the adapter at either end.
            num_emulator_layers: Layers kept of those in between, evenly spaced.

        Raises:
            ValueError: If a number is out of its range.
        """
        super().__init__()
        if num_adapter_layers < 1:
            raise ValueError(
                "`model.auxiliary.num_adapter_layers` must be at least 1, got "
                f"{num_adapter_layers}."
            )
        if num_emulator_layers < 0:
            raise ValueError(
                "`model.auxiliary.num_emulator_layers` must be at least 0, got "
                f"{num_emulator_layers}."
            )
        self.num_adapter_layers = num_adapter_layers
        self.num_emulator_layers = num_emulator_layers

    def sources(self, num_layers: int) -> list[int]:
        """Return adapters and emulator in their order; see `AuxiliaryRecipe.sources`."""
        outer, inner = self.num_adapter_layers, self.num_emulator_layers
        middle = num_layers - 2 * outer
        if middle < inner:
            raise ValueError(
                "`model.auxiliary`: two adapters of `num_adapter_layers` and an emulator of "
                f"`num_emulator_layers` must fit in the global model's {num_layers} layers, got "
                f"2 * {outer} + {inner}."
            )
        spread = [outer + (2 * idx + 1) * middle // (2 * inner) for idx in range(inner)]
        return [*range(outer), *spread, *range(num_layers - outer, num_layers)]

    def build(self, backbone: Backbone, token_counts: Tensor | None = None) -> Auxiliary:
        """Derive the model with its adapters out of reach of the distillation."""
        auxiliary = super().build(backbone, token_counts)
        layers, outer = auxiliary.backbone.layers, self.num_adapter_layers
        adapters = [*layers[:outer], *layers[len(layers) - outer :]]
        auxiliary.leave_out([p for layer in adapters for p in layer.parameters()])
        return auxiliary
