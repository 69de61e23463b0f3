"""How HR projections start if a checkpoint lacks them: as copies of self-attention's, or random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig

# Others hold codes: int8 with a scale for each row, two 4-bit codes in a byte, 8-bit floats with a scale.
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_projection(name: str) -> bool:
    """Return whether a weight is one of FlexAttention's k_proj_hd and v_proj_hd, or of LLaVA-XAttn's cross_attn."""
    return "_proj_hd." in name or ".cross_attn." in name


def layer_of(name: str) -> int:
    """Return the number of the layer that a weight of the language model belongs to."""
    return int(name.split(".layers.")[1].split(".")[0])


@torch.no_grad()
def start_projections(model: Any, names: Iterable[str], config: FlexAttnLlavaConfig) -> None:
    """Start the named projections as `hr_init` says; the output of LLaVA-XAttn's cross-attention always starts at zero.

    Raises:
        CheckpointError: If the weights are quantised: codes are not numbers that a projection could start from.
    """
    weights = dict(model.named_parameters())
    kv_heads = model.config.text_config.num_key_value_heads
    for name in sorted(names):
        weight = _numbers(weights, name)
        if name.endswith("cross_attn.o_proj.weight"):
            weight.zero_()
        elif config.flexattn.hr_init == "copy":
            weight.copy_(_with_heads(_numbers(weights, _source(name)), len(weight), kv_heads))


def _source(name: str) -> str:
    """Return the name of self-attention's weight that a projection starts as a copy of."""
    name = name.replace("_proj_hd.", "_proj.").replace("cross_attn.norm.", "input_layernorm.")
    return name.replace("cross_attn.", "self_attn.")


def _numbers(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    weight = weights.get(name)
    if weight is None or weight.dtype not in _NUMBERS:
        held = "is absent" if weight is None else f"holds {str(weight.dtype).removeprefix('torch.')} codes"
        raise CheckpointError(
            f"the HR projections cannot start from quantised weights: {name} {held}; load the checkpoint without "
            "quantisation, save it with save_pretrained, and quantise what was saved"
        )
    return weight


def _with_heads(weight: torch.Tensor, rows: int, kv_heads: int) -> torch.Tensor:
    """Repeat keys or values that several heads share (GQA) where every head has its own."""
    if len(weight) == rows:
        return weight
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(rows // len(weight), 0).flatten(0, 1)
