"""Cropping by attention, without training: ask once, cut a window out of the image where the model looked, and ask
again with both images. It is the manner of ViCrop (Zhang et al. 2025, "MLLMs know where to look").

The map is that of one layer of the plain model: the attention of the prompt's last row, which predicts the answer's
first token, on the image's tokens; the softmax is over the sequence, and the heads are added up, which finds the same
window as their mean.
"""

from __future__ import annotations

import numpy as np
import torch

from flexattn_cuda.inputs.frames import Frame, Region
from flexattn_cuda.mechanism.context import AttentionModule, HRArguments

SIZES = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Sides of the windows to choose from, in sides of the view that the model sees of an image."""
_ROUNDING = 1e-9  # of the map's sum: contrasts that differ by less are equal


class MapRecorder:
    """Records maps of a model without HR tokens. It is passed down to the layers in the place of an `HRContext`.

    Args:
        layers: Whose maps to record, counted from 0.
        ids: [1, N] token ids of a prompt.
        image_token_id: The id of an image token.
        cells: C, tokens of an image; all images have as many.

    Attributes:
        maps: By layer, [I, C] float32: the head-summed attention of the last row on the tokens of I images.
    """

    def __init__(self, layers: range, ids: torch.Tensor, image_token_id: int, cells: int) -> None:
        self.maps: dict[int, torch.Tensor] = {}
        self._layers, self._cells = layers, cells
        starts = (ids[0] == image_token_id).nonzero()[::cells, 0]
        self._ranges = torch.stack([starts, starts + cells], -1)[None].to(torch.int32)
        self._row = torch.tensor([[ids.shape[1] - 1]], dtype=torch.int32)

    def before_attention(self, module: AttentionModule, device: torch.device) -> HRArguments:
        """Ask a layer for its map, and for nothing else."""
        if module.layer_idx not in self._layers:
            return HRArguments()
        ranges, row = self._ranges.to(device), self._row.to(device)
        return HRArguments(map_ranges=ranges, map_size=self._cells, hr_rows=row)

    def after_attention(self, module: AttentionModule, attention_map: torch.Tensor) -> None:
        """Keep the map [1, 1, I, C] of a layer."""
        if module.layer_idx in self._layers:
            self.maps[module.layer_idx] = attention_map[0, 0].float()


def crop_window(attention: np.ndarray, frame: Frame, size: tuple[int, int], side: int) -> Region:
    """Return the window of an image that is to be looked at again, in whole cells of the map.

    For each of SIZES, it is where the window holds most of the map. Of these windows, the one with the largest contrast
    is chosen, or the smallest such: how much more of the map it holds than if it were as dense as its surroundings,
    which reach as far as its own size to each side. An image that is no larger than a window is taken whole.

    Args:
        attention: [rows, cols] float, not negative.
        frame: Where its cells lie, in pixels of the image. Cells outside of the image are not looked at.
        size: Width and height of the image in pixels.
        side: Of the view that the model sees, in pixels.
    """
    grid, image = attention.shape, _cells_of_image(attention.shape, frame, size)
    part = attention[image.top : image.bottom, image.left : image.right].astype(np.float64)
    sums = np.pad(part.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    cell = (frame.height / grid[0], frame.width / grid[1])
    windows = [
        _densest(sums, *(min(max(1, round(one * side / of)), most) for of, most in zip(cell, part.shape)))
        for one in SIZES
    ]
    best = windows[0]
    for window in windows[1:]:
        if _contrast(sums, window) > _contrast(sums, best) + _ROUNDING * sums[-1, -1]:
            best = window
    left, top, right, bottom = best
    cells = Region(left + image.left, top + image.top, right + image.left, bottom + image.top)
    return frame.in_pixels(cells, grid, size)


def _cells_of_image(grid: tuple[int, ...], frame: Frame, size: tuple[int, int]) -> Region:
    """Return the cells of a view that show some of the image."""
    down, across = frame.height / grid[0], frame.width / grid[1]
    return Region(
        max(0, int(-frame.left // across)),
        max(0, int(-frame.top // down)),
        min(grid[1], -int(-(size[0] - frame.left) // across)),
        min(grid[0], -int(-(size[1] - frame.top) // down)),
    )


def _densest(sums: np.ndarray, rows: int, columns: int) -> Region:
    """Return the window of rows x columns cells that holds most, of a map's sums [R + 1, C + 1] up to each cell."""
    held = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
    top, left = np.unravel_index(held.argmax(), held.shape)
    return Region(int(left), int(top), int(left) + columns, int(top) + rows)


def _contrast(sums: np.ndarray, window: Region) -> float:
    """Return what a window holds beyond its area's share of what surrounds it, up to its own size to each side."""
    rows, columns = window.bottom - window.top, window.right - window.left
    around = Region(
        max(0, window.left - columns),
        max(0, window.top - rows),
        min(sums.shape[1] - 1, window.right + columns),
        min(sums.shape[0] - 1, window.bottom + rows),
    )
    area = rows * columns
    surrounding = (around.bottom - around.top) * (around.right - around.left) - area
    if surrounding == 0:
        return 0.0
    held = _held(sums, window)
    return held - area * (_held(sums, around) - held) / surrounding


def _held(sums: np.ndarray, window: Region) -> float:
    left, top, right, bottom = window
    return float(sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left])
