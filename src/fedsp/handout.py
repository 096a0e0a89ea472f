"""A client's auxiliary model, built from what was handed out: the global model is never there."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsp.auxiliary import Auxiliary, AuxiliaryRecipe
from fedsp.backbone import Backbone
from fedsp.messages import MessageError, decode_handout
from fedsp.tensor_files import Buffer
from fedsp.vocabulary import Vocabulary


def receive_handout(data: Buffer, recipe: AuxiliaryRecipe, outline: Backbone) -> Auxiliary:
    """Read a hand-out into the model that the recipe makes of the global model's outline.

    Args:
        data: The bytes that came.
        recipe: `model.auxiliary`, as the server has it.
        outline: The global model without weights.

    Returns:
        The auxiliary model, frozen and on the CPU; the outline is not changed.

    Raises:
        MessageError: If the bytes are anything else than the tensors of that model.
    """
    # the tokens that the server kept are in the hand-out; only how many there are matters here
    any_counts = torch.ones(outline.vocab_size, dtype=torch.long)
    blank = recipe.build(outline, any_counts)
    tensors = decode_handout(data, like=blank.handout_tensors()).tensors
    model = blank.backbone.model
    _fill(model, tensors)
    vocabulary = None
    if blank.backbone.vocabulary is not None:
        kept, row_of = tensors["vocabulary.kept"].long(), tensors["vocabulary.row_of"]
        _check_rows("vocabulary.kept", kept, outline.vocab_size)
        _check_rows("vocabulary.row_of", row_of, len(kept))
        vocabulary = Vocabulary(kept, row_of)
    return blank.rebuilt(Backbone(model, outline.spec, vocabulary)).requires_grad_(False)


def _check_rows(name: str, rows: Tensor, limit: int) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= limit:
        raise MessageError(
            f"auxiliary_handout: `{name}` must be in [0, {limit}), got {low} to {high}"
        )


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of a model's parameters and saved buffers, shared ones shared."""
    filled: dict[nn.Parameter, nn.Parameter] = {
        parameter: nn.Parameter(tensors[name], requires_grad=parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # repetitions of a layer share one table of parameters, filled already
                module._parameters[name] = filled.get(parameter, parameter)
        for name in module._buffers:
            full_name = f"{prefix}.{name}" if prefix else name
            if full_name in tensors:
                module._buffers[name] = tensors[full_name]
