"""Frozen weights held in 8 or 4 bits: bitsandbytes' settings, and the plain weights back.

Which model that is, and whether it may be quantised, is decided elsewhere.
"""

from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

Bits = Literal["8bit", "4bit"]


def check_installed(bits: Bits) -> None:
    """Refuse quantisation without its library.

    Args:
        bits: What was asked for.

    Raises:
        ValueError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`model.backbone.quantization` {bits} needs bitsandbytes, which is not installed: pip "
            'install "fedsp[quantization]", or set it to null.'
        )


def quantization_config(bits: Bits, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of bitsandbytes.

    Args:
        bits: 8 bits, or 4 (NF4).
        dtype: Number format that 4-bit weights are multiplied in.
    """
    return BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers, if any, from packing their weights for a product without gradients."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized(module: nn.Module, parameter: Tensor) -> Tensor:
    """Return a parameter itself, or as floating point what quantised weights stand for.

    Args:
        module: Whose parameter it is.
        parameter: As it is held.
    """
    if type(parameter).__name__ not in {"Params4bit", "Int8Params"}:
        return parameter
    # an import of bitsandbytes, too
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    plain: Tensor = dequantize_bnb_weight(
        cast(nn.Parameter, parameter), getattr(module, "state", None)
    )
    return plain
