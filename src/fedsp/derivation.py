"""A model made of another one's layers: what of it is copied, repeated and shared.

Which layers it is made of is decided elsewhere; the other model is neither copied nor changed.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from fedsp.backbone import Backbone
from fedsp.pretrained import text_option


def derive(
    backbone: Backbone, sources: Sequence[int], shared: Collection[nn.Parameter]
) -> Backbone:
    """Build the model whose layer i is global layer `sources[i]`.

    A layer named twice is one set of parameters. `deepcopy` takes what its memo holds instead of
    copying it, which is the shared parameters, and the new list of layers in place of the old one.

    Args:
        backbone: The global model.
        sources: Global layers, 0-based.
        shared: Parameters that stay the global model's own objects; all others are float32 copies
            that require a gradient.

    Returns:
        The model in evaluation mode.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    text = copy.deepcopy(backbone.model.config, memo).get_text_config()
    text.num_hidden_layers = len(sources)
    kinds = text_option(backbone.model, "layer_types")
    if kinds is not None:
        text.layer_types = [kinds[source] for source in sources]
    layers = backbone.layers
    cell = {source: copy.deepcopy(layers[source], memo) for source in dict.fromkeys(sources)}
    shells = [_shell(cell[source], index) for index, source in enumerate(sources)]
    memo[id(layers)] = nn.ModuleList(shells)
    model = copy.deepcopy(backbone.model, memo)
    for parameter in set(model.parameters()) - set(shared):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return Backbone(model.eval(), backbone.spec)


def _shell(module: nn.Module, layer_idx: int) -> nn.Module:
    """Return `module` under a layer index and with hooks of its own, its parameters shared.

    One layer object in several places would read one slot of the prompt for all of them, and in
    common hook tables each place's hooks would fire for all; see docs/footguns.md#27 and #28.
    """
    shell = copy.copy(module)
    shell.__dict__ = dict(module.__dict__)
    for name, value in module.__dict__.items():
        if "hooks" in name and isinstance(value, dict):
            shell.__dict__[name] = copy.copy(value)
    children: dict[str, nn.Module | None] = module.__dict__["_modules"]
    shell.__dict__["_modules"] = {
        name: _shell(child, layer_idx) if child is not None and _knows_index(child) else child
        for name, child in children.items()
    }
    if "layer_idx" in shell.__dict__:
        shell.__dict__["layer_idx"] = layer_idx
    return shell


def _knows_index(module: nn.Module) -> bool:
    return any("layer_idx" in part.__dict__ for part in module.modules())


def embeddings(backbone: Backbone) -> set[nn.Parameter]:
    """Return token and position embeddings: every embedding table outside the layers."""
    inside = set(backbone.layers.modules())
    outside = [module for module in backbone.decoder.modules() if module not in inside]
    tables = [module for module in outside if isinstance(module, nn.Embedding)]
    return {parameter for table in tables for parameter in table.parameters()}


def head(backbone: Backbone) -> set[nn.Parameter]:
    """Return the parameters of the head; the embeddings' own where both are tied."""
    return set(backbone.model.get_output_embeddings().parameters())
