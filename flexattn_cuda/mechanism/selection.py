"""Which high-resolution tokens a query row may attend to: the attention map, or a replacement for ablations."""

from __future__ import annotations

import torch

from flexattn_cuda import ops, profiling
from flexattn_cuda.mechanism.config import FlexAttnConfig


@profiling.in_phase("select")
def select(config: FlexAttnConfig, map: torch.Tensor, live: torch.Tensor, hr_side: int) -> ops.SelectedTokens:
    """Applies the configured strategy to the maps of R query rows.

    Args:
        map: [B, R, I, S*S] float32 or float64.
        live: [B, I, 4] int32, the image inside its padding in LR cells; an empty rectangle means no image.
        hr_side: h.
    Returns:
        `ops.SelectedTokens`: mask [B, R, I, h*h], and index, count and row_bits of the union over the rows.
    """
    if config.strategy == "attention":
        if not config.mask_padding:
            whole = live.new_tensor([0, 0, 1, 1]) * int(map.shape[-1] ** 0.5)
            present = ((live[..., 2] > live[..., 0]) & (live[..., 3] > live[..., 1])).unsqueeze(-1)
            live = torch.where(present, whole, live)
        return ops.select_tokens(
            map,
            live,
            hr_side=hr_side,
            scale=config.scale,
            threshold=config.threshold,
            pool_side=config.pool,
        )

    # The ablations choose cells of the grid that the attention map would be pooled to, and hand them over as a map of
    # zeros and ones, so that everything after the choice is the same operator.
    side = config.pool or int(map.shape[-1] ** 0.5)
    scores = (
        torch.rand(*map.shape[:-1], side * side, device=map.device)
        if config.strategy == "random"
        else -_distance_from_center(side, map.device).expand(*map.shape[:-1], -1)
    )
    count = max(1, round(config.ratio * side * side))
    cells = torch.zeros_like(scores, dtype=map.dtype).scatter(-1, scores.topk(count).indices, 1.0)
    # A row without an image has an empty rectangle; margins are not cut out of a choice that ignores the map.
    present = ((live[..., 2] > live[..., 0]) & (live[..., 3] > live[..., 1])).unsqueeze(-1)
    rectangle = torch.where(present, live.new_tensor([0, 0, side, side]), live.new_zeros(4))
    return ops.select_tokens(cells, rectangle, hr_side=hr_side, scale=1.0, threshold=0.5)


def _distance_from_center(side: int, device: torch.device) -> torch.Tensor:
    """[side*side] squared distance of each cell's middle from the grid's, ties broken by position."""
    offset = torch.arange(side, device=device, dtype=torch.float64) - (side - 1) / 2
    square = (offset[:, None] ** 2 + offset[None, :] ** 2).flatten()
    return square + torch.arange(side * side, device=device) * 1e-6
