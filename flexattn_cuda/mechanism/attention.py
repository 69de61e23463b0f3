"""FlexAttention behind transformers' attention interface.

Two functions are registered under the name "flexattn": one turns transformers' padding mask into the ranges that the
operator reads, the other is called by every self-attention module of the language model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from flexattn_cuda import ops
from flexattn_cuda.mechanism.context import Call

NAME = "flexattn"


class VisibleKeys(NamedTuple):
    """Sequence keys that the queries of a call may see; causality comes on top.

    start: [B] int32, first key. length: [B] int32, one past the last key written; the queries end there.
    holes: [B, Nk] bool, False where a key between them is masked out; None where there is no such key.
    """

    start: torch.Tensor
    length: torch.Tensor
    holes: torch.Tensor | None


def visible_keys(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | None = None,
    **_,
) -> VisibleKeys:
    """transformers' mask interface: no N x N mask is built. Older versions hand over `cache_position` alone."""
    if mask_function is not causal_mask_function:
        raise ValueError(
            "flexattn attention is causal over one sequence per row; packed sequences (position_ids that start again) "
            "and other mask functions are not supported: put every sequence in a row of its own"
        )
    if cache_position is not None:
        q_length, q_offset, device = (
            cache_position.shape[0],
            cache_position[0],
            cache_position.device,
        )
    if attention_mask is not None:
        device = attention_mask.device
    start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    length = (start + (q_offset + q_length)).to(torch.int32)  # q_offset: a number, or with a static cache a tensor
    if attention_mask is None:
        return VisibleKeys(start, length, None)

    seen = attention_mask.to(torch.bool)
    if seen.shape[1] < kv_length:  # a static cache is longer than what has been written; causality hides the rest
        seen = nn.functional.pad(seen, (0, kv_length - seen.shape[1]), value=True)
    seen = seen[:, :kv_length]
    start = (seen.to(torch.int32).cumsum(-1) == 0).sum(-1, dtype=torch.int32)
    # On a GPU asking whether there are holes would wait for the device, and a few more bits to read cost nothing; compiled
    # code cannot ask.
    holes = (
        seen
        if seen.is_cuda or torch.compiler.is_compiling() or bool((seen.diff(dim=-1) & ~seen[:, 1:]).any())
        else None
    )
    return VisibleKeys(start, length, holes)


def flexattn_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: VisibleKeys | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    flexattn: Call | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, N, d], key and value [B, Hkv, Nk, d] -> [B, N, H, d].

    `flexattn` is the state of this forward call; without it the layer is plain causal attention.
    """
    if dropout:
        raise ValueError(f"flexattn attention has no dropout; attention_dropout is {dropout}, set it to 0")
    if isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"flexattn attention takes a padding mask of shape [batch, keys], not one of shape {tuple(attention_mask.shape)}"
        )
    start, length, holes = attention_mask if attention_mask is not None else (None, None, None)
    device = query.device
    layer = {} if flexattn is None else flexattn.enter(module, device)
    # torch casts for its own attention alone; a rotated query is float32 here.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = (one.to(dtype) for one in (query, key, value))
        layer |= {name: layer[name].to(dtype) for name in ("k_hr", "v_hr") if name in layer}
    out, _, _, map = ops.hierarchical_attention(
        query,
        key,
        value,
        kv_start=None if start is None else start.to(device),
        kv_len=None if length is None else length.to(device),
        key_mask=None if holes is None else holes.to(device),
        scale=scaling,
        **layer,
    )
    if flexattn is not None:
        flexattn.leave(module, map)
    return out, None


AttentionInterface.register(NAME, flexattn_attention)
AttentionMaskInterface.register(NAME, visible_keys)
