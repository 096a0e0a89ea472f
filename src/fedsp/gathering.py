"""A plain copy of some layers of a model that is sharded or quantised, to derive others from."""

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from fedsp.backbone import Backbone
from fedsp.pretrained import skeleton
from fedsp.quantization import dequantized
from fedsp.shards import is_sharded, whole


def gathered(backbone: Backbone, layers: Collection[int]) -> Backbone:
    """Gather all but the layers that are not wanted, one parameter after the other.

    Every process gets a copy of its own; the layers left out have no memory and cannot be run. A
    model that is plain already is returned as it is.

    Args:
        backbone: The global model.
        layers: Indices of the layers that are wanted.
    """
    if not is_sharded(backbone.model) and backbone.spec.quantization is None:
        return backbone
    model = skeleton(backbone.model)
    copy = Backbone(model, replace(backbone.spec, sharded=False, quantization=None))
    unwanted = [
        part
        for idx, layer in enumerate(copy.layers)
        if idx not in layers
        for part in layer.modules()
    ]
    held = dict(backbone.model.named_modules())
    made: dict[Tensor, nn.Parameter] = {}
    for name, module in model.named_modules():
        if module in unwanted:
            continue
        for key, parameter in held[name].named_parameters(recurse=False):
            if parameter not in made:
                # a copy: what was whole already must not be shared with the global model
                content = whole(dequantized(held[name], parameter).detach()).clone()
                made[parameter] = nn.Parameter(content, requires_grad=False)
            setattr(module, key, made[parameter])
        for key, buffer in held[name].named_buffers(recurse=False):
            setattr(module, key, whole(buffer).clone())
    copy.eval()
    return copy
