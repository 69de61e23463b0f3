"""Which high-resolution (HR) tokens a query row may attend to: by attention map, or an ablation in its place."""

from __future__ import annotations

import torch

from flexattn_cuda import ops, profiling
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.layout import RowLayout


@profiling.in_phase("select")
def select(
    config: FlexAttnConfig, attention_map: torch.Tensor, layout: RowLayout, hr_tokens: int
) -> ops.SelectedTokens:
    """Apply the configured strategy to the maps of R query rows.

    Args:
        config: Settings of the mechanism.
        attention_map: [B, R, I, C] float32 or float64, every image's cells first.
        layout: The images of the B rows.
        hr_tokens: T, HR tokens that an image has room for.

    Returns:
        index, count and row_bits of the union over the rows.
    """
    if config.strategy != "attention":
        grid = layout.lr_grid if layout.pool_grid is None else layout.pool_grid
        cells = _choose_cells(config, attention_map, grid)
        return ops.select_tokens(cells, grid, layout.hr_grid, hr_tokens=hr_tokens, scale=1.0, threshold=0.5)
    return ops.select_tokens(
        attention_map,
        layout.lr_grid,
        layout.hr_grid,
        hr_tokens=hr_tokens,
        scale=config.scale,
        threshold=config.threshold,
        pool_grid=layout.pool_grid,
        valid_rect=layout.valid_rect if config.mask_padding else None,
    )


def _choose_cells(config: FlexAttnConfig, attention_map: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Choose cells of the grids [B, I, 2] at random or around the center, on the grid that a map would be pooled to.

    They are passed on as a map of zeros and ones, so that everything after the choice is the same operator. The choice
    ignores the map, so margins are not cut out of it.
    """
    width = attention_map.shape[-1]
    if config.pool:
        width = min(width, config.pool**2)
    cells = grid.prod(-1)[:, None, :, None]  # of each image, [B, 1, I, 1]
    scores = (
        torch.rand(*attention_map.shape[:-1], width, device=attention_map.device)
        if config.strategy == "random"
        else -_distance_from_center(grid, width)[:, None].expand(*attention_map.shape[:-1], -1)
    )
    scores = scores.masked_fill(torch.arange(width, device=scores.device) >= cells, -torch.inf)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return (rank < (config.ratio * cells.double()).round().clamp(min=1)).to(attention_map.dtype)


def _distance_from_center(grid: torch.Tensor, width: int) -> torch.Tensor:
    """Return [B, I, width] squared distances of cells' centers from their grid's center, ties broken by position."""
    cell = torch.arange(width, device=grid.device)
    rows, cols = grid[..., None].clamp(min=1).unbind(-2)  # [B, I, 1] each
    y, x = cell // cols - (rows.double() - 1) / 2, cell % cols - (cols.double() - 1) / 2
    return y**2 + x**2 + cell * 1e-6
