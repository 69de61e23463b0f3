"""FlexAttention behind transformers' attention interface.

Two functions are registered under the name "flexattn": `visible_keys` turns transformers' padding mask into the ranges
that the operator reads, and `flexattn_attention` is called by every self-attention module of the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from flexattn_cuda import ops
from flexattn_cuda.mechanism.context import AttentionModule, HRArguments, HRContext

NAME = "flexattn"


class VisibleKeys(NamedTuple):
    """Sequence keys that the queries of a call may see; causality comes on top.

    Attributes:
        start: [B] int32, the first key.
        length: [B] int32, one past the last key written, where the queries end.
        bits: [B, ceil(Nk / 32)] int32, packed once for all layers: 0 where a key between them is masked out; None if
            there is no such key.
        window: How many of the latest keys a query sees, its own included; 0 for all.
    """

    start: torch.Tensor
    length: torch.Tensor
    bits: torch.Tensor | None
    window: int = 0


def visible_keys(  # noqa: PLR0913 (transformers' mask interface)
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> VisibleKeys:
    """Describe which keys are visible, in transformers' mask interface; no N x N mask is built.

    Older versions of transformers pass `cache_position` in place of q_length, q_offset and device. `local_size` is the
    attention window of models that have one.

    Raises:
        ValueError: If the mask is not a causal one with padding and perhaps a window.
    """
    if mask_function is not causal_mask_function:
        _check_mask(mask_function, local_size)
    window = 0 if local_size is None or kv_length <= local_size else local_size
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
        if device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU reading it would wait for the device
            q_offset = int(q_offset)
    assert q_length is not None
    if attention_mask is not None:
        device = attention_mask.device
    # A cache with a window has dropped the keys before kv_offset: what is visible is counted in the keys that are left.
    start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    length = (start + (q_offset + q_length - kv_offset)).to(torch.int32)  # with a static cache q_offset is a tensor
    if attention_mask is None:
        return VisibleKeys(start, length, None, window)

    if isinstance(q_offset, int) and attention_mask.shape[1] < q_offset + q_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, but this call ends at position "
            f"{q_offset + q_length}; with a key/value cache the mask must cover what is in the cache too"
        )
    seen = attention_mask.to(torch.bool)[:, int(kv_offset) :]
    if seen.shape[1] < kv_length:  # a static cache is longer than what has been written; causality hides the rest
        seen = nn.functional.pad(seen, (0, kv_length - seen.shape[1]), value=True)
    seen = seen[:, :kv_length]
    start = (seen.to(torch.int32).cumsum(-1) == 0).sum(-1, dtype=torch.int32)
    return VisibleKeys(start, length, ops.pack_bits(seen) if _may_have_holes(seen) else None, window)


def _may_have_holes(seen: torch.Tensor) -> bool:
    # On a GPU asking would wait for the device, and a few more bits to read cost nothing; compiled code cannot ask.
    if seen.is_cuda or torch.compiler.is_compiling():
        return True
    return bool((seen.diff(dim=-1) & ~seen[:, 1:]).any())


def _check_mask(mask_function: Callable[..., Any], window: int | None) -> None:
    """Raise unless the mask is a sliding window over plain causality."""
    if window is None or not _same_closure(mask_function, sliding_window_causal_mask_function(window)):
        raise ValueError(
            "flexattn attention is causal over one sequence per row; packed sequences (position_ids that start again) "
            "and other mask functions are not supported: put every sequence in a row of its own"
        )


def _same_closure(one: object, other: object) -> bool:
    """Whether two values are equal, functions by their code and what they enclose."""
    code, expected = getattr(one, "__code__", None), getattr(other, "__code__", None)
    if code is None or code is not expected:
        return one == other
    cells = (tuple(cell.cell_contents for cell in getattr(f, "__closure__", None) or ()) for f in (one, other))
    return all(
        len(a) == len(b) and all(map(_same_closure, a, b)) if isinstance(a, tuple) else _same_closure(a, b)
        for a, b in zip(*cells)
    )


def flexattn_attention(
    module: AttentionModule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: VisibleKeys | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    flexattn: HRContext | None = None,
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
    _check_options(module, options)
    start, length, bits, window = attention_mask or (None, None, None, options.get("sliding_window") or 0)
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
        kv_start=None if start is None else start.to(device),
        kv_len=None if length is None else length.to(device),
        key_mask=None if bits is None else bits.to(device),
        scale=scaling,
        window=window,
        softcap=options.get("softcap") or 0.0,
        **hr.as_keywords(),
    )
    if flexattn is not None:
        flexattn.after_attention(module, attended.map)
    return attended.out, None


def _check_options(module: AttentionModule, options: dict[str, Any]) -> None:
    """Raise if an option of transformers' attention interface would change the result."""
    name = type(module).__name__
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"{name} is not causal, but flexattn attention is: use it for the language model alone, e.g. "
            "model.model.vision_tower.set_attn_implementation('sdpa')"
        )
    if options.get("s_aux") is not None:
        raise ValueError(f"{name} has attention sinks (s_aux), which flexattn attention does not compute")


AttentionInterface.register(NAME, flexattn_attention)
AttentionMaskInterface.register(NAME, visible_keys)
