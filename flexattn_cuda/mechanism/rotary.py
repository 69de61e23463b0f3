"""Rotary position embedding of high-resolution (HR) keys."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from flexattn_cuda.mechanism.grid import Grid


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotary embedding, each [..., d]."""

    cos: torch.Tensor
    sin: torch.Tensor


def table_kinds(text: Any) -> list[str | None]:
    """Return the kinds of layers of a language model that have rotary tables of their own; [None] if all share one."""
    if "layer_type" not in inspect.signature(text.rotary_emb.forward).parameters:
        return [None]
    return sorted(set(text.config.layer_types))


def model_tables(text: Any, sequence: torch.Tensor, positions: torch.Tensor) -> RotaryTables:
    """Return a language model's rotary tables [n, tables*r] at positions [1, n], those of its kinds side by side."""
    made = [
        text.rotary_emb(sequence, position_ids=positions, **({} if kind is None else {"layer_type": kind}))
        for kind in table_kinds(text)
    ]
    return RotaryTables(*(torch.cat(tables, dim=-1)[0] for tables in zip(*made)))


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


def hr_positions(positions: torch.Tensor, lr_grid: Grid, hr_grid: Grid) -> torch.Tensor:
    """Return the coordinates of the HR tokens between those of the LR tokens (multi-axis RoPE).

    HR cell i of h lies at (i + 1/2) * S/h - 1/2, counted in LR cells from the center of the first of S. Coordinates are
    linear in this, also beyond the outermost centers.

    Args:
        positions: [axes, S_h*S_w], coordinates of the LR tokens, equidistant along rows and along columns.
        lr_grid: S_h x S_w.
        hr_grid: h_h x h_w.

    Returns:
        [axes, h_h*h_w] float32.
    """
    grid = positions.float().view(-1, *lr_grid)
    first, along_rows, along_cols = grid[:, :1, :1], torch.zeros(()), torch.zeros(())
    if lr_grid.rows > 1:
        along_rows = grid[:, 1:2, :1] - first
    if lr_grid.cols > 1:
        along_cols = grid[:, :1, 1:2] - first
    row, col = ((torch.arange(hr, device=grid.device) + 0.5) * lr / hr - 0.5 for lr, hr in zip(lr_grid, hr_grid))
    return (first + row[:, None] * along_rows + col * along_cols).flatten(1)


def _resize(table: torch.Tensor, source: Grid, target: Grid, mode: str) -> torch.Tensor:
    image = table.reshape(1, source.rows, source.cols, -1).permute(0, 3, 1, 2)
    align_corners = None if mode == "nearest" else False
    image = functional.interpolate(image, size=tuple(target), mode=mode, align_corners=align_corners)
    return image.flatten(2)[0].T.contiguous()


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate keys [..., d] by tables that broadcast against them (half-split form, as in LLaMA)."""
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin


def no_rotation(keys: torch.Tensor) -> RotaryTables:
    """Return tables [n, d] that leave keys [n, Hkv, d] as they are."""
    shape = (keys.shape[0], keys.shape[-1])
    return RotaryTables(keys.new_ones(shape), keys.new_zeros(shape))
