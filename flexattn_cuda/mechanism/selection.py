"""Which high-resolution (HR) tokens a query row may attend to: by attention map, or an ablation in its place."""

from __future__ import annotations

import torch

from flexattn_cuda import ops, profiling
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.grid import Grid


@profiling.in_phase("select")
def select(
    config: FlexAttnConfig, attention_map: torch.Tensor, valid_rect: torch.Tensor, lr_grid: Grid, hr_grid: Grid
) -> ops.SelectedTokens:
    """Apply the configured strategy to the maps of R query rows.

    Args:
        config: Settings of the mechanism.
        attention_map: [B, R, I, S*S] float32 or float64.
        valid_rect: [B, I, 4] int32, the image inside its padding in LR cells; an empty rectangle means no image.
        lr_grid: S x S.
        hr_grid: h x h.

    Returns:
        `ops.SelectedTokens`: mask [B, R, I, h*h], and index, count and row_bits of the union over the rows.

    Raises:
        ValueError: If a grid is not square: the selection operator takes sides.
    """
    side, hr_side = lr_grid.side("the low-resolution grid"), hr_grid.side("the high-resolution grid")
    if config.strategy != "attention":
        return _select_cells(config, attention_map, valid_rect, side, hr_side)
    if not config.mask_padding:
        valid_rect = _whole_where_present(valid_rect, side)
    return ops.select_tokens(
        attention_map,
        valid_rect,
        hr_side=hr_side,
        scale=config.scale,
        threshold=config.threshold,
        pool_side=config.pool,
    )


def _select_cells(
    config: FlexAttnConfig, attention_map: torch.Tensor, valid_rect: torch.Tensor, side: int, hr_side: int
) -> ops.SelectedTokens:
    """Choose cells at random or around the center, on the grid that the attention map would be pooled to.

    They are passed on as a map of zeros and ones, so that everything after the choice is the same operator.
    """
    side = config.pool or side
    scores = (
        torch.rand(*attention_map.shape[:-1], side * side, device=attention_map.device)
        if config.strategy == "random"
        else -_distance_from_center(side, attention_map.device).expand(*attention_map.shape[:-1], -1)
    )
    count = max(1, round(config.ratio * side * side))
    cells = torch.zeros_like(scores, dtype=attention_map.dtype).scatter(-1, scores.topk(count).indices, 1.0)
    # The choice ignores the map, so margins are not cut out of it.
    valid_rect = _whole_where_present(valid_rect, side)
    return ops.select_tokens(cells, valid_rect, hr_side=hr_side, scale=1.0, threshold=0.5)


def _whole_where_present(valid_rect: torch.Tensor, side: int) -> torch.Tensor:
    """Return the rectangle of the whole grid for every image, and the empty one where there is none."""
    present = (valid_rect[..., 2] > valid_rect[..., 0]) & (valid_rect[..., 3] > valid_rect[..., 1])
    return torch.where(present.unsqueeze(-1), valid_rect.new_tensor([0, 0, side, side]), valid_rect.new_zeros(4))


def _distance_from_center(side: int, device: torch.device) -> torch.Tensor:
    """Return [side*side] squared distances of the cells' centers from the grid's center, ties broken by position."""
    offset = torch.arange(side, device=device, dtype=torch.float64) - (side - 1) / 2
    square = (offset[:, None] ** 2 + offset[None, :] ** 2).flatten()
    return square + torch.arange(side * side, device=device) * 1e-6
