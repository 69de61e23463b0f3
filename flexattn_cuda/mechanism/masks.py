"""Which keys of the sequence a query sees, as ranges: transformers' mask interface.

A mask of transformers is a function of two positions. The functions that the operator can follow are taken apart here;
no N x N mask is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from flexattn_cuda import ops


class VisibleKeys(NamedTuple):
    """Sequence keys that the queries of a call may see; causality comes on top.

    Attributes:
        start: [B] int32, the first key; None for 0.
        length: [B] int32, one past the last key written, where the queries end; None for all keys.
        bits: [B, ceil(Nk / 32)] int32, packed once for all layers: 0 where a key between them is masked out; None if
            there is no such key.
        window: How many of the latest keys a query sees, its own included; 0 for all.
        blocks: [B, G, 2] int32, ranges of keys that see each other in both directions; None if there are none.
    """

    start: torch.Tensor | None
    length: torch.Tensor | None
    bits: torch.Tensor | None
    window: int = 0
    blocks: torch.Tensor | None = None

    @classmethod
    def all(cls, window: int | None) -> VisibleKeys:
        """Return what a call without padding sees."""
        return cls(None, None, None, window or 0)


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
        ValueError: If the mask is not a causal one with padding, perhaps a window, and perhaps blocks that see each
            other in both directions.
    """
    parts = _parts(mask_function, local_size)
    window = 0 if parts.window is None or kv_length <= parts.window else parts.window
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
    blocks = None
    if parts.overlay is not None:
        blocks = _block_ranges(parts.overlay, int(q_offset) + q_length, batch_size, start.device)
    if blocks is not None:
        if window and parts.limits_blocks and bool(((longest := blocks.diff(dim=-1)) > window).any()):
            raise ValueError(
                f"{int(longest.max())} image tokens see each other in both directions, but the model's attention "
                f"window is {window}; flexattn attention has no window inside an image: choose a smaller image"
            )
        blocks = (blocks - kv_offset).clamp(min=0)
    if attention_mask is None:
        return VisibleKeys(start, length, None, window, blocks)

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
    return VisibleKeys(start, length, ops.pack_bits(seen) if _may_have_holes(seen) else None, window, blocks)


def _may_have_holes(seen: torch.Tensor) -> bool:
    # On a GPU asking would wait for the device, and a few more bits to read cost nothing; compiled code cannot ask.
    if seen.is_cuda or torch.compiler.is_compiling():
        return True
    return bool((seen.diff(dim=-1) & ~seen[:, 1:]).any())


class _Parts(NamedTuple):
    """What a mask function is made of: causality, and what comes on top.

    Attributes:
        window: How many of the latest keys are visible; None for all.
        overlay: Blocks that see each other in both directions; None if there are none.
        limits_blocks: Whether the window holds inside a block too.
    """

    window: int | None = None
    overlay: Callable[..., Any] | None = None
    limits_blocks: bool = False


def _parts(mask_function: Callable[..., Any], window: int | None) -> _Parts:
    """Take a mask function apart, whose window transformers gives if it is not inside.

    Raises:
        ValueError: If it is one that the operator cannot follow.
    """
    causal = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    if _same_closure(mask_function, causal):
        return _Parts(window)
    joined, *others = _operands(mask_function, or_masks)
    if len(others) == 1 and _same_closure(joined, causal):
        return _Parts(window, others[0])
    both, *limits = _operands(mask_function, and_masks)
    if window is None and len(limits) == 1 and both is not None:
        window = inspect.getclosurevars(limits[0]).nonlocals.get("sliding_window")
        inner = _parts(both, None)
        if isinstance(window, int) and _same_closure(limits[0], sliding_window_overlay(window)) and not inner.window:
            return _Parts(window, inner.overlay, limits_blocks=True)
    raise ValueError(
        "flexattn attention is causal over one sequence per row; packed sequences (position_ids that start again) and "
        "other mask functions are not supported: put every sequence in a row of its own"
    )


def _operands(mask_function: Callable[..., Any], combine: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the functions that `or_masks` or `and_masks` has combined; (None,) if it has not."""
    example = combine(causal_mask_function, causal_mask_function)  # only its code is compared
    if getattr(mask_function, "__code__", None) is not example.__code__:
        return (None,)
    operands: tuple[Any, ...] = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    return operands


def _block_ranges(overlay: Callable[..., Any], length: int, batch: int, device: torch.device) -> torch.Tensor | None:
    """Return [B, G, 2] int32, the ranges of `length` positions inside which an overlay lets every position see every.

    Raises:
        ValueError: If it is not made of such ranges.
    """
    row, position = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    inside = overlay(row, 0, position, position).expand(batch, -1)
    joined = overlay(row, 0, position[:, :-1], position[:, 1:]).expand(batch, -1)  # with the next position
    begins = inside & ~nn.functional.pad(joined, (1, 0))
    ends = inside & ~nn.functional.pad(joined, (0, 1))
    count = int(begins.sum(-1).max())
    if not count:
        return None
    ranges = torch.zeros(batch, count, 2, dtype=torch.int32, device=device)
    for side, marks in enumerate((begins, ends)):
        rows, positions = marks.nonzero(as_tuple=True)
        ranges[rows, marks.cumsum(-1)[rows, positions] - 1, side] = (positions + side).int()
    first = ranges[:, :, 0].long()
    apart = ~torch.eye(count, dtype=torch.bool, device=device) & (ranges[:, :, 1] > 0)[:, None]
    if bool((overlay(row[..., None], 0, first[:, :, None], first[:, None]) & apart & apart.mT).any()):
        raise ValueError("flexattn attention takes bidirectional blocks of adjacent positions, but these have gaps")
    return ranges


def _same_closure(one: object, other: object) -> bool:
    """Return whether two values are equal; functions are if their code and what they enclose are."""
    code, expected = getattr(one, "__code__", None), getattr(other, "__code__", None)
    if code is None or code is not expected:
        return one == other
    cells = (tuple(cell.cell_contents for cell in getattr(f, "__closure__", None) or ()) for f in (one, other))
    return all(
        len(a) == len(b) and all(map(_same_closure, a, b)) if isinstance(a, tuple) else _same_closure(a, b)
        for a, b in zip(*cells)
    )
