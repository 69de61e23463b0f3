"""Rotary position embedding of high-resolution keys."""

from __future__ import annotations

import torch
from torch.nn import functional


def hr_rotary_tables(tables: tuple[torch.Tensor, ...], hr_side: int, mode: str = "bicubic") -> tuple[torch.Tensor, ...]:
    """Tables of the h x h HR tokens from those of the S x S LR tokens, resized like images (released behaviour).

    Args:
        tables: cos and sin, each [S*S, d]: rows of the rotary table at the positions of the LR tokens.
        hr_side: h.
        mode: "bicubic" (a = -0.75), "bilinear" or "nearest".
    Returns:
        cos and sin, each [h*h, d].
    """
    corners = {} if mode == "nearest" else {"align_corners": False}
    resized = []
    for table in tables:
        side = int(table.shape[0] ** 0.5)
        grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(hr_side, hr_side), mode=mode, **corners)
        resized.append(grid.flatten(2)[0].T.contiguous())
    return tuple(resized)


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates keys [..., d] by tables that broadcast against them (half-split form, as in LLaMA)."""
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin
