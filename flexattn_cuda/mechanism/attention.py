"""FlexAttention behind transformers' attention interface.

Two functions are registered under the name "flexattn": `visible_keys` (mechanism/masks.py) turns transformers' mask
into the ranges that the operator reads, and `flexattn_attention` is called by every self-attention module of the
language model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from flexattn_cuda import ops
from flexattn_cuda.mechanism.context import AttentionModule, HRArguments
from flexattn_cuda.mechanism.masks import VisibleKeys, visible_keys

NAME = "flexattn"


class LayerContext(Protocol):
    """What goes with a forward call to every layer: `context.HRContext`, or what records maps alone."""

    def before_attention(self, module: AttentionModule, device: torch.device) -> HRArguments:
        """Return what the attention of a layer needs beside its sequence."""

    def after_attention(self, module: AttentionModule, attention_map: torch.Tensor) -> None:
        """Take the layer's map [B, R, I, C], empty where none was asked for."""


def flexattn_attention(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: VisibleKeys | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    flexattn: LayerContext | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, in transformers' attention interface.

    Args:
        module: The self-attention module.
        query: [B, H, N, d].
        key: [B, Hkv, Nk, d].
        value: [B, Hkv, Nk, d].
        attention_mask: What `visible_keys` returned.
        scaling: Of the logits.
        dropout: 0.
        flexattn: The context of this forward call; without it the layer is plain causal attention.
        options: What else a model passes; options that would change the result are refused.

    Returns:
        [B, N, H, d], and None for the attention weights.

    Raises:
        ValueError: If the model asks for what the operator does not compute.
    """
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}, but flexattn attention has no dropout; set it to 0")
    if isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; flexattn attention takes a padding mask of shape "
            "[batch, keys]"
        )
    _check_options(module, attention_mask, options)
    visible = attention_mask or VisibleKeys.all(options.get("sliding_window"))
    device = query.device
    hr = HRArguments() if flexattn is None else flexattn.before_attention(module, device)
    # torch casts for its own attention alone; a rotated query is float32 here.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = (one.to(dtype) for one in (query, key, value))
        hr.cast_keys(dtype)
    attended = ops.hierarchical_attention(
        query,
        key,
        value,
        kv_start=_on(device, visible.start),
        kv_len=_on(device, visible.length),
        key_mask=_on(device, visible.bits),
        window=visible.window,
        bidirectional_ranges=_on(device, visible.blocks),
        scale=scaling,
        softcap=options.get("softcap") or 0.0,
        **hr.as_keywords(),
    )
    if flexattn is not None:
        flexattn.after_attention(module, attended.map)
    return attended.out, None


def _on(device: torch.device, part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part.to(device)


def _check_options(module: AttentionModule, mask: VisibleKeys | None, options: dict[str, Any]) -> None:
    """Raise if an option of transformers' attention interface would change the result."""
    name = type(module).__name__
    is_causal = options.get("is_causal")
    if is_causal is None and mask is None:  # with a mask the module's own default does not count
        is_causal = getattr(module, "is_causal", True)
    if is_causal is False:
        raise ValueError(
            f"{name} is not causal, but flexattn attention is: use it for the language model alone, e.g. "
            "model.model.vision_tower.set_attn_implementation('sdpa')"
        )
    if options.get("s_aux") is not None:
        raise ValueError(f"{name} has attention sinks (s_aux), which flexattn attention does not compute")


AttentionInterface.register(NAME, flexattn_attention)
AttentionMaskInterface.register(NAME, visible_keys)
