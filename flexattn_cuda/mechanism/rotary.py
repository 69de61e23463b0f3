"""Rotary position embedding of high-resolution (HR) keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from flexattn_cuda.mechanism.grid import Grid


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotary embedding, each [..., d]."""

    cos: torch.Tensor
    sin: torch.Tensor


def hr_rotary_tables(tables: RotaryTables, lr_grid: Grid, hr_grid: Grid, mode: str = "bicubic") -> RotaryTables:
    """Return the tables of the HR tokens: those of the LR tokens, resized like images (released behaviour).

    Args:
        tables: [S_h*S_w, d] each: the rotary tables at the positions of the LR tokens.
        lr_grid: S_h x S_w.
        hr_grid: h_h x h_w.
        mode: "bicubic" (a = -0.75), "bilinear" or "nearest".

    Returns:
        [h_h*h_w, d] each.
    """
    return RotaryTables(*(_resize(table, lr_grid, hr_grid, mode) for table in tables))


def _resize(table: torch.Tensor, source: Grid, target: Grid, mode: str) -> torch.Tensor:
    image = table.reshape(1, source.rows, source.cols, -1).permute(0, 3, 1, 2)
    align_corners = None if mode == "nearest" else False
    image = functional.interpolate(image, size=tuple(target), mode=mode, align_corners=align_corners)
    return image.flatten(2)[0].T.contiguous()


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate keys [..., d] by tables that broadcast against them (half-split form, as in LLaMA)."""
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin
