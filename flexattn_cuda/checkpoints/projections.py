"""How HR projections start if a checkpoint lacks them: as copies of self-attention's, or random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.mechanism.dequantise import is_quantised, unknown_codes, weight_of


def is_projection(name: str) -> bool:
    """Return whether a weight is one of FlexAttention's k_proj_hd and v_proj_hd, or of LLaVA-XAttn's cross_attn."""
    return "_proj_hd." in name or ".cross_attn." in name


def layer_of(name: str) -> int:
    """Return the number of the layer that a weight of the language model belongs to."""
    return int(name.split(".layers.")[1].split(".")[0])


@torch.no_grad()
def start_projections(model: Any, names: Iterable[str], config: FlexAttnLlavaConfig) -> None:
    """Start the named projections as `hr_init` says; the output of LLaVA-XAttn's cross-attention always starts at zero.

    Copies of quantised weights are copies of the numbers that their codes stand for.

    Raises:
        CheckpointError: If the projections are quantised themselves, or what they start from is in an unknown way.
    """
    kv_heads = model.config.text_config.num_key_value_heads
    for name in sorted(names):
        weight = _unquantised(model, name)
        if name.endswith("cross_attn.o_proj.weight"):
            weight.zero_()
        elif config.flexattn.hr_init == "copy":
            weight.copy_(_with_heads(_numbers(model, _source(name), weight.dtype), len(weight), kv_heads))


def _source(name: str) -> str:
    """Return the name of self-attention's weight that a projection starts as a copy of."""
    name = name.replace("_proj_hd.", "_proj.").replace("cross_attn.norm.", "input_layernorm.")
    return name.replace("cross_attn.", "self_attn.")


def _unquantised(model: Any, name: str) -> torch.Tensor:
    """Return the weight or bias of a projection, which can be written."""
    module, kind = _module_and_kind(model, name)
    if kind == "weight" and is_quantised(module):
        raise _cannot_start(name, "is quantised")
    return getattr(module, kind)


def _numbers(model: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a weight or bias, of this dtype where they are quantised."""
    module, kind = _module_and_kind(model, name)
    return weight_of(module, dtype) if kind == "weight" else getattr(module, kind)


def _module_and_kind(model: Any, name: str) -> tuple[Any, str]:
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if held := unknown_codes(module):
        raise _cannot_start(name, held)
    return module, kind


def _cannot_start(name: str, held: str) -> CheckpointError:
    return CheckpointError(
        f"the HR projections cannot start from quantised weights: {name} {held}; load the checkpoint without "
        "quantisation, save it with save_pretrained, and quantise what was saved"
    )


def _with_heads(weight: torch.Tensor, rows: int, kv_heads: int) -> torch.Tensor:
    """Repeat keys or values that several heads share (GQA) where every head has its own."""
    if len(weight) == rows:
        return weight
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(rows // len(weight), 0).flatten(0, 1)
