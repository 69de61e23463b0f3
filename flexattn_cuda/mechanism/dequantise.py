"""The weights of a linear layer as numbers, also where it holds codes of them.

kind                        what the layer holds
bitsandbytes, 4-bit         two codes in a byte, in one column, and scales of blocks
bitsandbytes, 8-bit         int8 codes, and a scale of each row
torchao and others          a tensor subclass with a `dequantize` of its own
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations import bitsandbytes

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight_of(linear: Any, compute_dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [out, in] of a linear layer, on their device; without gradients where they are quantised.

    Args:
        linear: The layer.
        compute_dtype: Of the result where the weights are quantised; others keep their own.

    Raises:
        ValueError: If they are quantised in a way that is not known, or an adapter of PEFT changes them.
    """
    check_readable(linear)
    weight: torch.Tensor = linear.weight
    if _is_bitsandbytes(linear):
        return _of_bitsandbytes(linear).detach().to(compute_dtype)
    if _dequantises_itself(weight):
        return weight.dequantize().detach().to(compute_dtype)
    return weight


def check_readable(linear: Any) -> None:
    """Raise ValueError where `weight_of` would."""
    if is_changed_by_peft(linear):
        raise ValueError(
            "an adapter of PEFT changes the model's keys or values; attach FlexAttention first and the adapter after "
            "it, or merge the adapter (merge_and_unload)"
        )
    if held := unknown_codes(linear):
        raise ValueError(
            f"the weight of {type(linear).__name__} {held} that flexattn cannot read; quantise with bitsandbytes or "
            "torchao, or not at all"
        )


def is_changed_by_peft(linear: Any) -> bool:
    """Return whether an adapter of PEFT has taken the place of a layer."""
    return type(linear).__module__.partition(".")[0] == "peft"


def unknown_codes(linear: Any) -> str | None:
    """Return what a layer holds in place of weights that can be read ("holds int8 codes"), None if they can be."""
    weight = getattr(linear, "weight", None)
    if weight is None:
        return "is absent, in place of it are codes"
    if is_quantised(linear) or weight.dtype in _NUMBERS:
        return None
    return f"holds {str(weight.dtype).removeprefix('torch.')} codes"


def is_quantised(linear: Any) -> bool:
    """Return whether a layer holds codes that `weight_of` can read."""
    return _is_bitsandbytes(linear) or _dequantises_itself(linear.weight)


def _is_bitsandbytes(linear: Any) -> bool:
    """Return whether bitsandbytes has quantised a layer, without importing it; its codes may be of any dtype."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        return getattr(weight, "quant_state", None) is not None
    if type(weight).__name__ != "Int8Params" or weight.dtype != torch.int8:
        return False
    scales = (getattr(weight, "SCB", None), getattr(getattr(linear, "state", None), "SCB", None))
    return any(scale is not None for scale in scales)


def _of_bitsandbytes(linear: Any) -> torch.Tensor:
    weight = linear.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # Some CPUs reorder the codes at the first call. The function that dequantises does not know that order; the one
        # that multiplies does.
        identity = torch.eye(linear.in_features, dtype=torch.bfloat16)
        product: torch.Tensor = bitsandbytes.bnb.matmul_4bit(identity, weight.data, quant_state=weight.quant_state)
        return product.T
    numbers: torch.Tensor = bitsandbytes.dequantize_bnb_weight(weight, getattr(linear, "state", None))
    return numbers


def _dequantises_itself(weight: torch.Tensor) -> bool:
    return type(weight).dequantize is not torch.Tensor.dequantize
